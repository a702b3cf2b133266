"""What EXECUTOR=dask says when its cluster cannot be used; the rest needs a cluster."""

import pytest

from jobs.dask_executor import DaskExecutor
from tests.harness import poll

pytest.importorskip("distributed", reason="pip install -r requirements-dask.txt")


def test_a_failure_is_whole_sentences_and_says_what_to_install(monkeypatch):
    def upload(*_):
        raise ModuleNotFoundError("No module named 'pandas'")

    monkeypatch.setattr("distributed.Client", lambda *_, **__: None)
    monkeypatch.setattr(DaskExecutor, "_upload", upload)
    one = DaskExecutor(
        analysis="prices:total",
        scheduler_url="tcp://dask:8786",
        upload_path=None,
    )

    one.start()

    told = "cannot be used: No module named 'pandas'. Install it on each Dask worker."
    poll(lambda: one.failure() == f"The Dask cluster at tcp://dask:8786 {told}", "the failure")
    one.close()

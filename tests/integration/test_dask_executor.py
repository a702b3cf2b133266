"""What EXECUTOR=dask promises: with a real scheduler and real workers, which are killed."""

import logging
import sys

import pytest

from jobs import dask_executor, errors, model
from jobs.dask_executor import DaskExecutor
from tests.cluster import Cluster
from tests.harness import ROOT, poll
from tests.integration.test_executor import Call, Loop, mark

distributed = pytest.importorskip("distributed", reason="pip install -r requirements-dask.txt")

UPLOAD = ROOT / "tests" / "uploaded.py"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster that lives as long as the tests of this file."""
    one = Cluster(tmp_path_factory.mktemp("cluster")).start(workers=1)
    yield one
    one.kill()


@pytest.fixture
def own_cluster(tmp_path):
    """A cluster that is not started yet, for a test that kills it."""
    one = Cluster(tmp_path)
    yield one
    one.kill()


@pytest.fixture
def start():
    """Return a function that starts an executor, and by default waits for the cluster."""
    started = []

    def start(on, *, analysis="uploaded:act", upload=UPLOAD, waits=True):
        one = DaskExecutor(
            analysis=analysis,
            scheduler_url=on.address,
            upload_path=upload,
        )
        one.start()
        started.append(Loop(one))
        if waits:
            poll(one.free, "the cluster", timeout=25)
        return one

    yield start

    for loop in started:
        loop.close()


def test_an_analysis_runs_on_the_cluster(cluster, start):
    call = Call(start(cluster), "describe", 0, starts=2, metadata={"a": 1})

    assert call.result() == {"id": call.job.id, "start": 2, "metadata": {"a": 1}}
    assert call.has_started.is_set()


def test_the_default_analysis_runs_on_the_cluster(cluster, start):
    one = start(cluster, analysis="processing:analyze", upload=None)

    assert Call(one, "", 0).result()["type"] == "object"


def test_progress_comes_from_the_cluster(cluster, start, tmp_path):
    call = Call(start(cluster), "wait", str(tmp_path / "go"))

    poll(lambda: call.told == [(0.5, "half")], "the report")
    assert call.has_started.is_set()
    (tmp_path / "go").touch()
    assert call.result() == "waited"


def test_a_value_cannot_be_kept_on_the_cluster(cluster, start):
    assert "EXECUTOR=dask cannot keep values" in Call(start(cluster), "keep", 1).error()


def test_an_analysis_that_raises_fails_with_its_frames(cluster, start):
    ending = Call(start(cluster), "fail", 7).wait()

    assert ending.error == {"type": "ValueError", "message": "cannot analyze 7"}
    assert ending.frames[-1].endswith(" fail")
    assert ending.may_run_again


@pytest.mark.parametrize("analysis", ["uploaded:nothing", "nowhere:run"])
def test_an_analysis_that_the_workers_do_not_have_fails_its_jobs(cluster, start, analysis):
    ending = Call(start(cluster, analysis=analysis), "", 0).wait()

    assert ending.error["type"] == "LoadError"


def test_a_job_that_cannot_be_submitted_fails(cluster, start, monkeypatch):
    def submit(*_, **__):
        raise ValueError("cannot be sent")

    one = start(cluster)
    monkeypatch.setattr(one._client, "submit", submit)

    ending = Call(one, "describe", 0).wait()

    assert ending.error == {"type": "ValueError", "message": "cannot be sent"}


@pytest.mark.slow
def test_a_job_whose_worker_is_killed_is_run_by_another(own_cluster, start, tmp_path):
    one = start(own_cluster.start(workers=1))
    call = Call(one, "wait", str(tmp_path / "go"))
    mark(call, tmp_path / "go")

    own_cluster.kill_worker()
    assert call.has_returned.wait(20)  # the clock stands still
    poll(lambda: "has no worker" in (one.failure() or ""), "the loss")
    (tmp_path / "go").touch()
    own_cluster.start_worker()

    assert call.result() == "waited"
    poll(lambda: one.failure() is None, "the worker")


def test_a_job_that_kills_its_workers_is_crashed(own_cluster, start):
    one = start(own_cluster.start(workers=2))

    ending = Call(one, "end", 3).wait()

    assert ending.outcome == "crashed"
    assert "ended its Dask workers" in ending.error["message"]


@pytest.mark.slow
def test_a_cluster_that_is_away_is_waited_for(own_cluster, start, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "postback")
    monkeypatch.setattr(dask_executor, "RETRY_SECONDS", 0.05)
    one = start(own_cluster, waits=False)
    poll(lambda: "cluster away" in caplog.messages, "the line")
    assert one.free() == 0
    assert "cannot be used" in one.failure()
    own_cluster.start(workers=1)
    poll(one.free, "the cluster", timeout=25)
    call = Call(one, "wait", str(tmp_path / "go"))
    mark(call, tmp_path / "go")

    own_cluster.kill()

    assert call.wait() == model.Again(pause_seconds=1.0)
    poll(lambda: not one.free(), "the loss")
    assert "its scheduler was lost" in one.failure()
    (tmp_path / "go").touch()
    own_cluster.start(workers=1)
    poll(one.free, "the cluster", timeout=25)
    assert Call(one, "wait", str(tmp_path / "go")).result() == "waited"
    told = [line for line in caplog.messages if line.startswith("cluster")]
    assert told == ["cluster away", "cluster connected"] * 2


def test_a_file_that_the_workers_cannot_import_is_said(cluster, start, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")

    one = start(cluster, upload=tmp_path / "broken.py", waits=False)

    poll(lambda: "cannot be used: division by zero" in (one.failure() or ""), "the failure")


def test_what_is_stopped_is_given_up_and_so_is_all_at_the_close(cluster, start, tmp_path):
    one = start(cluster)
    stopped, other = (Call(one, "wait", str(tmp_path / "go")) for _ in range(2))
    mark(stopped, tmp_path / "go")

    stopped.stop()
    assert stopped.wait() is None
    mark(other, tmp_path / "go")
    one.close()

    poll(lambda: not one.free(), "the end of the connection")
    assert not other.has_ended()
    (tmp_path / "go").touch()


def test_without_distributed_the_start_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)

    with pytest.raises(errors.ConfigError, match=r"install requirements-dask\.txt"):
        DaskExecutor(analysis="", scheduler_url="", upload_path=None).start()

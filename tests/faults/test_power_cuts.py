"""What a power cut costs, replayed at moments of a recorded run, and a disk that fails to sync."""

from pathlib import Path

import pytest
import requests

from tests.faults import power

#: Enough for the write-ahead log to be folded into the journal on the way.
JOBS = 120

#: Moments of the run at which the power is cut, in each of four ways.
POINTS = 80


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    built = power.build(tmp_path_factory.mktemp("shim"))
    if built is None:
        pytest.skip("install a C compiler named cc to cut the power")
    return built


@pytest.mark.slow
@pytest.mark.service
def test_g10_no_power_cut_loses_an_accepted_job(shim, tmp_path):
    entries = power.run(shim, tmp_path, jobs=JOBS, level="FULL")

    counts = power.replay(entries, POINTS, seed=1)

    assert counts["acknowledged"] == JOBS
    assert counts["cuts"] == POINTS * len(power.MODELS)
    assert (counts["lossy"], counts["refused"]) == (0, 0)


@pytest.mark.service
def test_g10_without_an_fsync_power_cuts_lose_jobs_so_the_replay_can_fail(shim, tmp_path):
    entries = power.run(shim, tmp_path, jobs=30, level="NORMAL")

    counts = power.replay(entries, 20, seed=1)

    assert counts["lossy"] > 0
    assert counts["worst"] > 1


@pytest.mark.service
def test_g20_after_a_failed_fsync_it_ends_and_answers_no_200(shim, tmp_path, start_process):
    env = {
        "LD_PRELOAD": str(shim),
        "POWER_JOURNAL": str(tmp_path.resolve() / "journal.db"),
        "POWER_EIO": str(tmp_path / "eio"),
    }
    service = start_process(**env)
    accepted = service.process({"data": 1})
    service.wait_for(accepted)
    (tmp_path / "eio").touch()

    with pytest.raises((AssertionError, requests.RequestException)):
        service.process({"data": 2})
    code = service.wait()
    (tmp_path / "eio").unlink()
    service.start()

    assert code == 74
    assert service.job(accepted)["state"] == "delivered"

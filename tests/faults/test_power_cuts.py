"""What a power cut costs, replayed at moments of a recorded run, and a disk that fails to sync."""

import random
from pathlib import Path

import pytest
import requests

from tests.faults import power
from tests.faults.power import SYNCED, TRUNCATED, WAL, WRITTEN, Disk, Entry

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
def test_g20_after_a_failed_fsync_nothing_is_answered_200_and_the_process_ends(
    shim, tmp_path, start_process
):
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


# The replay itself


def test_a_lost_write_is_gone_and_a_synced_one_stays():
    disk = written(Entry(WRITTEN, WAL, 0, b"old"), Entry(SYNCED, WAL, 0, b""))
    disk.do(Entry(WRITTEN, WAL, 3, b"new"))

    assert left(disk, "lost") == b"old"
    assert left(disk, "kept") == b"oldnew"


def test_a_torn_write_loses_whole_sectors():
    disk = written(Entry(WRITTEN, WAL, 500, b"x" * 1036))

    pieces = list(power.torn(Entry(WRITTEN, WAL, 500, b"x" * 1036)))

    assert [(piece.offset, len(piece.data)) for piece in pieces] == [
        (500, 12),
        (512, 512),
        (1024, 512),
    ]
    assert {len(left(disk, "torn", seed)) for seed in range(20)} == {0, 512, 1024, 1536}


def test_a_truncation_is_pending_like_a_write():
    disk = written(Entry(WRITTEN, WAL, 0, b"abc"), Entry(SYNCED, WAL, 0, b""))
    disk.do(Entry(TRUNCATED, WAL, 1, b""))

    assert left(disk, "lost") == b"abc"
    assert left(disk, "kept") == b"a"


def test_a_name_that_was_not_synced_may_be_missing():
    disk = Disk()
    disk.do(Entry(power.OPENED, WAL, 0, b""))

    assert disk.after_a_cut("lost", random.Random(1)) == {}
    assert disk.after_a_cut("kept", random.Random(1)) == {WAL: b""}


def written(*entries: Entry) -> Disk:
    """Return a disk whose directory holds the file, on which this was done."""
    disk = Disk()
    opened = Entry(power.OPENED, WAL, 0, b"")
    for entry in (opened, Entry(SYNCED, power.DIRECTORY, 0, b""), *entries):
        disk.do(entry)
    return disk


def left(disk: Disk, model: str, seed: int = 1) -> bytes:
    return disk.after_a_cut(model, random.Random(seed))[WAL]

"""A copy of the journal while the service runs: whole, private, and good for a start."""

import contextlib
import signal
import sqlite3
import stat
from pathlib import Path

import pytest

from jobs import errors
from tests.harness import InProcess


def ids(path: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return {row[0] for row in connection.execute("SELECT id FROM jobs")}


def test_a_copy_has_every_job_and_is_nobody_elses_business(service):
    accepted = {service.process({"data": n}) for n in (1, 2, 3)}

    copy = service.journal.backup()

    assert ids(copy) == accepted
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


def test_a_copy_replaces_the_one_before(service, tmp_path):
    service.journal.backup()
    job_id = service.process({"data": 1})

    copy = service.journal.backup()

    assert job_id in ids(copy)
    assert {path.name for path in tmp_path.glob("*.part")} == set()


def test_a_copy_that_fails_leaves_the_one_before(service):
    job_id = service.process({"data": 1})
    copy = service.journal.backup()
    part = copy.with_suffix(".part")
    part.mkdir()

    with pytest.raises(errors.JournalError):
        service.journal.backup()

    assert job_id in ids(copy)
    assert service.get("/readyz").status_code == 200


@pytest.mark.service
def test_a_signal_makes_a_copy_that_a_service_can_start_from(start_process, tmp_path, monkeypatch):
    service = start_process(POSTBACK_URL="http://127.0.0.1:9/", POSTBACK_SCHEDULE="1h")
    job_id = service.process({"data": 1})
    service.process_.send_signal(signal.SIGUSR1)
    service.wait_for_log("journal backed up")
    service.end()

    monkeypatch.setenv("JOURNAL", str(tmp_path / "journal.db.backup"))
    restored = InProcess()

    assert restored.job(job_id)["data"] == 1
    restored.stop()


@pytest.mark.service
def test_a_copy_that_cannot_be_made_is_told_and_the_service_goes_on(start_process, tmp_path):
    service = start_process()
    (tmp_path / "journal.db.part").mkdir()

    service.process_.send_signal(signal.SIGUSR1)

    service.wait_for_log("journal not backed up")
    assert service.get("/readyz").status_code == 200
    assert service.end() == 0

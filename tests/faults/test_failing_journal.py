"""Each operation of SQLite made to fail in turn, in a running service and at its start."""

import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import requests

from jobs import model
from jobs.errors import ConfigError, JournalError
from tests.harness import RealProcess, poll, refusal
from tests.integration.test_journal import LATEST, NOW, Committing, accept, claim, delivering
from tests.integration.test_storage import Faulty

#: Faults that pass, and faults after which only a restart can tell what is on the disk.
PASSING = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_BUSY")
LASTING = ("SQLITE_IOERR_FSYNC", "SQLITE_CORRUPT")


@pytest.fixture
def service(start_process, receiver, tmp_path):
    settings = {"POSTBACK_URL": receiver.url, "FAULT": str(tmp_path / "fault")}
    return start_process(command=("-m", "tests.faults.launch"), **settings)


def arm(path: Path, code: str, number: int) -> None:
    """Have the operation of this number fail, counted from now."""
    path.with_suffix(".new").write_text(f"{code} {number}")
    path.with_suffix(".new").rename(path)


def insist(service: RealProcess) -> str:
    """Send a payload until it is accepted, and return the job's id."""

    def accepted() -> str | None:
        answer = service.post("/process", json={"data": 1})
        if answer.status_code == 200:
            return str(answer.json()["id"])
        assert "Retry-After" in answer.headers
        assert refusal(answer, 503)
        return None

    return poll(accepted, "an accepted job")


@pytest.mark.slow
@pytest.mark.service
@pytest.mark.timeout(90)
@pytest.mark.parametrize("code", PASSING)
def test_whichever_operation_fails_the_job_is_delivered(service, receiver, tmp_path, code):
    job_ids, number = [], 0

    while service.log().count("It fails.") == number:  # until a job needs no more operations
        number += 1
        arm(tmp_path / "fault", code, number)
        job_ids.append(insist(service))
        assert service.wait_for(job_ids[-1])["outcome"] == "succeeded"
        poll(lambda: service.get("/readyz").status_code == 200, "ready")

    assert number > 18  # the operations of one job
    assert service.log().count("journal failed") == service.log().count("journal recovered")
    assert service.log().count("journal failed") == number - 1
    assert {one.headers["webhook-id"] for one in receiver.requests} == set(job_ids)


@pytest.mark.slow
@pytest.mark.service
@pytest.mark.timeout(120)
@pytest.mark.parametrize("code", LASTING)
def test_whichever_operation_fails_for_good_no_job_is_lost(service, receiver, tmp_path, code):
    job_ids, number, code_of_exit = [], 0, 74

    while code_of_exit == 74:
        number += 1
        arm(tmp_path / "fault", code, number)
        try:
            job_ids.append(service.process({"data": 1}))
            poll(lambda: service.process_.poll() or is_delivered(service, job_ids[-1]), "an end")
        except (AssertionError, requests.RequestException):  # refused, or it has ended
            pass
        code_of_exit = service.end() if service.process_.poll() is None else service.wait()
        assert service.log().count("journal lost") == (code_of_exit == 74)
        service.start()
        assert {job["outcome"] for job in service.wait_for_all(job_ids)} <= {"succeeded"}

    assert number > 18


def is_delivered(service: RealProcess, job_id: str) -> bool:
    return bool(service.job(job_id)["state"] == model.State.DELIVERED)


def start_is_refused(path: Path, code: str, number: int) -> bool:
    """Open and resume a journal; return whether the operation of this number makes that fail."""
    with closing(Committing(path, on_lost=lambda: None)) as journal:
        Faulty.code, Faulty.fails_at = code, number
        try:
            journal.open()
            journal.resume(now=NOW)
            journal.advance(latest=LATEST)
            journal.release_due_starts(now=NOW)
        except (ConfigError, JournalError):
            return True
    return False


@pytest.mark.parametrize("code", [*PASSING, *LASTING])
def test_whichever_operation_fails_at_a_start_the_next_resumes_all(monkeypatch, tmp_path, code):
    path = tmp_path / "journal.db"
    with closing(Committing(path, on_lost=lambda: None)) as journal:
        journal.open()
        posted = delivering(journal).id
        ids = [accept(journal), accept(journal)]
        claim(journal, limit=1)
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Faulty))
    monkeypatch.setattr(Faulty, "fails_at", 0)
    monkeypatch.setattr(Faulty, "code", "")
    number = 1

    while start_is_refused(path, code, number):
        number += 1
    Faulty.fails_at = 0

    assert number > 15
    with closing(Committing(path, on_lost=lambda: None)) as journal:
        journal.open()
        assert [one.id for one in claim(journal)] == ids
        assert journal.detail(posted)[0].next_attempt_at == NOW
        assert journal.detail(ids[0])[0].interrupted == 1

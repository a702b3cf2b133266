"""Each operation of SQLite made to fail in turn, in a running service and in one that starts."""

import contextlib
import sqlite3
from collections.abc import Iterator
from functools import partial

import pytest
import requests

import app
import config
from jobs import errors, model, waiting
from tests.harness import InProcess, events, poll
from tests.test_runner import accept, journal_at
from tests.test_storage import fault

#: Faults that pass, and faults after which only a restart can tell what is on the disk.
PASSING = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_BUSY")
LASTING = ("SQLITE_IOERR_FSYNC", "SQLITE_CORRUPT")


class Failing(sqlite3.Connection):
    """A connection whose operation `fails_at` fails, once; they are counted from 1."""

    newest: "Failing"
    code = ""
    fails_at = 0

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.operations = 0
        Failing.newest = self

    def execute(self, *arguments):
        self._count()
        return super().execute(*arguments)

    def executescript(self, script):
        self._count()
        return super().executescript(script)

    def has_failed(self) -> bool:
        return 0 < self.fails_at <= self.operations

    def _count(self) -> None:
        self.operations += 1
        if self.operations == self.fails_at:
            raise fault(self.code)


@pytest.fixture(autouse=True)
def failing_connections(monkeypatch):
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Failing))
    monkeypatch.setattr(waiting, "RETRY_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def settings(monkeypatch, receiver, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("POSTBACK_URL", receiver.url)
    monkeypatch.setenv("ANALYSIS", "tests.analyses:echo")
    monkeypatch.setenv("DRAIN", "200ms")  # a thread that could not begin its job is not idle


@contextlib.contextmanager
def serving(*, code: str = "", number: int = 0) -> Iterator[InProcess]:
    """Run a service whose operation `number`, counted from when it is ready, fails."""
    service = InProcess()
    with service.journal._storage._lock:
        Failing.newest.code = code
        Failing.newest.fails_at = number and Failing.newest.operations + number
    try:
        yield service
    finally:
        service.close()
        stop(service.service)


def stop(service: app.Service) -> None:
    """Stop also what has lost its journal, as the end of the process would."""
    try:
        service.runner.drain(0 if service._journal.failure else 5)
        service.stop()
    except errors.JournalError:
        service._server.stop()
        service._sender.close()
        service._journal.close()


def accepted(service: InProcess) -> str:
    """Send a payload until it is accepted, or the journal is lost; return the id or ""."""
    try:
        answer = service.post("/process", json={"data": 1})
    except requests.ConnectionError:  # what an answer promised could no longer be kept
        assert is_lost(service)
        return ""
    if answer.status_code == 200:
        return str(answer.json()["id"])
    assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
    return "" if is_lost(service) else accepted(service)


def is_lost(service: InProcess) -> bool:
    return isinstance(service.journal.failure, errors.JournalLostError)


def one_job(code: str, number: int, caplog) -> tuple[bool, str]:
    """Take a job round the whole loop; return whether an operation failed, and the job's id."""
    caplog.clear()
    with serving(code=code, number=number) as service:
        connection = Failing.newest
        job_id = accepted(service)
        poll(lambda: "job delivered" in caplog.messages or is_lost(service), "the end")
        has_failed = connection.has_failed()
        check(service, caplog, has_failed=has_failed)
        lost = is_lost(service)
    if lost and job_id:
        with serving() as restarted:
            assert restarted.wait_for(job_id)["outcome"] == "succeeded"
    return has_failed, job_id


def check(service: InProcess, caplog, *, has_failed: bool) -> None:
    """What failed is told, and then the service is whole again or asks to be ended."""
    if is_lost(service):
        assert service.service.run() == 74
        assert caplog.messages.count("journal lost") == 1
    elif has_failed:
        poll(lambda: service.get("/readyz").status_code == 200, "ready again")
        assert caplog.messages.count("journal failed") == 1
        assert caplog.messages.count("journal recovered") == 1


@pytest.mark.parametrize("code", PASSING + LASTING)
def test_whichever_operation_fails_no_accepted_job_is_lost(
    monkeypatch, tmp_path, receiver, caplog, code
):
    job_ids, number, has_failed = [], 0, True

    while has_failed:  # until a run has no fault left
        number += 1
        monkeypatch.setenv("JOURNAL", str(tmp_path / f"{number}.db"))
        has_failed, job_id = one_job(code, number, caplog)
        job_ids.append(job_id)

    assert number > 12  # the operations of one job
    posted = {event["data"]["id"] for event in events(receiver.requests)}
    assert posted == set(job_ids) - {""}
    assert job_ids[-1]


# At the start


def start_is_refused() -> bool:
    """Start a service; return whether it refuses, and stop whatever there is."""
    service = app.Service(config.load())
    try:
        service.start()
    except (errors.ConfigError, errors.JournalError):
        service._journal.close()
        if hasattr(service, "_server"):
            service._server._socket.close()
            service._sender.close()
        return True
    stop(service)
    return False


@pytest.mark.parametrize("code", PASSING + LASTING)
def test_whichever_operation_fails_a_start_is_refused_and_the_next_one_takes_all_up(
    monkeypatch, tmp_path, receiver, code
):
    with journal_at(tmp_path / "journal.db") as journal:
        suspect, waiting = accept(journal), accept(journal)
        journal.claim(now=model.utc_now())
    monkeypatch.setattr(Failing, "code", code)
    number = 1
    monkeypatch.setattr(Failing, "fails_at", number)

    while start_is_refused():
        number += 1
        monkeypatch.setattr(Failing, "fails_at", number)
    monkeypatch.setattr(Failing, "fails_at", 0)
    with serving() as service:
        jobs = [service.wait_for(job_id) for job_id in (suspect, waiting)]

    assert number > 15
    assert [(job["state"], job["outcome"]) for job in jobs] == [("delivered", "succeeded")] * 2
    assert {event["data"]["id"] for event in events(receiver.requests)} == {suspect, waiting}

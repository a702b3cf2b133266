"""The runner where it cannot be seen from outside."""

import contextlib
import sqlite3
import threading

import pytest

import app
from jobs import runner
from tests.conftest import ACT
from tests.harness import failing, poll


@pytest.fixture
def hasty(monkeypatch):
    """Make the pauses between two tries short."""
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(runner, "PRUNE_SECONDS", 0.05)


@pytest.fixture
def service(start, receiver, hasty):
    return start(**ACT, POSTBACK_URL=receiver.url, JOB_TIMEOUT="300ms")


@pytest.fixture
def threads(monkeypatch):
    """Let the threads of jobs start only while the returned event is set."""
    allowed, start = threading.Event(), threading.Thread.start

    def limited(thread):
        if not allowed.is_set() and len(thread.name) == 32:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    return allowed


def test_an_attempt_whose_thread_cannot_start_is_made_later(service, receiver, threads, caplog):
    receiver.default = lambda *_: threads.clear() or 500
    threads.set()
    job_id = service.send(1)
    poll(lambda: "thread not started" in caplog.messages, "a thread that does not start")

    receiver.default = 204
    threads.set()

    assert service.wait_for(job_id)["attempts_made"] == 2


def test_a_time_out_is_declared_as_soon_as_the_journal_takes_it(service, gate):
    job_id = service.send(gate.data)
    gate.wait_for(1)

    with failing(service.journal):
        poll(lambda: service.journal.failure, "a time-out that is refused")

    assert service.wait_for(job_id)["outcome"] == "timed_out"


def test_a_stop_does_not_wait_for_a_journal_that_fails(service, gate):
    service.send(gate.data)
    gate.wait_for(1)

    with failing(service.journal):
        assert service.service.stop() == app.EXIT_LOST


def test_jobs_are_pruned_in_batches(service, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "BATCH", 2)
    service.wait_for_all([service.send(number) for number in range(1, 6)])

    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db")) as other:
        other.execute("UPDATE jobs SET ended_at = '2026-01-01T00:00:00.000Z'")
        other.commit()

    poll(lambda: service.ids() == [], "all removed")

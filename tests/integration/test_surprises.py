"""What happens at the wrong moment, or fails once: no job is lost, and no place stays taken."""

import _thread
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest

import app
import postback
from jobs import executor, model, runner
from jobs.errors import JournalError
from jobs.executor import WorkerExecutor
from jobs.journal import Journal
from jobs.model import Again
from jobs.runner import Runner
from jobs.writer import Writer
from tests.conftest import ACT
from tests.harness import ROOT, Caller, act, environment, failing, poll, refusal
from tests.integration import test_executor
from tests.integration.test_executor import SHARED, Call
from tests.receiver import Receiver
from web import outbound

start_executor, own = test_executor.start, test_executor.own


class FullDisk(sqlite3.Connection):
    """A connection that commits nothing while the disk is full."""

    is_full = False

    def execute(self, statement, *values):
        if self.is_full and statement == "COMMIT":
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(statement, *values)


@pytest.fixture
def start_hasty(start, receiver, monkeypatch):
    """Return `start`, for a service with short pauses that posts to the receiver."""
    for name in ("RETRY_SECONDS", "TICK_SECONDS", "LOST_SECONDS"):
        monkeypatch.setattr(runner, name, 0.05)
    return partial(start, **ACT, POSTBACK_URL=receiver.url)


@pytest.fixture
def start_twice(start_hasty, receiver, monkeypatch, caplog):
    """Return `start_hasty`, with one place, for an analysis and an attempt that fail at first."""
    monkeypatch.setattr(runner, "PRUNE_SECONDS", 0.05)  # a due attempt that was missed is found
    receiver.answers = [500]
    caplog.set_level("DEBUG", logger="postback")  # every line is written
    return partial(start_hasty, MAX_RUNNING="1", ANALYSIS_SCHEDULE="50ms")


@pytest.fixture
def fail(monkeypatch):
    """Return a function that has a method fail at its next `times` calls that matter."""

    def fail(owner, name, *, times=1, matters=lambda *_, **__: True, problem=MemoryError):
        original, failures, has_failed = getattr(owner, name), [problem] * times, threading.Event()

        def method(*arguments, **options):
            if failures and matters(*arguments, **options):
                problem = failures.pop()
                if not failures:
                    has_failed.set()
                raise problem
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, method)
        return has_failed

    return fail


@pytest.fixture
def no_threads(monkeypatch):
    """Let no thread start while the returned event is set."""
    refused, start = threading.Event(), _thread.start_new_thread

    def limited(*args):
        if refused.is_set():
            raise RuntimeError("can't start new thread")
        return start(*args)

    monkeypatch.setattr(_thread, "start_new_thread", limited)
    return refused


def test_a_cancel_that_cannot_be_committed_is_refused_and_the_job_goes_on(
    start_hasty, gate, monkeypatch
):
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=FullDisk))
    service = start_hasty()
    job_id = service.send(gate.data)
    gate.wait_for(1)

    monkeypatch.setattr(FullDisk, "is_full", True)
    for path in (f"/jobs/{job_id}/cancel", *["/process"] * 3):
        assert "disk is full" in refusal(service.post(path, json={"data": 1}), 503)
    monkeypatch.setattr(FullDisk, "is_full", False)
    gate.open()

    assert service.wait_for(job_id)["outcome"] == "succeeded"


def test_a_canceled_job_frees_its_place_though_its_event_must_wait(start_hasty, receiver):
    service = start_hasty(MAX_RUNNING="1")
    receiver.answers = [b"HTTP/1.1 503 x\r\nRetry-After: 60\r\nContent-Length: 0\r\n\r\n"]
    held = service.send(1)
    poll(lambda: service.job(held)["attempts"], "an attempt after which the receiver is held")
    running = service.send(act("sleep", 60))
    service.wait_for(running, "running")

    service.post(f"/jobs/{running}/cancel")

    service.wait_for(service.send(2), "delivering")
    assert service.job(running)["attempts"] == []


# A journal that fails once


def test_a_time_out_is_declared_as_soon_as_the_journal_takes_it(start_hasty, gate):
    service = start_hasty(JOB_TIMEOUT="300ms")
    job_id = service.send(gate.data)
    gate.wait_for(1)

    with failing(service.journal):
        poll(lambda: service.journal.failure, "a time-out that is refused")

    assert service.wait_for(job_id)["outcome"] == "timed_out"


@pytest.mark.parametrize("name", ["earliest_attempts", "claim_due"])
def test_due_attempts_that_cannot_be_read_once_are_made(start_hasty, receiver, fail, name):
    find = Journal.earliest_attempts
    options = {"problem": JournalError("a fault"), "matters": lambda one, *_, **__: find(one)}
    has_failed = fail(Journal, name, **options)  # when there is an attempt to be found
    receiver.answers = [500]
    service = start_hasty()

    job_id = service.send(1)

    assert service.wait_for(job_id)["attempts_made"] == 2
    assert has_failed.is_set()


def test_due_attempts_for_which_there_is_no_memory_once_are_made(start_hasty, receiver, fail):
    receiver.answers = [500]
    has_failed = fail(runner, "Run", matters=lambda *, is_posting, **_: is_posting)
    service = start_hasty()

    assert service.wait_for(service.send(1))["attempts_made"] == 2
    assert has_failed.is_set()


def test_a_receiver_that_fails_is_known_while_its_attempts_are_under_way(start_hasty, receiver):
    receiver.answers, released = [500], threading.Event()
    receiver.default = lambda *_: 500 if released.wait(20) else None
    service = start_hasty()
    service.send(0)
    receiver.wait_for(2)

    ids = [service.send(n) for n in range(9)]
    due = [service.wait_for(one, "delivering")["next_attempt_at"] for one in ids]
    released.set()

    assert due.count(None) == runner.MAX_PER_UNPROVEN_RECEIVER - 1


@pytest.mark.parametrize("have_worked", [False, True])
def test_receivers_that_hang_leave_room_for_one_that_works(start_hasty, monkeypatch, have_worked):
    monkeypatch.setattr(runner, "MAX_ATTEMPTS", 8)
    ended = threading.Event()
    with Receiver() as good, Receiver() as first, Receiver() as second:
        service = start_hasty(POSTBACK_ALLOW=" ".join(x.origin for x in (good, first, second)))
        for one in (good, *[first, second] * have_worked):
            assert service.wait_for(service.send(0, to=one))["state"] == "delivered"
        first.default = second.default = lambda *_: 500 if ended.wait(20) else None
        for one in [first, second] * 8:
            service.send(1, to=one)
        second.wait_for(1 + have_worked)

        for number in range(3):
            assert service.wait_for(service.send(number, to=good))["state"] == "delivered"

        ended.set()


def test_one_resend_of_all_is_made_at_a_time_and_says_when_a_stop_cut_it_short(
    start_hasty, monkeypatch
):
    monkeypatch.setattr(runner, "BATCH", 1)
    monkeypatch.setattr(runner, "BATCH_PAUSE_SECONDS", 20)
    service = start_hasty(POSTBACK_URL="http://127.0.0.1:9/", POSTBACK_SCHEDULE="none")
    for job_id in [service.send(n) for n in range(2)]:
        service.wait_for(job_id, "undelivered")

    def resend():
        return Caller(service.base_url).post("/jobs/resend", json={"state": "undelivered"})

    with ThreadPoolExecutor() as threads:
        cut_short = threads.submit(resend)
        poll(service.service.runner._resending.locked, "the first")
        assert "Another resend" in refusal(resend(), 503)
        service.service.runner._drained.set()

        assert refusal(cut_short.result(20), 503) == "Resent so far: 1. Send it again later."


def test_a_job_that_is_resent_during_the_stop_is_counted(start_hasty, monkeypatch):
    service = start_hasty()
    job_id = service.send(1)
    service.wait_for(job_id)
    server, journal = service.service.server, service.journal
    stop = server.stop

    def stop_late():
        with journal.transaction():
            journal.resend(job_id, now=model.utc_now())
        stop()

    monkeypatch.setattr(server, "stop", stop_late)

    assert service.stop() == app.EXIT_WAITING
    service.start_again()


@pytest.mark.parametrize(("name", "line"), [("claim", "runner failed"), ("record", "write failed")])
def test_g27_what_nobody_expected_is_logged_once(start_hasty, fail, caplog, name, line):
    service = start_hasty()
    fail(Journal, name, problem=ValueError("unexpected"))

    assert service.wait_for(service.send(1))["state"] == "delivered"
    poll(lambda: line in caplog.messages, "a line in the log")


def test_jobs_whose_commit_failed_do_not_fill_the_queue(start_hasty, gate, monkeypatch):
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=FullDisk))
    service = start_hasty(MAX_RUNNING="1", MAX_PENDING="2")
    service.send(gate.data)
    gate.wait_for(1)

    monkeypatch.setattr(FullDisk, "is_full", True)
    for _ in range(3):
        assert refusal(service.post("/process", json={"data": 1}), 503)
    monkeypatch.setattr(FullDisk, "is_full", False)

    poll(lambda: service.post("/process", json={"data": 1}).ok, "an accepted job")


def test_a_large_event_that_is_refused_holds_up_no_other_job(start_hasty, monkeypatch):
    monkeypatch.setattr(runner, "TICK_SECONDS", 3600.0)  # so that only this test has it retried
    service = start_hasty(MAX_RUNNING="2")
    service.wait_for(service.send(1))

    limit_pages(service.journal, more=100)
    large = service.send(act("large", 1_000_000))
    poll(lambda: service.journal.failure, "a write that is refused")
    others = service.wait_for_all([service.send(number) for number in range(3)])
    assert [job["state"] for job in others] == ["delivered"] * 3
    assert "full" in refusal(service.get("/readyz"), 503)

    limit_pages(service.journal, more=10_000)
    service.service.runner._tick_at = 0.0
    service.service.server.wake()
    assert service.wait_for(large)["state"] == "delivered"
    assert not service.service._executor.held
    assert service.get("/readyz").status_code == 200


def limit_pages(journal, *, more):
    """Let the journal grow by so many pages, as if its disk had only so much room."""
    with journal._lock:
        [count] = journal._connection.execute("PRAGMA page_count").fetchone()
        journal._connection.execute(f"PRAGMA max_page_count = {count + more}").fetchone()


def test_a_journal_that_another_program_locks_is_waited_for_once(start_hasty):
    executed: list[str] = []
    told: list[None] = []
    journal = start_hasty().journal
    writer = Writer(journal)
    for _ in range(3):
        writer.hand_over(
            lambda: journal.prune_received(before=model.utc_now(), limit=1) or None, told.append
        )

    with closing(sqlite3.connect(journal._path)) as other, journal._lock:
        other.execute("BEGIN IMMEDIATE")
        journal._connection.set_trace_callback(executed.append)
        writer.write()
        journal._connection.set_trace_callback(None)

    assert (executed.count("BEGIN IMMEDIATE"), len(writer.failed), told) == (1, 3, [])
    writer.write(retry=True)
    assert told == [None] * 3


def test_a_write_that_always_fails_holds_up_no_other_though_they_take_long(start_hasty):
    told: list[str] = []
    writer = Writer(start_hasty().journal)

    def take_long():
        threading.Event().wait(0.4)
        return "written"

    for _ in range(2):
        writer.hand_over(take_long, told.append)
    writer.hand_over(lambda: 1 / 0, told.append)

    for _ in range(3):
        writer.write(retry=True)

    assert told == ["written"] * 2
    assert len(writer.failed) == 1


def test_a_job_that_is_to_run_again_cannot_time_out_while_that_is_not_written(start_hasty, fail):
    service = start_hasty(JOB_TIMEOUT="300ms", ANALYSIS_SCHEDULE="10ms")
    has_failed = fail(Journal, "run_again", times=30, problem=JournalError("a fault"))

    job = service.wait_for(service.send(act("fail_at_first", 1)))

    assert has_failed.is_set()
    assert (job["outcome"], job["starts"]) == ("succeeded", 2)


def test_a_value_that_cannot_be_kept_is_said_so(start_hasty, fail, tmp_path):
    service = start_hasty()
    has_failed = fail(Journal, "keep", times=2)  # with others, and alone

    job = service.wait_for(service.send(act("keep", [1, str(tmp_path / "mark"), "end"])))

    assert has_failed.is_set()
    assert job["error"] == {"type": "RuntimeError", "message": "MemoryError"}


def test_an_analysis_that_cannot_begin_fails_and_keeps_no_place(start_hasty, fail):
    service = start_hasty(MAX_RUNNING="1")
    fail(WorkerExecutor, "run", problem=OSError)

    jobs = service.wait_for_all([service.send(number) for number in range(1, 3)])

    assert [job["outcome"] for job in jobs] == ["failed", "succeeded"]


# What fails behind a commit


def test_a_metric_that_fails_after_a_commit_refuses_nothing(start_hasty, fail):
    service = start_hasty()
    has_failed = fail(service.journal, "_on_commit")

    assert service.wait_for(service.send(1))["state"] == "delivered"
    assert has_failed.is_set()


@pytest.mark.parametrize(
    ("place", "name", "times"),
    [
        *(("metric", "retried", 1), ("metric", "ended_analysis", 2), ("metric", "attempted", 3)),
        *(("line", "analysis to run again", 1), ("line", "analysis ended", 1)),
        *(("line", "attempt failed", 1), ("line", "job %s", 1)),
    ],
)
def test_what_fails_after_a_write_keeps_no_place(start_twice, fail, place, name, times):
    service = start_twice()
    failing = {
        "metric": lambda: fail(service.service.metrics, name, times=times),
        "line": lambda: fail(logging.Logger, "_log", matters=lambda *one, **_: one[2] == name),
    }
    has_failed = failing[place]()

    jobs = service.wait_for_all([service.send(act("fail_at_first", 1)), service.send(1)])

    assert [(job["state"], job["starts"]) for job in jobs] == [("delivered", 2), ("delivered", 1)]
    assert has_failed.wait(10)
    poll(lambda: not service.service.runner.runs, "all places free")


# No thread, no memory, no worker, no time


def test_a_cancel_that_is_not_counted_still_frees_the_worker(start_hasty, fail):
    service = start_hasty(EXECUTOR="process", WORKERS="1")
    running = service.send(act("sleep", 60))
    service.wait_for(running, "running")
    has_failed = fail(service.service.metrics, "ended_analysis")

    service.post(f"/jobs/{running}/cancel")

    assert has_failed.wait(10)
    assert service.wait_for(service.send(1))["outcome"] == "succeeded"
    assert service.wait_for(running)["outcome"] == "canceled"


def test_no_memory_when_a_job_ends_and_when_that_is_handled_keeps_no_place(start_hasty, fail):
    service, has_failed = start_hasty(MAX_RUNNING="1"), fail(Runner, "_end", times=4)

    job_id = service.send(1)

    assert service.wait_for(job_id)["outcome"] == "failed"
    assert has_failed.is_set()
    assert service.wait_for(service.send(1))["outcome"] == "succeeded"


@pytest.mark.parametrize(("name", "times"), [("run_again", 2), ("end", 4)])
def test_a_write_that_finds_no_memory_is_tried_again(start_twice, receiver, fail, name, times):
    """Each try fails twice: with others, and alone."""
    service, has_failed = start_twice(), fail(Journal, name, times=times)
    fail(postback.Sender, "attempt")

    job = service.wait_for(service.send(act("fail_at_first", 1)))

    assert has_failed.is_set()
    assert (job["state"], job["starts"], job["attempts_made"]) == ("delivered", 2, 2)
    assert service.wait_for(service.send(1))["outcome"] == "succeeded"


def test_a_claim_that_finds_no_memory_to_commit_keeps_no_place(start_hasty, fail):
    service = start_hasty(MAX_RUNNING="1")
    runs = service.service.runner.runs
    has_failed = fail(Journal, "_commit", matters=lambda *_: runs)

    job = service.wait_for(service.send(1))

    assert has_failed.is_set()
    assert (job["outcome"], job["starts"]) == ("succeeded", 1)


@pytest.mark.parametrize("problem", [MemoryError, RuntimeError])
def test_an_attempt_that_cannot_begin_is_made_later(start_hasty, fail, problem):
    service = start_hasty(MAX_RUNNING="1")
    has_failed = fail(postback.Sender, "attempt", problem=problem)

    job = service.wait_for(service.send(1))

    assert has_failed.is_set()
    assert (job["outcome"], job["starts"]) == ("succeeded", 1)


@pytest.mark.parametrize(("name", "requests"), [("begin", 1), ("go_on", 1), ("_end", 3)])
def test_an_attempt_that_an_error_has_lost_is_made_again(
    start_hasty, receiver, fail, name, requests
):
    service = start_hasty(POSTBACK_TIMEOUT="200ms")
    has_failed = fail(outbound._Group, name, times=2)

    job = service.wait_for(service.send(1))

    assert has_failed.is_set()
    assert (job["state"], job["attempts_made"]) == ("delivered", 1)
    assert len(receiver.requests) == requests


@pytest.mark.parametrize("workers", [None, 1])
def test_without_a_thread_for_a_worker_jobs_run(start_executor, no_threads, tmp_path, workers):
    one = start_executor(workers)
    hung = Call(one, "hang", str(tmp_path / "hung"))
    poll(lambda: list(tmp_path.glob("hung.*")), "a job that hangs")

    no_threads.set()
    hung.stop()

    assert hung.wait() is None
    if workers:  # its only place is that of the worker which was killed
        no_threads.clear()
    assert Call(one, "echo", 1).result() == 1


def test_a_job_alone_for_whose_worker_no_thread_can_start_runs_later(start_executor, no_threads):
    one = start_executor()

    no_threads.set()
    assert isinstance(Call(one, "echo", 1, **SHARED).wait(), Again)
    no_threads.clear()

    assert Call(one, "echo", 1, **SHARED).result() == 1


def test_a_short_lived_worker_is_not_replaced_at_once(start_executor, own, tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "RETRY_SECONDS", 3600.0)
    source = f"import os; open(f'{tmp_path}/{{os.getpid()}}.pid', 'w').close(); run = print"
    short_lived = start_executor(analysis=own(source))
    [mark] = tmp_path.glob("*.pid")

    os.kill(int(mark.stem), signal.SIGKILL)
    poll(lambda: not short_lived.free(), "its end")

    # Meanwhile two others load one after the other: time enough to see a hasty start.
    for _ in range(2):
        assert Call(start_executor(), "echo", 1).result() == 1
    assert list(tmp_path.glob("*.pid")) == [mark]


@pytest.mark.service
def test_a_stop_while_the_analysis_loads_ends_in_order_and_does_not_wait_for_it(own, tmp_path):
    analysis = own(f"import threading\nopen('{tmp_path}/loads', 'w')\nthreading.Event().wait()")
    env = environment({"JOURNAL": os.environ["JOURNAL"], "ANALYSIS": analysis})

    command = [sys.executable, "app.py"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as child:
        poll((tmp_path / "loads").exists, "an analysis that loads")
        child.terminate()
        _, told = child.communicate(timeout=20)

    assert child.returncode == 0
    assert "ANALYSIS=" not in told


def test_a_stop_does_not_wait_for_a_journal_that_fails(start_hasty, gate):
    service = start_hasty(DRAIN="100ms")
    service.send(gate.data)
    gate.wait_for(1)

    with failing(service.journal), pytest.raises(JournalError):
        service.service.stop()

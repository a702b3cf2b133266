"""What happens at the wrong moment, or fails once: no job is lost, and no place stays taken."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import requests

from jobs import executor, runner
from jobs.errors import JournalError
from jobs.executor import WorkerExecutor
from jobs.journal import Journal
from jobs.model import Again, State
from tests.conftest import ACT
from tests.harness import ROOT, Caller, act, environment, events, free_port, poll, refusal
from tests.integration.test_executor import SHARED, Call


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
    for name in ("RETRY_SECONDS", "TICK_SECONDS"):
        monkeypatch.setattr(runner, name, 0.05)
    return partial(start, **ACT, POSTBACK_URL=receiver.url)


@pytest.fixture
def fail_once(monkeypatch):
    """Return a function that has a method of the journal fail at its next call that matters."""

    def fail_once(name, *, matters=lambda _: True):
        original, has_failed = getattr(Journal, name), threading.Event()

        def method(self, *arguments, **options):
            if not has_failed.is_set() and matters(self):
                has_failed.set()
                raise JournalError("a fault")
            return original(self, *arguments, **options)

        monkeypatch.setattr(Journal, name, method)
        return has_failed

    return fail_once


@pytest.fixture
def start_executor():
    """Return a function that starts an executor."""
    started = []

    def start_executor(workers=None, analysis=ACT["ANALYSIS"]):
        options = {"workers": workers, "log_level": "info", "on_change": lambda: None}
        started.append(WorkerExecutor(analysis=analysis, **options))
        started[-1].start()
        return started[-1]

    yield start_executor

    for one in started:
        one.close()


@pytest.fixture
def no_threads(monkeypatch):
    """Let no thread start while the returned event is set, but those of calls."""
    refused, start = threading.Event(), threading.Thread.start

    def limited(thread):
        if refused.is_set() and not isinstance(thread, Call):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    return refused


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Return a function that writes a module of the user's, and returns ANALYSIS."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source):
        (tmp_path / "own_analysis.py").write_text(source)
        return "own_analysis:run"

    return write


@pytest.fixture
def run():
    """Return a function that starts `app.py` and does not wait until it answers."""
    started = []

    def run(**options):
        started.append(subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, **options))
        return started[-1]

    yield run

    for one in started:
        one.kill()
        one.wait()


# A cancel


def cancel_when(monkeypatch, moment, cancel):
    """Call `cancel` when a claim was committed, before its thread starts, or before it runs."""
    if moment == "committed":
        commit = Journal.transaction

        @contextmanager
        def transaction(self, **options):
            with commit(self, **options):
                yield
            cancel()

        monkeypatch.setattr(Journal, "transaction", transaction)
        return
    owner, name = (threading.Thread, "start") if moment == "thread" else (WorkerExecutor, "run")
    original = getattr(owner, name)

    def begin(*arguments, **options):
        cancel()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, begin)


@pytest.mark.parametrize("moment", ["committed", "thread", "executor"])
def test_a_cancel_just_after_the_claim_frees_the_worker_and_posts_no_result(
    start_hasty, receiver, monkeypatch, tmp_path, moment
):
    service, once = start_hasty(EXECUTOR="process", WORKERS="1"), threading.Lock()
    canceled: list[str] = []

    def cancel():
        for job in service.journal.page(state=State.RUNNING, limit=1, before=None):
            if once.acquire(blocking=False):
                canceled.append(job.id)
                service.service.runner.cancel(job.id)

    cancel_when(monkeypatch, moment, cancel)
    hung = service.send(act("hang", str(tmp_path / "hung")))
    other = service.send(1)

    assert service.wait_for(other)["outcome"] == "succeeded"
    assert service.wait_for(hung)["outcome"] == "canceled"
    assert canceled == [hung]
    posted = {event["data"]["id"]: event["data"]["outcome"] for event in events(receiver.requests)}
    assert posted == {hung: "canceled", other: "succeeded"}


# A journal that fails once


def test_a_time_out_whose_write_fails_once_is_written_again(start_hasty, fail_once, tmp_path):
    service, has_failed = start_hasty(JOB_TIMEOUT="100ms"), fail_once("end")

    job_id = service.send(act("hang", str(tmp_path / "hung")))

    assert service.wait_for(job_id)["outcome"] == "timed_out"
    assert has_failed.is_set()


@pytest.mark.parametrize("name", ["earliest_attempts", "claim_due"])
def test_due_attempts_that_cannot_be_read_once_are_made(start_hasty, receiver, fail_once, name):
    find = Journal.earliest_attempts
    has_failed = fail_once(name, matters=find)  # when there is an attempt to be found
    receiver.answers = [500]
    service = start_hasty()

    job_id = service.send(1)

    assert service.wait_for(job_id)["attempts_made"] == 2
    assert has_failed.is_set()


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


# No thread, no memory


@pytest.mark.parametrize("problem", [MemoryError, RuntimeError])
def test_a_job_whose_thread_cannot_start_runs_later(start_hasty, monkeypatch, problem):
    service, start = start_hasty(), threading.Thread.start
    refused: list[str] = []

    def limited(thread):
        if len(thread.name) == 32 and not refused:
            refused.append(thread.name)
            raise problem
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    job_id = service.send(1)

    job = service.wait_for(job_id)
    assert refused == [job_id]
    assert (job["outcome"], job["starts"]) == ("succeeded", 1)


@pytest.mark.parametrize("workers", [None, 1])
def test_jobs_run_behind_a_hung_one_though_no_thread_can_start_for_a_worker(
    start_executor, no_threads, tmp_path, workers
):
    one = start_executor(workers)
    hung = Call(one, "hang", str(tmp_path / "hung"))
    poll(lambda: list(tmp_path.glob("hung.*")), "a job that hangs")

    no_threads.set()
    hung.stop()

    assert hung.wait() is None
    assert Call(one, "echo", 1).result() == 1


def test_a_job_alone_for_whose_worker_no_thread_can_start_runs_later(start_executor, no_threads):
    one = start_executor()

    no_threads.set()
    assert isinstance(Call(one, "echo", 1, **SHARED).wait(), Again)
    no_threads.clear()

    assert Call(one, "echo", 1, **SHARED).result() == 1


# Workers that are of no use


def test_a_worker_that_ends_at_once_is_not_started_again_at_once(
    start_executor, own, tmp_path, monkeypatch
):
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


# The process


@pytest.mark.service
def test_with_outputs_that_nobody_reads_it_starts_works_and_ends_in_order(run, own):
    settings = {"JOURNAL": os.environ["JOURNAL"], "PORT": str(free_port()), "LOG_LEVEL": "debug"}
    settings["ANALYSIS"] = own("def run(data): print(data); return data")
    service = Caller(f"http://127.0.0.1:{settings['PORT']}")
    reader, writer = os.pipe()
    os.close(reader)

    child = run(env=environment(settings), stdout=writer, stderr=writer)
    os.close(writer)
    poll(partial(is_ready, service), "the service")

    assert service.wait_for(service.send(1))["outcome"] == "succeeded"
    service.close()
    child.terminate()
    assert child.wait(20) == 0


def is_ready(service):
    with suppress(requests.ConnectionError):
        return service.get("/readyz").ok
    return False


@pytest.mark.service
def test_a_stop_while_the_analysis_loads_ends_in_order_and_does_not_wait_for_it(run, own, tmp_path):
    analysis = own(f"import threading\nopen('{tmp_path}/loads', 'w')\nthreading.Event().wait()")
    settings = {"JOURNAL": os.environ["JOURNAL"], "ANALYSIS": analysis}
    child = run(env=environment(settings), stderr=subprocess.PIPE, text=True)
    poll(Path(tmp_path / "loads").exists, "an analysis that loads")

    child.terminate()

    _, told = child.communicate(timeout=20)
    assert child.returncode == 0
    assert "ANALYSIS=" not in told

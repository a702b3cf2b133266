"""Where the analysis runs: whatever it does to its process, every job gets what it deserves."""

import dataclasses
import itertools
import json
import logging
import os
import queue
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jobs import errors, executor, model, worker
from jobs.executor import Listener, WorkerExecutor
from tests.harness import act, is_alive, poll

JOB = model.Job(
    id="",
    state=model.State.RUNNING,
    postback_url=None,
    receiver="",
    forwarded={},
    created_at=model.utc_now(),
)

SHARED = {"alone": model.Alone.SHARED}

_numbers = itertools.count(1)


class Loop(threading.Thread):
    """What the loop of the service does for an executor: it starts, listens and stops."""

    of: ClassVar[dict[Any, "Loop"]] = {}

    def __init__(self, one):
        super().__init__(daemon=True)
        self._one, self._calls, self._todo = one, list[Call](), queue.SimpleQueue[Any]()
        self._is_closed = False
        self.of[one] = self
        self.start()

    def run(self):
        while not self._is_closed:
            self._one.selector.select(0.01)
            self._one.listen()
            with suppress(queue.Empty):
                while True:
                    self._todo.get_nowait()()
            for call in [call for call in self._calls if call.job.alone or self._one.free()]:
                if call.job.alone or self._one.free():
                    self._calls.remove(call)
                    self._one.run(call.job, call.body, kept=None, listener=call.listener)

    def start_call(self, call):
        self._todo.put(lambda: self._calls.append(call))

    def stop_call(self, call):
        def stop():
            self._one.stop(call.job.id)
            call.end(None)

        self._todo.put(stop)

    def close(self):
        self._is_closed = True
        self.join()
        self._one.close()
        del self.of[self._one]


class Call:
    """One call of `run`, as soon as there is a place, which notes what the listener is told."""

    def __init__(self, one, name, data, progressed=None, **fields):
        self.job = dataclasses.replace(JOB, id=f"job-{next(_numbers)}", **fields)
        self.told: list[Any] = []
        self.has_started, self.has_returned = threading.Event(), threading.Event()
        self._endings = queue.SimpleQueue[Any]()
        self._loop = Loop.of[one]
        self.body = json.dumps({"data": act(name, data)}).encode()
        self.listener = Listener(
            started=self.has_started.set,
            returned=self.has_returned.set,
            progressed=progressed or (lambda *report: self.told.append(report)),
            kept=lambda text, _: self.told.append(text),
            ended=self.end,
        )
        self._loop.start_call(self)

    def end(self, ending):
        self._endings.put(ending)

    def stop(self):
        self._loop.stop_call(self)

    def has_ended(self):
        return not self._endings.empty()

    def wait(self):
        """Return the ending; None when it was stopped."""
        ending = self._endings.get(timeout=20)
        self._endings.put(ending)
        return ending

    def result(self):
        ending = self.wait()
        assert getattr(ending, "outcome", None) == "succeeded", ending
        return json.loads(ending.result)

    def error(self):
        """Return the message of an ending without a result."""
        return self.wait().error["message"]


@pytest.fixture
def start():
    """Return a function that starts an executor; `workers` is None for EXECUTOR=thread."""
    started = []

    def start(workers=None, analysis="tests.misbehaving:act"):
        one = WorkerExecutor(analysis=analysis, workers=workers, log_level="info")
        one.start()
        started.append(one)
        Loop(one)
        return one

    yield start

    for one in started:
        pids = [worker.pid for worker in one._workers]
        Loop.of[one].close()
        assert not one._workers
        assert not any(map(is_alive, pids))


@pytest.fixture(params=[None, 1], ids=["thread", "process"])
def one(request, start):
    """An executor of each kind."""
    return start(request.param)


def mark(call, path):
    """Return what a job wrote beside a file, as soon as it is there."""
    file = Path(f"{path}.{call.job.id}")
    poll(file.exists, f"{file}")
    return file.read_text()


# What a process has of its own


def test_a_worker_inherits_nothing_that_surprises(one):
    assert Call(one, "surroundings", 0).result() == {
        "input": "",
        "arguments": [],
        "signals": ["SIG_DFL"] * 3,
        "is group leader": True,
    }


def test_nothing_of_one_job_is_left_for_the_next(one):
    seen = [Call(one, "leave_state", number).result() for number in range(5)]

    assert seen == [[28, None, False, False]] * 5


@pytest.mark.parametrize("workers", [None, 1])
def test_what_an_analysis_prints_and_logs_is_in_the_log_of_the_service(capfd, start, workers):
    call = Call(start(workers), "print_in_every_way", "me")
    call.result()

    lines = sorted(line for line in capfd.readouterr().err.splitlines() if "me" in line.split())
    assert [line for line in lines if "logged" not in line] == [
        "me child",
        "me print \\ud800",
        "me write",
    ]
    logged = [line.partition("Z ")[2] for line in lines if "logged" in line]
    phrase = "WARNING own me logged job_id="
    assert sorted(logged) == sorted([f"{phrase}{call.job.id}", f"{phrase}own"])


def test_pools_and_children_of_an_analysis_work(one):
    calls = [Call(one, "pool", [-1, -2]) for _ in range(5)]

    assert [call.result() for call in calls] == [[1, 2]] * 5
    assert Call(one, "pool_given_up", 0).result() == "gave up"
    assert Call(one, "terminate_a_child", 0).result() == -signal.SIGTERM


# The end of a worker


def test_a_job_that_has_ended_is_not_to_blame(start):
    one = start()
    assert Call(one, "die_later", 0.3).result() is None

    assert Call(one, "sleep", 10).wait().outcome == "crashed"


def test_the_end_of_a_worker_is_a_warning_unless_the_service_wanted_it(one, caplog, tmp_path):
    caplog.set_level("INFO")
    hung = Call(one, "hang", str(tmp_path / "go"), **SHARED)
    mark(hung, tmp_path / "go")
    hung.stop()
    poll(lambda: "worker ended" in caplog.messages, "the end of its worker")
    assert Call(one, "end_process", "exit 3", **SHARED).error()

    ended = [record for record in caplog.records if record.message == "worker ended"]
    told = [(record.levelname, record.ending) for record in ended]
    assert told == [("INFO", None), ("WARNING", "exit code 3")]


def test_a_module_that_forks_when_it_is_imported_runs_once(own, start):
    own("import os; os.fork()\ndef run(data): return 1")

    assert Call(start(None, "own_analysis:run"), "", 0).result() == 1


def test_an_analysis_may_replace_threads_locks_and_sockets(own, start):
    replaced = "socket.socket = threading.Lock = _thread.start_new_thread = None"
    own(f"import _thread, socket, threading\n{replaced}\ndef run(data): return 'x' * 3_000_000")

    assert len(Call(start(None, "own_analysis:run"), "", 0).result()) == 3_000_000


def test_an_analysis_that_ends_its_worker_politely_does_so_only_twice(one):
    assert Call(one, "terminate", 0).wait() == model.Again(is_alone=True)
    assert "signal 15 (Terminated)" in Call(one, "terminate", 0, **SHARED).error()


def test_while_the_service_drains_no_job_is_blamed_or_begins(one, tmp_path):
    running = Call(one, "wait", str(tmp_path / "go"))
    mark(running, tmp_path / "go")

    waiting = Call(one, "echo", 1, **SHARED)
    poll(lambda: len(one._runs) == 2, "its worker")
    one.drain()

    assert Call(one, "echo", 1, **SHARED).wait() == executor.NOT_BEGUN
    assert isinstance(waiting.wait(), model.Again)
    one._workers[0].kill()
    assert running.wait() == model.Again()


def test_a_worker_that_is_asked_to_end_just_before_the_service_crashes_no_job(one, tmp_path):
    call = Call(one, "hang", str(tmp_path / "go"), **SHARED)
    mark(call, tmp_path / "go")
    [pid] = [worker.pid for worker in one._workers if worker.runs]

    os.kill(pid, signal.SIGTERM)
    poll(lambda: not is_alive(pid), "the end of its worker")
    one.drain()

    assert call.wait() == model.Again()


def test_a_stop_of_a_job_whose_worker_has_just_ended_starts_no_second_one(start, tmp_path):
    one = start()
    calls = [Call(one, "hang", str(tmp_path / str(number))) for number in range(2)]
    for number, call in enumerate(calls):
        mark(call, tmp_path / str(number))
    [pid] = [worker.pid for worker in one._workers]

    os.kill(pid, signal.SIGTERM)
    poll(lambda: not is_alive(pid), "the end of its worker")
    calls[0].stop()

    assert [call.wait() for call in calls] == [None, model.Again(is_alone=True)]
    assert Call(one, "echo", 1).result() == 1
    assert len(one._workers) == 1


def test_a_worker_gives_way_to_the_service_in_a_group_of_its_own(start):
    [pid] = [one.pid for one in start()._workers]

    assert (os.getsid(pid), os.getpgid(pid)) == (os.getsid(0), pid)
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) + worker.NICE


# Stopped jobs


def test_a_stopped_job_frees_its_place_at_once(one, tmp_path):
    call = Call(one, "keep_the_interpreter", 0)
    assert call.has_started.wait(20)
    pid = one._workers[0].pid

    call.stop()

    assert call.wait() is None
    poll(lambda: not is_alive(pid), "the end of its worker")
    assert Call(one, "echo", 1).result() == 1


def test_a_worker_with_a_hung_job_serves_until_another_is_ready_and_then_ends(start, tmp_path):
    one = start()
    hung = Call(one, "hang", str(tmp_path / "hung"))
    other = Call(one, "wait", str(tmp_path / "go"))
    pid = int(mark(hung, tmp_path / "hung"))
    mark(other, tmp_path / "go")

    hung.stop()

    assert hung.wait() is None
    assert one.failure() is None
    poll(lambda: Call(one, "pid", 0).result() != pid, "the other worker")
    assert is_alive(pid)
    (tmp_path / "go").touch()
    assert other.result() == "waited"
    poll(lambda: not is_alive(pid), "its end")


def test_a_job_that_cannot_begin_beside_a_hung_one_is_put_back(start):
    one = start()
    hung = Call(one, "keep_the_interpreter", 0)
    assert hung.has_started.wait(20)
    poll(lambda: all(run.has_begun for run in one._runs.values()), "its begin")
    waiting = Call(one, "echo", 1)
    assert waiting.has_started.wait(20)

    hung.stop()

    assert isinstance(waiting.wait(), model.Again)


def test_a_stopped_job_may_have_ended_the_worker_of_another(start, tmp_path):
    one = start()
    hung, other = (Call(one, "hang", str(tmp_path / "go")) for _ in range(2))
    pid = int(mark(hung, tmp_path / "go"))
    mark(other, tmp_path / "go")
    hung.stop()

    os.kill(pid, signal.SIGKILL)

    assert other.wait() == model.Again(is_alone=True)


# Places and limits


def test_each_worker_runs_one_job_and_a_third_waits(start, tmp_path):
    one = start(2)
    poll(lambda: one.free() == 2, "both workers")
    calls = [Call(one, "wait", str(tmp_path / "go")) for _ in range(3)]
    poll(lambda: len(list(tmp_path.iterdir())) == 2, "two have begun")

    assert one.free() == 0
    assert one.failure() is None
    (tmp_path / "go").touch()
    assert [call.result() for call in calls] == ["waited"] * 3


def test_large_results_wait_while_others_are_held_and_cannot_time_out_then(start):
    one = start()
    one.held |= {"another", "a third"}
    calls = [Call(one, "large", 2_000_000) for _ in range(2)]
    assert all(call.has_returned.wait(10) for call in calls)

    assert Call(one, "large", 1000).result() == "x" * 1000
    assert not any(call.has_ended() for call in calls)
    one.held.clear()
    assert [len(call.result()) for call in calls] == [2_000_000] * 2
    assert one.held == {call.job.id for call in calls}


def test_a_large_result_that_does_not_come_ends_its_worker(start, monkeypatch):
    monkeypatch.setattr(executor, "SILENCE_SECONDS", 0.2)
    one = start()
    one.held |= {"another", "a third"}
    call = Call(one, "large", 2_000_000)
    assert call.has_returned.wait(10)

    os.kill(one._workers[0].pid, signal.SIGSTOP)
    one.held.clear()

    assert call.error() == "The analysis ended its process: signal 9 (Killed)."


def test_a_report_that_cannot_be_handled_fails_its_job_and_retires_its_worker(one, tmp_path):
    def fail(*_):
        raise MemoryError

    pid = one._workers[0].pid
    call = Call(one, "report", [0.5, "half", str(tmp_path / "never")], progressed=fail)

    assert call.error() == "The job could not be handled."
    poll(lambda: not is_alive(pid), "the end of its worker")
    assert Call(one, "echo", 1).result() == 1


def test_a_job_that_is_stopped_while_its_worker_gets_ready_does_not_begin(start, monkeypatch):
    one = start()
    call: Any = None
    welcome = one._welcome

    def stop_and_welcome(*arguments):
        one.stop(call.job.id)
        welcome(*arguments)

    monkeypatch.setattr(one, "_welcome", stop_and_welcome)
    call = Call(one, "echo", 1, **SHARED)
    poll(lambda: one._runs, "a worker of its own")
    poll(lambda: not one._runs, "the stop")

    assert Call(one, "echo", 2).result() == 2
    assert not call.has_started.is_set()


@pytest.mark.parametrize("left", [0, 1])
def test_a_worker_without_descriptors_or_threads_is_replaced(start, left):
    one = start()
    Call(one, "open_too_many", left).result()

    endings = [Call(one, "sleep", 0.2) for _ in range(3)]

    again = [call.wait() for call in endings if isinstance(call.wait(), model.Again)]
    assert again == [model.Again(pause_seconds=1.0, has_started=False)] * len(again)
    assert len(again) >= 2 - left
    poll(lambda: getattr(Call(one, "echo", 1).wait(), "outcome", None), "a worker that can run it")


# Loading


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Return a function that writes a module of the user's, and returns ANALYSIS."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source, name="own_analysis"):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return f"{name}:run"

    return write


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise ValueError('two\\n  lines')", "importing it raised ValueError: two lines"),
        (
            "import os, time\nif os.fork(): os._exit(6)\ntime.sleep(20)",
            "loading it ended its process: exit code 6",
        ),
        (
            "import threading; threading.Thread(target=threading.Event().wait).start(); 1 / 0",
            "importing it raised ZeroDivisionError: division by zero",
        ),
    ],
)
def test_an_analysis_that_cannot_be_loaded_refuses_the_start(own, start, source, problem):
    own(source)

    with pytest.raises(errors.ConfigError) as caught:
        start(2, "own_analysis:run")

    [line] = str(caught.value).splitlines()
    assert line.startswith(f"ANALYSIS='own_analysis:run': {problem}")
    assert "\n" not in line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a socket is left
def test_a_worker_that_cannot_start_is_a_lack_that_may_pass(start, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere")

    with pytest.raises(errors.Refusal, match="No worker can be started: "):
        start(2)


def test_a_worker_that_is_killed_while_it_loads_is_a_lack_that_may_pass(own, start):
    own("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")

    with pytest.raises(errors.Refusal, match="loading the analysis ended with signal 9"):
        start(2, "own_analysis:run")


def test_a_worker_whose_thread_begins_too_late_is_given_up(start, monkeypatch):
    gate, serve = threading.Event(), WorkerExecutor._serve
    monkeypatch.setattr(executor, "LOADING_SECONDS", 0.1)
    one = start(1)
    monkeypatch.setattr(WorkerExecutor, "_serve", lambda *args: gate.wait(9) and serve(*args))
    (first,) = one._workers
    first.kill()

    poll(lambda: one.failure() and "did not begin" in one.failure(), "it is given up")
    gate.set()
    poll(one.free, "another one")
    poll(lambda: len(one._workers) == 1, "only that one")


def test_the_modules_of_the_user_are_found_before_ours(own, start):
    for name in ("config", "jobs", "app", "processing"):
        own(f"name = 'own {name}'", name)
    own("import app, config, jobs, processing\ndef run(_): return app.name, jobs.name, config.name")

    assert Call(start(None, "own_analysis:run"), "", 0).result() == [
        "own app",
        "own jobs",
        "own config",
    ]


def test_logging_that_the_user_sets_up_is_theirs(capfd, own, start):
    own(
        "import logging, logging.config\n"
        "logging.config.dictConfig({'version': 1, 'formatters': {'own': {'format':"
        " 'own %(message)s %(job_id)s'}}, 'handlers': {'own': {'class': 'logging.StreamHandler',"
        " 'formatter': 'own'}}, 'root': {'handlers': ['own'], 'level': 'INFO'}})\n"
        "def run(data): logging.info('line')\n"
    )
    call = Call(start(None, "own_analysis:run"), "", 0)
    call.result()

    assert f"own line {call.job.id}\n" in capfd.readouterr().err


def test_a_slow_import_is_waited_for_and_told(own, start, caplog, monkeypatch):
    monkeypatch.setattr(executor, "LOADING_SECONDS", 0.1)
    caplog.set_level(logging.INFO, "postback")
    own("import time; time.sleep(0.5)\ndef run(data): return 1")

    assert Call(start(None, "own_analysis:run"), "", 0).result() == 1

    assert "analysis loading" in caplog.messages
    assert "worker ready" in caplog.messages


def test_a_later_worker_that_cannot_load_is_told_and_tried_again(own, start, caplog, monkeypatch):
    monkeypatch.setattr(executor, "RETRY_SECONDS", 0.05)
    own("def run(data): return 1")
    one = start(None, "own_analysis:run")
    own("1 / 0")

    one._workers[0].kill()

    problem = "ANALYSIS='own_analysis:run': importing it raised ZeroDivisionError: division by zero"
    poll(lambda: (one.failure() or "").startswith(problem), "the failure")
    assert one.free() == 0
    assert "worker refused" in caplog.messages
    own("def run(data): return 22")
    assert Call(one, "", 0).result() == 22
    assert one.failure() is None


def test_a_job_alone_whose_worker_cannot_load_is_put_back(own, start):
    own("def run(data): return 1")
    one = start(None, "own_analysis:run")
    own("1 / 0")

    again = model.Again(pause_seconds=1.0, has_started=False)
    assert Call(one, "", 0, **SHARED).wait() == again
    assert one.failure() is None
    assert Call(one, "", 0).result() == 1

"""Where the analysis runs: what threads and child processes promise. Dask has a file of its own."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import processing
from jobs import analysis, errors, executors, model
from jobs.executors import ProcessExecutor, ThreadExecutor
from tests import analyses
from tests.harness import ROOT, events, poll

ENDS = {
    "exit 0": "exit code 0",
    "exit 3": "exit code 3",
    "segfault": "signal 11 (Segmentation fault)",
    "segfault, a child lives": "signal 11 (Segmentation fault)",
    "kill": "signal 9 (Killed)",
}


def run(executor, data, *, job_id="job", report=lambda _: None):
    return executor.run(job_id, json.dumps({"data": data}).encode(), report)


def result_of(ending):
    assert ending.outcome == "succeeded", ending
    return json.loads(ending.result)


def is_alive(pid):
    with suppress(FileNotFoundError, ProcessLookupError):  # it ends before, or while, it is read
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def read_pids(path):
    poll(path.exists, f"{path}")
    return [int(text) for text in path.read_text().split()]


@pytest.fixture
def pool():
    """Return a function that starts workers for an analysis of tests/analyses.py."""
    started = []

    def start(name, workers=1):
        started.append(ProcessExecutor(processing.load, f"tests.analyses:{name}", workers=workers))
        started[-1].start()
        return started[-1]

    yield start

    for one in started:
        pids = [worker._process.pid for worker in one._alive]
        one.close()
        assert not any(map(is_alive, pids))


# All executors: the analysis itself


@pytest.fixture(params=["thread", "process"])
def executor(request, pool):
    """Return a function that starts an executor of each kind."""
    if request.param == "process":
        return pool
    return lambda name: ThreadExecutor(getattr(analyses, name))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fail", "ValueError"),
        ("leave", "SystemExit"),
        ("interrupt", "KeyboardInterrupt"),
        ("exhaust", "MemoryError"),
        ("nan", "not_serialisable"),
        ("unserialisable", "not_serialisable"),
    ],
)
def test_whatever_the_analysis_raises_or_returns_is_an_ending(executor, name, kind):
    one = executor(name)

    ending = run(one, 1)

    assert (ending.outcome, ending.error["type"]) == ("failed", kind)


def test_a_payload_that_cannot_be_read_fails_its_job_alone(executor):
    one = executor("echo")

    ending = one.run("job", b"\xff", lambda _: None)

    assert (ending.outcome, ending.error["type"]) == ("failed", "UnicodeDecodeError")
    assert result_of(run(one, {"a": [1]})) == {"a": [1]}


def test_progress_is_clamped_cut_and_thinned_out(executor, tmp_path):
    (tmp_path / "go").touch()
    told: list[analysis.Progress] = []
    reports = [[1.7, "x" * 300 + "\ud800"], [0.5], [0.6], [float("nan")]]

    ending = run(executor("report"), [*reports, str(tmp_path / "go")], report=told.append)

    assert result_of(ending) == "told"
    assert [(one.fraction, one.note) for one in told] == [(1.0, "x" * 200)]


@pytest.mark.parametrize(
    ("fraction", "note", "kept"),
    [(-1, "é", (0.0, "é")), (0.5, 7, (0.5, "7")), (True, "\ud800", (1.0, "?"))],
)
def test_a_report_is_kept_as_json_can_tell_it(fraction, note, kept):
    told: list[analysis.Progress] = []

    analysis._Reporter(told.append)(fraction, note)

    assert (told[0].fraction, told[0].note) == kept


@pytest.mark.parametrize(
    ("analyze", "takes"),
    [
        pytest.param(lambda data, report: 0, True, id="required"),
        pytest.param(lambda data, progress=None: 0, True, id="optional, but named progress"),
        pytest.param(lambda data: 0, False, id="none"),
        pytest.param(lambda data, start=0: 0, False, id="optional"),
        pytest.param(lambda data, *, progress: 0, False, id="by keyword only"),
        pytest.param(lambda *data: 0, False, id="any number"),
        pytest.param(sum, False, id="builtin"),
        pytest.param(dict.update, False, id="without a signature"),
        pytest.param(functools.partial(lambda a, b: 0, 1), False, id="given already"),
    ],
)
def test_progress_goes_to_a_second_argument_that_asks_for_it(analyze, takes):
    assert (analysis.with_progress(analyze) is analyze) == takes


# Threads


def test_threads_change_more_often_than_python_has_it(monkeypatch):
    before = sys.getswitchinterval()
    try:
        ThreadExecutor(analyses.echo).start()
        assert sys.getswitchinterval() == pytest.approx(executors.SWITCH_SECONDS)
    finally:
        sys.setswitchinterval(before)


def test_a_crowd_of_analyses_asks_for_the_interpreter_no_more_often_than_a_few(monkeypatch):
    monkeypatch.setattr(executors, "CROWD", 2)
    before, seconds = sys.getswitchinterval(), []
    one = ThreadExecutor(lambda data: seconds.append(sys.getswitchinterval()))
    one._running.update(f"{number}" for number in range(7))
    try:
        one.run("the eighth", b'{"data": 1}', lambda _: None)
        one._running.clear()
        one.run("a lone one", b'{"data": 1}', lambda _: None)
    finally:
        sys.setswitchinterval(before)

    assert seconds == pytest.approx([4 * executors.SWITCH_SECONDS, executors.SWITCH_SECONDS])


def test_a_thread_that_outlives_its_job_is_counted_and_named_once(start, gate, receiver, caplog):
    service = start(
        ANALYSIS="tests.analyses:wait", JOB_TIMEOUT="50ms", POSTBACK_URL=receiver.url, DRAIN="1s"
    )
    job_id = service.process({"data": 1})

    service.wait_for(job_id)
    metrics = service.get("/metrics").text
    gate.open()
    poll(lambda: not service.service.runner.outlived, "the thread's end")

    assert "\npostback_outlived_threads 1.0\n" in metrics
    named = [one.job_id for one in caplog.records if one.message == "thread outlived its job"]
    assert named == [job_id]
    assert [event["type"] for event in events(receiver.requests)] == ["job.timed_out"]


# Child processes


@pytest.mark.parametrize(("way", "how"), ENDS.items())
def test_what_ends_its_process_is_crashed_and_spares_its_neighbour(pool, tmp_path, way, how):
    paths = {"here": str(tmp_path / "here"), "there": str(tmp_path / "there")}
    one = pool("either", workers=2)
    with ThreadPoolExecutor(1) as neighbour:
        met = neighbour.submit(run, one, paths, job_id="neighbour")
        [pid] = read_pids(tmp_path / "here")

        ending = run(one, way)
        after = run(one, "still here")
        (tmp_path / "there").touch()

        assert ending == model.crashed(f"The analysis ended its process: {how}.")
        assert result_of(after) == "still here"
        assert result_of(met.result(10)) == pid


def test_a_stop_kills_an_analysis_that_is_deaf_to_signals_and_its_children(pool, tmp_path):
    path = tmp_path / "pids"
    one = pool("be_deaf")
    with ThreadPoolExecutor(1) as job:
        ending = job.submit(run, one, str(path))
        pids = read_pids(path)

        assert one.stop("job")

        assert ending.result(1).outcome == "crashed"
        poll(lambda: not any(map(is_alive, pids)), "the end of both", timeout=1)


def test_a_stop_of_a_job_that_does_not_run_harms_nobody(pool):
    one = pool("pid")
    pid = result_of(run(one, 1))

    assert one.stop("another")

    assert result_of(run(one, 1)) == pid


def test_a_worker_loads_the_analysis_once_and_keeps_it_warm(pool):
    one = pool("pid")

    pids = {result_of(run(one, 1)) for _ in range(20)}

    assert len(pids) == 1
    assert pids != {os.getpid()}


def test_a_worker_that_was_killed_while_it_was_idle_costs_no_job(pool):
    one = pool("pid")
    pid = result_of(run(one, 1))
    os.kill(pid, signal.SIGKILL)
    poll(lambda: not is_alive(pid), "its end")

    assert result_of(run(one, 1)) != pid


def test_what_a_thread_left_by_another_job_reports_is_passed_over(pool, tmp_path):
    one = pool("report_late")
    told: list[analysis.Progress] = []
    left = result_of(run(one, str(tmp_path / "go"), job_id="first", report=told.append))
    (tmp_path / "go").touch()

    waited = result_of(run(one, str(tmp_path / "go"), job_id="second", report=told.append))

    assert (left, waited, told) == ("left", "waited", [])


@pytest.mark.slow
def test_the_pool_outlives_100_kills_at_any_moment(pool):
    one = pool("either", workers=2)
    ends = []
    with ThreadPoolExecutor(2) as jobs:
        for number in range(100):
            job = jobs.submit(run, one, "x" * (number * 50_000), job_id=str(number))
            neighbour = jobs.submit(run, one, number, job_id="neighbour")
            threading.Event().wait(number / 100 * 0.02)
            one.stop(str(number))
            ends.append(job.result(5).outcome)
            assert result_of(neighbour.result(5)) == number

    assert set(ends) == {"crashed", "succeeded"}
    assert result_of(run(one, "alive")) == "alive"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nothing_here:f", "there is no module"),
        ("tests.crashing:f", "loading it ended the process: exit code 7"),
    ],
)
def test_an_analysis_that_cannot_be_loaded_refuses_the_start(name, problem):
    one = ProcessExecutor(processing.load, name, workers=1)

    with pytest.raises(errors.ConfigError, match=problem):
        one.start()

    assert one._alive == set()


def test_an_analysis_that_can_no_longer_be_loaded_fails_its_jobs(pool, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "fickle.py"
    module.write_text("import os\ndef kill(data):\n    os._exit(0)\n")
    one = ProcessExecutor(processing.load, "fickle:kill", workers=1)
    one.start()
    module.write_text("not Python")

    endings = [run(one, 1) for _ in range(2)]
    one.close()

    assert [ending.outcome for ending in endings] == ["crashed", "failed"]
    assert "importing it raised NameError" in endings[1].error["message"]


def test_a_worker_that_cannot_be_started_is_told_once_and_tried_again(pool, monkeypatch, caplog):
    monkeypatch.setattr(executors, "RETRY_SECONDS", 0.02)
    python = sys.executable
    one = pool("end_process")
    monkeypatch.setattr(sys, "executable", "/nowhere")

    run(one, "kill")
    poll(one.failure, "the failure")
    threading.Event().wait(0.1)
    monkeypatch.setattr(sys, "executable", python)

    assert result_of(run(one, 1)) == 1
    assert one.failure() is None
    assert [record.message for record in caplog.records] == ["worker failed to start"]


def test_closing_wakes_who_waits_for_a_worker_and_ends_who_has_one(pool, tmp_path):
    one = pool("be_deaf")
    with ThreadPoolExecutor(2) as jobs:
        busy = jobs.submit(run, one, str(tmp_path / "pids"), job_id="busy")
        pids = read_pids(tmp_path / "pids")
        waiting = jobs.submit(run, one, 1, job_id="waiting")

        one.close()

        assert {busy.result(2).outcome, waiting.result(2).outcome} == {"crashed", "canceled"}
    assert not is_alive(pids[0])


def test_a_worker_passes_over_the_signals_of_a_drain_but_its_children_do_not(pool, tmp_path):
    path = tmp_path / "pids"
    one = pool("start_child")
    with ThreadPoolExecutor(1) as job:
        ending = job.submit(run, one, str(path))
        worker, _ = read_pids(path)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker, number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker, number)
        Path(f"{path}.go").touch()

        assert result_of(ending.result(10)) == -signal.SIGTERM


def serve(parent_pid):
    """Start a worker as the executor does; return its process and the connection to it."""
    here, there = socket.socketpair()
    with here, there:
        numbers = [str(there.fileno()), str(parent_pid)]
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", executors._BOOT, *numbers, str(ROOT), *sys.path],
            pass_fds=[there.fileno()],
        )
        return process, Connection(here.detach())


def test_a_worker_ends_by_itself_when_its_connection_does():
    process, connection = serve(os.getpid())
    connection.send((processing.load, "tests.analyses:echo"))
    loaded = connection.recv()
    connection.send(("job", b'{"data": 5}'))
    answer = connection.recv()

    connection.close()

    assert process.wait(10) == 0
    assert (loaded, answer) == ((), ("job", model.succeeded(5)))


def test_a_worker_that_cannot_load_the_analysis_tells_why_and_ends():
    process, connection = serve(os.getpid())
    connection.send((processing.load, "nothing_here:f"))

    [problem] = connection.recv()

    assert process.wait(10) == 0
    assert "there is no module 'nothing_here'" in problem
    connection.close()


def test_a_worker_that_starts_while_the_pool_is_closed_is_ended(pool):
    one = pool("pid")
    one._closed.set()

    one._start_worker()

    assert sorted(worker.has_ended for worker in one._alive) == [False, True]


def test_a_worker_whose_service_ended_before_it_began_ends():
    process, connection = serve(parent_pid=1)

    assert process.wait(10) == 1
    connection.close()


# The service with EXECUTOR=process


@pytest.fixture
def start_pool(start, receiver):
    """Return a function that starts the service with workers for an analysis."""

    def start_with(name, **settings):
        return start(
            EXECUTOR="process",
            WORKERS="2",
            ANALYSIS=f"tests.analyses:{name}",
            POSTBACK_URL=receiver.url,
            **settings,
        )

    return start_with


def test_job_timeout_and_cancel_kill_within_a_second_and_post_one_event(
    start_pool, receiver, tmp_path
):
    service = start_pool("be_deaf", JOB_TIMEOUT="1s")
    canceled = service.process({"data": str(tmp_path / "1")})
    timed_out = service.process({"data": str(tmp_path / "2")})
    pids = read_pids(tmp_path / "1") + read_pids(tmp_path / "2")

    service.post(f"/jobs/{canceled}/cancel")
    poll(lambda: not any(map(is_alive, pids[:2])), "the end of the canceled", timeout=1)
    service.wait_for(timed_out)
    poll(lambda: not any(map(is_alive, pids)), "the end of the timed out", timeout=1)
    service.wait_for(canceled)

    outcomes = {event["data"]["id"]: event["type"] for event in events(receiver.requests)}
    assert outcomes == {canceled: "job.canceled", timed_out: "job.timed_out"}
    assert len(receiver.requests) == 2
    poll(lambda: not service.service.runner.outlived, "the threads' end", timeout=2)


def test_a_crash_is_posted_and_its_job_is_not_run_again(start_pool, receiver):
    service = start_pool("end_process")

    crashed = [service.process({"data": way}) for way in ENDS]
    fine = [service.process({"data": number}) for number in range(20)]

    jobs = [service.wait_for(job_id) for job_id in crashed + fine]
    assert [job["outcome"] for job in jobs] == ["crashed"] * len(ENDS) + ["succeeded"] * 20
    assert {job["starts"] for job in jobs} == {1}
    assert len(receiver.requests) == len(jobs)


def test_of_a_result_a_cancel_and_a_timeout_at_one_moment_exactly_one_is_posted(
    start_pool, receiver
):
    service = start_pool("sleep", JOB_TIMEOUT="50ms", MAX_PENDING="1000")
    job_ids = [service.process({"data": 0.045 + number / 4000}) for number in range(40)]

    for job_id in job_ids:
        service.wait_for(job_id, "running", "delivering", "delivered")
        service.post(f"/jobs/{job_id}/cancel")
    jobs = [service.wait_for(job_id) for job_id in job_ids]

    posted = {event["data"]["id"]: event["data"]["outcome"] for event in events(receiver.requests)}
    assert posted == {job["id"]: job["outcome"] for job in jobs}
    assert len(receiver.requests) == len(job_ids)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_the_last_report_of_a_running_job_is_shown_and_then_no_more(start, tmp_path, kind):
    go = tmp_path / "go"
    service = start(EXECUTOR=kind, WORKERS="1", ANALYSIS="tests.analyses:report")
    job_id = service.process({"data": [[0.25, "a quarter"], str(go)]})

    progress = poll(lambda: service.job(job_id)["progress"], "a report")
    go.touch()

    assert (progress["fraction"], progress["note"]) == (0.25, "a quarter")
    assert progress["at"].endswith("Z")
    assert service.wait_for(job_id)["progress"] is None


def test_workers_die_with_a_service_that_is_killed_and_do_not_block_its_restart(
    start_process, receiver, tmp_path
):
    settings = {"EXECUTOR": "process", "WORKERS": "2", "ANALYSIS": "tests.analyses:meet"}
    service = start_process(POSTBACK_URL=receiver.url, **settings)
    paths = {"here": str(tmp_path / "here"), "there": str(tmp_path / "there")}
    job_id = service.process({"data": paths})
    [pid] = read_pids(tmp_path / "here")

    service.kill()
    poll(lambda: not is_alive(pid), "the worker's end", timeout=2)
    (tmp_path / "there").touch()
    service.start()

    assert service.wait_for(job_id)["outcome"] == "succeeded"
    assert service.job(job_id)["starts"] == 2


def test_what_a_drain_cuts_off_is_put_back_and_its_worker_is_killed(
    start_process, receiver, tmp_path
):
    settings = {"EXECUTOR": "process", "ANALYSIS": "tests.analyses:be_deaf", "DRAIN": "100ms"}
    service = start_process(POSTBACK_URL=receiver.url, **settings)
    job_id = service.process({"data": str(tmp_path / "pids")})
    pids = read_pids(tmp_path / "pids")

    code = service.end(timeout=5)

    assert code == 75, service.log()
    assert not any(map(is_alive, pids))
    assert "will_resume=1" in service.log()
    assert job_id not in [event["data"]["id"] for event in events(receiver.requests)]


def test_check_tells_of_an_analysis_that_no_worker_can_load(tmp_path):
    env = os.environ | {"EXECUTOR": "process", "ANALYSIS": "nothing_here:f"}

    done = subprocess.run(
        [sys.executable, "app.py", "--check"],
        check=False,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 78
    assert "there is no module 'nothing_here'" in done.stderr

"""Group G: the real process killed, starved, stopped and run full; what was accepted outlives it.

Kills at chosen points are in tests/acceptance/test_restarting.py, power cuts in test_power_cuts.py.
"""

import contextlib
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import requests

from jobs import model, runner
from jobs.journal import Journal
from tests.acceptance.test_stopping import run
from tests.conftest import ACT
from tests.faults.world import EXECUTORS, serves
from tests.harness import ROOT, RealProcess, act, executed, free_port, poll
from tests.receiver import Receiver
from tests.soak import kills

pytestmark = pytest.mark.slow  # together half a minute

MISBEHAVING = "tests.misbehaving:act"

UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

#: Runs a command as a user that owns nothing and runs nothing else, but may read all files.
AS_NOBODY = [
    *("setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"),
    *("--inh-caps", "+dac_override", "--ambient-caps", "+dac_override"),
]


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_g09_no_kill_under_load_loses_or_invents_a_job():
    ledger = kills.soak(0, seed=9, kills=8)

    assert ledger.violation == ""
    assert ledger.counts["kills"] == 8
    assert ledger.counts["worker_kills"] > 0
    assert len(ledger.promised) > 200
    assert set(ledger.promised) <= ledger.delivered


# Signals


def test_g12_sigquit_ends_it_as_it_ends_any_process(start_process):
    service = start_process()
    resource.prlimit(service.pid, resource.RLIMIT_CORE, (0, 0))

    assert service.end(signal.SIGQUIT) == -signal.SIGQUIT


@EXECUTORS
def test_g13_a_stopped_process_goes_on_where_it_was(start_process, receiver, gate, executor):
    receiver.answers = [503]
    settings = {**executed(executor, workers=1), "POSTBACK_SCHEDULE": "300ms"}
    service = start_process(**settings, POSTBACK_URL=receiver.url, MAX_RUNNING="1")
    sent = [service.send(gate.data) for _ in range(2)]
    gate.wait_for(1)
    pids = [service.pid, *service.workers()]

    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        threading.Event().wait(0.5)
    gate.open()

    jobs = service.wait_for_all(sent)
    assert [(job["state"], job["starts"]) for job in jobs] == [("delivered", 1)] * 2
    assert len(receiver.requests) == 3  # the first was refused once


def test_g13_what_ended_while_the_service_was_stopped_is_no_time_out(start_process, gate):
    service = start_process(JOB_TIMEOUT="4s", MAX_RUNNING="200")
    sent = [service.send(gate.data) for _ in range(200)]
    gate.wait_for(200)

    os.kill(service.pid, signal.SIGSTOP)
    gate.open()
    threading.Event().wait(5)
    os.kill(service.pid, signal.SIGCONT)

    assert {job["outcome"] for job in service.wait_for_all(sent)} == {"succeeded"}


# A full disk


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of one MiB, with nothing else on it."""
    directory = tempfile.mkdtemp()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "postback", directory]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("run as root to mount a small disk")
    yield Path(directory)
    subprocess.run(["umount", "--lazy", directory], check=True)
    Path(directory).rmdir()


@pytest.fixture
def on_small_disk(start_process, small_disk, receiver):
    """Return a function that starts the service with its journal on the small disk."""
    settings = {"JOURNAL": str(small_disk / "journal.db"), "ANALYSIS": MISBEHAVING}
    return lambda **more: start_process(**{**settings, "POSTBACK_URL": receiver.url, **more})


def fill(disk: Path) -> Path:
    """Take all space that is left; return the file to remove."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    return filler


def until_refused(service: RealProcess) -> tuple[list[str], requests.Response]:
    """Send large payloads until one is refused; return the accepted ids and the refusal."""
    job_ids = []
    while (answer := service.post("/process", json={"data": "x" * 20_000})).status_code == 200:
        job_ids.append(answer.json()["id"])
    return job_ids, answer


def test_g14_a_full_disk_is_503_until_there_is_space(on_small_disk, small_disk):
    service = on_small_disk()
    before = service.send(0)
    service.wait_for(before)
    filler = fill(small_disk)

    accepted, refusal = until_refused(service)
    unready = service.get("/readyz").status_code
    filler.unlink()
    poll(lambda: service.get("/readyz").status_code == 200, "ready again")

    assert (refusal.status_code, "Retry-After" in refusal.headers, unready) == (503, True, 503)
    jobs = service.wait_for_all([before, *accepted, service.send(1)])
    assert {job["state"] for job in jobs} == {"delivered"}


def test_g14_a_result_that_finds_no_space_is_kept(on_small_disk, small_disk, receiver, gate):
    service = on_small_disk()
    job_id = service.send(act("grow", [gate.data["with"], 60_000]))
    gate.wait_for(1)
    filler = fill(small_disk)

    gate.open()
    service.wait_for_log("journal failed")
    filler.unlink()

    job = service.wait_for(job_id)
    assert (job["state"], job["outcome"], job["starts"]) == ("delivered", "succeeded", 1)
    assert len(receiver.requests) == 1


def test_g14_a_delivery_that_finds_no_space_is_not_made_again(on_small_disk, small_disk):
    fillers = []

    def answer_on_a_full_disk(conn: socket.socket, request: object) -> int:
        fillers.append(fill(small_disk))
        return 204

    with Receiver(default=answer_on_a_full_disk) as receiver:
        service = on_small_disk(POSTBACK_URL=receiver.url)
        # The write-ahead log ends within a page: what is stored next needs a new one.
        job_id = service.send("x" * 100_000)
        service.wait_for_log("journal failed")
        fillers[0].unlink()
        job = service.wait_for(job_id)

    assert (job["state"], len(job["attempts"])) == ("delivered", 1)
    assert len(receiver.requests) == 1


def test_g14_a_start_on_a_full_disk_is_refused_with_the_reason(on_small_disk, small_disk, gate):
    service = on_small_disk()
    job_id = service.send(gate.data)
    gate.wait_for(1)
    service.kill()
    filler = fill(small_disk)

    for name in ("journal.db", "new.db"):
        said = refused_start(small_disk / name, 74)  # so that it is started again
        assert "full" in said or "No space left" in said
    filler.unlink()
    gate.open()
    service.start()

    assert "Traceback" not in said
    assert service.wait_for(job_id)["outcome"] == "succeeded"


# A journal that cannot be used


def refused_start(path: Path, code: int = 78) -> str:
    """Return what a start on this journal says when it is refused."""
    done = run(JOURNAL=str(path))
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    return done.stderr.rstrip()


def write(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as plain:
        plain.executescript(script)


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 4096)


def replace_by_another_database(path: Path) -> None:
    path.unlink()
    write(path, "CREATE TABLE notes (text TEXT)")


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        pytest.param(replace_by_directory, "cannot be opened", id="G15 a directory"),
        pytest.param(lambda path: path.write_text("x" * 999), "not a database", id="G16 text"),
        pytest.param(replace_by_another_database, "another program", id="G16 another database"),
        pytest.param(damage, "is damaged", id="G16 a damaged page"),
        pytest.param(
            lambda path: write(path, "PRAGMA user_version = 99"),
            "another version",
            id="G16 a newer schema",
        ),
        pytest.param(lambda path: os.truncate(path, 0), "is gone", id="G16 emptied"),
        pytest.param(
            lambda path: write(path, "PRAGMA user_version = 2"),
            "another version",
            id="G30 version 1",
        ),
    ],
)
def test_an_unusable_journal_is_refused_in_one_line_and_left_as_it_is(tmp_path, harm, reason):
    path = tmp_path / "journal.db"
    journal = Journal(path, on_lost=lambda: None)
    journal.open()
    journal.close()
    harm(path)
    before = path.is_file() and path.read_bytes()

    said = refused_start(path)

    assert said.startswith(f"JOURNAL={str(path)!r}: ")
    assert reason in said
    assert "\n" not in said
    assert (path.is_file() and path.read_bytes()) == before


# Starvation, the clock, a container


def test_g21_a_thread_that_cannot_start_leaves_its_job_for_later(start_process):
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("run as root, with setpriv: a limit of threads does not hold for root")
    code = f"import os; os.execvp('setpriv', {[*AS_NOBODY, sys.executable, 'app.py']})"
    service = start_process(command=("-c", code))
    limit_threads = [*AS_NOBODY, "prlimit", "--pid", str(service.workers()[0])]

    subprocess.run([*limit_threads, "--nproc=1:"], check=True)
    job_id = service.send(1)
    service.wait_for_log("analysis to run again")
    subprocess.run([*limit_threads, "--nproc=1000:"], check=True)

    assert service.wait_for(job_id)["outcome"] == "succeeded"
    assert service.end() == 0


def test_g22_with_64_descriptors_it_answers_through_a_crowd_and_delivers(start_process, receiver):
    few = "import app, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); app.main([])"
    service = start_process(command=("-c", few), POSTBACK_URL=receiver.url, MAX_RUNNING="4")

    crowd(service, 100).close()

    jobs = service.wait_for_all([service.send(number) for number in range(1, 21)])
    assert {job["state"] for job in jobs} == {"delivered"}


def test_g22_without_a_free_descriptor_it_does_not_spin_and_recovers(start_process, receiver):
    service = start_process(POSTBACK_URL=receiver.url)
    service.wait_for(service.send(1))
    used = len(list(Path(f"/proc/{service.pid}/fd").iterdir()))
    limits = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (used, limits[1]))

    with crowd(service, 20):
        service.wait_for_log("connection not accepted")
        before = processor_seconds(service.pid)
        threading.Event().wait(1)
        spent = processor_seconds(service.pid) - before
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, limits)

    assert spent < 0.3
    assert service.wait_for(service.send(2))["state"] == "delivered"
    assert service.end() == 0


def crowd(service: RealProcess, size: int) -> contextlib.ExitStack:
    """Return as many connections, to be closed."""
    address = ("127.0.0.1", int(service.base_url.rpartition(":")[2]))
    stack = contextlib.ExitStack()
    for _ in range(size):
        stack.enter_context(socket.create_connection(address, timeout=5))
    return stack


def processor_seconds(pid: int) -> float:
    """Return how long a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def limit_memory(pid: int, more_bytes: int) -> None:
    """Let a process have no more memory than it has now, and a little."""
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size + more_bytes, resource.RLIM_INFINITY))


def test_g23_an_analysis_that_finds_no_memory_has_failed_and_its_worker_goes_on(start_process):
    service = start_process()
    limit_memory(service.workers()[0], 2**28)

    starved, fine = service.wait_for_all([service.send(act("large", n)) for n in (2**30, 10)])

    assert (starved["outcome"], starved["error"]["type"]) == ("failed", "MemoryError")
    assert fine["result"] == "x" * 10


def test_g23_i10_results_that_find_no_memory_have_failed_and_free_their_places(start_process):
    service = start_process(MAX_RUNNING="4")
    limit_memory(service.pid, 2**26)

    starved = service.wait_for_all([service.send(act("large", 60_000_000)) for _ in range(4)])
    resource.prlimit(service.pid, resource.RLIMIT_AS, UNLIMITED)
    fine = service.wait_for_all([service.send(act("large", 5_000_000)) for _ in range(4)])

    assert {(job["state"], job["outcome"]) for job in starved} == {("delivered", "failed")}
    assert {job["outcome"] for job in fine} == {"succeeded"}


@pytest.mark.parametrize("hours", [-24, -1, 1, 24])
def test_g25_g26_a_clock_that_jumps_burns_and_delays_nothing(start, receiver, monkeypatch, hours):
    monkeypatch.setattr(runner, "PRUNE_SECONDS", 0.05)
    receiver.default = 503
    service = start(**{**ACT, "POSTBACK_SCHEDULE": "2h 2h", "POSTBACK_URL": receiver.url})
    job_id = service.send(1)
    poll(lambda: service.job(job_id)["next_attempt_at"], "a wait")

    def clock() -> datetime:
        return model.utc_now() + timedelta(hours=hours)

    monkeypatch.setattr(service.service.runner, "_clock", clock)

    made = 2 if hours > 2 else 1
    receiver.wait_for(made)
    poll(
        lambda: is_due_in_time(service.journal.detail(job_id)[0], clock()), "an attempt due in time"
    )
    assert service.job(job_id)["attempts_made"] == len(receiver.requests) == made


def is_due_in_time(job: model.Job, now: datetime) -> bool:
    """Return whether the next attempt waits, and not much longer than the schedule says."""
    due_at = job.next_attempt_at
    return due_at is not None and now < due_at <= now + timedelta(hours=2.5)


@pytest.mark.skipif(not shutil.which("unshare"), reason="apt install util-linux")
def test_g29_as_process_1_without_an_environment_it_serves_and_stops_in_order(tmp_path):
    new_space = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*new_space, "true"], check=False, capture_output=True).returncode:
        pytest.skip("run as root to make a namespace of processes")
    port = free_port()
    env = {"PORT": str(port), "JOURNAL": str(tmp_path / "journal.db")}
    command = [*new_space, sys.executable, "app.py"]

    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as outer:
        poll(lambda: serves(f"http://127.0.0.1:{port}"), "the service")
        inner = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0]
        status = Path(f"/proc/{inner}/status").read_text()
        os.kill(int(inner), signal.SIGTERM)
        log = outer.stderr.read()

    (pids,) = [line for line in status.splitlines() if line.startswith("NSpid:")]
    assert pids.split()[-1] == "1"
    assert "drain ended" in log
    assert outer.returncode == 0

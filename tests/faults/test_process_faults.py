"""The real process killed, starved, stopped and run full; what was accepted outlives it all.

The cases G01 to G30 are those of docs/reliability.md, which also names the tests of those that are
not here.
"""

import contextlib
import json
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
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
import requests

from jobs import attempts, model
from postback import Sender
from tests.harness import ROOT, RealProcess, events, poll
from tests.launcher import KILLED
from tests.receiver import Receiver, hang
from tests.soak import kills
from tests.test_runner import Clock, accept, journal_at, runner_of
from web.outbound import Policy

pytestmark = pytest.mark.service

#: The analysis that reads the file it is given, or waits for the fifo; `poison` ends the process.
READ = "tests.launcher:read"
ECHO = "tests.analyses:echo"
LAUNCH = ("-m", "tests.faults.launch")

#: A user that owns nothing and runs nothing else.
NOBODY = 54321


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture
def fine(tmp_path: Path) -> str:
    path = tmp_path / "fine"
    path.write_text("fine")
    return str(path)


def becomes(path: Path, text: str) -> None:
    """Put a file in the place of a fifo: who reads it no longer waits."""
    path.unlink()
    path.write_text(text)


def refusal(path: Path, **env: str) -> str:
    """Return the one line with which a start on this journal is refused."""
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=ROOT,
        env={**os.environ, "JOURNAL": str(path), **env},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 78, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def processor_seconds(pid: int) -> float:
    """Return how long a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Random kills


@pytest.mark.soak
@pytest.mark.timeout(60)
def test_g09_no_kill_under_load_loses_or_invents_a_job():
    ledger = kills.soak(0, seed=9, kills=8)

    assert ledger.violation == ""
    assert ledger.counts["kills"] == 8
    assert len(ledger.promised) > 500
    assert set(ledger.promised) <= ledger.delivered


@pytest.mark.parametrize(
    ("number", "body", "violation"),
    [
        (1, {"id": "a", "outcome": "succeeded", "result": 2}, "a was never sent"),
        (1, {"id": "b", "outcome": "succeeded", "result": 1}, "a came with the event of b"),
        (1, {"id": "a", "outcome": "failed", "result": None}, "a ended as failed"),
    ],
)
def test_g09_the_ledger_sees_a_broken_promise(number, body, violation):
    ledger = kills.Ledger(sent={number})
    ledger.promise("a", number)

    ledger.receive("a", json.dumps({"data": body}).encode(), answer=200)

    assert ledger.violation == violation


@pytest.mark.parametrize("second", [b'{"data": {"id": "a", "outcome": "crashed"}, "x": 1}'])
def test_g09_the_ledger_sees_bytes_that_changed(second):
    ledger = kills.Ledger()
    ledger.receive("a", b'{"data": {"id": "a", "outcome": "crashed"}}', answer=500)

    ledger.receive("a", second, answer=200)

    assert ledger.violation == "a changed"


@pytest.mark.soak
@pytest.mark.timeout(60)
def test_g08_twenty_kills_while_it_resumes_use_up_no_start(start_process, fifo):
    service = start_process(ANALYSIS=READ)
    job_id = service.process({"data": str(fifo)})
    service.wait_for(job_id, "running")
    service.kill()
    command = [sys.executable, "-m", "tests.launcher"]
    env = os.environ | {"KILL_AT": "Journal.resume:after"}

    codes = [subprocess.run(command, cwd=ROOT, env=env, check=False).returncode for _ in range(20)]
    becomes(fifo, "done")
    service.start()

    assert codes == [KILLED] * 20
    assert service.wait_for(job_id)["starts"] == 2


# Poison


def test_g24_a_job_that_ends_the_process_is_found_and_99_neighbours_are_delivered(
    start_process, receiver, fifo, fine, tmp_path
):
    os.mkfifo(tmp_path / "beside")
    service = start_process(ANALYSIS=READ, MAX_RUNNING="2", POSTBACK_URL=receiver.url)
    beside, poison = (service.process({"data": str(path)}) for path in (tmp_path / "beside", fifo))
    service.wait_for(poison, "running")
    behind = [service.process({"data": fine}) for _ in range(98)]

    fifo.write_text("poison")
    codes = [service.wait()]
    becomes(fifo, "poison")
    becomes(tmp_path / "beside", "fine")
    codes += restart_until_ended(service, poison)

    jobs = {job_id: service.wait_for(job_id) for job_id in (beside, poison, *behind)}
    assert codes == [KILLED] * 3
    assert jobs.pop(poison)["outcome"] == "crashed"
    assert {(job["state"], job["outcome"]) for job in jobs.values()} == {("delivered", "succeeded")}
    posted = {event["data"]["id"]: event["type"] for event in events(receiver.wait_for(100))}
    assert posted[poison] == "job.crashed"


def restart_until_ended(service: RealProcess, job_id: str) -> list[int]:
    """Start the service again whenever it ends, until the job has; return its exit codes."""
    codes: list[int] = []
    while True:
        try:
            service.start()
            service.wait_for(job_id)
            return codes
        except (AssertionError, requests.RequestException):
            codes.append(service.wait())


def test_g24_planned_restarts_never_count_against_a_job(start_process, receiver, fifo):
    service = start_process(ANALYSIS=READ, POSTBACK_URL=receiver.url, DRAIN="50ms")
    job_id = service.process({"data": str(fifo)})
    codes = []

    for _ in range(model.MAX_STARTS + 1):
        service.wait_for(job_id, "running")
        codes.append(service.end())
        service.start()
    becomes(fifo, "done")

    service.wait_for(job_id, "running", "delivered")
    assert codes == [75] * (model.MAX_STARTS + 1)
    assert service.job(job_id)["starts"] == 1


# Signals


def test_g12_sigquit_ends_it_as_it_ends_any_process(start_process):
    service = start_process()
    resource.prlimit(service.pid, resource.RLIMIT_CORE, (0, 0))

    assert service.end(signal.SIGQUIT) == -signal.SIGQUIT


@pytest.mark.parametrize(
    "seconds", [1, pytest.param(60, marks=[pytest.mark.soak, pytest.mark.timeout(120)])]
)
def test_g13_a_stopped_process_goes_on_where_it_was(start_process, receiver, fifo, seconds):
    receiver.answers = [503]
    service = start_process(
        ANALYSIS=READ, POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="300ms", MAX_RUNNING="1"
    )
    running, waiting = (service.process({"data": str(fifo)}) for _ in range(2))
    service.wait_for(running, "running")

    service.process_.send_signal(signal.SIGSTOP)
    threading.Event().wait(seconds)
    service.process_.send_signal(signal.SIGCONT)
    fifo.write_text("done")
    service.wait_for(running)
    fifo.write_text("done")

    jobs = [service.wait_for(job_id) for job_id in (running, waiting)]
    assert [(job["state"], job["starts"]) for job in jobs] == [("delivered", 1)] * 2
    assert len(receiver.requests) == 3  # the first was refused once


# A full disk


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of one MiB, with nothing else on it."""
    directory = Path(tempfile.mkdtemp())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "postback", str(directory)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        directory.rmdir()
        pytest.skip("run as root to mount a small disk")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
    directory.rmdir()


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


def test_g14_a_full_disk_is_503_and_red_until_there_is_space(start_process, receiver, small_disk):
    journal = str(small_disk / "journal.db")
    service = start_process(JOURNAL=journal, ANALYSIS=ECHO, POSTBACK_URL=receiver.url)
    before = service.process({"data": 0})
    service.wait_for(before)
    filler = fill(small_disk)

    accepted, refusal = until_refused(service)
    seen = {service.get("/readyz").status_code for _ in pauses(2.5)}
    log = service.log()
    filler.unlink()
    poll(lambda: service.get("/readyz").status_code == 200, "ready again")
    after = service.process({"data": 1})

    assert (refusal.status_code, "Retry-After" in refusal.headers) == (503, True)
    assert seen == {503}  # it does not take turns
    assert log.count("journal failed") == 1
    delivered = [service.wait_for(job_id)["state"] for job_id in (before, *accepted, after)]
    assert set(delivered) == {"delivered"}


def pauses(seconds: float) -> Iterator[None]:
    """Yield now and then, for so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        threading.Event().wait(0.1)


def test_g14_a_result_that_finds_no_space_is_kept_until_there_is(
    start_process, receiver, small_disk, fifo, tmp_path
):
    journal = str(small_disk / "journal.db")
    service = start_process(JOURNAL=journal, ANALYSIS=READ, POSTBACK_URL=receiver.url)
    job_id = service.process({"data": str(fifo)})
    service.wait_for(job_id, "running")
    filler = fill(small_disk)

    fifo.write_text("x" * 60_000)
    service.wait_for_log("journal failed")
    filler.unlink()

    job = service.wait_for(job_id)
    assert (job["state"], job["starts"]) == ("delivered", 1)
    assert len(receiver.requests) == 1


def test_g14_a_delivery_that_finds_no_space_is_stored_later_and_not_made_again(
    start_process, small_disk
):
    fillers = []
    journal = str(small_disk / "journal.db")

    def answer_on_a_full_disk(conn: socket.socket, request: object) -> int:
        fillers.append(fill(small_disk))
        return 204

    with Receiver(default=answer_on_a_full_disk) as receiver:
        service = start_process(JOURNAL=journal, ANALYSIS=ECHO, POSTBACK_URL=receiver.url)
        # The write-ahead log ends within a page: what is stored next needs a new one.
        job_id = service.process({"data": "x" * 100_000})
        service.wait_for_log("journal failed")
        fillers[0].unlink()
        job = service.wait_for(job_id)

    assert (job["state"], len(job["attempts"])) == ("delivered", 1)
    assert len(receiver.requests) == 1


def test_g14_a_start_that_must_write_on_a_full_disk_is_refused_with_the_reason(
    start_process, receiver, small_disk
):
    path = small_disk / "journal.db"
    with journal_at(path) as journal:
        suspect = accept(journal)
        journal.claim(now=model.utc_now())
        for _ in range(model.MAX_STARTS - 1):
            journal.begin_again(suspect, now=model.utc_now())
    filler = fill(small_disk)

    line = refusal(path)
    filler.unlink()
    service = start_process(JOURNAL=str(path), POSTBACK_URL=receiver.url)

    assert "full" in line or "No space left" in line
    assert service.wait_for(suspect)["outcome"] == "crashed"


def test_g14_a_limit_of_the_file_size_is_survived_like_a_full_disk(start_process, receiver):
    service = start_process(ANALYSIS=ECHO, POSTBACK_URL=receiver.url)
    before = service.process({"data": 0})
    service.wait_for(before)
    resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))

    accepted, refusal = until_refused(service)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(service.pid, resource.RLIMIT_FSIZE, unlimited)
    after = service.process({"data": 1})

    assert refusal.status_code == 503
    delivered = [service.wait_for(job_id)["state"] for job_id in (before, *accepted, after)]
    assert set(delivered) == {"delivered"}


# A journal that cannot be used


def new(path: Path) -> None:
    """Leave the journal of a service that stopped in order."""
    with journal_at(path) as journal:
        for number in range(50):
            accept(journal, number)


def not_a_database(path: Path) -> None:
    path.write_text("minutes of the meeting\n" * 100)


def damaged(path: Path) -> None:
    new(path)
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 4096)


def newer(path: Path) -> None:
    new(path)
    with closing(sqlite3.connect(path)) as plain:
        plain.execute("PRAGMA user_version = 99")


def emptied(path: Path) -> None:
    new(path)
    os.truncate(path, 0)


def directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        pytest.param(directory, "cannot be opened", id="G15 a directory"),
        pytest.param(not_a_database, "not a database", id="G16 not a database"),
        pytest.param(damaged, "is damaged", id="G16 a damaged page"),
        pytest.param(newer, "newer version", id="G16 a newer schema"),
        pytest.param(emptied, "is empty, and was not", id="G16 emptied"),
    ],
)
def test_a_journal_that_cannot_be_used_is_refused_in_one_line(tmp_path, act, reason):
    path = tmp_path / "journal.db"
    act(path)

    line = refusal(path)

    assert line.startswith(f"JOURNAL={str(path)!r}: ")
    assert reason in line


def test_g15_a_missing_directory_is_refused(tmp_path):
    assert "cannot be opened" in refusal(tmp_path / "nowhere" / "journal.db")


def test_g17_a_journal_that_is_replaced_ends_it_and_nothing_more_is_accepted(
    start_process, tmp_path
):
    service = start_process()
    path = tmp_path / "journal.db"
    path.rename(tmp_path / "moved.db")
    shutil.copy(tmp_path / "moved.db", path)

    with pytest.raises((AssertionError, requests.RequestException)):
        service.process({"data": 1})

    assert service.wait(timeout=5) == 74


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("journal_*.sql")), ids=str)
def test_g30_jobs_pending_in_a_journal_of_each_version_are_delivered(
    start_process, receiver, tmp_path, path
):
    with closing(sqlite3.connect(tmp_path / "journal.db")) as old:
        old.executescript(path.read_text(encoding="utf-8"))
    service = start_process(ANALYSIS=ECHO, POSTBACK_URL=receiver.url)

    key = {"Idempotency-Key": "one"}
    new = {service.process({"data": 1}, headers=key) for _ in range(2)}
    jobs = [service.wait_for(job["id"]) for job in service.get("/jobs").json()["jobs"]]

    assert len(new) == 1
    assert [job["state"] for job in jobs] == ["delivered"] * 4
    assert {event["data"]["id"] for event in events(receiver.requests)} == {
        job["id"] for job in jobs
    }


# Starvation


def test_g21_a_thread_that_cannot_start_leaves_its_job_to_be_run_later():
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("run as root, with setpriv, to run the service as another user")
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, NOBODY, NOBODY)
        env = {"PORT": "0", "JOURNAL": f"{directory}/journal.db", "RUN_AS": str(NOBODY)}
        service = RealProcess(env | {"THREADS": "toggle"}, command=LAUNCH)

        service.process_.send_signal(signal.SIGUSR2)
        job_id = service.process({"data": 1})
        service.wait_for_log("thread failed to start")
        service.process_.send_signal(signal.SIGUSR2)

        assert service.wait_for(job_id)["state"] == "delivered"
        assert service.end() == 0


def test_g22_with_64_descriptors_it_answers_through_a_crowd_and_delivers(start_process, receiver):
    service = start_process(
        command=LAUNCH, NOFILE="64", ANALYSIS=ECHO, POSTBACK_URL=receiver.url, MAX_RUNNING="4"
    )
    address = ("127.0.0.1", int(service.base_url.rpartition(":")[2]))

    with contextlib.ExitStack() as crowd:
        for _ in range(100):
            crowd.enter_context(socket.create_connection(address, timeout=5))
    alive = service.get("/livez").status_code
    jobs = [service.wait_for(service.process({"data": number})) for number in range(20)]

    assert alive == 200
    assert {job["state"] for job in jobs} == {"delivered"}


def test_g22_without_a_free_descriptor_it_does_not_spin_and_recovers(start_process, receiver):
    service = start_process(
        ANALYSIS=ECHO, POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE=" ".join(["200ms"] * 50)
    )
    job_id = service.process({"data": 1})
    service.wait_for(job_id)
    limits = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    used = len(list(Path(f"/proc/{service.pid}/fd").iterdir()))
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
    address = ("127.0.0.1", int(service.base_url.rpartition(":")[2]))

    with contextlib.ExitStack() as crowd:
        for _ in range(20):
            crowd.enter_context(socket.create_connection(address, timeout=5))
        before = processor_seconds(service.pid)
        threading.Event().wait(1)
        spent = processor_seconds(service.pid) - before
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, limits)

    assert spent < 0.3
    assert service.get("/livez").status_code == 200
    assert service.wait_for(service.process({"data": 2}))["state"] == "delivered"
    assert service.log().count("connection not accepted") == 1
    assert service.end() == 0


def test_g23_an_analysis_that_finds_no_memory_has_failed_and_the_service_goes_on(
    start_process, receiver
):
    service = start_process(ANALYSIS="tests.analyses:large", POSTBACK_URL=receiver.url)
    size = int(Path(f"/proc/{service.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(service.pid, resource.RLIMIT_AS, (size + 2**28, resource.RLIM_INFINITY))

    starved = service.wait_for(service.process({"data": 2**30}))
    fine = service.wait_for(service.process({"data": 10}))

    assert (starved["outcome"], starved["error"]["type"]) == ("failed", "MemoryError")
    assert fine["result"] == "x" * 10


# The clock


@pytest.mark.parametrize("hours", [-24, -1, 1, 24])
def test_g25_g26_a_clock_that_jumps_neither_burns_attempts_nor_puts_them_off(
    monkeypatch, tmp_path, hours
):
    monkeypatch.setattr(attempts, "ROUND_SECONDS", 0.02)
    clock = Clock()
    with Receiver(default=503) as receiver, journal_at(tmp_path / "journal.db") as journal:
        sender = Sender(
            url=receiver.url,
            policy=Policy.of(""),
            secrets=(),
            headers={},
            timeout_seconds=5,
            schedule=(7200.0, 7200.0),
            clock=clock,
        )
        one = runner_of(journal, postbox=sender, clock=clock)
        one.start()
        job_id = accept(one)
        before = poll(lambda: journal.job(job_id).next_attempt_at, "the second attempt")

        clock.now += timedelta(hours=hours)
        made = 2 if before <= clock.now else 1
        receiver.wait_for(made)
        longest = timedelta(seconds=sender.longest_wait_seconds)
        job = poll(lambda: is_due_within(journal.job(job_id), clock, longest), "an early attempt")
        one.drain(1)
        sender.close()

    assert job.attempts == len(receiver.requests) == made


def is_due_within(job: model.Job, clock: Clock, longest: timedelta) -> model.Job | None:
    """Return the job if its next attempt waits, and not longer than any schedule allows."""
    due_at = job.next_attempt_at
    return job if due_at and clock.now < due_at <= clock.now + longest else None


# A container


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare makes a process 1")
def test_g29_as_process_1_without_an_environment_it_serves_and_stops_in_order(tmp_path):
    probe = subprocess.run(["unshare", "--pid", "--fork", "true"], check=False, capture_output=True)
    if probe.returncode:
        pytest.skip("run as root to make a namespace of processes")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    env = {"PORT": str(port), "JOURNAL": str(tmp_path / "journal.db")}
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "app.py"]

    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as outer:
        url = f"http://127.0.0.1:{port}"
        poll(lambda: serves(url), "the service")
        inner = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0]
        status = Path(f"/proc/{inner}/status").read_text()
        os.kill(int(inner), signal.SIGTERM)
        log = outer.stderr.read()

    assert any(
        line.startswith("NSpid:") and line.split()[-1] == "1" for line in status.splitlines()
    )
    assert "drain ended" in log
    assert outer.returncode == 0


def serves(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/livez", timeout=5).status_code == 200
    return False


# Resume


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_h07_a_hundred_thousand_pending_jobs_are_taken_up_at_once(start_process, tmp_path):
    pending = 100_000
    with journal_at(tmp_path / "journal.db") as journal:
        first = accept(journal)
        journal._storage._connection.executescript(f"""
            BEGIN;
            WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < {pending})
            INSERT INTO jobs (id, state, receiver, created_at)
            SELECT printf('%032x', i), 'accepted', '', '2026-01-02T03:04:05.678Z' FROM n;
            INSERT INTO payloads (seq, body)
            SELECT seq, CAST('{{"data": 1}}' AS BLOB) FROM jobs WHERE seq > 1;
            COMMIT;
        """)

    with Receiver(default=hang) as receiver:
        began = time.monotonic()
        service = start_process(ANALYSIS=ECHO, POSTBACK_URL=receiver.url)
        alive = service.get("/livez").status_code
        seconds = time.monotonic() - began
        threads = len(list(Path(f"/proc/{service.pid}/task").iterdir()))
        oldest = service.wait_for(first, "running", "delivering")
        service.kill()

    print(f"ready after {seconds:.2f} s, {threads} threads")  # noqa: T201 - with pytest -s
    assert alive == 200
    assert seconds < 2
    assert threads < 150
    assert oldest["starts"] == 1

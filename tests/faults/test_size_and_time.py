"""Group E: slow callers, many callers, long jobs, full and old journals."""

import contextlib
import json
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import wire
from tests.harness import events, poll

ECHO = {"ANALYSIS": "tests.analyses:echo"}

#: What a caller may leave half done, and how long the service waits for the rest.
SILENT = {
    "A14 half a body": wire.post(length=100),
    "A14 half a header": b"POST /process HTTP/1.1\r\nHost: x\r\n",
    "A14 half a chunk": wire.chunked(end=b"b\r\n{"),
    "A04 no chunk size": wire.chunked(b'{"data": 1}', end=b"\r\n\r\n"),
    "A18 bare LF": wire.post().replace(b"\r\n", b"\n"),
    "E02 nothing": b"",
}


@contextlib.contextmanager
def connections(service, count: int, sent: bytes):
    """Hold so many connections, on each of which these bytes were sent."""
    with contextlib.ExitStack() as held:
        for _ in range(count):
            conn = held.enter_context(wire.open_socket(service, timeout=10))
            conn.sendall(sent)
        yield


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


# Slow callers


@pytest.fixture(scope="module")
def patient(shared):
    """The service, when silent connections are as old as they get; what was sent on each."""
    with contextlib.ExitStack() as held:
        answers: list[int] = []
        slow = threading.Thread(target=upload, args=(shared, answers), daemon=True)
        slow.start()
        silent = {}
        for number, sent in SILENT.items():
            silent[number] = held.enter_context(wire.open_socket(shared, timeout=40))
            silent[number].sendall(sent)
        silent["E03 reads nothing"] = held.enter_context(unread(shared))
        yield shared, silent
        slow.join(60)
        assert answers == [200]


def upload(service, answers: list[int]) -> None:
    """Send a valid payload for 30 s: a byte each second, and what is left at the end."""
    sent = wire.post()
    with wire.connected(service) as (conn, stream):
        conn.settimeout(60)
        for n in range(30):
            conn.sendall(sent[n : n + 1])
            threading.Event().wait(1)
        conn.sendall(sent[30:])
        answers.append(wire.answer(stream)[0])


@contextlib.contextmanager
def unread(service):
    """Ask for more answers than any buffer between the two takes, and read none."""
    with wire.open_socket(service, timeout=40) as conn:
        conn.settimeout(0)
        with contextlib.suppress(BlockingIOError, OSError):
            for _ in range(100_000):
                conn.send(wire.get("/jobs?limit=1000") * 10)
        conn.settimeout(40)
        yield conn


@pytest.mark.soak
@pytest.mark.timeout(90)
@pytest.mark.parametrize("number", [*SILENT, "E03 reads nothing"])
def test_a_connection_that_stays_silent_is_closed_and_leaves_no_row(patient, number):
    service, silent = patient

    ended = b"rest"
    with contextlib.suppress(ConnectionResetError):
        while ended:
            ended = silent[number].recv(65536)

    assert len(service.get("/jobs").json()["jobs"]) <= 1  # that of the slow upload
    assert wire.status_code(service, wire.get()) == 200


@pytest.mark.soak
@pytest.mark.timeout(90)
def test_e01_a_slow_upload_is_accepted_and_others_wait_for_nothing(patient):
    service, _ = patient

    took = sorted(wire.seconds(service, wire.get()) for _ in range(100))

    assert took[98] < 0.05


@pytest.mark.soak
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("count", "sent"),
    [
        pytest.param(200, b"", id="E02 200"),
        pytest.param(1000, b"", id="E02 1,000"),
        pytest.param(4000, b"", id="E02 4,000"),
    ],
)
def test_idle_connections_stop_nobody(start_process, receiver, count, sent):
    service = start_process(**ECHO, POSTBACK_URL=receiver.url)

    with connections(service, count, sent):
        poll(lambda: descriptors(service.pid) > count, "all are accepted", 30)
        job = service.wait_for(service.process({"data": 1}))

    assert job["state"] == "delivered"
    assert service.get("/livez").status_code == 200


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_2000_half_sent_requests_do_not_slow_down_the_others(start_process, receiver):
    service = start_process(**ECHO, POSTBACK_URL=receiver.url, LOG_LEVEL="warning")
    usual = percentiles(service)

    with (
        connections(service, 1000, SILENT["A14 half a header"]),
        connections(service, 1000, SILENT["A14 half a body"]),
    ):
        poll(lambda: descriptors(service.pid) > 2000, "all are accepted", 30)
        crowded = percentiles(service)

    sys.stdout.write(f"usual {usual}, with 2,000 half-sent requests {crowded} (p50, p99; ms)\n")
    assert crowded[0] < 2 * usual[0]
    assert crowded[1] < 2 * usual[1] + 2  # the clock of a shared machine is that rough


def percentiles(service) -> tuple[float, float]:
    """Return the p50 and the p99 of a 200, in ms: the best of three rounds."""
    service.process({"data": 0})
    rounds = [sorted(milliseconds(service) for _ in range(300)) for _ in range(3)]
    return min(one[150] for one in rounds), min(one[297] for one in rounds)


def milliseconds(service) -> float:
    began = time.perf_counter()
    service.process({"data": 1})
    return (time.perf_counter() - began) * 1000


# Jobs


@pytest.mark.parametrize("seconds", [0, 0.001, 600])
def test_e04_the_200_does_not_wait_for_the_analysis(start, monkeypatch, seconds):
    service = start(ANALYSIS="tests.analyses:sleep", POSTBACK_SCHEDULE="none", DRAIN="100ms")

    took = wire.seconds(service, wire.post(json.dumps({"data": seconds or 0.0}).encode()))

    assert took < 0.5


def test_e06_a_burst_over_the_limit_is_refused_and_after_it_all_is_well(start, receiver, gate):
    service = start(
        ANALYSIS="tests.analyses:wait", POSTBACK_URL=receiver.url, MAX_RUNNING="1", MAX_PENDING="5"
    )
    service.process({"data": "first"})
    gate.wait_for(1)

    answers = [service.post("/process", json={"data": n}) for n in range(1, 21)]

    assert [one.status_code for one in answers] == [200] * 5 + [503] * 15
    assert {one.headers.get("Retry-After") for one in answers[5:]} == {"5"}
    assert len(service.get("/jobs").json()["jobs"]) == 6
    gate.open()
    receiver.wait_for(6)
    assert service.wait_for(service.process({"data": 1}))["state"] == "delivered"


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_e05_ten_thousand_jobs_are_all_delivered(start_process, receiver):
    """A tenth of a second each, and 100 at once: the shape of the case in a tenth of its time."""
    service = start_process(
        ANALYSIS="tests.analyses:sleep",
        POSTBACK_URL=receiver.url,
        MAX_RUNNING="100",
        MAX_PENDING="20000",
        LOG_LEVEL="warning",
    )

    sent = {service.process({"data": 0.1}) for _ in range(10_000)}

    receiver.wait_for(10_000, timeout=200)
    assert {one["data"]["id"] for one in events(receiver.requests)} == sent
    assert resident_mib(service.pid) < 150


def resident_mib(pid: int) -> int:
    words = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()
    return int(words[0]) // 1024


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_e07_a_million_old_jobs_slow_down_nothing_and_are_pruned(start_process, receiver, tmp_path):
    service = start_process(**ECHO, POSTBACK_URL=receiver.url, LOG_LEVEL="warning")
    few = percentiles(service)
    service.end()
    change(tmp_path / "journal.db", MULTIPLY)

    service.start()
    many = percentiles(service)
    service.end()
    change(tmp_path / "journal.db", AGE)
    service.start()

    sys.stdout.write(f"few jobs {few}, a million {many} (p50, p99; ms)\n")
    assert many[0] < 1.5 * few[0]
    assert many[1] < 1.5 * few[1] + 2
    poll(lambda: service.get(f"/jobs/{10_000:032x}").status_code == 404, "they are pruned", 60)


#: Makes a million ended jobs of today, each with all that belongs to one.
MULTIPLY = """
    CREATE TEMP TABLE numbers AS
      WITH RECURSIVE step (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM step WHERE i < 1000000)
      SELECT i, i + (SELECT max(seq) FROM jobs) AS seq FROM step;
    INSERT INTO jobs (seq, id, state, outcome, receiver, starts, created_at, started_at,
                      finished_at, ended_at, attempts)
      SELECT seq, printf('%032x', i), 'delivered', 'succeeded', '', 1, now, now, now, now, 1
        FROM numbers, (SELECT max(ended_at) AS now FROM jobs);
    INSERT INTO payloads SELECT seq, CAST('{"data": 1}' AS BLOB) FROM numbers;
    INSERT INTO events (seq, body) SELECT seq, CAST('{"data": {}}' AS BLOB) FROM numbers;
    INSERT INTO attempts SELECT seq, 1, '2026-01-02T03:04:05.678Z', 0.1, 204, NULL FROM numbers;
"""

#: Makes the first ten thousand of them so old that they are to be removed.
AGE = "UPDATE jobs SET ended_at = '2020-01-02T03:04:05.678Z' WHERE id <= printf('%032x', 10000)"


def change(path: Path, statements: str) -> None:
    """Change the journal of a stopped service."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(statements)

"""A worker as the service sees it, frame by frame, and `./run analyze` as its user does."""

import json
import os
import pty
import socket
import subprocess
import sys
import threading

import pytest

from jobs import worker
from tests.harness import ROOT


def echo(data, job):
    return data


def report(data, job):
    job.progress(0.25, "quarter")
    job.progress(0.5, keep=data)
    return job.kept


def _start(target, arguments):
    """Start a thread, as `_thread` does, that coverage sees."""

    def run():
        target(*arguments)
        threading._active[threading.get_ident()] = thread  # type: ignore[attr-defined]

    thread = threading.Thread(target=run)
    thread.start()


@pytest.fixture
def connect(monkeypatch):
    """Return a function that sends a job to a worker with an analysis; it runs in this process."""
    monkeypatch.setattr(worker, "start_new_thread", _start)
    controls: list[socket.socket] = []
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def connect(analyze, body=b'{"data": 7}', *, sent=True):
        ours, theirs = socket.socketpair()
        controls.extend((ours, theirs))
        threads.append(threading.Thread(target=worker._serve, args=(theirs, analyze)))
        threads[-1].start()
        connection, far = socket.socketpair()
        connections.append(connection)
        for one in (ours, theirs, connection):
            one.settimeout(None)
        with far:
            socket.send_fds(ours, [b"j"], [far.fileno()])
        facts = {"id": "j1", "start": 1, "metadata": None, "kept": None}
        if sent:
            connection.sendall(worker.pack(facts, body))
        return connection

    yield connect

    socket.setdefaulttimeout(None)
    for one in controls[::2]:
        one.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()
    for one in (*connections, *controls):
        one.close()


def exactly(connection, size):
    """Return as many bytes, or fewer when the connection has ended."""
    return connection.recv(size, socket.MSG_WAITALL)


def read(connection):
    """Return the kind and the payload of the next frame."""
    kind, length = worker.FRAME.unpack(exactly(connection, worker.FRAME.size))
    return kind, exactly(connection, length)


@pytest.mark.parametrize("size", [0, 3_000_000])
def test_a_job_begins_and_ends_with_its_result(connect, size):
    connection = connect(echo, json.dumps({"data": "x" * size}).encode())

    assert exactly(connection, 1) == worker.START
    assert read(connection) == (worker.RESULT, b'"' + b"x" * size + b'"')
    assert connection.recv(1) == b""


def test_a_result_that_is_too_large_is_an_error(connect, monkeypatch):
    monkeypatch.setattr(worker, "MAX_RESULT_BYTES", 5)
    connection = connect(echo, b'{"data": 123456}')

    assert exactly(connection, 1) == worker.START
    kind, payload = read(connection)
    assert (kind, json.loads(payload)["kind"]) == (worker.ERROR, "result_too_large")


@pytest.mark.parametrize(
    ("answer", "frame"),
    [(b"", (worker.RESULT, b"7")), (b"disk full", (worker.ERROR, b'"message": "disk full"'))],
)
def test_progress_returns_once_the_value_is_kept_or_raises(connect, answer, frame):
    socket.setdefaulttimeout(0.05)  # of the analysis, but not for the connection to the service
    connection = connect(report)
    assert exactly(connection, 1) == worker.START
    assert read(connection) == (worker.PROGRESS, b'[0.25, "quarter", null]')
    assert read(connection) == (worker.PROGRESS, b'[0.5, "", "7"]')
    threading.Event().wait(0.2)  # as when the journal is locked

    worker.send(connection, worker.KEPT, answer)

    kind, payload = read(connection)
    assert kind == frame[0]
    assert frame[1] in payload


def test_a_worker_whose_service_has_ended_before_it_looks_ends_at_once():
    ours, theirs = socket.socketpair()
    arguments = [str(theirs.fileno()), "info", "tests.analyses:echo"]
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-P", worker.__file__, *arguments],
            cwd=ROOT,
            input=b"",
            pass_fds=[theirs.fileno()],
            process_group=0,
            check=False,
            timeout=20,
        )
        theirs.close()

        assert (done.returncode, ours.recv(1)) == (0, b"")


# ./run analyze


def analyze(path, *, name="tests.analyses:echo", text="", stderr=subprocess.PIPE):
    return subprocess.run(
        [sys.executable, "-P", str(ROOT / "jobs" / "worker.py"), "analyze", str(path)],
        cwd=ROOT,
        env=os.environ | {"ANALYSIS": name},
        input=text,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        check=False,
    )


def test_an_analysis_runs_once_in_the_terminal(tmp_path):
    path = tmp_path / "payload.json"
    path.write_text('{"data": {"é": [1]}}', encoding="utf-8")

    done = analyze(path)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == '{\n  "é": [\n    1\n  ]\n}\n'


def test_the_default_analysis_reads_standard_input():
    done = analyze("-", name="", text='{"data": 5, "metadata": {}}')

    assert json.loads(done.stdout) == {"type": "number", "value": 5}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tests.analyses:fail", '{"data": 1}', "ValueError: cannot analyze 1\n"),
        ("tests.analyses:unserialisable", '{"data": 1}', 'result["rows"][0] is a set: use'),
        ("tests.analyses:nowhere", '{"data": 1}', "ANALYSIS='tests.analyses:nowhere': the module"),
        ("tests.analyses:echo", "{", "Standard input is not JSON: Expecting property name"),
        ("tests.analyses:echo", '{"data": [NaN]}', "not JSON: NaN must be null or a string"),
        ("tests.analyses:echo", "[]", 'The payload needs "data" that is not null'),
        ("tests.analyses:echo", '{"data": []}', 'The payload needs "data" that is not null'),
    ],
)
def test_what_goes_wrong_is_said_in_the_terminal(name, text, message):
    done = analyze("-", name=name, text=text)

    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("set_up", "line"),
    [
        ("pass", "WARNING root seen job_id=None"),
        ("logging.basicConfig(format='my %(message)s')", "my seen"),
    ],
)
def test_what_the_analysis_logs_is_seen_in_the_terminal(tmp_path, monkeypatch, set_up, line):
    source = f"import logging; print()\n{set_up}\ndef run(data): logging.warning('seen')"
    (tmp_path / "own_logs.py").write_text(source, encoding="ascii")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    done = analyze("-", name="own_logs:run", text='{"data": 1}')

    assert done.stdout == "null\n"
    assert done.stderr.strip().endswith(line)
    assert len(done.stderr.strip().splitlines()) == 1


def test_progress_is_a_bar_on_a_terminal():
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        done = analyze(
            "-", name="tests.misbehaving:complete", text='{"data": "half"}', stderr=theirs
        )
        os.close(theirs)
        shown = terminal.read(1000).decode()

    assert done.stdout == "null\n"
    assert f"[{'#' * 15}{' ' * 15}]  50% half" in shown
    assert f"[{'#' * 30}] 100% \x1b[K\r\n" in shown

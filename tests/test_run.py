"""`./run` and the demo that it starts: what they prepare, what they start, how they refuse."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from packaging.requirements import Requirement

from web import demo

ROOT = Path(__file__).parent.parent

#: Plays python3, pip and the tools: logs each call, and does what the variables STUB_… say.
STUB = """#!/bin/sh
echo "$*" >>"$STUB_CALLS"
case $* in
    --version) echo "Python ${STUB_VERSION-3.11.7}" ;;
    *flock*) exec "$STUB_PYTHON" "$@" ;;
    *isdir*) ;;
    *version_info*) [ "${STUB_VERSION-}" != 3.10.1 ] ;;
    "-c import ensurepip") [ -z "${STUB_NO_ENSUREPIP-}" ] ;;
    "-m venv "*)
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        echo "command = $0 -m venv $PWD/$3" >"$3/pyvenv.cfg"
        [ -z "${STUB_NO_VENV-}" ] || { echo "no space left"; exit 1; } ;;
    "-m pip install "*)
        [ -z "${STUB_GATE-}" ] || read -r _ <"$STUB_GATE"
        [ -z "${STUB_NO_PIP-}" ] || { echo "no such version" >&2; exit 1; } ;;
    app.py*) [ -z "${STUB_SERVICE-}" ] || exec "$STUB_PYTHON" "$@" ;;
    *"${STUB_FAILING-nothing fails}") exit 9 ;;
esac
"""

#: Plays the service's process: prints the address it is given, and on SIGTERM ends with a status.
LISTENER = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("Postback listens on", sys.argv[1], flush=True)
signal.sigwait({signal.SIGTERM})
sys.exit(int(sys.argv[2]))
"""

JOB_ID = "job1"
EVENT = {"type": "job.succeeded", "data": {"result": list(range(50))}}
RECEIPT = {
    "webhook_id": JOB_ID,
    "received_at": "2099-01-02T03:04:05.678Z",
    "signature": "good",
    "event": EVENT,
}


class Checkout:
    """A copy of `run` in a directory of its own, and a stub for Python."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._calls = path.parent / "calls"
        self._stub = path.parent / "python3"
        self._started: list[subprocess.Popen[str]] = []
        path.mkdir()
        shutil.copy(ROOT / "run", path)
        (path / "requirements.txt").write_text("bottle==1\n")
        (path / "requirements-dask.txt").write_text("dask==1\n")
        (path / "requirements-dev.txt").write_text("-r requirements.txt\n")
        (path / "bench").mkdir()
        (path / "bench" / "requirements.txt").write_text("fastapi==1\n")
        self._stub.write_text(STUB)
        self._stub.chmod(0o755)

    def start(self, *args: str, script: str | Path = "./run", cwd: Any = None, **env: str):
        """Start `run`; the variables go to it and to the stub."""
        known = {"STUB_CALLS": str(self._calls), "STUB_PYTHON": sys.executable}
        process = subprocess.Popen(
            [script, *args],
            cwd=cwd or self.path,
            env=os.environ | known | {"PYTHON": str(self._stub)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `run` to its end."""
        process = self.start(*args, **options)
        stdout, stderr = process.communicate(timeout=10)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def stop(self) -> None:
        """End what a failed test left running, with its children."""
        for process in self._started:
            with process:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def calls(self, containing: str = "") -> list[str]:
        """Return how the stub was called, in order."""
        self._calls.touch()
        return [line for line in self._calls.read_text().splitlines() if containing in line]

    def forget_calls(self) -> None:
        """Let `calls` begin anew."""
        self._calls.write_text("")


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    checkout = Checkout(tmp_path / "a checkout")
    yield checkout
    checkout.stop()


@pytest.fixture
def prepared(checkout: Checkout) -> Checkout:
    """A checkout whose .venv is made and filled."""
    checkout.run("test")
    checkout.forget_calls()
    return checkout


def wait_until(true: Callable[[], bool]) -> None:
    deadline = monotonic() + 10
    while not true():
        assert monotonic() < deadline
        threading.Event().wait(0.005)


# What run prepares


def test_the_first_run_makes_the_venv_installs_and_starts_the_service(checkout):
    done = checkout.run()

    assert done.returncode == 0, done.stderr
    assert checkout.calls("-m venv") == ["-m venv .venv"]
    assert checkout.calls("-m pip")[0].endswith("-r requirements.txt")
    assert checkout.calls()[-1] == "app.py"


def test_what_is_prepared_is_told_on_stderr_alone(checkout):
    done = checkout.run()

    assert done.stdout == ""
    assert done.stderr == "run: making .venv with Python 3.11.7\nrun: installing requirements.txt\n"


def test_the_next_run_prepares_nothing(prepared):
    done = prepared.run()

    assert done.stderr == ""
    assert prepared.calls("-m venv") == prepared.calls("-m pip") == []
    assert prepared.calls()[-1] == "app.py"


@pytest.mark.parametrize(
    ("changed", "verb", "installed"),
    [
        ("requirements.txt", "serve", ["requirements.txt"]),
        ("requirements.txt", "test", ["requirements.txt"]),
        ("requirements-dev.txt", "test", ["requirements-dev.txt"]),
        ("requirements-dev.txt", "serve", []),
    ],
)
def test_requirements_are_installed_again_when_they_changed(prepared, changed, verb, installed):
    (prepared.path / changed).write_text("# another version\n")

    prepared.run(verb)

    assert [call.split()[-1] for call in prepared.calls("-m pip")] == installed


def test_a_failed_install_shows_the_error_of_pip_and_starts_nothing(checkout):
    done = checkout.run(STUB_NO_PIP="1")

    assert done.returncode == 1
    assert "no such version" in done.stderr
    assert checkout.calls("app.py") == []


def test_a_failed_install_is_repeated_even_when_the_old_requirements_return(prepared):
    requirements = prepared.path / "requirements.txt"
    before = requirements.read_text()
    requirements.write_text("bottle==2\n")
    prepared.run(STUB_NO_PIP="1")
    requirements.write_text(before)
    prepared.forget_calls()

    done = prepared.run()

    assert done.returncode == 0
    assert len(prepared.calls("-m pip")) == 1


def test_a_venv_without_its_python_is_made_again(prepared):
    python = prepared.path / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python3")

    prepared.run()

    assert prepared.calls("-m venv") == ["-m venv .venv"]
    assert len(prepared.calls("-m pip")) == 1


def test_a_venv_that_was_moved_is_made_again(prepared):
    moved = prepared.path.rename(prepared.path.parent / "elsewhere")

    done = prepared.run(cwd=moved)

    assert done.returncode == 0
    assert prepared.calls("-m venv") == ["-m venv .venv"]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Where the stub of pip waits for a line when it is given as STUB_GATE."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


def test_nobody_else_installs_while_a_run_does(checkout, gate):
    process = checkout.start(STUB_GATE=str(gate))

    with (
        (checkout.path / "requirements.txt").open() as requirements,
        gate.open("w"),  # pip waits from here to the end of the block
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(requirements, fcntl.LOCK_SH | fcntl.LOCK_NB)

    assert process.wait(10) == 0


def test_two_runs_at_the_same_time_install_once(checkout, gate):
    first, second = checkout.start(STUB_GATE=str(gate)), checkout.start(STUB_GATE=str(gate))
    wait_until(lambda: len(checkout.calls("flock")) == 2)

    gate.write_text("go on\n")

    assert (first.wait(10), second.wait(10)) == (0, 0)
    assert len(checkout.calls("-m venv")) == len(checkout.calls("-m pip")) == 1
    assert checkout.calls("app.py") == ["app.py"] * 2


def test_a_running_service_does_not_hold_up_the_install_of_another_run(checkout):
    (checkout.path / "app.py").write_text(LISTENER)
    process = checkout.start("serve", "http://here", "0", STUB_SERVICE="1")
    process.stdout.readline()

    done = checkout.run("test")

    assert done.returncode == 0
    assert checkout.calls("-m pip")[-1].endswith("-r requirements-dev.txt")


def test_the_peers_of_bench_have_a_venv_of_their_own(prepared):
    prepared.run("bench")

    installed = [call.split()[-1] for call in prepared.calls("-m pip")]
    assert prepared.calls("-m venv") == ["-m venv bench/.venv"]
    assert installed == ["bench/requirements.txt"]
    assert not (prepared.path / ".venv/bench").exists()


# What run refuses


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"STUB_VERSION": "3.10.1"}, "is Python 3.10.1"),
        ({"PYTHON": "/nowhere/python3"}, "/nowhere/python3 does not start"),
        ({"STUB_NO_ENSUREPIP": "1"}, "apt install python3-venv"),
        ({"STUB_NO_VENV": "1"}, "could not make .venv"),
    ],
    ids=["too old", "missing", "without ensurepip", "venv fails"],
)
def test_a_python_that_cannot_make_a_venv_is_refused_and_leaves_none(checkout, env, message):
    done = checkout.run(**env)

    assert done.returncode == 78
    assert message in done.stderr
    assert not (checkout.path / ".venv").exists()


def test_an_unknown_verb_is_refused_with_the_list_of_verbs(checkout):
    done = checkout.run("sevre")

    assert done.returncode == 2
    assert "usage: ./run" in done.stderr


def test_help_lists_the_verbs(checkout):
    done = checkout.run("help")

    assert done.returncode == 0
    assert "receiver" in done.stdout


# What run starts


@pytest.mark.parametrize("verb", ["serve", "demo"])
def test_dask_is_installed_only_for_those_who_choose_it(prepared, verb):
    (prepared.path / "requirements-dask.txt").write_text("dask==2\n")

    prepared.run(verb)
    without = prepared.calls("-m pip")
    prepared.run(verb, EXECUTOR="dask")

    assert without == []
    assert [call.split()[-1] for call in prepared.calls("-m pip")] == ["requirements-dask.txt"]


@pytest.mark.parametrize(
    ("arguments", "started"),
    [
        ([], ["app.py"]),
        (["--check"], ["app.py --check"]),
        (["serve", "--check"], ["app.py --check"]),
        (["demo"], ["-m web.demo"]),
        (["receiver"], ["-m web.receiver"]),
        (["soak", "10", "7"], ["-m tests.soak.kills 10 7"]),
        (["fuzz", "1000", "7"], ["-m tests.soak.fuzz 1000 7"]),
        (["bench", "quick"], ["-m bench quick"]),
        (["test", "-k", "two words"], ["-m pytest -k two words"]),
        (["format"], ["-m ruff check --fix .", "-m ruff format ."]),
        (
            ["check"],
            [
                "-m ruff check .",
                "-m ruff format --check .",
                "-m mypy",
                "-m coverage erase",
                "-m coverage run -m pytest -m not soak",
                "-m coverage combine --quiet",
                "-m coverage report",
            ],
        ),
    ],
)
def test_each_verb_starts_its_commands(prepared, arguments, started):
    done = prepared.run(*arguments)

    assert done.returncode == 0, done.stderr
    assert prepared.calls()[-len(started) :] == started


@pytest.mark.parametrize(
    "failing", ["ruff check .", "--check .", "mypy", "-m pytest -m not soak", "report"]
)
def test_check_stops_at_the_first_failure(prepared, failing):
    done = prepared.run("check", STUB_FAILING=failing)

    assert done.returncode == 9
    assert prepared.calls()[-1].endswith(failing)


def test_run_works_from_any_directory_and_through_a_symlink(prepared, tmp_path):
    (prepared.path / "app.py").write_text("import os; print(os.getcwd())")
    link = tmp_path / "postback"
    link.symlink_to(prepared.path / "run")

    done = prepared.run(script=link, cwd="/", STUB_SERVICE="1")

    assert done.stdout.strip() == str(prepared.path)


def test_signals_reach_the_service(prepared):
    (prepared.path / "app.py").write_text(LISTENER)
    process = prepared.start("serve", "http://here", "7", STUB_SERVICE="1")
    process.stdout.readline()

    process.terminate()

    assert process.wait(10) == 7


# What is installed


def requirements(name: str) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


@pytest.mark.parametrize(
    "name",
    ["requirements.txt", "requirements-dask.txt", "requirements-dev.txt", "bench/requirements.txt"],
)
def test_every_requirement_is_pinned(name):
    operators = {spec.operator for line in requirements(name) for spec in line.specifier}

    assert operators == {"=="}


@pytest.mark.parametrize("pinned", requirements("requirements.txt"), ids=str)
def test_what_a_requirement_needs_is_pinned_too(pinned):
    lines = [Requirement(line) for line in metadata.requires(pinned.name) or []]
    needed = {line.name for line in lines if not line.marker or line.marker.evaluate({"extra": ""})}

    names = {line.name.replace("_", "-") for line in requirements("requirements.txt")}
    assert {name.replace("_", "-") for name in needed} <= names


# The demo


class FakeService(HTTPServer):
    """The HTTP face of a service that works; a test changes its answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers: dict[str, tuple[int, dict[str, Any]]] = {
            "POST /process": (200, {"id": JOB_ID, "state": "accepted"}),
            "GET /postprocessed": (200, {"received": [RECEIPT]}),
            f"GET /jobs/{JOB_ID}": (200, {"id": JOB_ID, "state": "delivered"}),
        }


class FakeHandler(BaseHTTPRequestHandler):
    """Answers each route with what its server's `answers` say."""

    server: FakeService

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status_code, document = self.server.answers[f"{self.command} {self.path}"]
        body = json.dumps(document).encode()
        self.send_response(status_code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer  # noqa: N815 - http.server chooses the names

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def service() -> Iterator[FakeService]:
    with FakeService() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.service
def test_the_demo_takes_a_payload_round_the_whole_loop(tmp_path):
    settings = {"API_TOKEN": "t", "POSTBACK_URL": "http://nowhere", "PYTHONUNBUFFERED": ""}
    proxy = {"http_proxy": "http://127.0.0.1:1", "no_proxy": ""}

    with subprocess.Popen(
        [sys.executable, "-m", "web.demo"],
        cwd=ROOT,
        env=os.environ | settings | proxy | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        shown, _ = process.communicate(timeout=25)

    assert process.returncode == 0
    assert "200 after" in shown
    assert "job.succeeded" in shown
    assert list(tmp_path.iterdir()) == []


def test_the_demo_shows_the_answer_and_the_start_of_the_event(service, capsys):
    demo.show_loop(service.url, b'{"data": 1}')

    shown = capsys.readouterr().out
    assert "200 after" in shown
    assert f'"id": "{JOB_ID}"' in shown
    assert "… and 27 more lines" in shown


@pytest.mark.parametrize(
    ("route", "answer", "message"),
    [
        ("POST /process", (503, {"detail": "It is full."}), "answered 503.*It is full"),
        ("GET /postprocessed", (200, {"received": [RECEIPT | {"signature": "none"}]}), "Expected"),
        (
            "GET /postprocessed",
            (200, {"received": [RECEIPT | {"event": {"type": "job.failed"}}]}),
            "Expected",
        ),
    ],
    ids=["refused", "unsigned", "failed"],
)
def test_a_loop_that_is_not_whole_fails_the_demo(service, route, answer, message):
    service.answers[route] = answer

    with pytest.raises(SystemExit, match=message):
        demo.show_loop(service.url, b'{"data": 1}')


def test_a_job_that_is_never_delivered_fails_the_demo_in_time(service):
    service.answers[f"GET /jobs/{JOB_ID}"] = 200, {"state": "delivering"}

    with pytest.raises(SystemExit, match=r"The job is still delivering after 0\.02 s"):
        demo.wait_for_delivery(f"{service.url}/jobs/{JOB_ID}", seconds=0.02)


def test_a_service_that_does_not_answer_fails_the_demo():
    with pytest.raises(SystemExit, match="gave no answer"):
        demo.call("http://127.0.0.1:1/process", b"{}")


def test_the_address_is_what_the_service_prints():
    with demo.running([sys.executable, "-c", LISTENER, "http://127.0.0.1:8", "0"], {}) as url:
        assert url == "http://127.0.0.1:8"


def test_a_service_that_does_not_start_fails_the_demo_with_its_reason(capfd):
    command = [sys.executable, "-c", "import sys; sys.exit('PORT is wrong')"]

    with (
        pytest.raises(SystemExit, match="ended with status 1 before it listened"),
        demo.running(command, {}),
    ):
        pytest.fail("it must not be reached")

    assert "PORT is wrong" in capfd.readouterr().err


def test_a_service_that_does_not_end_well_fails_the_demo():
    command = [sys.executable, "-c", LISTENER, "http://127.0.0.1:8", "75"]

    with pytest.raises(SystemExit, match="ended with status 75"), demo.running(command, {}):
        pass


def test_a_service_that_does_not_obey_is_killed():
    obstinate = "import signal; signal.signal(15, signal.SIG_IGN); print('on'); signal.pause()"

    with subprocess.Popen(
        [sys.executable, "-uc", obstinate], stdout=subprocess.PIPE, text=True
    ) as child:
        child.stdout.readline()
        status = demo.stop(child, seconds=0.05)

    assert status == -signal.SIGKILL


def test_the_service_gets_no_setting_that_sends_it_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTBACK_URL", "http://elsewhere")
    monkeypatch.setenv("API_TOKEN_FILE", "/secret")
    monkeypatch.setenv("PORT", "80")
    monkeypatch.setenv("EXECUTOR", "process")

    env = demo.environment(tmp_path, {})

    assert env["EXECUTOR"] == "process"
    assert env["PORT"] == "0"
    assert "POSTBACK_URL" not in env
    assert "API_TOKEN_FILE" not in env


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_demo_leaves_no_process_and_no_files(tmp_path, number):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "temporary").mkdir()
    silent = f"import os, signal; open({str(fifo)!r}, 'w').write(str(os.getpid())); signal.pause()"
    script = f"import sys; from web import demo; demo.main([sys.executable, '-c', {silent!r}])"
    env = os.environ | {"TMPDIR": str(tmp_path / "temporary")}

    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        child_pid = int(fifo.read_text())
        process.send_signal(number)
        _, message = process.communicate(timeout=10)

    assert process.returncode == 1
    assert message == "The demo was interrupted.\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child_pid, 0)
    assert list((tmp_path / "temporary").iterdir()) == []

"""`./run`: what it prepares, what it starts, and what it says when it cannot."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import config
from tests.harness import ROOT

#: Plays python3, pip and the tools. It logs each call, and does what the variables STUB_... say.
STUB = """#!/bin/sh
echo "$*" >>"$STUB_CALLS"
case $* in
    *--version) echo "Python ${STUB_VERSION-3.11.7}" ;;
    *flock*) exec "$STUB_PYTHON" "$@" ;;
    *isdir*) ;;
    *base_prefix*) echo "$STUB_CALLS" ;;
    *version_info*) [ "${STUB_VERSION-}" != 3.10.1 ] ;;
    *"import ensurepip"*) [ -z "${STUB_NO_ENSUREPIP-}" ] ;;
    "-I -m venv "*)
        mkdir -p "$4/bin"
        cp "$0" "$4/bin/python"
        echo "#!$PWD/$4/bin/python" >"$4/bin/pip"
        echo "command = $0 -m venv $PWD/$4" >"$4/pyvenv.cfg"
        [ -z "${STUB_NO_VENV-}" ] || { echo "no space left"; exit 1; } ;;
    "-I -m pip install "*)
        [ -z "${STUB_GATE-}" ] || read -r _ <"$STUB_GATE"
        [ -z "${STUB_PIP_SAYS-}" ] || { echo "$STUB_PIP_SAYS"; exit 1; } ;;
    app.py*) [ -z "${STUB_SERVICE-}" ] || exec "$STUB_PYTHON" "$@" ;;
    *"${STUB_FAILING-nothing fails}") exit 9 ;;
esac
"""

#: Plays the service: says that it listens, and on SIGTERM ends with status 7.
LISTENER = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("listening", os.getcwd(), os.environ.get("PYTHONSAFEPATH"), flush=True)
signal.sigwait({signal.SIGTERM})
os._exit(7)
"""

CONFLICT = """Collecting botocore==1.29.0
ERROR: Cannot install -r requirements-local.txt (line 1) and urllib3==2.8.0 because ...

The conflict is caused by:
    The user requested urllib3==2.8.0
    botocore 1.29.0 depends on urllib3<1.27 and >=1.25.4

To fix this you could try to:
1. loosen the range of package versions you've specified

ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/"""


class Checkout:
    """A copy of `run` in a directory of its own, and a stub for Python."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.venv = path / ".venv"
        self._calls = path.parent / "calls"
        self._stub = path.parent / "python3"
        self._started: list[subprocess.Popen[str]] = []
        path.mkdir()
        shutil.copy(ROOT / "run", path)
        self._stub.write_text(STUB)
        self._stub.chmod(0o755)
        self.write("requirements.txt", "bottle==1\n")
        self.write("requirements-dask.txt", "dask==1\n")
        self.write("requirements-dev.txt", "-r requirements.txt\n")
        self.write("bench/requirements.txt", "fastapi==1\n")

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_text(text)

    def start(self, *args: str, script: str | Path = "./run", cwd: Any = None, **env: str):
        """Start `run`. The variables are for it and for the stub."""
        stub = {"STUB_CALLS": str(self._calls), "STUB_PYTHON": sys.executable}
        process = subprocess.Popen(
            [script, *args],
            cwd=cwd or self.path,
            env=os.environ | stub | {"PYTHON": str(self._stub)} | env,
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

    def installed(self) -> list[list[str]]:
        """Return the files that each call of pip was to install."""
        return [[word for word in call.split() if ".txt" in word] for call in self.calls("-m pip")]

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


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Where the stub of pip waits for a line when it is given as STUB_GATE."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


# What it prepares


@pytest.mark.parametrize(
    ("env", "files"),
    [
        ({}, ["requirements.txt"]),
        ({"EXECUTOR": "Dask"}, ["requirements.txt", "requirements-dask.txt"]),
    ],
)
def test_the_first_run_makes_the_venv_installs_and_starts_the_service(checkout, env, files):
    done = checkout.run(**env)

    assert (done.returncode, done.stdout) == (0, "")
    made, installing = done.stderr.splitlines()
    assert made == "run: making .venv with Python 3.11.7"
    assert installing == f"run: installing {' '.join(files)} (see .venv/install.log)"
    assert checkout.installed() == [files]
    assert checkout.calls()[-1] == "app.py"
    assert (checkout.venv / "bin/pip").read_text() == f"#!{checkout.venv}/bin/python\n"
    assert not (checkout.path / ".venv.new").exists()


@pytest.mark.parametrize(
    ("changed", "verb", "installed"),
    [
        ("requirements.txt", "serve", ["requirements.txt"]),
        ("requirements-dev.txt", "serve", None),
        (
            "requirements-dev.txt",
            "test",
            ["requirements.txt", "requirements-dask.txt", "requirements-dev.txt"],
        ),
        ("requirements-local.txt", "serve", ["requirements.txt", "requirements-local.txt"]),
    ],
)
def test_requirements_are_installed_when_they_changed(prepared, changed, verb, installed):
    prepared.write(changed, "# another version\n")

    prepared.run(verb)
    again = prepared.run(verb)

    assert prepared.installed() == ([installed] if installed else [])
    assert again.stderr == ""


@pytest.mark.parametrize("damage", ["python gone", "moved", "another python"])
def test_a_venv_that_does_not_work_is_made_again(prepared, damage):
    python, moved = prepared.venv / "bin/python", prepared.path.parent / "elsewhere"
    if damage == "python gone":
        python.unlink()
        python.symlink_to("/nowhere/python3")
    if damage == "moved":
        prepared.path.rename(moved)
    if damage == "another python":
        python.write_text(STUB.replace('echo "$STUB_CALLS"', "echo another"))

    done = prepared.run(cwd=moved if damage == "moved" else None)

    assert (done.returncode, len(done.stderr.splitlines())) == (0, 2)
    assert prepared.calls("-m venv") == ["-I -m venv .venv.new"]
    assert len(prepared.installed()) == 1


def test_two_runs_at_the_same_time_install_once(checkout, gate):
    first, second = checkout.start(STUB_GATE=str(gate)), checkout.start(STUB_GATE=str(gate))
    with (
        (checkout.path / "requirements.txt").open() as requirements,
        gate.open("w"),  # pip waits from here to the end of the block
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(requirements, fcntl.LOCK_SH | fcntl.LOCK_NB)

    assert (first.wait(10), second.wait(10)) == (0, 0)
    assert len(checkout.calls("-m venv")) == len(checkout.installed()) == 1
    assert checkout.calls("app.py") == ["app.py"] * 2


# What it says when it cannot


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"STUB_VERSION": "3.10.1"}, "is Python 3.10.1. Set PYTHON to a newer one."),
        ({"PYTHON": "/nowhere/python3"}, "/nowhere/python3 does not start."),
        ({"STUB_NO_ENSUREPIP": "1"}, "apt install python3-venv"),
        ({"STUB_NO_VENV": "1"}, "could not make .venv here: the reason is above."),
    ],
    ids=["too old", "missing", "without ensurepip", "venv fails"],
)
@pytest.mark.parametrize("has_venv", [False, True])
def test_a_venv_is_never_removed_for_one_that_cannot_be_made(prepared, env, message, has_venv):
    (prepared.venv / "bin/python").unlink()
    if not has_venv:
        shutil.rmtree(prepared.venv)

    done = prepared.run(**env)

    assert done.returncode == 78
    assert message in done.stderr.splitlines()[-1]
    assert (prepared.venv / "pyvenv.cfg").exists() == has_venv
    assert not (prepared.path / ".venv.new").exists()


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="needs setpriv")
@pytest.mark.parametrize("broken", [False, True])
def test_a_venv_of_another_user_is_left_alone_and_its_owner_is_named(prepared, broken):
    prepared.write("requirements.txt", "bottle==2\n")
    if broken:
        (prepared.venv / "bin/python").unlink()
    for path in (prepared.venv, prepared.path):
        path.chmod(0o555)
    others = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for folder in prepared.path.parents[:3]:  # pytest's own, which only the user may enter
        folder.chmod(0o755)

    command = [*others, "./run"] if os.getuid() == 0 else ["./run"]
    done = prepared.run(*command[1:], script=command[0], STUB_CALLS="/dev/null")

    assert done.returncode == 78
    [line] = done.stderr.splitlines()
    assert prepared.venv.owner() in line
    assert (prepared.venv / "pyvenv.cfg").exists()


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (CONFLICT, "pins: urllib3==2.8.0 is required; botocore 1.29.0 depends on urllib3<1.27"),
        ("Could not run curl-config\nERROR: Failed to build pycurl", "libcurl4-openssl-dev"),
        ("ERROR: No matching distribution found for pycurl==7.49.0", "use a system with glibc"),
    ],
    ids=["conflict", "no compiler", "musl"],
)
def test_what_pip_cannot_do_is_explained_in_one_line(checkout, says, words):
    checkout.write("requirements-local.txt", "botocore==1.29.0\n")

    done = checkout.run(STUB_PIP_SAYS=says)

    assert done.returncode == 78
    assert words in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 3
    assert checkout.calls("app.py") == []


def test_any_other_failure_of_pip_is_shown_and_the_next_run_tries_again(prepared):
    requirements = (prepared.path / "requirements.txt").read_text()
    prepared.write("requirements.txt", "bottle==2\n")

    failed = prepared.run(STUB_PIP_SAYS="No matching distribution found for bottle==2")
    prepared.write("requirements.txt", requirements)
    again = prepared.run()

    assert failed.returncode == 1
    assert "found for bottle==2\nrun: pip could not install requirements.txt." in failed.stderr
    assert again.stderr == "run: installing requirements.txt (see .venv/install.log)\n"


# What it starts


@pytest.mark.parametrize(
    ("command", "started"),
    [
        ("--check", "app.py --check"),
        ("serve --help", "app.py --help"),
        ("demo", "-m web.demo"),
        ("receiver --port 0", "-m web.receiver --port 0"),
        ("secret https://example.com", "-m web.signatures https://example.com"),
        ("analyze -", "-P -X faulthandler jobs/worker.py analyze -"),
        ("analyze /tmp/a.json", "-P -X faulthandler jobs/worker.py analyze /tmp/a.json"),
        ("test -k a", "-m pytest -k a"),
        ("soak 60", "-m tests.soak.kills 60"),
        ("fuzz", "-m tests.soak.fuzz"),
        ("bench", "-m bench"),
        ("format", "-m ruff format ."),
    ],
)
def test_a_verb_starts_its_program(prepared, command, started):
    done = prepared.run(*command.split())

    assert done.returncode == 0
    assert prepared.calls()[-1] == started


def test_it_works_from_anywhere_and_a_payload_is_found_where_the_user_stands(prepared, tmp_path):
    link = tmp_path / "postback"
    link.symlink_to(prepared.path / "run")

    prepared.run("analyze", "my payload.json", script=link, cwd=tmp_path)

    assert (
        prepared.calls()[-1]
        == f"-P -X faulthandler jobs/worker.py analyze {tmp_path}/my payload.json"
    )


def test_check_stops_at_the_first_failure(prepared):
    done = prepared.run("check", STUB_FAILING="-m mypy")

    assert done.returncode == 9
    assert prepared.calls("coverage") == []


def test_the_service_starts_in_the_checkout_and_gets_the_signals_itself(prepared, tmp_path):
    prepared.write("app.py", LISTENER)
    script = prepared.path / "run"
    process = prepared.start(script=script, cwd=tmp_path, STUB_SERVICE="1", PYTHONSAFEPATH="1")

    line = process.stdout.readline()
    process.terminate()

    assert line == f"listening {prepared.path} None\n"
    assert process.wait(10) == 7


def test_help_needs_nothing_and_begins_with_what_a_user_wants(checkout):
    texts = {checkout.run(word, PYTHON="/nowhere").stdout for word in ("help", "--help", "-h")}

    [text] = texts
    assert text.index("./run demo") < text.index("analyze FILE") < text.index("bench")
    settings = {name for name, *_ in config.table()}
    assert {"ANALYSIS", "POSTBACK_URL", "API_TOKEN"} <= settings & set(text.split())
    assert checkout.calls() == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sevre", "no verb sevre"),
        ("analyze", "usage: ./run analyze FILE"),
        ("analyze --help", "usage: ./run analyze FILE"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(checkout, command, message):
    done = checkout.run(*command.split())

    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


# What is pinned


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

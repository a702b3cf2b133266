"""What the tests share: a caller, the real service, and the service inside the test's process."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import requests

import app
import config
from jobs import model
from jobs.journal import Journal
from tests.receiver import Answer, Receiver, Recorded

ROOT = Path(__file__).parent.parent

#: From each state, the states a job may move to.
MOVES: Mapping[str, set[str]] = {
    "accepted": {"running", "delivering"},
    "running": {"accepted", "delivering"},
    "delivering": {"delivered", "undelivered"},
    "delivered": {"delivering"},
    "undelivered": {"delivering"},
}

T = TypeVar("T")


def poll(find: Callable[[], T | None], what: str, timeout: float = 10) -> T:
    """Return what `find` returns, as soon as that is something."""
    deadline, pause = time.monotonic() + timeout, 0.001
    while time.monotonic() < deadline:
        if found := find():
            return found
        threading.Event().wait(pause)
        pause = min(2 * pause, 0.03)
    raise AssertionError(f"{what}: not within {timeout} s")


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of this process with these settings, and no other ones."""
    names = {config.variable(name) for name in config.Config.__dataclass_fields__}
    own = {name: value for name, value in os.environ.items() if name not in names}
    own = {name: value for name, value in own.items() if not name.startswith("POSTBACK_")}
    return {**own, "PORT": "0", "DRAIN": "5s", **settings}


def executed(executor: str, *, workers: int) -> dict[str, str]:
    """Return the settings of an executor. WORKERS is refused where it does not count."""
    only = {"WORKERS": str(workers)} if executor == "process" else {}
    return {"EXECUTOR": executor, **only}


def free_port() -> int:
    """Return a port at which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def is_open(port: int) -> bool:
    """Return whether somebody listens at a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_alive(pid: int | None) -> bool:
    """Return whether a process runs: it may end before, or while, its state is read."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def act(name: str, argument: Any = None) -> dict[str, Any]:
    """Return the data for which `tests.analyses:act` calls the function of this name."""
    return {"call": name, "with": argument}


class Caller:
    """Someone who calls a service."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self._session = requests.Session()
        self._session.trust_env = False

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        return self._session.request(method, self.base_url + path, timeout=20, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        return self.request("POST", path, **options)

    def process(self, payload: Any, headers: Mapping[str, str] | None = None) -> str:
        """Send a payload that is accepted, and return the job's id."""
        answer = self.post("/process", json=payload, headers=headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def send(self, data: Any, to: "Receiver | Mailbox | None" = None, **fields: Any) -> str:
        """Send data, to be posted back to a receiver, and return the job's id."""
        url = {"postback_url": to.url} if to else {}
        return self.process({"data": data, **url, **fields})

    def job(self, job_id: str) -> Any:
        answer = self.get(f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ids(self, query: str = "") -> list[str]:
        """Return the ids on a page of jobs, the newest first."""
        return [job["id"] for job in self.get("/jobs" + query).json()["jobs"]]

    def is_busy(self) -> bool:
        """Return whether there is a job that has not ended."""
        states = ("accepted", "running", "delivering")
        return any(self.ids(f"?limit=1&state={state}") for state in states)

    def wait_for(self, job_id: str, *states: str, timeout: float = 10) -> Any:
        """Return the job as soon as it is in one of the states; by default in a final one."""
        wanted = states or (model.State.DELIVERED, model.State.UNDELIVERED)

        def find() -> Any:
            job = self.job(job_id)
            return job if job["state"] in wanted else None

        return poll(find, f"job {job_id} {wanted}", timeout)

    def wait_for_all(self, job_ids: list[str], timeout: float = 20) -> list[Any]:
        """Return these jobs as soon as all of them have ended."""
        deadline = time.monotonic() + timeout
        return [self.wait_for(one, timeout=deadline - time.monotonic()) for one in job_ids]

    def close(self) -> None:
        self._session.close()


class InProcess(Caller):
    """The service in the test's own process: for what must be looked at, or set, inside."""

    def __init__(self) -> None:
        super().__init__("")
        self.start_again()

    def start_again(self) -> None:
        """Start, with the settings of the environment; after a stop with the same journal."""
        self.service = app.Service(config.load())
        self.service.start()
        self.base_url = self.service.base_url

    def stop(self) -> int:
        self.close()
        return self.service.stop()

    @property
    def journal(self) -> Journal:
        return self.service.journal


@contextlib.contextmanager
def failing(journal: Journal) -> Iterator[None]:
    """Have SQLite refuse every write, as on a full disk; reading goes on."""
    with journal._lock:
        journal._connection.execute("PRAGMA query_only = ON")
    try:
        yield
    finally:
        with journal._lock:
            journal._connection.execute("PRAGMA query_only = OFF")


class RealProcess(Caller):
    """The service as a user starts it, to be killed and started again."""

    def __init__(
        self, settings: Mapping[str, str], *, command: tuple[str, ...] = ("app.py",)
    ) -> None:
        self._env, self._command = environment(settings), command
        self.start()

    def start(self) -> None:
        self.process_ = subprocess.Popen(
            [sys.executable, *self._command],
            cwd=ROOT,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        line = self.process_.stdout.readline()
        super().__init__(line.strip().rpartition(" ")[2])
        if "listens on" not in line:
            self.process_.kill()
            self.wait()
            raise AssertionError(f"The service did not start: {line}{self.log()}")

    @property
    def pid(self) -> int:
        return self.process_.pid

    def workers(self) -> list[int]:
        """Return the process ids of its children."""
        found: list[int] = []
        for path in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread has ended
                found += map(int, path.read_text().split())
        return found

    def log(self) -> str:
        """Return what it has written to standard error."""
        return "".join(self._lines)

    def wait_for_log(self, text: str, timeout: float = 10) -> None:
        poll(lambda: text in self.log(), f"{text!r} in the log: {self.log()}", timeout)

    def kill(self) -> None:
        """End it as the kernel would, at any moment."""
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        """Send it a signal, and return its exit code."""
        self.process_.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 20) -> int:
        code = self.process_.wait(timeout)
        self._reader.join(5)
        assert not self._reader.is_alive(), "a child of the service lives on"
        self.process_.stdout.close()
        self.process_.stderr.close()
        self.close()
        return code

    def _read_log(self) -> None:
        for line in self.process_.stderr:
            self._lines.append(line)


class Mailbox:
    """One path at a receiver that many tests share; with answers and requests of its own."""

    def __init__(self, receiver: Receiver, path: str) -> None:
        self.url = receiver.url_for(path)
        self.answers: list[Answer] = []
        self.default: Answer = 204
        self._receiver, self._path = receiver, path

    @property
    def requests(self) -> list[Recorded]:
        return [one for one in list(self._receiver.requests) if one.path == self._path]

    def wait_for(self, n: int, timeout: float = 10) -> list[Recorded]:
        """Return all requests as soon as there are `n`."""
        poll(lambda: len(self.requests) >= n, f"{n} requests at {self._path}", timeout)
        return self.requests

    def answer(self) -> Answer:
        return self.answers.pop(0) if self.answers else self.default


class Gate:
    """Holds up analyses, as the data tells them, until it is opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.data = act("wait", str(path))

    def open(self) -> None:
        self._path.touch()

    def wait_for(self, n: int) -> list[str]:
        """Return the ids of all jobs whose analyses have begun, as soon as there are `n`."""
        poll(lambda: len(self.begun()) >= n, f"{n} analyses at the gate")
        return self.begun()

    def begun(self) -> list[str]:
        """Return the ids of the jobs that came to it, in their order."""
        return [mark.suffix[1:] for mark in self._marks()]

    def forget(self) -> None:
        """Count no job that came to it before."""
        for mark in self._marks():
            mark.unlink()

    def _marks(self) -> list[Path]:
        marks = self._path.parent.glob(f"{self._path.name}.*")
        return sorted(marks, key=lambda mark: mark.stat().st_mtime_ns)


def events(requests_: Any) -> list[Any]:
    """Return the events that a receiver recorded."""
    return [json.loads(one.body) for one in requests_]


def refusal(answer: requests.Response, status_code: int) -> str:
    """Return the detail of an answer that refuses, once its form is seen to be right."""
    problem = answer.json()
    assert answer.status_code == problem["status"] == status_code, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert sorted(problem) == ["detail", "status", "title", "type"]
    return str(problem["detail"])

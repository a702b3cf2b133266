"""What the tests share: a caller, the service inside the test process, and the real process."""

import contextlib
import json
import os
import signal
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

ROOT = Path(__file__).parent.parent

T = TypeVar("T")


def poll(find: Callable[[], T | None], what: str, timeout: float = 10) -> T:
    """Return what `find` returns, as soon as that is something."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := find():
            return found
        threading.Event().wait(0.005)
    raise AssertionError(f"{what}: not within {timeout} s")


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

    def job(self, job_id: str) -> Any:
        answer = self.get(f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_for(self, job_id: str, *states: str, timeout: float = 10) -> Any:
        """Return the job as soon as it is in one of the states; by default in a final one."""
        wanted = states or (model.State.DELIVERED, model.State.UNDELIVERED)

        def find() -> Any:
            job = self.job(job_id)
            return job if job["state"] in wanted else None

        return poll(find, f"job {job_id} {wanted}", timeout)

    def close(self) -> None:
        self._session.close()


class InProcess(Caller):
    """The service in the test's own process: fast, and open to a look inside."""

    def __init__(self) -> None:
        self.service = app.Service(config.load())
        self.service.start()
        super().__init__(self.service.base_url)

    def stop(self) -> int:
        self.close()
        return self.service.stop()

    def restart(self) -> int:
        """Stop in order and start again; return how many jobs were left for that."""
        left = self.service.stop()
        self.start_again()
        return left

    def start_again(self) -> None:
        """Start what has stopped, with the same settings and the same journal."""
        self.service = app.Service(config.load())
        self.service.start()
        self.base_url = self.service.base_url

    @property
    def journal(self) -> Journal:
        return self.service._journal


@contextlib.contextmanager
def failing(journal: Journal) -> Iterator[None]:
    """Have SQLite refuse every write, as on a full disk; reading goes on."""
    storage = journal._storage
    with storage._lock:
        storage._connection.execute("PRAGMA query_only = ON")
    try:
        yield
    finally:
        with storage._lock:
            storage._connection.execute("PRAGMA query_only = OFF")


class RealProcess(Caller):
    """The service as a user starts it, to be killed and started again."""

    def __init__(self, env: Mapping[str, str], *, command: tuple[str, ...] = ("app.py",)) -> None:
        self._env, self._command = env, command
        self.start()

    def start(self) -> None:
        self.process_ = subprocess.Popen(
            [sys.executable, *self._command],
            cwd=ROOT,
            env={**os.environ, **self._env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        line = self.process_.stdout.readline()
        assert "listens on" in line, (line, self.log())
        super().__init__(line.split()[-1])

    @property
    def pid(self) -> int:
        return self.process_.pid

    def log(self) -> str:
        """Return what it has written to standard error."""
        return "".join(self._errors)

    def wait_for_log(self, text: str, timeout: float = 10) -> None:
        poll(lambda: text in self.log(), f"{text!r} in the log: {self.log()}", timeout)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        """Send it a signal, and return its exit code."""
        self.process_.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 20) -> int:
        code = self.process_.wait(timeout)
        self._reader.join(5)
        self.process_.stdout.close()
        self.process_.stderr.close()
        self.close()
        return code

    def _read_errors(self) -> None:
        for line in self.process_.stderr:
            self._errors.append(line)


def events(requests_: Any) -> list[Any]:
    """Return the events that a receiver recorded."""
    return [json.loads(one.body) for one in requests_]

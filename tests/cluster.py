"""A real Dask cluster on loopback: a scheduler and workers as child processes, to be killed."""

import os
import subprocess
import sys
from pathlib import Path

from tests.harness import free_port, is_open, poll

#: A job that ends a worker is given up after as many more.
ENV = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}


class Cluster:
    """The scheduler keeps its address over restarts. Workers know nothing of this checkout."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = free_port()
        self.address = f"tcp://127.0.0.1:{self._port}"
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_scheduler(self) -> None:
        self.scheduler = self._start("scheduler", "--port", str(self._port))
        poll(lambda: is_open(self._port), "the scheduler", timeout=20)

    def start_worker(self, *options: str) -> None:
        self.workers.append(
            self._start("worker", self.address, "--nthreads", "2", "--no-nanny", *options)
        )

    def start(self, workers: int) -> "Cluster":
        self.start_scheduler()
        for _ in range(workers):
            self.start_worker()
        return self

    def kill_worker(self) -> None:
        worker = self.workers.pop()
        worker.kill()
        worker.wait()

    def kill(self) -> None:
        """End all of it as a power cut would."""
        for process in (self.scheduler, *self.workers):
            if process:
                process.kill()
                process.wait()
        self.scheduler, self.workers = None, []

    def _start(self, role: str, *arguments: str) -> "subprocess.Popen[bytes]":
        log = (self._directory / f"{role}.log").open("ab")
        with log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", f"distributed.cli.dask_{role}"),
                    *("--host", "127.0.0.1", "--no-dashboard", *arguments),
                ],
                cwd=self._directory,
                env=os.environ | ENV,
                stdout=log,
                stderr=log,
            )

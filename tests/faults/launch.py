"""Starts the service as a user does; it notes what it accepts, fails, or ends at one point.

ACKNOWLEDGED=<path>  writes the id of each accepted job to this file before its answer leaves
ACCEPT=NORMAL        lets answers leave without an fsync, which the product must not do
FAULT=<path>         once this file says `SQLITE_FULL 3`, the third operation from then on of the
                     connection that writes fails with this error; it says so in the log
KILL_AT=Journal.accept:before
                     ends it as kill -9 would when that method is called; with `:after`, when the
                     method has done its work and nobody knows yet
"""

import logging
import os
import sqlite3
import sys
from functools import partial
from pathlib import Path
from typing import Any

import app
from jobs import runner
from jobs.executor import WorkerExecutor
from jobs.journal import Journal
from jobs.storage import Storage
from postback import Sender

#: The exit code of a process that was killed by SIGKILL, as a shell tells it.
KILLED = 137


class Careless(sqlite3.Connection):
    """A connection whose commits never wait for the disk."""

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        return super().execute(statement.replace("synchronous = 2", "synchronous = 1"), *values)


class Faulty(sqlite3.Connection):
    """A connection that fails once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writes = not kwargs["uri"]
        self._code, self._left = "", 0

    def execute(self, *args: Any) -> sqlite3.Cursor:
        if self._writes:
            self._count()
        return super().execute(*args)

    def _count(self) -> None:
        path = Path(os.environ["FAULT"])
        if path.exists():
            self._code, left = path.read_text().split()
            self._left = int(left)
            path.unlink()
        self._left -= 1
        if self._left == 0:
            logging.getLogger("postback").warning("It fails.")
            exc = sqlite3.OperationalError("a fault")
            exc.sqlite_errorname = self._code
            raise exc


def connect_by(factory: type[sqlite3.Connection]) -> None:
    sqlite3.connect = partial(sqlite3.connect, factory=factory)  # type: ignore[assignment]


def acknowledge(path: str) -> None:
    """Note an id as soon as nothing can fail its answer: after the commit."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    accept, commit = Journal.accept, Storage._commit
    accepted: list[str] = []  # in the open transaction

    def accept_and_keep(self: Journal, job: Any, *args: Any, **kwargs: Any) -> None:
        accept(self, job, *args, **kwargs)
        accepted.append(job.id)

    def commit_and_note(self: Storage, *args: Any) -> None:
        ids = accepted.copy()
        accepted.clear()
        commit(self, *args)
        for job_id in ids:
            os.write(descriptor, job_id.encode())

    Journal.accept = accept_and_keep  # type: ignore[method-assign]
    Storage._commit = commit_and_note  # type: ignore[assignment,method-assign]


def die_at(point: str) -> None:
    """Make one method the last that the process calls."""
    method, _, moment = point.partition(":")
    owner_name, _, name = method.partition(".")
    owner = {one.__name__: one for one in (Journal, Sender, WorkerExecutor)}[owner_name]
    original = getattr(owner, name)

    def last(*args: Any, **kwargs: Any) -> None:
        if moment == "after":
            original(*args, **kwargs)
        os._exit(KILLED)

    setattr(owner, name, last)


if __name__ == "__main__":
    if point := os.environ.get("KILL_AT"):
        die_at(point)
    if path := os.environ.get("ACKNOWLEDGED"):
        acknowledge(path)
    if os.environ.get("ACCEPT") == "NORMAL":
        connect_by(Careless)
    if "FAULT" in os.environ:
        connect_by(Faulty)
        runner.RETRY_SECONDS = 0.02
    app.main(sys.argv[1:])

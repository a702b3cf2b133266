"""Starts the service as a user does, with less than it needs, or with less care.

ACKNOWLEDGED=<path>  writes each accepted id to this file before the answer leaves
ACCEPT=NORMAL        lets the answer leave without an fsync: what the product must not do
RUN_AS=<uid>         runs as this user, so that limits of processes hold also for root
NOFILE=<number>      has so many descriptors
"""

import os
import resource
import signal
import sys
from typing import Any

import app
from jobs.journal import Journal
from jobs.storage import Storage


def acknowledge(path: str) -> None:
    """Note an id as soon as nothing can fail its answer."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    accept, settle = Journal.accept, Journal.settle
    accepted: dict[str, bool] = {}

    def accept_and_keep(self: Journal, *args: Any, **kwargs: Any) -> str:
        job_id = accept(self, *args, **kwargs)
        accepted[job_id] = True
        return job_id

    def settle_and_note(self: Journal) -> None:
        before = list(accepted)
        settle(self)
        for job_id in before:
            if accepted.pop(job_id, False):  # no other thread has noted it
                os.write(descriptor, job_id.encode())

    Journal.accept = accept_and_keep  # type: ignore[method-assign]
    Journal.settle = settle_and_note  # type: ignore[method-assign]


def be_careless(level: str) -> None:
    if level == "NORMAL":
        Storage._synchronise = lambda self: None  # type: ignore[method-assign]


def limit_files(number: str) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(number), int(number)))


def run_as(user: str) -> None:
    """Start again as another user, who may read all files, as Python may be anywhere."""
    rights = ("--inh-caps", "+dac_override", "--ambient-caps", "+dac_override")
    command = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", *rights]
    del os.environ["RUN_AS"]
    os.execvp(command[0], [*command, sys.executable, "-m", "tests.faults.launch"])


def toggle_threads(_: str) -> None:
    def toggle(*_: object) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        resource.setrlimit(resource.RLIMIT_NPROC, (hard if soft == 1 else 1, hard))

    signal.signal(signal.SIGUSR2, toggle)


WISHES = {
    "RUN_AS": run_as,
    "THREADS": toggle_threads,
    "ACKNOWLEDGED": acknowledge,
    "ACCEPT": be_careless,
    "NOFILE": limit_files,
}

if __name__ == "__main__":
    for name, fulfil in WISHES.items():
        if name in os.environ:
            fulfil(os.environ[name])
    app.main(sys.argv[1:])

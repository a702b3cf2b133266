"""Starts the service as a user does, and ends it at one point as kill -9 would.

`KILL_AT=Journal.accept:before python -m tests.launcher` ends it when that method is called;
with `:after`, when the method has done its work and nobody knows yet.
"""

import os
import sys
from typing import Any

import app
from jobs.executor import WorkerExecutor
from jobs.journal import Journal
from postback import Sender

#: The exit code of a process that was killed by SIGKILL, as a shell tells it.
KILLED = 137

OWNERS = {owner.__name__: owner for owner in (Journal, Sender, WorkerExecutor)}


def die_at(point: str) -> None:
    """Make one method the last that the process calls."""
    method, _, moment = point.partition(":")
    owner_name, _, name = method.partition(".")
    owner = OWNERS[owner_name]
    original = getattr(owner, name)

    def last(*args: Any, **kwargs: Any) -> None:
        if moment == "after":
            original(*args, **kwargs)
        os._exit(KILLED)

    setattr(owner, name, last)


if __name__ == "__main__":
    die_at(os.environ["KILL_AT"])
    app.main(sys.argv[1:])

"""What analyses do to the process they run in. `act` also calls those of tests/analyses.py."""

import contextvars
import decimal
import logging
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

from tests import analyses
from tests.analyses import act as act_plainly

_local = threading.local()
_variable = contextvars.ContextVar("_variable", default=None)
_held: list[int] = []


def act(data: Any, job: Any) -> Any:
    """Call the function that the data names, here or in tests/analyses.py."""
    function = globals().get(data["call"])
    return function(data["with"]) if function else act_plainly(data, job)


def die_later(data: float) -> None:
    """End the process in as many seconds, and return at once."""
    threading.Timer(data, os._exit, (3,)).start()


def terminate(data: Any) -> None:
    """Ask the own process to end."""
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(analyses.PATIENCE_SECONDS)


def close_descriptors(data: list[int]) -> str:
    """Close a range of file descriptors, and go on for a while."""
    os.closerange(*data)
    if data[0] > 2:
        threading.Event().wait(analyses.PATIENCE_SECONDS)
    return "closed"


def keep_the_interpreter(data: Any) -> None:
    """Never let another thread run again."""
    re.match("(a+)+$", "a" * 60 + "b")


def open_too_many(data: int) -> None:
    """Open files until there can be only as many more."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    try:
        while True:
            _held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        for _ in range(data):
            os.close(_held.pop())


def crash_beside_a_child(data: Any) -> None:
    """Fork a child that holds all connections open, and end."""
    if os.fork() == 0:
        threading.Event().wait(analyses.PATIENCE_SECONDS)
    os._exit(3)


def leave_state(data: Any) -> list[Any]:
    """Return what the last job left in this thread, and leave the same."""
    thread = threading.current_thread()
    seen = [decimal.getcontext().prec, _variable.get(), hasattr(_local, "mark")]
    seen.append(hasattr(thread, "mark"))
    decimal.getcontext().prec, _local.mark, thread.mark = 3, 1, 1  # type: ignore[attr-defined]
    _variable.set(data)
    return seen


def surroundings(data: Any) -> dict[str, Any]:
    """Return what a process of one's own would look like."""
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    return {
        "input": sys.stdin.read(),
        "arguments": sys.argv[1:],
        "signals": [*masked] or [one.name for one in handlers],
        "is group leader": os.getpgrp() == os.getpid(),
    }


def print_in_every_way(data: str) -> None:
    """Print by Python, by descriptor, by a child, and with characters that are none."""
    print(f"{data} print \ud800")  # noqa: T201 - its point
    os.write(1, f"{data} write\n".encode())
    subprocess.run(["echo", f"{data} child"], check=True)
    logging.getLogger("own").warning("%s logged", data)
    logging.getLogger("own").warning("%s logged", data, extra={"job_id": "own"})


def pool(data: list[int]) -> list[int]:
    with multiprocessing.Pool(2) as workers:
        return workers.map(abs, data)


def pool_given_up(data: Any) -> str:
    with multiprocessing.Pool(2) as workers:
        try:
            workers.apply_async(signal.pause).get(timeout=0.1)
        except multiprocessing.TimeoutError:
            return "gave up"
    return "never"


def terminate_a_child(data: Any) -> int | None:
    child = multiprocessing.Process(target=signal.pause)
    child.start()
    child.terminate()
    child.join()
    return child.exitcode


def complete(data: str, job: Any) -> None:
    """Report half and all of it."""
    job.progress(0.5, data)
    threading.Event().wait(0.3)
    job.progress(1)

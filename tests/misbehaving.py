"""What analyses do to the process they run in, and `work` for the soak."""

import contextlib
import contextvars
import ctypes
import decimal
import inspect
import logging
import multiprocessing
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

from tests import analyses

_local = threading.local()
_variable = contextvars.ContextVar("_variable", default=None)
_held: list[int] = []


def act(data: Any, job: Any) -> Any:
    """Call the function of this file that the data names, or do what `tests.analyses:act` does."""
    function = globals().get(data.get("call", "")) if isinstance(data, dict) else None
    if not function:
        return analyses.act(data, job)
    takes_job = "job" in inspect.signature(function).parameters
    return function(data["with"], job) if takes_job else function(data["with"])


def kill_service(data: float, job: Any) -> None:
    """End the service like kill -9: at once where the job runs alone, and else a little later."""
    threading.Event().wait(data if job.start <= 3 else 0)
    os.kill(os.getppid(), signal.SIGKILL)


def die_later(data: float) -> None:
    """End the process in as many seconds, and return at once."""
    threading.Timer(data, os._exit, (3,)).start()


def terminate(data: Any) -> None:
    """Ask the own process to end."""
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(analyses.PATIENCE_SECONDS)


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


def meddle(data: str) -> str:
    """Do to the process what an analysis should not."""
    if data == "print":
        sys.stdout.write("x" * 1_000_000)
    if data == "write natively":  # as a library written in C does
        with contextlib.suppress(OSError):
            os.write(1, b"progress\n")
    if data == "change directory":
        pathlib.Path("app.py").stat()  # no other job has changed it
        os.chdir("/")
    if data == "set a handler":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if data == "close output":
        sys.stdout.close()
        os.close(1)
    if data == "close all":
        os.closerange(3, 1000)
    return data


def hold(data: list[Any]) -> None:
    """Leave a mark beside a path, and keep the interpreter for as many seconds."""
    path, seconds = data
    analyses.note_down(path, "")
    ctypes.PyDLL(None).sleep(seconds)


def leave_behind(data: Any) -> Any:
    """Start a process that outlives the analysis."""
    subprocess.Popen(["sh", "-c", "sleep 60 & exit 0"])
    return data


def grow(data: list[Any], job: Any) -> Any:
    """Wait for a file, then return as many characters as the data says."""
    path, size = data
    analyses.wait(path, job)
    return "x" * size


def work(data: int, job: Any) -> int:
    """Return the data. Every eighth takes three steps, and goes on behind those that it kept."""
    if data % 8:
        return data
    owner, done = job.kept or (data, 0)
    for step in range(done, 3):
        threading.Event().wait(0.02)
        job.progress(step / 3, keep=[data, step + 1])
    return owner  # what another job kept would be seen

"""Analyses that misbehave: ANALYSIS=tests.faults.misbehaving:act calls what the data names."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import Any

from tests import analyses


def act(data: Any, job: Any) -> Any:
    """Call the function of this file that the data names, or do what `tests.analyses:act` does."""
    function = globals().get(data.get("call", "")) if isinstance(data, dict) else None
    return function(data["with"], job) if function else analyses.act(data, job)


def meddle(data: str, job: Any) -> str:
    """Do to the process what an analysis should not."""
    if data == "print":
        sys.stdout.write("x" * 1_000_000)
    if data == "write natively":  # as a library written in C does
        with contextlib.suppress(OSError):
            os.write(1, b"progress\n")
    if data == "change directory":
        os.chdir("/")
    if data == "set a handler":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if data == "close output":
        sys.stdout.close()
        os.close(1)
    if data == "close all":
        os.closerange(3, 1000)
    return data


def hold(data: list[Any], job: Any) -> None:
    """Leave a mark beside a path, and keep the interpreter for as many seconds."""
    path, seconds = data
    analyses.note_down(path, "")
    ctypes.PyDLL(None).sleep(seconds)


def leave_behind(data: Any, job: Any) -> Any:
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

"""Which processor cores a thread may use: one for all that serve, every one for an analysis.

Python lets one thread of a process run at a time. On several cores each hand-over wakes another
core, which cost more than the work that was handed over. So the threads that serve keep to one
core; what they analyze, and the processes that are started, may use every one.
"""

import contextlib
import os
from collections.abc import Iterator

#: Whether the system can do that.
_CAN = hasattr(os, "sched_setaffinity")


def keep_to_one() -> None:
    """Keep this thread, and those it will start, to the core that serves."""
    if _CAN:
        cores = sorted(_every())
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


@contextlib.contextmanager
def every() -> Iterator[None]:
    """Let this thread, and those it will start, use every core within the block."""
    if not _CAN:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _every())
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _every() -> set[int]:
    return os.sched_getaffinity(os.getpid())  # those of the main thread, which serves nobody

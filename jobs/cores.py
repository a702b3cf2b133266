"""Which processor cores a thread may use: one for all that serve, every one for an analysis.

Python lets one thread of a process run at a time. On several cores each hand-over wakes another
core, which cost more than the work that was handed over. So the threads that serve keep to one
core; what they analyze, and the processes that are started, may use every one.
"""

import contextlib
import functools
import os
import random
from collections.abc import Iterator

#: Whether the system can do that.
_CAN = hasattr(os, "sched_setaffinity")


def keep_to_one() -> None:
    """Keep this thread, and those it will start, to the core that serves."""
    if _CAN:
        _keep_to({_serving()})


@contextlib.contextmanager
def every() -> Iterator[None]:
    """Let this thread, and those it will start, use every core within the block."""
    if not _CAN:
        yield
        return
    before = os.sched_getaffinity(0)
    _keep_to(_every())
    try:
        yield
    finally:
        _keep_to(before)


def _keep_to(cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # it is forbidden, or those cores are gone
        os.sched_setaffinity(0, cores)


@functools.cache
def _serving() -> int:
    # By chance, not by the process id, which in a container is always 1.
    return random.choice(sorted(_every()))


def _every() -> set[int]:
    return os.sched_getaffinity(os.getpid())  # those of the main thread, which serves nobody

"""Which processor cores a thread may use: one for all that serve, every one for an analysis.

Python lets one thread of a process run at a time. On several cores each hand-over wakes another
core, which cost more than the work that was handed over. So the threads that serve keep to one
core; analyses, unless they are always short, and the processes that are started may use every one.
"""

import contextlib
import functools
import os
import random
import time
from collections.abc import Callable
from typing import Any

#: A run that is over sooner is short, in seconds.
SHORT_SECONDS = 0.001

#: After a run that is not short, so many may use every core.
RUNS = 100

#: Whether the system can do that.
_CAN = hasattr(os, "sched_setaffinity")


def keep_to_one() -> None:
    """Keep this thread, and those it will start, to the core that serves."""
    if _CAN:
        _keep_to({_serving()})


class Roaming:
    """A function that may use every core while it runs, and so may the threads it starts.

    Unless its last runs were all short: then it keeps to the core of its thread. A short one gains
    nothing by another core, and to be allowed one costs more than it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._roams = RUNS  # so many of the next runs may use every core

    def __call__(self, *args: Any) -> Any:
        """Return what the function returns for the arguments."""
        before = os.sched_getaffinity(0) if _CAN and self._roams else None
        if before:
            _keep_to(_every())
        began = time.monotonic()
        try:
            return self._function(*args)
        finally:
            is_short = time.monotonic() - began < SHORT_SECONDS
            self._roams = max(0, self._roams - 1) if is_short else RUNS
            if before:
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

"""How threads wait: until there is something to do, or until the journal can be written again."""

import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from jobs import errors

#: Seconds until something that failed (the journal, a thread that would not start) is tried again.
RETRY_SECONDS = 1.0

T = TypeVar("T")


class Alarm:
    """Lets one thread sleep until there is something to do; any thread may ring it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rings_at = math.inf  # monotonic

    def ring(self) -> None:
        """Wake the thread at once; if it does not sleep, it will not the next time."""
        self.ring_by(0.0)

    def ring_by(self, moment: float) -> None:
        """Wake the thread at a moment (monotonic), unless it wakes before."""
        with self._changed:
            if moment < self._rings_at:
                self._rings_at = moment
                self._changed.notify()

    def sleep(self, seconds: float) -> None:
        """Sleep so long, or until it rings."""
        until = time.monotonic() + seconds
        with self._changed:
            while (left := min(until, self._rings_at) - time.monotonic()) > 0:
                self._changed.wait(left)
            self._rings_at = math.inf


def insist(work: Callable[[], T], stopped: threading.Event) -> T:
    """Return what a write returns, trying until the journal takes it: nothing else may follow.

    Raises:
        JournalError: It never will, or the service stops.
    """
    while True:
        try:
            return work()
        except errors.JournalLostError:
            raise
        except errors.JournalError:
            if stopped.wait(RETRY_SECONDS):
                raise

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
        self._rung = threading.Condition()
        self._at = math.inf  # when it looks again (monotonic)

    def ring(self) -> None:
        """Wake the thread at once."""
        self.ring_by(0.0)

    def ring_by(self, moment: float) -> None:
        """Have the thread look by a moment (monotonic): it wakes, and sees how long to sleep."""
        with self._rung:
            if moment < self._at:
                self._at = 0.0
                self._rung.notify()

    def sleep(self, seconds: float) -> None:
        """Sleep so long, or until it rings; not at all if it has rung since the last time."""
        with self._rung:
            if self._at > 0:
                self._at = time.monotonic() + seconds
                self._rung.wait_for(lambda: self._at == 0, timeout=max(0.0, seconds))
            self._at = math.inf


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

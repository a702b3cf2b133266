"""Daemon threads that are named for what they do, and kept when it is done.

Knows when a thread is started. A new one costs several times what it costs to wake one, and at
first it runs slowly: with a new thread for each job a quarter of the jobs a second were lost.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from jobs import cores

#: Threads that are kept, though they have nothing to do.
MAX_IDLE = 64

_Work = tuple[str, Callable[..., None], tuple[Any, ...]]


class Threads:
    """As many threads as there is work at once. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._idle: deque[SimpleQueue[_Work | None]] = deque()
        self._closed = False

    def start(self, name: str, work: Callable[..., None], *args: Any) -> None:
        """Do some work, which must not raise, in a thread of that name.

        Raises:
            RuntimeError: The machine allows no more threads.
        """
        try:
            inbox = self._idle.pop()
        except IndexError:
            first = (name, work, args)
            threading.Thread(target=self._live, args=first, name=name, daemon=True).start()
        else:
            inbox.put((name, work, args))

    def close(self) -> None:
        """End the threads that do nothing, and each other one once it is done."""
        self._closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().put(None)

    def _live(self, name: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        cores.keep_to_one()
        work(*args)
        inbox: SimpleQueue[_Work | None] = SimpleQueue()
        while not self._closed and len(self._idle) < MAX_IDLE:
            del name, work, args  # a payload is not kept in memory longer than it is needed
            self._idle.append(inbox)
            if (told := inbox.get()) is None:
                return
            name, work, args = told
            del told
            threading.current_thread().name = name
            work(*args)

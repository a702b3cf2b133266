"""Daemon threads that are named for what they do, and kept when it is done.

Knows when a thread is started. A new one costs several times what it costs to wake one, and at
first it runs slowly: with a new thread for each job a quarter of the jobs a second were lost.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from jobs import cores, errors

#: Threads that are kept, though they have nothing to do.
MAX_IDLE = 64

log = logging.getLogger("postback")

_Work = tuple[str, Callable[..., None], tuple[Any, ...]]


class Threads:
    """As many threads as there is work at once. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._idle: deque[SimpleQueue[_Work | None]] = deque()
        self._closed = False

    def start(self, name: str, work: Callable[..., None], *args: Any) -> bool:
        """Do some work in a thread of that name; what it raises is logged.

        Returns:
            False, if the machine allows no more threads.
        """
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            if not _start(self._live, inbox):
                return False
        inbox.put((name, work, args))
        return True

    def close(self) -> None:
        """End the threads that do nothing, and each other one once it is done."""
        self._closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().put(None)

    def _live(self, inbox: SimpleQueue[_Work | None]) -> None:
        cores.keep_to_one()
        while told := inbox.get():
            name, work, args = told
            threading.current_thread().name = name
            _do(work, args)
            del told, name, work, args  # a payload is not kept in memory longer than it is needed
            if self._closed or len(self._idle) >= MAX_IDLE:
                return
            self._idle.append(inbox)


def _start(live: Callable[..., None], inbox: SimpleQueue[_Work | None]) -> bool:
    try:
        threading.Thread(target=live, args=(inbox,), daemon=True).start()
    except RuntimeError as exc:
        log.warning("thread failed to start", extra={"error": str(exc)})
        return False
    return True


def _do(work: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        work(*args)
    except errors.JournalError:
        pass  # the process is about to end; the job is taken up by the next start
    except Exception:
        log.exception("thread failed", extra={"job_id": threading.current_thread().name})

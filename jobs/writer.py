"""Writes to the journal what was handed over, many writes in one commit."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from jobs.errors import JournalError, Refusal
from jobs.journal import Journal

#: After so many seconds no more writes are tried alone, as when another program locks the journal.
MAX_SECONDS = 0.5

log = logging.getLogger("postback")


class _Write(NamedTuple):
    write: Callable[[], Any]
    then: Callable[[Any], None]
    may_fail: bool


class Writer:
    """Does what is handed over. Only the loop may call `write`.

    Any thread may call `hand_over`, and then has to wake the loop.

    Args:
        journal: What is written to.

    Attributes:
        waiting: What the next `write` will try.
        failure: Why something could not be written yet; None when all is.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.waiting: deque[_Write] = deque()
        self.failed: list[_Write] = []  # to be tried again
        self.failure: JournalError | None = None

    def hand_over(
        self, write: Callable[[], Any], then: Callable[[Any], None], *, may_fail: bool = False
    ) -> None:
        """Have something written.

        Args:
            write: Changes the journal, inside a transaction. It is tried again until the journal
                takes it.
            then: Is given what `write` returned, after the commit; or the Refusal that it raised,
                mostly a MoveError.
            may_fail: `then` is also given any other exception than a JournalError.
        """
        self.waiting.append(_Write(write, then, may_fail))

    def write(self, *, retry: bool = False) -> None:
        """Write what was handed over, in one transaction.

        When that fails, any of it may be to blame, so each is written alone, as far as there is
        time: the loop must go on.

        Args:
            retry: Try again, too, what failed before.
        """
        if retry:
            self.waiting.extendleft(reversed(self.failed))
            self.failed, self.failure = [], None
        writes = [self.waiting.popleft() for _ in range(len(self.waiting))]
        if not writes:
            return
        deadline = time.monotonic() + MAX_SECONDS
        try:
            with self._journal.transaction():
                answers = [_answer(one) for one in writes]
        except Exception as exc:  # noqa: BLE001 - it is logged
            _log(exc)
            if not isinstance(exc, JournalError):  # a write is to blame, and took the time
                deadline = time.monotonic() + MAX_SECONDS
            answers = [self._write_alone(one, deadline) for one in writes]
        for one, answer in zip(writes, answers, strict=True):
            if isinstance(answer, JournalError):
                self.failed.append(one)
                self.failure = answer
            else:
                _tell(one, answer)

    def _write_alone(self, one: _Write, deadline: float) -> Any:
        if time.monotonic() > deadline:
            return JournalError("The journal takes too long to be written.")
        try:
            with self._journal.transaction():
                return _answer(one)
        except JournalError as exc:
            return exc
        except Exception as exc:  # noqa: BLE001 - it is logged
            _log(exc)
            return exc if one.may_fail else JournalError(f"A write failed: {exc!r}.")


def _answer(one: _Write) -> Any:
    """Return what a write returns, or how the state of its job did not allow it."""
    try:
        return one.write()
    except JournalError:
        raise
    except Refusal as exc:
        return exc


def _log(exc: Exception) -> None:
    if not isinstance(exc, JournalError):  # which was logged where it was seen
        with contextlib.suppress(Exception):
            log.error("write failed", exc_info=exc)


def _tell(one: _Write, answer: Any) -> None:
    try:
        one.then(answer)
    except Exception:
        with contextlib.suppress(Exception):  # others are still to be told
            log.exception("write not followed up")

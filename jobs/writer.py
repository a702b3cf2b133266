"""Writes to the journal for many threads, in shared commits."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from jobs.errors import JournalError, MoveError
from jobs.journal import Journal

log = logging.getLogger("postback")


class _Write(NamedTuple):
    write: Callable[[], Any]
    then: Callable[[Any], None]


class Writer:
    """Does what threads hand over. `hand_over` may be called from any thread.

    Args:
        journal: What is written to.
        on_write: Is called when there is something for `write`.
    """

    def __init__(self, journal: Journal, on_write: Callable[[], None]) -> None:
        self._journal = journal
        self._on_write = on_write
        self._writes: deque[_Write] = deque()
        self._is_closed = False

    def hand_over(self, write: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Have something written.

        Args:
            write: Changes the journal, inside a transaction.
            then: Is given what `write` returned, after the commit, or the exception it raised. That
                is a MoveError when the job's state did not allow it, and a JournalError only after
                `close`: what the journal cannot take now is tried again.
        """
        self._writes.append(_Write(write, then))
        if self._is_closed:
            self.close()
        else:
            self._on_write()

    def write(self) -> None:
        """Write what was handed over, in one transaction.

        When that fails, any of it may be to blame, so each is written alone.

        Raises:
            JournalError: Something is still to be written.
        """
        writes = [self._writes.popleft() for _ in range(len(self._writes))]
        if not writes:
            return
        try:
            with self._journal.transaction():
                answers = [_answer(one) for one in writes]
        except Exception:  # noqa: BLE001 - it comes again, and then it is told
            answers = [self._write_alone(one) for one in writes]
        for one, answer in zip(writes, answers, strict=True):
            if isinstance(answer, JournalError):
                self._writes.append(one)
            else:
                _tell(one, answer)
        if failure := next((one for one in answers if isinstance(one, JournalError)), None):
            raise failure

    def close(self) -> None:
        """Give up what could not be written, and what is handed over from now on."""
        self._is_closed = True
        while self._writes:
            _tell(self._writes.popleft(), JournalError("The service stops."))

    def _write_alone(self, one: _Write) -> Any:
        try:
            with self._journal.transaction():
                return _answer(one)
        except Exception as exc:  # noqa: BLE001 - it is told to whoever wanted it written
            return exc


def _answer(one: _Write) -> Any:
    """Return what a write returns, or how the state of its job did not allow it."""
    try:
        return one.write()
    except MoveError as exc:
        return exc


def _tell(one: _Write, answer: Any) -> None:
    try:
        one.then(answer)
    except Exception:
        log.exception("write not followed up")

"""Attempts at postbacks: a bounded number at once, each recorded with what follows from it.

Knows how many are under way, and which are due. The first attempt is made by the job's own thread,
when there is a place for it; all others are started here, by the scheduler, once they are due.
"""

import contextlib
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Protocol

from jobs import errors, model, waiting
from jobs.journal import Journal
from jobs.model import State
from jobs.threads import Threads
from jobs.waiting import Alarm

#: Attempts under way at once, all receivers together and for one of them.
MAX_ATTEMPTS = 256
MAX_ATTEMPTS_PER_RECEIVER = 32

#: The longest time that is slept until the next look for what is due: the clock may have been set,
#: or the machine suspended.
ROUND_SECONDS = 60.0

#: What the log says of a job that has ended.
_ENDED = {State.DELIVERED: "job delivered", State.UNDELIVERED: "job undelivered"}

log = logging.getLogger("postback")


class Postback(Protocol):
    """What is asked of whoever posts events."""

    #: No attempt is due later than this after another.
    longest_wait_seconds: float

    def attempt(self, job: model.Job, event: bytes) -> model.Attempt:
        """Make the job's next attempt; never raises."""


class Attempts:
    """Makes attempts. Every method may be called from any thread, `start_due` from one alone.

    Args:
        on_attempt: Is told of each attempt, and of the state its job has now.
        on_left: Is called when an attempt is over, while the service drains.
        stopped: Once it is set, nothing is tried again.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        postback: Postback,
        threads: Threads,
        alarm: Alarm,
        stopped: threading.Event,
        clock: Callable[[], datetime],
        on_attempt: Callable[[model.Job, model.Attempt, State], None],
        on_left: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._postback = postback
        self._threads = threads
        self._alarm = alarm
        self._stopped = stopped
        self._clock = clock
        self._on_attempt = on_attempt
        self._on_left = on_left
        self._lock = threading.Lock()  # guards what follows
        self._under_way: Counter[str] = Counter()  # by receiver
        self._backlog = False  # one was due and found no place
        self._draining = False
        self._finished = 0
        self._last_look_at = clock()

    @property
    def finished(self) -> int:
        """How many jobs had their last attempt."""
        return self._finished

    @property
    def are_under_way(self) -> bool:
        """Whether a place is taken."""
        return bool(self._under_way)

    def drain(self) -> None:
        """Start none any more that is due; those of jobs that end may go on."""
        self._draining = True

    def take(self, receiver: str) -> bool:
        """Take a place for one attempt; return False when none is free."""
        with self._lock:
            return self._take(receiver, 1) > 0

    def leave(self, receiver: str, count: int = 1) -> None:
        """Leave places that were taken."""
        if not count:
            return
        with self._lock:
            self._under_way[receiver] -= count
            if not self._under_way[receiver]:
                del self._under_way[receiver]
            if self._backlog:
                self._backlog = False
                self._alarm.ring()
        if self._draining:
            self._on_left()

    def deliver(self, job: model.Job, event: bytes) -> None:
        """Make one attempt, in a place that was taken, and store what follows from it."""
        try:
            attempt = self._postback.attempt(job, event)
            state = waiting.insist(
                lambda: self._journal.record(job, attempt, now=self._clock()), self._stopped
            )
            self._log(job, attempt, state)
            self._on_attempt(job, attempt, state)
            self._note_next(attempt.seconds_until_next)
        finally:
            self.leave(job.receiver)

    def advance(self) -> None:
        """Bring forward what is due later than any schedule allows: the clock was set back."""
        latest = self._clock() + timedelta(seconds=self._postback.longest_wait_seconds)
        self._journal.advance(latest=latest)

    def start_due(self) -> float:
        """Start the attempts that are due; return the seconds until the next one is."""
        soonest, now = ROUND_SECONDS, self._clock()
        if now < self._last_look_at:
            self.advance()
        self._last_look_at = now
        for receiver, due_at in [] if self._draining else self._journal.earliest_attempts():
            seconds = (due_at - now).total_seconds()
            if seconds > 0:
                soonest = min(soonest, seconds)
            elif self._start(receiver, now):
                soonest = 0.0  # there may be more
        return soonest

    def _take(self, receiver: str, wanted: int) -> int:
        """Take places, and return how many were free. The lock is held."""
        room = min(
            MAX_ATTEMPTS_PER_RECEIVER - self._under_way[receiver],
            MAX_ATTEMPTS - self._under_way.total(),
        )
        taken = max(0, min(room, wanted))
        self._backlog |= taken < wanted
        if taken:
            self._under_way[receiver] += taken
        return taken

    def _start(self, receiver: str, now: datetime) -> int:
        """Start attempts that are due for one receiver; return how many."""
        with self._lock:
            places = self._take(receiver, MAX_ATTEMPTS_PER_RECEIVER)
        claimed: list[tuple[model.Job, bytes]] = []
        try:
            if places:
                claimed = self._journal.claim_due(receiver, now=now, limit=places)
        finally:
            self.leave(receiver, places - len(claimed))
        for job, event in claimed:
            if not self._threads.start(job.id, self.deliver, job, event):
                until = now + timedelta(seconds=waiting.RETRY_SECONDS)
                put_off = functools.partial(self._journal.put_off, job.id, until=until)
                with contextlib.suppress(errors.JournalError):  # the process is about to end
                    waiting.insist(put_off, self._stopped)
                self.leave(receiver)
        return len(claimed)

    def _note_next(self, seconds: float | None) -> None:
        if seconds is None:
            with self._lock:
                self._finished += 1
        else:
            self._alarm.ring_by(time.monotonic() + seconds)

    def _log(self, job: model.Job, attempt: model.Attempt, state: State) -> None:
        if attempt.error:
            values = {
                "attempt": attempt.number,
                "status_code": attempt.status_code,
                "error": attempt.error,
                "seconds_until_next": attempt.seconds_until_next,
            }
            log.warning("attempt failed", extra=job.facts | values)
        if state is not State.DELIVERING:
            story = {
                "outcome": job.outcome,
                "starts": job.starts,
                "attempts": attempt.number,
                "seconds": round((self._clock() - job.created_at).total_seconds(), 3),
            }
            log.info(_ENDED[state], extra=job.facts | story)

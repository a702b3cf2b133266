"""What happens, counted: Prometheus text for `GET /metrics`, and the last hour for the page.

Owns prometheus_client. Counters and histograms count from the start of the process. What the
journal knows is read from it at each request, so it is also right after a restart.
"""

import functools
import threading
from collections import Counter, deque
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import prometheus_client

from jobs import model
from jobs.journal import Journal
from jobs.model import Outcome, State
from web.logs import Answer

#: What kind of text `Metrics.text` returns.
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4

#: Bounds of histograms in seconds: for what should take no time, and for what may take long.
SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
LONG = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200, 43200)

#: Minutes that the page shows, and what it shows of each.
MINUTES = 60
COUNTED = ("accepted", "delivered", "undelivered")


class _Minute(NamedTuple):
    """One minute.

    Attributes:
        answers: How many took so many seconds, which are rounded to two digits.
    """

    begins_at: datetime
    counts: dict[str, int]
    answers: Counter[float]


class Metrics:
    """Counts what happens. Every method may be called from any thread."""

    def __init__(self, clock: Callable[[], datetime] = model.utc_now) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards the minutes
        self._minutes: deque[_Minute] = deque(maxlen=MINUTES)
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = prometheus_client.CollectorRegistry()
        options: dict[str, Any] = {"namespace": "postback", "registry": self._registry}
        counter: Any = functools.partial(prometheus_client.Counter, **options)
        gauge: Any = functools.partial(prometheus_client.Gauge, **options)
        seconds: Any = functools.partial(prometheus_client.Histogram, unit="seconds", **options)

        self._accepted = counter("jobs_accepted", "Jobs committed and answered")
        self._refused = counter("jobs_refused", "Requests that left no trace", ["reason"])
        self._finished = counter("jobs_finished", "Analyses that ended", ["outcome"])
        #: Counts an analysis that raised an exception and is run again.
        self.retried = counter("analyses_retried", "Failed analyses that are run again").inc
        self._ended = counter("jobs_ended", "Jobs delivered or undelivered", ["state"])
        self._attempts = counter("attempts", "Attempts at postbacks", ["result"])
        names = ("method", "route", "status_code")
        self._answer = seconds("answer", "From a request to its answer", names, buckets=SHORT)
        #: Counts the seconds of one durable commit.
        self.committed = seconds("commit", "One durable commit", buckets=SHORT).observe
        self._attempt = seconds("attempt", "One attempt at a postback", buckets=LONG)
        self._waiting = seconds("waiting", "From the answer to the start", buckets=LONG)
        self._running = seconds("running", "From an analysis' start to its end", buckets=LONG)
        self._delivery = seconds("delivery", "From the answer to delivered", buckets=LONG)
        self._jobs = gauge("jobs", "Jobs that are not delivered", ["state"])
        self._ages = gauge("oldest_job_age_seconds", "Age of the oldest job", ["state"])
        self._size = gauge("journal_bytes", "Size of the journal")
        for outcome in Outcome:
            self._finished.labels(outcome)
        for state in (State.DELIVERED, State.UNDELIVERED):
            self._ended.labels(state)

    def answered(self, answer: Answer) -> None:
        """Count one answer of the service."""
        # Without a route the method is whatever a caller made up, so it gets no label of its own.
        method = answer.method if answer.route != "none" else "any"
        self._answer.labels(method, answer.route, answer.status_code).observe(answer.seconds)
        is_process = (method, answer.route) == ("POST", "/process")
        if is_process:
            seconds = float(f"{answer.seconds:.1e}")
            with self._lock:
                self._minute(self._clock()).answers[seconds] += 1
        if answer.reason and (is_process or answer.route == "none"):  # by the server itself
            self._refused.labels(answer.reason.lower().replace(" ", "_")).inc()

    def accepted(self, job: model.Job) -> None:
        """Count a job that was committed."""
        self._accepted.inc()
        self._count(job.created_at, "accepted")

    def ended_analysis(self, job: model.Job, ending: model.Ending) -> None:
        """Count an analysis that ended. One that was canceled before has no start."""
        self._finished.labels(ending.outcome).inc()
        if ending.started_at and ending.finished_at:
            self._waiting.observe(_seconds(job.created_at, ending.started_at))
            self._running.observe(_seconds(ending.started_at, ending.finished_at))

    def attempted(self, job: model.Job, attempt: model.Attempt, state: State) -> None:
        """Count an attempt, and the end of the job if it was the last one."""
        status_code = attempt.status_code
        result = f"{status_code // 100}xx" if status_code else "no_answer"
        self._attempts.labels("delivered" if attempt.delivered else result).inc()
        self._attempt.observe(attempt.duration_seconds)
        if state is State.DELIVERING:
            return
        now = self._clock()
        self._ended.labels(state).inc()
        self._count(now, state)
        if state is State.DELIVERED and not job.resent_after:
            self._delivery.observe(_seconds(job.created_at, now))

    def text(self, journal: Journal) -> bytes:
        """Return everything in Prometheus' text format.

        Raises:
            JournalError: The journal cannot be read.
        """
        now = self._clock()
        for state, count, created_at in journal.census():
            self._jobs.labels(state).set(count)
            self._ages.labels(state).set(_seconds(created_at or now, now))
        self._size.set(journal.size_bytes())
        return prometheus_client.generate_latest(self._registry)

    def hour(self) -> list[dict[str, Any]]:
        """Return the last 60 minutes, the oldest first, as far as this process has seen them."""
        earliest = self._clock() - timedelta(minutes=MINUTES)
        with self._lock:
            return [
                {"at": model.text_of(begins_at), **counts, "p99_seconds": _p99_seconds(answers)}
                for begins_at, counts, answers in self._minutes
                if begins_at > earliest
            ]

    def _count(self, now: datetime, what: str) -> None:
        with self._lock:
            self._minute(now).counts[what] += 1

    def _minute(self, now: datetime) -> _Minute:
        # A clock that is set back goes on counting in the latest minute.
        if not self._minutes or now - self._minutes[-1].begins_at >= timedelta(minutes=1):
            begins_at = now.replace(second=0, microsecond=0)
            self._minutes.append(_Minute(begins_at, dict.fromkeys(COUNTED, 0), Counter()))
        return self._minutes[-1]


def _p99_seconds(answers: Counter[float]) -> float | None:
    left = answers.total() * 0.99
    for seconds in sorted(answers):
        left -= answers[seconds]
        if left <= 0:
            return seconds
    return None


def _seconds(begin: datetime, end: datetime) -> float:
    return max(0.0, (end - begin).total_seconds())  # the clock may have been set back

"""What happens, counted: Prometheus text for `GET /metrics`, and the last hour for the page.

Owns prometheus_client. Counters and histograms count from the start of the process. What the
journal knows anyway is read from it when somebody asks, so it is right after a restart too.
"""

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import prometheus_client
from prometheus_client import Histogram
from prometheus_client.core import GaugeMetricFamily

from jobs import model
from jobs.journal import Journal
from jobs.model import State
from jobs.runner import Observer
from web.logs import Answer

#: What kind of text `Metrics.text` returns.
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4

#: Bounds of histograms, in seconds: of what should be over at once, and of what may take long.
SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
LONG = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200, 43200)

#: Minutes that the page shows.
MINUTES = 60

#: Answer times are kept for the page in steps of this factor: their p99 is right within 10 %.
STEP = 1.1

#: The route whose answer times the page shows: the one that makes a promise.
PROCESS = ("POST", "/process")


class Metrics(Observer):
    """Counts what it is told. Every method may be called from any thread."""

    def __init__(self, clock: Callable[[], datetime] = model.utc_now) -> None:
        self._clock = clock
        self._hour = _Hour()
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = prometheus_client.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(f"postback_{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, bounds: tuple[float, ...], *labels: str
        ) -> prometheus_client.Histogram:
            full_name = f"postback_{name}_seconds"
            return Histogram(full_name, text, labels, buckets=bounds, registry=registry)

        self._accepted = counter("jobs_accepted", "Jobs committed and answered")
        text = "POST /process that left no trace"
        self._refused = cache(counter("jobs_refused", text, "reason").labels)
        self._finished = cache(counter("jobs_finished", "Analyses that ended", "outcome").labels)
        self._ended = cache(counter("jobs_ended", "Jobs delivered or given up", "state").labels)
        self._attempts = cache(counter("attempts", "Attempts made at postbacks", "result").labels)
        text, names = "From a request to its answer", ("method", "route", "status_code")
        self._answer = cache(histogram("answer", text, SHORT, *names).labels)
        self._commit = histogram("commit", "Until what was promised is on the disk", SHORT)
        self._attempt = histogram("attempt", "One attempt at a postback", LONG)
        self._waiting = histogram("waiting", "From the answer to the start of the analysis", LONG)
        self._running = histogram("running", "From the start of the analysis to its end", LONG)
        self._delivery = histogram("delivery", "From the answer to delivered; no resends", LONG)
        for outcome in model.Outcome:
            self._finished(outcome)
        for state in (State.DELIVERED, State.UNDELIVERED):
            self._ended(state)

    # What happens

    def answered(self, answer: Answer) -> None:
        """Count one answer of the service."""
        # Without a route the method is whatever a caller made up: no label for each.
        method = answer.method if answer.route != "none" else "any"
        self._answer(method, answer.route, answer.status_code).observe(answer.seconds)
        if (method, answer.route) == PROCESS:
            self._hour.answered(self._clock(), answer.seconds)
            if answer.error:
                self._refused(_reason(answer.error)).inc()

    def settled(self, seconds: float) -> None:
        """Count one wait for the disk."""
        self._commit.observe(seconds)

    def accepted(self, job: model.Job) -> None:
        """Count a job that was committed."""
        self._accepted.inc()
        self._hour.count(job.created_at, "accepted")

    def finished(self, job: model.Job) -> None:
        """Count an analysis that ended."""
        self._finished(job.outcome).inc()
        if job.started_at and job.finished_at:  # one canceled before it began has no start
            self._waiting.observe(_seconds(job.created_at, job.started_at))
            self._running.observe(_seconds(job.started_at, job.finished_at))

    def attempted(self, job: model.Job, attempt: model.Attempt, state: State) -> None:
        """Count an attempt, and the end of the job where it was the last."""
        self._attempts(_result(attempt)).inc()
        self._attempt.observe(attempt.duration_seconds)
        if state is State.DELIVERING:
            return
        now = self._clock()
        self._ended(state).inc()
        self._hour.count(now, state)
        if state is State.DELIVERED and not job.resent_after:
            self._delivery.observe(_seconds(job.created_at, now))

    # What is asked

    def watch(self, journal: Journal, outlived: Callable[[], int]) -> None:
        """Ask the journal, too, whenever the metrics are asked for.

        Args:
            journal: It must be open by then.
            outlived: Returns how many threads run an analysis whose job has ended.
        """
        self._registry.register(_Collector(journal, outlived, self._clock))

    def text(self) -> bytes:
        """Return everything in Prometheus' text format.

        Raises:
            JournalError: The journal cannot be read.
        """
        return prometheus_client.generate_latest(self._registry)

    def hour(self) -> list[dict[str, Any]]:
        """Return the last 60 minutes, the oldest first, as far as this process has seen them."""
        return self._hour.rows(self._clock())


class _Collector:
    """Reads gauges where their values are known."""

    def __init__(
        self, journal: Journal, outlived: Callable[[], int], clock: Callable[[], datetime]
    ) -> None:
        self._journal = journal
        self._outlived = outlived
        self._clock = clock

    def describe(self) -> list[Any]:
        """Return nothing: the journal is not to be read when this is registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        now = self._clock()
        jobs = GaugeMetricFamily("postback_jobs", "Jobs not delivered", labels=["state"])
        ages = GaugeMetricFamily(
            "postback_oldest_job_age_seconds", "Age of the oldest job", labels=["state"]
        )
        for state, count, created_at in self._journal.census():
            jobs.add_metric([state], count)
            ages.add_metric([state], _seconds(created_at, now) if created_at else 0.0)
        yield jobs
        yield ages
        size_bytes = self._journal.size_bytes()
        yield GaugeMetricFamily("postback_journal_bytes", "Size of the journal", value=size_bytes)
        text = "Threads whose analysis goes on after its time-out or cancel"
        yield GaugeMetricFamily("postback_outlived_threads", text, value=self._outlived())


@dataclass(slots=True)
class _Minute:
    """One minute.

    Attributes:
        answers: How many took `STEP ** key` seconds.
    """

    begins_at: datetime
    counts: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)

    def p99_seconds(self) -> float | None:
        left = self.answers.total() * 0.99
        for step in sorted(self.answers):
            left -= self.answers[step]
            if left <= 0:
                return round(STEP**step, 6)
        return None


class _Hour:
    """The last minutes, in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._minutes: deque[_Minute] = deque(maxlen=MINUTES)

    def count(self, now: datetime, what: str) -> None:
        with self._lock:
            self._minute(now).counts[what] += 1

    def answered(self, now: datetime, seconds: float) -> None:
        step = math.ceil(math.log(max(seconds, 1e-6), STEP))
        with self._lock:
            self._minute(now).answers[step] += 1

    def rows(self, now: datetime) -> list[dict[str, Any]]:
        earliest = _minute_of(now) - timedelta(minutes=MINUTES - 1)
        with self._lock:
            return [
                {
                    "at": model.text_of(minute.begins_at),
                    **{name: minute.counts[name] for name in _COUNTED},
                    "p99_seconds": minute.p99_seconds(),
                }
                for minute in self._minutes
                if minute.begins_at >= earliest
            ]

    def _minute(self, now: datetime) -> _Minute:
        begins_at = _minute_of(now)
        # A clock that is set back goes on counting in the latest minute.
        if not self._minutes or self._minutes[-1].begins_at < begins_at:
            self._minutes.append(_Minute(begins_at))
        return self._minutes[-1]


_COUNTED = ("accepted", "delivered", "undelivered")


def _minute_of(instant: datetime) -> datetime:
    return instant.replace(second=0, microsecond=0)


def _seconds(begin: datetime, end: datetime) -> float:
    return max(0.0, (end - begin).total_seconds())  # the clock may have been set back


def _result(attempt: model.Attempt) -> str:
    if attempt.delivered:
        return "delivered"
    return f"{attempt.status_code // 100}xx" if attempt.status_code else "no_answer"


def _reason(error: Exception) -> str:
    """Return `full` for a FullError, `too_large` for a TooLargeError."""
    words = type(error).__name__.removesuffix("Error")
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in words)[1:]

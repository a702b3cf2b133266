"""What a job is: its states and the moves between them, its outcome, its id, and its event.

    from                     to             when
    accepted                 running        a worker is given its analysis
    running                  accepted       its analysis is to run again
    running                  delivering     its analysis has ended
    accepted, running        delivering     it was canceled
    delivering               delivered      the receiver has answered 2xx
    delivering               undelivered    no attempt is left
    delivered, undelivered   delivering     it was resent

A running job goes back to `accepted` when its analysis is to run again: after a stop of the
service, after the end of a worker that it shared with others, when it could not begin, when a Dask
cluster was lost, and by ANALYSIS_SCHEDULE. How the analysis ended is the outcome. The outcome is
not part of the state: a failed job can be delivered.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Any


class State(StrEnum):
    """Where a job stands. The values are stored in the journal, so never rename one."""

    ACCEPTED = "accepted"  # committed and answered 200; its analysis waits to be started
    RUNNING = "running"  # its analysis is given to a worker, or runs
    DELIVERING = "delivering"  # the event is stored; an attempt is under way, or will be
    DELIVERED = "delivered"  # the receiver answered 2xx
    UNDELIVERED = "undelivered"  # no attempt is left; it can be resent


class Outcome(StrEnum):
    """How the analysis ended. The type of the event is `job.<outcome>`."""

    SUCCEEDED = "succeeded"  # it returned a JSON value
    FAILED = "failed"  # it raised an exception, or what it returned is not JSON
    TIMED_OUT = "timed_out"  # it took longer than JOB_TIMEOUT
    CANCELED = "canceled"  # a caller canceled it
    CRASHED = "crashed"  # it ended its worker, or it ran at five unclean ends of the service


class Alone(IntEnum):
    """Why a job must have a worker of its own. The values are stored in the journal."""

    NO = 0  # it may share one
    SHARED = 1  # it shared one that died, and any of its jobs may be to blame
    INTERRUPTED = 2  # it was running at several unclean ends of the service


#: After so many unclean ends of the service under a job, the job runs alone in a worker.
ALONE_FROM = 3

#: After so many, the job is `crashed`.
MAX_INTERRUPTED = 5

#: Characters of an error's message that are kept.
MAX_MESSAGE = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One accepted payload on its way to the receiver, as the journal knows it.

    Attributes:
        state: Where it stood when it was read.
        outcome: None until the analysis has ended.
        postback_url: None for the configured POSTBACK_URL.
        receiver: The origin of `postback_url`; "" for the configured one.
        metadata: The caller's own object, which the event repeats.
        forwarded: Headers that travel with the job to the postback and into the log.
        starts: How often its analysis was started.
        failures: How often its analysis raised an exception and was to run again.
        interrupted: How often the service ended uncleanly while it ran, since it last kept a value.
        alone: Whether it must have a worker of its own, and why.
        started_at: When its analysis was started the last time.
        finished_at: When its analysis ended.
        next_start_at: When a failed analysis runs again; None when nothing holds it back.
        next_attempt_at: When the next attempt is due. None while one is under way.
        ended_at: When it became `delivered` or `undelivered`.
        attempts: How many attempts are recorded.
        resent_after: How many there were when it was last resent; the schedule counts from there.
        last_error: Why its analysis failed when it was to run again last: a type and a message.
    """

    id: str
    state: State
    outcome: Outcome | None = None
    postback_url: str | None
    receiver: str
    metadata: Mapping[str, Any] | None = None
    forwarded: Mapping[str, str]
    starts: int = 0
    failures: int = 0
    interrupted: int = 0
    alone: Alone = Alone.NO
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    next_start_at: datetime | None = None
    next_attempt_at: datetime | None = None
    ended_at: datetime | None = None
    attempts: int = 0
    resent_after: int = 0
    last_error: Mapping[str, str] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What each log line about it contains."""
        return {"job_id": self.id, **self.forwarded}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an analysis ended.

    Attributes:
        result: The returned value as JSON in UTF-8, for `succeeded`.
        error: What is posted in its place: a type and a message.
        frames: Where it was raised, one `file:line function` each, the outermost first.
        may_run_again: Whether ANALYSIS_SCHEDULE applies: the analysis raised an exception.
        started_at: When the analysis began; None when it never did.
        finished_at: When it ended.
    """

    outcome: Outcome
    result: bytes | None = None
    error: Mapping[str, str] | None = None
    frames: Sequence[str] = ()
    may_run_again: bool = False
    started_at: datetime | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """The analysis is to run again: it was cut off, could not begin, or failed and is repeated.

    Attributes:
        is_alone: Whether it must have a worker of its own, because it shared one that died.
        pause_seconds: How long to wait before.
        error: What it raised, where ANALYSIS_SCHEDULE repeats it.
        has_started: False if it certainly has not.
    """

    is_alone: bool = False
    pause_seconds: float = 0.0
    has_started: bool = True
    error: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The posted document, serialized once.

    Attributes:
        body: What every attempt sends.
        result_at: Where the result begins in `body`; None when it is not there.
        result: The result, where `body` only links to it.
        result_key: What that link contains in place of a token.
    """

    body: bytes
    result_at: int | None = None
    result: bytes | None = None
    result_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try at the postback, and what follows from it.

    Attributes:
        number: Counts from 1, over resends too.
        status_code: None when the receiver did not answer.
        error: What went wrong, for the operator; None when it was delivered.
        answer: The first characters of a failed answer, for the operator.
        seconds_until_next: None when no further attempt follows.
        hold_seconds: For how long the receiver wants no attempt for any job.
    """

    number: int
    attempted_at: datetime
    duration_seconds: float
    status_code: int | None = None
    error: str | None = None
    answer: str | None = None
    seconds_until_next: float | None = None
    hold_seconds: float = 0.0

    @property
    def delivered(self) -> bool:
        """Whether the receiver has the event."""
        return self.error is None


def new_id(now: datetime) -> str:
    """Return 32 hexadecimal digits, 48 bits of time in ms and 80 random ones: ids sort by age."""
    return f"{int(now.timestamp() * 1000):012x}{secrets.token_hex(10)}"


def utc_now() -> datetime:
    """Return the wall clock, in UTC."""
    return datetime.now(UTC)


def text_of(instant: datetime) -> str:
    """Return an instant in UTC as `2026-01-02T03:04:05.678Z`, so that text order is time order."""
    return instant.isoformat(timespec="milliseconds")[:23] + "Z"


def not_handled(exc: Exception) -> Ending:
    """Return the ending for a job that the service could not handle."""
    return without_result(Outcome.FAILED, "The job could not be handled.", type(exc).__name__)


def without_result(outcome: Outcome, message: str, kind: str | None = None) -> Ending:
    """Return an ending with an error of this type, by default named like the outcome.

    The message may contain any text.
    """
    # Half of a surrogate pair could not be posted as UTF-8.
    clean = message[:MAX_MESSAGE].encode(errors="replace").decode()
    return Ending(outcome=outcome, error={"type": kind or outcome, "message": clean})


def event_of(job: Job, ending: Ending, *, max_bytes: int, job_url: str) -> Event:
    """Return the event for a job that ended.

    Args:
        job: The job.
        ending: How and when its analysis ended.
        max_bytes: An event larger than this is posted without its result, with a link to it.
        job_url: The job's own URL; the link is below it.
    """
    fields = {
        "id": job.id,
        "outcome": ending.outcome,
        "error": ending.error,
        "metadata": job.metadata,
        "created_at": text_of(job.created_at),
        "started_at": ending.started_at and text_of(ending.started_at),
        "finished_at": ending.finished_at and text_of(ending.finished_at),
    }
    # The result is JSON already, so it is put before the two braces that close the document.
    head, result = _serialize(fields)[:-2] + b', "result": ', ending.result or b"null"
    if ending.result is None or len(head) + len(result) + 2 <= max_bytes:
        result_at = None if ending.result is None else len(head)
        return Event(body=head + result + b"}}", result_at=result_at)
    key = secrets.token_urlsafe(16)
    link = {
        "result_url": f"{job_url}/result?key={key}",
        "result_bytes": len(result),
        "result_sha256": hashlib.sha256(result).hexdigest(),
    }
    return Event(body=_serialize(fields | link), result=result, result_key=key)


def _serialize(fields: Mapping[str, Any]) -> bytes:
    event = {"type": f"job.{fields['outcome']}", "timestamp": fields["finished_at"], "data": fields}
    return json.dumps(event).encode()

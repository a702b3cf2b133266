"""What a job is: its states and the moves between them, its outcome, its id, the event posted.

    accepted ──> running ──> delivering ──> delivered
       ^            │          ^  │  ^           │
       │   drain    │   resend │  │  └───────────┤
       └────────────┘          │  └────────> undelivered
                               └─────────────────┘

A canceled job goes from `accepted` straight to `delivering`. A job found `running` at start is a
suspect: it is begun again, alone. How the analysis ended is the outcome, apart from the state.
"""

import contextlib
import hashlib
import json
import re
import secrets
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple


class State(StrEnum):
    """Where a job stands. The values are stored in the journal: never rename one."""

    ACCEPTED = "accepted"  # committed and answered 200; waits for its analysis
    RUNNING = "running"  # its analysis has begun
    DELIVERING = "delivering"  # the event is stored; attempts are under way
    DELIVERED = "delivered"  # the receiver answered 2xx
    UNDELIVERED = "undelivered"  # no attempt is left; it can be resent


class Outcome(StrEnum):
    """How the analysis ended. The event's type is `job.<outcome>`."""

    SUCCEEDED = "succeeded"  # it returned a JSON value
    FAILED = "failed"  # it raised, or what it returned is not JSON
    TIMED_OUT = "timed_out"  # it took longer than JOB_TIMEOUT
    CANCELED = "canceled"  # a caller canceled it
    CRASHED = "crashed"  # it ended the process it ran in


#: From each state, the states a job may move to. The SQL CHECK and the README say the same.
MOVES: Mapping[State, frozenset[State]] = {
    State.ACCEPTED: frozenset({State.RUNNING, State.DELIVERING}),
    State.RUNNING: frozenset({State.RUNNING, State.DELIVERING, State.ACCEPTED}),
    State.DELIVERING: frozenset({State.DELIVERED, State.UNDELIVERED}),
    State.DELIVERED: frozenset({State.DELIVERING}),
    State.UNDELIVERED: frozenset({State.DELIVERING}),
}

#: How often a job may end the process before it is given up as crashed.
MAX_STARTS = 3

#: The largest result that is kept, in bytes of JSON. A larger one is a failed analysis.
MAX_RESULT_BYTES = 64 * 1024 * 1024

#: How deep a result may be nested: what every JSON parser reads.
MAX_RESULT_DEPTH = 128

#: Characters of an error's message that are kept.
MAX_MESSAGE = 2000

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

# Made once: `json.dumps` with options makes an encoder for each call.
_STRICT = json.JSONEncoder(allow_nan=False)

#: The chance for so many ids is drawn at once: to ask the system costs more than all the rest.
DRAWN = 100

_chances: deque[str] = deque()  # drawn, and not used yet


class Job(NamedTuple):
    """One accepted payload on its way to the receiver, as the journal knows it.

    Attributes:
        state: Where it stood when it was read.
        outcome: None until the analysis has ended.
        postback_url: None for the configured POSTBACK_URL.
        receiver: The origin of `postback_url`, or "" for the configured one.
        starts: How often its analysis was begun.
        started_at: When it was begun the last time.
        finished_at: When the analysis ended.
        next_attempt_at: None while an attempt is under way, and in every state but `delivering`.
        ended_at: When it became delivered or undelivered.
        attempts: How many attempts are recorded.
        resent_after: How many there were when it was last resent: the schedule counts from there.
        forwarded: Headers that travel with the job to the postback and the log lines.
    """

    id: str
    state: State
    outcome: Outcome | None
    postback_url: str | None
    receiver: str
    starts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    next_attempt_at: datetime | None
    ended_at: datetime | None
    attempts: int
    resent_after: int
    forwarded: Mapping[str, str]

    @property
    def facts(self) -> dict[str, Any]:
        """What each log line tells of it."""
        return {"job_id": self.id, **self.forwarded}


class Ending(NamedTuple):
    """How an analysis ended, ready to be posted.

    Attributes:
        result: The returned value as JSON text, for `succeeded`.
        error: What is posted in its place: its type and a message.
    """

    outcome: Outcome
    result: str | None = None
    error: Mapping[str, str] | None = None


class Event(NamedTuple):
    """The posted document, serialised once.

    Attributes:
        body: What every attempt sends.
        result: The result as JSON text where `body` only links to it, else None.
    """

    body: bytes
    result: str | None = None


class Attempt(NamedTuple):
    """One try at the postback, and what follows from it.

    Attributes:
        number: Counts from 1, over resends too.
        status_code: None when the receiver did not answer.
        error: What went wrong, for the operator; None when it was delivered.
        seconds_until_next: None when no further attempt follows.
    """

    number: int
    attempted_at: datetime
    duration_seconds: float
    status_code: int | None
    error: str | None
    seconds_until_next: float | None

    @property
    def delivered(self) -> bool:
        """Whether the receiver has the event."""
        return self.error is None


def new_job(
    *,
    postback_url: str | None,
    receiver: str,
    forwarded: Mapping[str, str],
    now: datetime | None = None,
) -> Job:
    """Return a job that is about to be accepted."""
    created_at = now or utc_now()
    return Job(
        id=new_id(created_at),
        state=State.ACCEPTED,
        outcome=None,
        postback_url=postback_url,
        receiver=receiver,
        starts=0,
        created_at=created_at,
        started_at=None,
        finished_at=None,
        next_attempt_at=None,
        ended_at=None,
        attempts=0,
        resent_after=0,
        forwarded=forwarded,
    )


def begun(job: Job, *, now: datetime) -> Job:
    """Return a job whose analysis begins for the first time."""
    return job._replace(state=State.RUNNING, starts=1, started_at=now)


def new_id(now: datetime) -> str:
    """Return 32 hexadecimal digits, 48 bits of time in ms and 80 of chance: ids sort by age."""
    return f"{int(now.timestamp() * 1000):012x}{_chance()}"


def utc_now() -> datetime:
    """Return the wall clock, in UTC."""
    return datetime.now(UTC)


def text_of(instant: datetime) -> str:
    """Return an instant in its one form, `2026-01-02T03:04:05.678Z`, whose order is time order."""
    if instant.tzinfo is not UTC:
        instant = instant.astimezone(UTC)
    return instant.isoformat(timespec="milliseconds")[:23] + "Z"


def succeeded(result: Any) -> Ending:
    """Return the ending for what an analysis returned: `failed` if it is not JSON, or too large."""
    try:
        text = _STRICT.encode(result)
        _refuse_unreadable(result, text)
    except (TypeError, ValueError, RecursionError) as exc:
        return _failed("not_serialisable", f"The result is not JSON: {exc}.")
    if len(text) > MAX_RESULT_BYTES:
        message = f"The result is {len(text)} bytes of JSON; at most {MAX_RESULT_BYTES} are kept."
        return _failed("result_too_large", message)
    return Ending(outcome=Outcome.SUCCEEDED, result=text)


def failed(exc: BaseException) -> Ending:
    """Return the ending for an analysis that raised: the type and the message, no traceback."""
    try:
        message = str(exc)
    except BaseException:  # noqa: BLE001 - an exception of the user's may not even print
        message = "(its message cannot be read)"
    return _failed(type(exc).__name__, message)


def timed_out(job_timeout_seconds: float) -> Ending:
    """Return the ending for an analysis that took longer than JOB_TIMEOUT."""
    message = f"The analysis took longer than JOB_TIMEOUT, {job_timeout_seconds:g} s."
    return _without_result(Outcome.TIMED_OUT, "timed_out", message)


def canceled() -> Ending:
    """Return the ending for a job that a caller canceled."""
    return _without_result(Outcome.CANCELED, "canceled", "The job was canceled.")


def crashed(message: str) -> Ending:
    """Return the ending for a job that ended the process it ran in."""
    return _without_result(Outcome.CRASHED, "crashed", message)


def event_of(
    job: Job, ending: Ending, *, finished_at: datetime, max_bytes: int, result_url: str
) -> Event:
    """Return the event for a job that ended.

    Args:
        job: The job; its times are posted with the result.
        ending: How its analysis ended.
        finished_at: When it ended.
        max_bytes: An event over this size is posted without its result, with a link to it.
        result_url: That link.
    """
    fields = {
        "id": job.id,
        "outcome": ending.outcome,
        "error": ending.error,
        "created_at": text_of(job.created_at),
        "started_at": job.started_at and text_of(job.started_at),
        "finished_at": text_of(finished_at),
    }
    whole = _serialise(fields, ending.result or "null")
    if ending.result is None or len(whole) <= max_bytes:
        return Event(body=whole)
    result = ending.result.encode()
    link = {
        "result_url": result_url,
        "result_bytes": len(result),
        "result_sha256": hashlib.sha256(result).hexdigest(),
    }
    return Event(body=_serialise(fields | link), result=ending.result)


def depth_of(value: Any) -> int:
    """Return how deep a JSON value is nested; a scalar is 0, `[]` is 1."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list | tuple)]:
        depth += 1
        level = [child for item in level for child in _children(item)]
    return depth


def has_lone_surrogate(value: Any, text: str) -> bool:
    """Return whether a JSON value, and its JSON text, holds half of a surrogate pair.

    No UTF-8 exists for it (RFC 3629), so the receiver could not keep it.
    """
    if not _SURROGATE_ESCAPE.search(text):
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _chance() -> str:
    """Return 20 hexadecimal digits that nobody can guess."""
    while True:
        with contextlib.suppress(IndexError):
            return _chances.pop()
        drawn = secrets.token_hex(10 * DRAWN)
        _chances.extend(drawn[at : at + 20] for at in range(0, len(drawn), 20))


def _children(item: Any) -> Any:
    return item.values() if isinstance(item, dict) else item


def _refuse_unreadable(result: Any, text: str) -> None:
    if text.count("[") + text.count("{") > MAX_RESULT_DEPTH and depth_of(result) > MAX_RESULT_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_RESULT_DEPTH}")
    if has_lone_surrogate(result, text):
        raise ValueError("it holds half of a surrogate pair")


def _failed(kind: str, message: str) -> Ending:
    return _without_result(Outcome.FAILED, kind, message)


def _without_result(outcome: Outcome, kind: str, message: str) -> Ending:
    # A message may hold anything; half of a surrogate pair could not be posted.
    clean = message[:MAX_MESSAGE].encode(errors="replace").decode()
    return Ending(outcome=outcome, error={"type": kind, "message": clean})


def _serialise(fields: Mapping[str, Any], result: str | None = None) -> bytes:
    """Return the event; `result` is JSON text already, and is not parsed again."""
    event = {"type": f"job.{fields['outcome']}", "timestamp": fields["finished_at"], "data": fields}
    text = json.dumps(event)
    if result is not None:
        text = f'{text[:-2]}, "result": {result}}}}}'
    return text.encode()

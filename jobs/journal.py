"""The durable record of jobs, events, attempts and received postbacks; all SQL but the schema.

One statement a method where it can be. A move is one conditional UPDATE: no row changed means that
another thread was first, or that the state does not allow it.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from jobs import errors, model
from jobs.model import Outcome, State
from jobs.storage import Storage

#: A page of received postbacks ends after this many bytes.
MAX_PAGE_BYTES = 4 * 1024 * 1024

_SCHEMA_PATH = Path(__file__).with_name("schema.sql")


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A postback that the built-in receiver has.

    Attributes:
        signature: "good", or "none" where no secret is configured.
        body: The event, as it came.
    """

    webhook_id: str
    received_at: datetime
    signature: str
    body: bytes


class Detail(NamedTuple):
    """All there is of one job, as it was at one moment.

    Attributes:
        body: What the caller sent.
        event: What is posted, once the analysis has ended.
        attempts: Every attempt as it is shown, the first first.
    """

    job: model.Job
    body: bytes
    event: model.Event | None
    attempts: list[dict[str, Any]]


class Journal:
    """The record. Every method may be called from any thread, and raises JournalError."""

    def __init__(
        self,
        path: Path,
        *,
        on_lost: Callable[[], None],
        on_settled: Callable[[float], None] = lambda _: None,
    ) -> None:
        schema = _SCHEMA_PATH.read_text(encoding="utf-8")
        self._storage = Storage(path, schema=schema, on_lost=on_lost, on_settled=on_settled)

    def open(self) -> None:
        """Open the file, alone.

        Raises:
            ConfigError: It is in use, damaged, not ours, newer, or cannot be written.
        """
        self._storage.open()

    def close(self) -> None:
        """Let the file go, folded into one."""
        self._storage.close()

    def settle(self) -> None:
        """Wait until what was accepted, canceled, resent or received survives a power cut."""
        self._storage.settle()

    @property
    def failure(self) -> errors.JournalError | None:
        """Why the last commit failed; None when it did not."""
        return self._storage.failure

    def probe(self) -> None:
        """Write nothing that stays, to see whether the journal can be written again."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(_PROBE)
            connection.execute(_UNDO_PROBE)

        self._storage.write(work)

    # Accept

    def accept(
        self, job: model.Job, body: bytes, *, idempotency_key: str | None, body_sha256: str
    ) -> str:
        """Commit a job and return its id, or that of the job first sent with this key.

        Raises:
            KeyReusedError: The key came with another body.
        """
        row = {
            "id": job.id,
            "state": job.state,
            "postback_url": job.postback_url,
            "receiver": job.receiver,
            "starts": job.starts,
            "created_at": model.text_of(job.created_at),
            "started_at": job.started_at and model.text_of(job.started_at),
            "forwarded": json.dumps(dict(job.forwarded)) if job.forwarded else "{}",
            "idempotency_key": idempotency_key,
            "body_sha256": idempotency_key and body_sha256,
        }

        def work(connection: sqlite3.Connection) -> str:
            inserted = connection.execute(_ACCEPT, row)
            if not inserted.rowcount:
                return _same_body(connection.execute(_BY_KEY, row).fetchone(), body_sha256)
            connection.execute(_KEEP_PAYLOAD, {"seq": inserted.lastrowid, "body": body})
            return job.id

        return self._storage.write(work, promised=True)

    def accepted_before(self, idempotency_key: str, *, body_sha256: str) -> str | None:
        """Return the id of the job that was sent with this key, if there is one.

        Raises:
            KeyReusedError: It came with another body.
        """
        rows = self._storage.read(_BY_KEY, {"idempotency_key": idempotency_key})
        return _same_body(rows[0], body_sha256) if rows else None

    # Run

    def claim(self, *, now: datetime) -> tuple[model.Job, bytes] | None:
        """Begin the oldest accepted job: return it with its body, or None when none waits."""
        return self._storage.write(lambda connection: _begun(connection, _CLAIM, now=now))

    def begin_again(self, job_id: str, *, now: datetime) -> tuple[model.Job, bytes] | None:
        """Begin a suspect again: return it with its body, or None when it has moved on."""
        return self._storage.write(
            lambda connection: _begun(connection, _BEGIN_AGAIN, now=now, job_id=job_id)
        )

    def end(
        self,
        job: model.Job,
        outcome: Outcome,
        event: model.Event,
        *,
        finished_at: datetime,
        due_at: datetime | None,
        source: State,
    ) -> None:
        """Store how a job's analysis ended, and its event: the job is now `delivering`.

        Args:
            due_at: When its first attempt is due; None when the caller makes it now.
            source: The state it must come from.

        Raises:
            MoveError: It is in another; nothing was changed.
        """
        row = {
            "id": job.id,
            "outcome": outcome,
            "finished_at": model.text_of(finished_at),
            "next_attempt_at": due_at and model.text_of(due_at),
            "source": source,
            "body": event.body,
            "result": event.result,
        }

        def work(connection: sqlite3.Connection) -> None:
            wanted = "canceled" if outcome is Outcome.CANCELED else "ended"
            _move(connection, _END, row, wanted=wanted)
            connection.execute(_KEEP_EVENT, row)

        self._storage.write(work, promised=outcome is Outcome.CANCELED)

    def put_back(self, job_ids: Iterable[str]) -> int:
        """Return begun jobs to `accepted`, as if they had not been; return how many there were."""
        parameters = {"ids": json.dumps(list(job_ids))}
        return self._storage.write(lambda conn: conn.execute(_PUT_BACK, parameters).rowcount)

    # Deliver

    def earliest_attempts(self) -> list[tuple[str, datetime]]:
        """Return each receiver for which attempts are due or will be, and when its next one is."""
        rows = self._storage.read(_EARLIEST_ATTEMPTS, {})
        return [(row["receiver"], datetime.fromisoformat(row["due_at"])) for row in rows]

    def claim_due(
        self, receiver: str, *, now: datetime, limit: int
    ) -> list[tuple[model.Job, bytes]]:
        """Take the attempts for one receiver that are due, with their events."""
        parameters = {"receiver": receiver, "limit": limit, "now": model.text_of(now)}

        def work(connection: sqlite3.Connection) -> list[tuple[model.Job, bytes]]:
            rows = connection.execute(_CLAIM_DUE, parameters).fetchall()
            return [(_job(row), _large(connection, _EVENT, row)) for row in rows]

        return self._storage.write(work)

    def record(self, job: model.Job, attempt: model.Attempt, *, now: datetime) -> State:
        """Store an attempt and what follows from it; return the state the job has now.

        Raises:
            MoveError: The job is not `delivering`, or its attempt was recorded already.
        """
        state, next_at, ended_at = _after(attempt, now)
        row = {
            "id": job.id,
            "state": state,
            "number": attempt.number,
            "next_attempt_at": next_at,
            "ended_at": ended_at,
            "attempted_at": model.text_of(attempt.attempted_at),
            "duration_seconds": round(attempt.duration_seconds, 6),
            "status_code": attempt.status_code,
            "error": attempt.error,
        }

        def work(connection: sqlite3.Connection) -> None:
            _move(connection, _RECORD, row, wanted=f"made {state}")
            connection.execute(_KEEP_ATTEMPT, row)

        self._storage.write(work)
        return state

    def put_off(self, job_id: str, *, until: datetime) -> None:
        """Make an attempt that was taken, but not made, due at a later time."""
        row = {"id": job_id, "until": model.text_of(until)}
        self._storage.write(lambda connection: connection.execute(_PUT_OFF, row))

    def advance(self, *, latest: datetime) -> int:
        """Bring forward attempts that are due later than any schedule allows; return how many.

        Their times were set before the clock was set back.
        """
        parameters = {"latest": model.text_of(latest)}
        return self._storage.write(lambda conn: conn.execute(_ADVANCE, parameters).rowcount)

    def resend(self, job_id: str, *, now: datetime) -> None:
        """Make an ended job's event due again, with the whole schedule before it.

        Raises:
            MoveError: It is not `delivered` or `undelivered`.
            JobNotFoundError: There is no such job.
        """
        row = {"id": job_id, "next_attempt_at": model.text_of(now)}
        self._storage.write(
            lambda connection: _move(connection, _RESEND, row, wanted="resent"),
            promised=True,
        )

    # Resume and prune

    def resume(self, *, now: datetime) -> tuple[list[model.Job], int]:
        """Make attempts due that were under way when the process ended.

        Returns:
            The suspects, the least often begun first, and how many accepted jobs wait.
        """

        def work(connection: sqlite3.Connection) -> tuple[list[model.Job], int]:
            connection.execute(_RESUME_ATTEMPTS, {"now": model.text_of(now)})
            suspects = connection.execute(_SUSPECTS).fetchall()
            return [_job(row) for row in suspects], connection.execute(_WAITING).fetchone()[0]

        return self._storage.write(work)

    def count_unfinished(self) -> int:
        """Return how many jobs are not delivered or undelivered."""
        return int(self._storage.read(_UNFINISHED, {})[0][0])

    def prune(self, *, before: datetime, limit: int) -> int:
        """Remove at most `limit` jobs that ended, and as many received postbacks, of before.

        Returns:
            How many rows were removed.
        """
        parameters = {"before": model.text_of(before), "limit": limit}

        def work(connection: sqlite3.Connection) -> int:
            jobs = connection.execute(_PRUNE_JOBS, parameters).rowcount
            return jobs + connection.execute(_PRUNE_RECEIVED, parameters).rowcount

        return self._storage.write(work)

    # Look

    def job(self, job_id: str) -> model.Job:
        """Return one job.

        Raises:
            JobNotFoundError: There is none.
        """
        return _job(self._row(_JOB, job_id))

    def detail(self, job_id: str) -> Detail:
        """Return all there is of one job.

        Raises:
            JobNotFoundError: There is none.
        """
        row = self._row(_DETAIL, job_id)
        event = row["event"] and model.Event(body=row["event"], result=row["result"])
        return Detail(_job(row), row["body"], event, json.loads(row["attempts_made"]))

    def page(self, *, state: State | None, limit: int, before: str | None) -> list[model.Job]:
        """Return jobs, newest first, without their payloads and results.

        Args:
            state: Only these.
            limit: At most so many.
            before: Only those accepted before the job with this id.
        """
        parameters = {"state": state, "limit": limit, "before": before}
        statement = _PAGE if state is None else _PAGE_OF_STATE
        return [_job(row) for row in self._storage.read(statement, parameters)]

    def census(self) -> list[tuple[State, int, datetime | None]]:
        """Return, for each state but `delivered`, how many jobs there are and since when."""
        return [
            (State(row["state"]), row["jobs"], _instant(row["created_at"]))
            for row in self._storage.read(_CENSUS, {})
        ]

    def size_bytes(self) -> int:
        """Return the size of the file and of its write-ahead log."""
        return self._storage.size_bytes()

    def backup(self) -> Path:
        """Copy the journal, while it is written, to a file beside it; return the copy's path."""
        return self._storage.backup()

    # The built-in receiver

    def receive(self, postback: Received) -> bool:
        """Commit a received postback, and return whether its webhook-id is new."""
        row = {
            "webhook_id": postback.webhook_id,
            "received_at": model.text_of(postback.received_at),
            "signature": postback.signature,
            "body": postback.body,
        }
        return self._storage.write(
            lambda connection: connection.execute(_RECEIVE, row).rowcount == 1, promised=True
        )

    def received(self, *, limit: int) -> list[Received]:
        """Return what was received, newest first; fewer when they are large."""
        return [
            Received(
                webhook_id=row["webhook_id"],
                received_at=datetime.fromisoformat(row["received_at"]),
                signature=row["signature"],
                body=row["body"],
            )
            for row in self._storage.read(_RECEIVED, {"limit": limit, "max_bytes": MAX_PAGE_BYTES})
        ]

    def _row(self, statement: str, job_id: str) -> sqlite3.Row:
        rows = self._storage.read(statement, {"id": job_id})
        if not rows:
            raise errors.JobNotFoundError(job_id)
        return rows[0]


def _job(row: sqlite3.Row) -> model.Job:
    outcome = row["outcome"]
    return model.Job(
        id=row["id"],
        state=State(row["state"]),
        outcome=Outcome(outcome) if outcome else None,
        postback_url=row["postback_url"],
        receiver=row["receiver"],
        starts=row["starts"],
        created_at=datetime.fromisoformat(row["created_at"]),
        started_at=_instant(row["started_at"]),
        finished_at=_instant(row["finished_at"]),
        next_attempt_at=_instant(row["next_attempt_at"]),
        ended_at=_instant(row["ended_at"]),
        attempts=row["attempts"],
        resent_after=row["resent_after"],
        forwarded=json.loads(row["forwarded"]),
    )


def _instant(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _same_body(row: sqlite3.Row, body_sha256: str) -> str:
    if row["body_sha256"] != body_sha256:
        raise errors.KeyReusedError(
            "This Idempotency-Key was used with another body: send a new key with a new payload."
        )
    return str(row["id"])


def _begun(
    connection: sqlite3.Connection, statement: str, *, now: datetime, job_id: str | None = None
) -> tuple[model.Job, bytes] | None:
    rows = connection.execute(statement, {"now": model.text_of(now), "id": job_id}).fetchall()
    return (_job(rows[0]), _large(connection, _PAYLOAD, rows[0])) if rows else None


def _large(connection: sqlite3.Connection, statement: str, row: sqlite3.Row) -> bytes:
    return bytes(connection.execute(statement, {"seq": row["seq"]}).fetchone()[0])


def _move(
    connection: sqlite3.Connection, statement: str, row: Mapping[str, Any], *, wanted: str
) -> None:
    if connection.execute(statement, row).rowcount:
        return
    found = connection.execute(_JOB, row).fetchone()
    if found is None:
        raise errors.JobNotFoundError(row["id"])
    raise errors.MoveError(row["id"], state=found["state"], wanted=wanted)


def _after(attempt: model.Attempt, now: datetime) -> tuple[State, str | None, str | None]:
    """Return the state after an attempt, when the next is due, and when the job ended."""
    if attempt.delivered:
        return State.DELIVERED, None, model.text_of(now)
    if attempt.seconds_until_next is None:
        return State.UNDELIVERED, None, model.text_of(now)
    next_at = now + timedelta(seconds=attempt.seconds_until_next)
    return State.DELIVERING, model.text_of(next_at), None


# A change of no row would write no page, and succeed on a full disk.
_PROBE = """
    INSERT INTO received (webhook_id, received_at, signature, body) VALUES ('', '', 'none', x'')
"""

_UNDO_PROBE = "DELETE FROM received WHERE webhook_id = ''"

_ACCEPT = """
    INSERT INTO jobs (id, state, postback_url, receiver, starts, created_at, started_at, forwarded,
                      idempotency_key, body_sha256)
    VALUES (:id, :state, :postback_url, :receiver, :starts, :created_at, :started_at, :forwarded,
            :idempotency_key, :body_sha256)
    ON CONFLICT (idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
"""

_BY_KEY = "SELECT id, body_sha256 FROM jobs WHERE idempotency_key = :idempotency_key"

_KEEP_PAYLOAD = "INSERT INTO payloads (seq, body) VALUES (:seq, :body)"

_PAYLOAD = "SELECT body FROM payloads WHERE seq = :seq"

_CLAIM = """
    UPDATE jobs SET state = 'running', starts = starts + 1, started_at = :now
     WHERE seq = (SELECT min(seq) FROM jobs WHERE state = 'accepted')
    RETURNING *
"""

_BEGIN_AGAIN = """
    UPDATE jobs SET starts = starts + 1, started_at = :now
     WHERE id = :id AND state = 'running'
    RETURNING *
"""

_END = """
    UPDATE jobs SET state = 'delivering', outcome = :outcome, finished_at = :finished_at,
                    next_attempt_at = :next_attempt_at
     WHERE id = :id AND state = :source
"""

_KEEP_EVENT = """
    INSERT INTO events (seq, body, result)
    VALUES ((SELECT seq FROM jobs WHERE id = :id), :body, :result)
"""

_EVENT = "SELECT body FROM events WHERE seq = :seq"

# A planned stop is not held against a job.
_PUT_BACK = """
    UPDATE jobs SET state = 'accepted', starts = starts - 1, started_at = NULL
     WHERE id IN (SELECT value FROM json_each(:ids)) AND state = 'running'
"""

_EARLIEST_ATTEMPTS = "SELECT receiver, due_at FROM receivers WHERE due_at IS NOT NULL"

_CLAIM_DUE = """
    UPDATE jobs SET next_attempt_at = NULL
     WHERE seq IN (SELECT seq FROM jobs
                    WHERE state = 'delivering' AND receiver = :receiver
                      AND next_attempt_at <= :now
                    ORDER BY next_attempt_at LIMIT :limit)
    RETURNING *
"""

# The attempt's number guards against recording it twice.
_RECORD = """
    UPDATE jobs SET state = :state, attempts = :number, next_attempt_at = :next_attempt_at,
                    ended_at = :ended_at
     WHERE id = :id AND state = 'delivering' AND attempts = :number - 1
"""

_KEEP_ATTEMPT = """
    INSERT INTO attempts (seq, number, attempted_at, duration_seconds, status_code, error)
    VALUES ((SELECT seq FROM jobs WHERE id = :id), :number, :attempted_at, :duration_seconds,
            :status_code, :error)
"""

_PUT_OFF = """
    UPDATE jobs SET next_attempt_at = :until
     WHERE id = :id AND state = 'delivering'
"""

_ADVANCE = """
    UPDATE jobs SET next_attempt_at = :latest
     WHERE state = 'delivering' AND next_attempt_at > :latest
"""

_RESEND = """
    UPDATE jobs SET state = 'delivering', next_attempt_at = :next_attempt_at, ended_at = NULL,
                    resent_after = attempts
     WHERE id = :id AND state IN ('delivered', 'undelivered')
"""

_RESUME_ATTEMPTS = """
    UPDATE jobs SET next_attempt_at = :now WHERE state = 'delivering' AND next_attempt_at IS NULL
"""

_SUSPECTS = "SELECT * FROM jobs WHERE state = 'running' ORDER BY starts, seq"

_WAITING = "SELECT count(*) FROM jobs WHERE state = 'accepted'"

_UNFINISHED = """
    SELECT count(*) FROM jobs WHERE state IN ('accepted', 'running', 'delivering')
"""

_CENSUS = """
    SELECT value AS state,
           (SELECT count(*) FROM jobs WHERE state = value) AS jobs,
           (SELECT created_at FROM jobs
             WHERE seq = (SELECT min(seq) FROM jobs WHERE state = value)) AS created_at
      FROM json_each('["accepted", "running", "delivering", "undelivered"]')
"""

_PRUNE_JOBS = """
    DELETE FROM jobs
     WHERE seq IN (SELECT seq FROM jobs WHERE ended_at < :before ORDER BY ended_at LIMIT :limit)
"""

_PRUNE_RECEIVED = """
    DELETE FROM received
     WHERE seq IN (SELECT seq FROM received WHERE received_at < :before
                    ORDER BY received_at LIMIT :limit)
"""

_JOB = "SELECT * FROM jobs WHERE id = :id"

# One statement, or a move in between would show a state and the attempts of another.
_DETAIL = """
    SELECT jobs.*, payloads.body, events.body AS event, events.result,
           (SELECT json_group_array(json_object(
                       'number', number, 'attempted_at', attempted_at,
                       'duration_seconds', round(duration_seconds, 3),
                       'status_code', status_code, 'error', error))
              FROM (SELECT * FROM attempts WHERE attempts.seq = jobs.seq ORDER BY number)
           ) AS attempts_made
      FROM jobs JOIN payloads USING (seq) LEFT JOIN events USING (seq)
     WHERE id = :id
"""

_PAGE = """
    SELECT * FROM jobs
     WHERE seq < coalesce((SELECT seq FROM jobs WHERE id = :before), 9223372036854775807)
     ORDER BY seq DESC LIMIT :limit
"""

_PAGE_OF_STATE = """
    SELECT * FROM jobs
     WHERE state = :state
       AND seq < coalesce((SELECT seq FROM jobs WHERE id = :before), 9223372036854775807)
     ORDER BY seq DESC LIMIT :limit
"""

_RECEIVE = """
    INSERT INTO received (webhook_id, received_at, signature, body)
    VALUES (:webhook_id, :received_at, :signature, :body)
    ON CONFLICT (webhook_id) DO NOTHING
"""

# The sum of the sizes so far; the newest is always shown.
_RECEIVED = """
    SELECT * FROM (
        SELECT *, sum(length(body)) OVER (ORDER BY seq DESC) - length(body) AS before_bytes
          FROM (SELECT * FROM received ORDER BY seq DESC LIMIT :limit))
     WHERE before_bytes <= :max_bytes
"""

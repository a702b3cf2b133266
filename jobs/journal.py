"""The durable record of jobs, events, attempts and received postbacks: all SQL but the schema.

A move is one conditional UPDATE. When no row changed, the job has moved on already. How the file is
opened and what a commit means is in `jobs/storage.py`.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from jobs import model
from jobs.errors import MoveError, Refusal
from jobs.model import State
from jobs.storage import Storage

#: `GET /jobs/<id>` shows an event up to this size, and a page of received postbacks ends there.
MAX_SHOWN_BYTES = 1024 * 1024

#: The beginning of an UPDATE that makes events due again. The caller adds its WHERE.
_RESEND = """
    UPDATE jobs SET state = 'delivering', next_attempt_at = :now, ended_at = NULL,
                    resent_after = attempts """

#: The largest `seq` that SQLite can store.
MAX_SEQ = 2**63 - 1


class Journal(Storage):
    """The record. Every method may be called from any thread, and raises JournalError.

    Where a method opens no transaction, its caller does, so that the loop can put many calls into
    one. A method that raises a Refusal has written nothing, unless it is a JournalError.
    """

    # Accept

    def accept(self, job: model.Job, body: bytes, *, idempotency_key: str | None = None) -> None:
        """Store a job. Its Idempotency-Key must be new."""
        statement = """
            INSERT INTO jobs (id, state, postback_url, receiver, metadata, forwarded, created_at,
                              idempotency_key, body_sha256)
            VALUES (:id, :state, :postback_url, :receiver, :metadata, :forwarded, :created_at,
                    :key, :body_sha256)"""
        sha256 = hashlib.sha256(body).hexdigest() if idempotency_key else None
        self._write(statement, **_values(job), key=idempotency_key, body_sha256=sha256)
        self._write("INSERT INTO payloads VALUES (last_insert_rowid(), :body)", body=body)

    def accepted_before(self, idempotency_key: str, body: bytes) -> str | None:
        """Return the id of the job that was sent with this key, if there is one.

        Raises:
            Refusal: It was sent with another body (422).
        """
        statement = "SELECT id, body_sha256 FROM jobs WHERE idempotency_key = :key"
        rows = self._fetch(statement, key=idempotency_key)
        if rows and rows[0]["body_sha256"] != hashlib.sha256(body).hexdigest():
            text = "This Idempotency-Key was sent with another body: send a new key."
            raise Refusal(422, "Idempotency key reused", text)
        return str(rows[0]["id"]) if rows else None

    # Run

    def claim(
        self, *, now: datetime, limit: int, max_shared: int, max_interrupted: int
    ) -> list[tuple[model.Job, bytes, str | None]]:
        """Move the oldest accepted jobs that may start now to `running`.

        It reads and then writes, because UPDATE with RETURNING takes three times as long.

        Args:
            now: When those start that need no worker of their own.
            limit: At most so many, those that must run alone first.
            max_shared: At most so many of those that shared a worker that died.
            max_interrupted: At most so many of those that were running at ends of the service.

        Returns:
            Each job, what its caller sent, and the JSON text that its analysis kept last.
        """
        choose = """
            WITH chosen AS (
                SELECT * FROM (SELECT seq FROM startable
                                WHERE alone = 2 ORDER BY seq LIMIT :max_interrupted)
                UNION ALL
                SELECT * FROM (SELECT seq FROM startable
                                WHERE alone = 1 ORDER BY seq LIMIT :max_shared)
                UNION ALL
                SELECT * FROM (SELECT seq FROM startable
                                WHERE alone = 0 ORDER BY seq LIMIT :limit)
                LIMIT :limit)
            SELECT jobs.*, payloads.body, kept.value AS kept
              FROM chosen CROSS JOIN jobs USING (seq) CROSS JOIN payloads USING (seq)
              LEFT JOIN kept USING (seq)"""
        move = """
            UPDATE jobs SET state = 'running', starts = starts + 1,
                            started_at = iif(alone = 0, :now, NULL)
             WHERE seq = :seq"""
        limits = {"limit": limit, "max_shared": max_shared, "max_interrupted": max_interrupted}
        rows = self._fetch(choose, **limits)
        for row in rows:
            self._write(move, seq=row["seq"], now=now)
        jobs = [_job(row, state=State.RUNNING, starts=row["starts"] + 1) for row in rows]
        return [(job, row["body"], row["kept"]) for job, row in zip(jobs, rows, strict=True)]

    def begin(self, job_id: str, *, now: datetime) -> None:
        """Note that a job begins, which waited for a worker of its own."""
        statement = "UPDATE jobs SET started_at = :now WHERE id = :id AND state = 'running'"
        self._write(statement, id=job_id, now=now)

    def keep(self, job_id: str, value: str) -> None:
        """Store what a running analysis wants to find when it is started again.

        Raises:
            MoveError: The job is not running.
        """
        acquit = """
            UPDATE jobs SET interrupted = 0, alone = CASE alone WHEN 2 THEN 0 ELSE alone END
             WHERE id = :id AND state = 'running'"""
        store = "INSERT OR REPLACE INTO kept SELECT seq, :value FROM jobs WHERE id = :id"
        self._move(job_id, acquit, wanted="given a value to keep")
        self._write(store, id=job_id, value=value)

    def run_again(self, job_id: str, again: model.Again, *, now: datetime) -> None:
        """Move a running job back to `accepted`.

        Args:
            job_id: The job.
            again: Why, and after which pause from now on. With an error it counts as a failure. A
                start that never began is not counted any more.
            now: When that is.

        Raises:
            MoveError: The job is not running.
        """
        statement = """
            UPDATE jobs SET state = 'accepted', next_start_at = :next_start_at,
                            starts = starts - 1 + :has_started, alone = max(alone, :is_alone),
                            started_at = iif(:has_started OR starts > 1, started_at, NULL),
                            failures = failures + (:error IS NOT NULL),
                            last_error = coalesce(:error, last_error)
             WHERE id = :id AND state = 'running'"""
        pause = timedelta(seconds=again.pause_seconds)
        values = {"next_start_at": now + pause if pause else None, **_values(again)}
        self._move(job_id, statement, wanted="run again", **values)

    def release_due_starts(self, *, now: datetime) -> int:
        """Let jobs start whose wait is over; return how many accepted jobs can start now."""
        release = "UPDATE jobs SET next_start_at = NULL WHERE next_start_at <= :now"
        with self.transaction():
            self._write(release, now=now)
            return int(self._fetch("SELECT count(*) FROM startable")[0][0])

    def end(
        self,
        job: model.Job,
        ending: model.Ending,
        event: model.Event,
        *,
        due_at: datetime | None,
    ) -> None:
        """Store how a job's analysis ended, and its event: the job is now `delivering`.

        Args:
            job: The job.
            ending: How and when its analysis ended.
            event: What is posted.
            due_at: When the first attempt is due; None when the caller makes it now.

        Raises:
            MoveError: It had ended already. Nothing was changed.
        """
        move = """
            UPDATE jobs SET state = 'delivering', outcome = :outcome, started_at = :started_at,
                            finished_at = :finished_at, next_attempt_at = :due_at,
                            next_start_at = NULL
             WHERE id = :id AND outcome IS NULL"""
        store = """
            INSERT INTO events
            SELECT seq, :body, :result_at, :result, :result_key FROM jobs WHERE id = :id"""
        forget = "DELETE FROM kept WHERE seq = (SELECT seq FROM jobs WHERE id = :id)"
        wanted = "canceled" if ending.outcome is model.Outcome.CANCELED else "ended"
        self._move(job.id, move, wanted=wanted, due_at=due_at, **_values(ending))
        self._write(store, id=job.id, **_values(event))
        self._write(forget, id=job.id)

    # Deliver

    def earliest_attempts(self) -> list[tuple[str, datetime]]:
        """Return each receiver for which attempts are due or will be, and when its next one is."""
        rows = self._read("SELECT receiver, due_at FROM receivers WHERE due_at IS NOT NULL")
        return [(row["receiver"], datetime.fromisoformat(row["due_at"])) for row in rows]

    def claim_due(
        self, receiver: str, *, now: datetime, limit: int
    ) -> list[tuple[model.Job, bytes]]:
        """Take the attempts for one receiver that are due, with their events."""
        statement = """
            UPDATE jobs SET next_attempt_at = NULL
             WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_due
                            WHERE receiver = :receiver AND next_attempt_at <= :now
                            ORDER BY next_attempt_at LIMIT :limit)
            RETURNING *, (SELECT body FROM events WHERE events.seq = jobs.seq) AS event"""
        rows = self._fetch(statement, receiver=receiver, now=now, limit=limit)
        return [(_job(row), row["event"]) for row in rows]

    def record(self, job: model.Job, attempt: model.Attempt, *, now: datetime) -> State:
        """Store an attempt and what follows from it; return the state the job has now.

        Raises:
            MoveError: The job is not `delivering`, or its attempt was recorded already.
        """
        state, next_at = State.DELIVERED if attempt.delivered else State.UNDELIVERED, None
        if attempt.seconds_until_next is not None:
            state, next_at = State.DELIVERING, now + timedelta(seconds=attempt.seconds_until_next)
        # The attempt's number guards against recording it twice.
        move = """
            UPDATE jobs SET state = :state, attempts = :number, next_attempt_at = :next_at,
                            ended_at = :ended_at
             WHERE id = :id AND state = 'delivering' AND attempts = :number - 1"""
        store = """
            INSERT INTO attempts
            SELECT seq, :number, :attempted_at, :duration_seconds, :status_code, :error, :answer
              FROM jobs WHERE id = :id"""
        moved = {"state": state, "next_at": next_at, "ended_at": None if next_at else now}
        self._move(job.id, move, wanted=f"made {state}", number=attempt.number, **moved)
        self._write(store, id=job.id, **_values(attempt))
        return state

    def resend(self, job_id: str, *, now: datetime) -> None:
        """Make an ended job's event due again. The schedule begins again.

        Raises:
            MoveError: It is not `delivered` or `undelivered`.
            Refusal: There is no such job (404).
        """
        chosen = "WHERE id = :id AND state IN ('delivered', 'undelivered')"
        self._move(job_id, _RESEND + chosen, wanted="resent", now=now)

    def resend_undelivered(self, *, since: datetime, now: datetime, limit: int) -> int:
        """Make events of undelivered jobs that ended from `since` on due again; return how many.

        Jobs that ended after `now` are left, so that repeated calls come to an end.
        """
        chosen = """
             WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_undelivered
                            WHERE state = 'undelivered' AND ended_at BETWEEN :since AND :now
                            LIMIT :limit)"""
        with self.transaction():
            return self._write(_RESEND + chosen, since=since, now=now, limit=limit)

    # Start, stop and prune

    def plan_stop(self) -> None:
        """Note that the service was told to stop, so that nobody is blamed for its end."""
        with self.transaction(durable=True):
            self._write("UPDATE service SET planned_stop = 1")

    def probe(self, *, durable: bool = False) -> None:
        """Write something that changes nothing, to see whether the journal can be written.

        Args:
            durable: Whether all that was committed before must survive a power cut from now on.
        """
        with self.transaction(durable=durable):
            for _ in range(2):  # SQLite writes nothing where nothing changes
                self._write("UPDATE service SET planned_stop = 1 - planned_stop")

    def resume(self, *, now: datetime) -> list[model.Job]:
        """Make everything due that was under way when the service ended.

        Args:
            now: Attempts that were under way are due now.

        Returns:
            The jobs that ended the service too often, still `running`.
        """
        count = """
            UPDATE jobs SET interrupted = interrupted + (SELECT NOT planned_stop FROM service)
             WHERE state = 'running' AND started_at IS NOT NULL"""
        put_back = """
            UPDATE jobs SET state = 'accepted', starts = starts - (started_at IS NULL),
                            alone = CASE WHEN interrupted >= :alone_from THEN 2 ELSE alone END
             WHERE state = 'running' AND interrupted < :max_interrupted"""
        limits = {"alone_from": model.ALONE_FROM, "max_interrupted": model.MAX_INTERRUPTED}
        make_due = """
            UPDATE jobs SET next_attempt_at = :now
             WHERE state = 'delivering' AND next_attempt_at IS NULL"""
        with self.transaction():
            self._write(count)
            self._write("UPDATE service SET planned_stop = 0")
            self._write(put_back, **limits)
            self._write(make_due, now=now)
            return [_job(row) for row in self._fetch("SELECT * FROM jobs WHERE state = 'running'")]

    def advance(self, *, latest: datetime) -> None:
        """Bring forward to `latest` what is due later.

        It was due earlier before the clock was set back, or the schedule is shorter now.
        """
        attempts = """
            UPDATE jobs SET next_attempt_at = :latest
             WHERE next_attempt_at IS NOT NULL AND next_attempt_at > :latest"""
        starts = "UPDATE jobs SET next_start_at = :latest WHERE next_start_at > :latest"
        with self.transaction():
            self._write(attempts, latest=latest)
            self._write(starts, latest=latest)

    def prune(self, *, before: datetime, received_before: datetime, limit: int) -> int:
        """Remove at most `limit` jobs, and as many received postbacks, that are older than these.

        Returns:
            How many rows were removed.
        """
        statement = """
            DELETE FROM jobs
             WHERE seq IN (SELECT seq FROM jobs WHERE ended_at < :before
                            ORDER BY ended_at LIMIT :limit)"""
        with self.transaction():
            removed = self._write(statement, before=before, limit=limit)
            return removed + self.prune_received(before=received_before, limit=limit)

    def prune_received(self, *, before: datetime, limit: int) -> int:
        """Remove at most `limit` received postbacks that are older than this; return how many."""
        statement = """
            DELETE FROM received
             WHERE seq IN (SELECT seq FROM received WHERE received_at < :before
                            ORDER BY received_at LIMIT :limit)"""
        return self._write(statement, before=before, limit=limit)

    def delete(self, job_id: str) -> None:
        """Remove an ended job and all that belongs to it, its received postback included.

        Raises:
            MoveError: It has not ended.
            Refusal: There is no such job (404).
        """
        statement = "DELETE FROM jobs WHERE id = :id AND state IN ('delivered', 'undelivered')"
        self._move(job_id, statement, wanted="deleted")
        self._write("DELETE FROM received WHERE webhook_id = :id", id=job_id)

    def _move(self, job_id: str, statement: str, *, wanted: str, **values: Any) -> None:
        """Change one job's row, named by `id`.

        Raises:
            MoveError: Its state does not allow it.
            Refusal: There is no such job (404).
        """
        if not self._write(statement, id=job_id, **values):
            rows = self._fetch("SELECT state FROM jobs WHERE id = :id", id=job_id)
            raise MoveError(job_id, state=_one(rows, job_id)["state"], wanted=wanted)

    # Look

    def detail(self, job_id: str) -> tuple[model.Job, bytes, bytes | None, list[dict[str, Any]]]:
        """Return a job, its payload, its event and its attempts, as they were at one moment.

        An event over MAX_SHOWN_BYTES is not read. The payload and the event are JSON.

        Raises:
            Refusal: There is no such job (404).
        """
        statement = """
            SELECT details.*,
                   CASE WHEN length(events.body) <= :max_bytes THEN events.body END AS event
              FROM details LEFT JOIN events USING (seq) WHERE id = :id"""
        row = _one(self._read(statement, id=job_id, max_bytes=MAX_SHOWN_BYTES), job_id)
        return _job(row), row["payload"], row["event"], json.loads(row["attempts_made"])

    def current(self, job_id: str) -> model.Job:
        """Return one job as the open transaction sees it.

        Raises:
            Refusal: There is none (404).
        """
        return _job(_one(self._fetch("SELECT * FROM jobs WHERE id = :id", id=job_id), job_id))

    def result(self, job_id: str) -> bytes:
        """Return the result of a job as JSON.

        Raises:
            MoveError: It has none.
            Refusal: There is no such job (404).
        """
        rows = self._read("SELECT state, result FROM results WHERE id = :id", id=job_id)
        row = _one(rows, job_id)
        if row["result"] is None:
            raise MoveError(job_id, state=row["state"], wanted="asked for a result")
        return bytes(row["result"])

    def result_key(self, job_id: str) -> str | None:
        """Return what the `result_url` of a job contains; None where there is no such URL."""
        rows = self._read("SELECT result_key FROM results WHERE id = :id", id=job_id)
        return rows[0][0] if rows else None

    def page(self, *, state: str | None, limit: int, before: str | None) -> list[model.Job]:
        """Return jobs, newest first, without their payloads and results.

        Args:
            state: Only these.
            limit: At most so many.
            before: Only those accepted before the job with this id.

        Raises:
            Refusal: There is no such job (404).
        """
        source = "jobs INDEXED BY jobs_by_state WHERE state = :state AND" if state else "jobs WHERE"
        statement = f"SELECT * FROM {source} seq < :end ORDER BY seq DESC LIMIT :limit"  # noqa: S608
        end = MAX_SEQ
        if before is not None:
            end = _one(self._read("SELECT seq FROM jobs WHERE id = :id", id=before), before)["seq"]
        return [_job(row) for row in self._read(statement, state=state, limit=limit, end=end)]

    def census(self) -> list[tuple[State, int, datetime | None]]:
        """Return, for each state but `delivered`, the number of jobs, and when the oldest came."""
        rows = self._read("SELECT state, jobs, created_at FROM census")
        read = datetime.fromisoformat
        return [(State(state), count, at and read(at)) for state, count, at in rows]

    # The built-in receiver

    def receive(self, **columns: Any) -> bool:
        """Store a received postback, a row of `received`; return whether its webhook-id is new."""
        statement = """
            INSERT INTO received (webhook_id, received_at, signature, body)
            VALUES (:webhook_id, :received_at, :signature, :body)
                ON CONFLICT (webhook_id) DO NOTHING"""
        return self._write(statement, **columns) == 1

    def received(self, *, limit: int) -> list[dict[str, Any]]:
        """Return rows of `received`, newest first; fewer when they are large."""
        statement = """
            SELECT webhook_id, received_at, signature, body
              FROM (SELECT seq, sum(bytes) OVER (ORDER BY seq DESC) - bytes AS bytes_before
                      FROM (SELECT seq, length(body) AS bytes FROM received
                             ORDER BY seq DESC LIMIT :limit))
              JOIN received USING (seq)
             WHERE bytes_before <= :max_bytes ORDER BY seq DESC"""
        rows = self._read(statement, limit=limit, max_bytes=MAX_SHOWN_BYTES)
        return [dict(row) for row in rows]


#: How the columns of `jobs` are read that are neither texts, numbers nor instants.
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "state": State,
    "outcome": model.Outcome,
    "alone": model.Alone,
    **dict.fromkeys(("metadata", "forwarded", "last_error"), json.loads),
}

_JOB_FIELDS = [
    (name, datetime.fromisoformat if name.endswith("_at") else _READERS.get(name))
    for name in model.Job.__slots__
]


def _job(row: sqlite3.Row, **changes: Any) -> model.Job:
    """Return the job of a row that begins with the columns of `jobs`, with these changes."""
    # By position, in half the time that looking up 20 names takes.
    values: dict[str, Any] = {
        name: read(value) if read and value is not None else value
        for (name, read), value in zip(_JOB_FIELDS, row[1:], strict=False)
    }
    return model.Job(**(values | changes))


def _values(thing: Any) -> dict[str, Any]:
    """Return the attributes of a slotted dataclass by their names, which are those of columns."""
    return {name: getattr(thing, name) for name in thing.__slots__}


def _one(rows: list[sqlite3.Row], job_id: str) -> sqlite3.Row:
    if not rows:
        text = f"No job has the id {job_id[:64]!r}. Ended jobs are removed after RETENTION."
        raise Refusal(404, "No such job", text)
    return rows[0]

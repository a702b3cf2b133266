import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobs import errors, journal, model
from jobs.journal import Journal, Received
from jobs.model import MOVES, Outcome, State
from tests.test_storage import after_a_crash, make_faulty

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SECOND = timedelta(seconds=1)
BODY = b'{"data": 1}'
EVENT = model.Event(body=b'{"type": "job.succeeded"}')
#: What three accepts ask of the connection, and as many what claim, end and record together ask.
OPERATIONS = 12
TABLES = ("jobs", "payloads", "events", "attempts", "received")


@pytest.fixture
def opened(tmp_path) -> Iterator[Journal]:
    one = Journal(tmp_path / "journal.db", on_lost=lambda: None)
    one.open()
    yield one
    one.close()


def accept(
    one: Journal,
    *,
    key: str | None = None,
    sha: str = "sha",
    at: datetime = NOW,
    receiver: str = "",
) -> str:
    job = model.new_job(
        postback_url=f"{receiver}/hook" if receiver else None,
        receiver=receiver,
        forwarded={"x-request-id": "7"},
        now=at,
    )
    return one.accept(job, BODY, idempotency_key=key, body_sha256=sha)


def end(one: Journal, job: model.Job, *, source: State, due_at: datetime | None = None) -> None:
    outcome = Outcome.CANCELED if source == State.ACCEPTED else Outcome.SUCCEEDED
    one.end(job, outcome, EVENT, finished_at=NOW, due_at=due_at, source=source)


def attempt(job: model.Job, *, error: str | None = None, wait: float | None = None):
    return model.Attempt(
        number=job.attempts + 1,
        attempted_at=NOW,
        duration_seconds=0.25,
        status_code=502 if error else 204,
        error=error,
        seconds_until_next=wait,
    )


def record(one: Journal, job: model.Job, **options: Any) -> State:
    return one.record(job, attempt(job, **options), now=NOW)


# One job in each state


def accepted(one: Journal, **options: Any) -> model.Job:
    return one.job(accept(one, **options))


def running(one: Journal, **options: Any) -> model.Job:
    accept(one, **options)
    begun = one.claim(now=NOW)
    assert begun
    return begun[0]


def delivering(one: Journal, *, due_at: datetime | None = None, **options: Any) -> model.Job:
    job = running(one, **options)
    end(one, job, source=State.RUNNING, due_at=due_at)
    return one.job(job.id)


def delivered(one: Journal, **options: Any) -> model.Job:
    job = delivering(one, **options)
    record(one, job)
    return one.job(job.id)


def undelivered(one: Journal, **options: Any) -> model.Job:
    job = delivering(one, **options)
    record(one, job, error="HTTP 502")
    return one.job(job.id)


BRING_TO: dict[State, Callable[..., model.Job]] = {
    State.ACCEPTED: accepted,
    State.RUNNING: running,
    State.DELIVERING: delivering,
    State.DELIVERED: delivered,
    State.UNDELIVERED: undelivered,
}

# Moves that raise when the state does not allow them: how, from where, to where.

LOUD: dict[str, tuple[Callable[[Journal, model.Job], object], set[State], State]] = {
    "end what waits": (
        lambda one, job: end(one, job, source=State.ACCEPTED),
        {State.ACCEPTED},
        State.DELIVERING,
    ),
    "end what runs": (
        lambda one, job: end(one, job, source=State.RUNNING),
        {State.RUNNING},
        State.DELIVERING,
    ),
    "record a success": (
        record,
        {State.DELIVERING},
        State.DELIVERED,
    ),
    "record the last failure": (
        lambda one, job: record(one, job, error="x"),
        {State.DELIVERING},
        State.UNDELIVERED,
    ),
    "resend": (
        lambda one, job: one.resend(job.id, now=NOW),
        {State.DELIVERED, State.UNDELIVERED},
        State.DELIVERING,
    ),
}

# Moves that take what there is to take, and nothing when there is nothing.

QUIET: dict[str, tuple[Callable[[Journal, model.Job], object], set[State], State]] = {
    "claim": (lambda one, job: one.claim(now=NOW), {State.ACCEPTED}, State.RUNNING),
    "begin again": (
        lambda one, job: one.begin_again(job.id, now=NOW),
        {State.RUNNING},
        State.RUNNING,
    ),
    "put back": (lambda one, job: one.put_back([job.id]), {State.RUNNING}, State.ACCEPTED),
}

BOTH = LOUD | QUIET


def legal(table):
    return [(name, source) for name, (_, sources, _) in table.items() for source in sources]


def illegal(table):
    return [(name, state) for name in table for state in set(State) - table[name][1]]


def contents(one: Journal) -> list[tuple[Any, ...]]:
    read = one._storage.read
    return [tuple(row) for table in TABLES for row in read(f"SELECT * FROM {table}", {})]


def count(one: Journal, table: str) -> int:
    return int(one._storage.read(f"SELECT count(*) FROM {table}", {})[0][0])


def moves(operation: Callable[[], object]) -> bool:
    """Return whether a loud move was made."""
    try:
        operation()
    except errors.MoveError:
        return False
    return True


def tried(operation: Callable[[], Any]) -> Any:
    """Return what it returns, or None when the journal fails."""
    try:
        return operation()
    except errors.JournalError:
        return None


def insist(operation: Callable[[], Any]) -> Any:
    """Return what it returns, at the second try where the first one fails."""
    try:
        return operation()
    except errors.JournalError:
        return operation()


def race(operation: Callable[[], Any], *, threads: int = 16) -> list[Any]:
    """Return what each of so many threads gets that do the same at the same moment."""
    barrier = threading.Barrier(threads)

    def run(_):
        barrier.wait(10)
        return operation()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


# Moves


def test_the_operations_together_make_exactly_the_moves_that_are_allowed():
    made = {(source, BOTH[name][2]) for name, source in legal(BOTH)}

    assert made == {(source, wanted) for source, targets in MOVES.items() for wanted in targets}


@pytest.mark.parametrize(("name", "source"), legal(BOTH))
def test_a_move_that_is_allowed_is_made(opened, name, source):
    operation, _, wanted = BOTH[name]
    job = BRING_TO[source](opened)

    operation(opened, job)

    assert opened.job(job.id).state == wanted


@pytest.mark.parametrize(("name", "state"), illegal(LOUD))
def test_any_other_move_raises_and_changes_nothing(opened, name, state):
    operation, *_ = LOUD[name]
    job = BRING_TO[state](opened)
    before = contents(opened)

    with pytest.raises(errors.MoveError) as caught:
        operation(opened, job)

    assert (caught.value.job_id, caught.value.state) == (job.id, state)
    assert str(caught.value) == f"Job {job.id} is {state}; it cannot be {caught.value.wanted}."
    assert contents(opened) == before


@pytest.mark.parametrize(("name", "state"), illegal(QUIET))
def test_where_there_is_nothing_to_take_nothing_is_changed(opened, name, state):
    job = BRING_TO[state](opened)
    before = contents(opened)

    assert not QUIET[name][0](opened, job)

    assert contents(opened) == before


@pytest.mark.parametrize("state", sorted(set(State) - {State.DELIVERING}))
def test_attempts_are_taken_and_timed_only_while_delivering(opened, state):
    job = BRING_TO[state](opened)
    before = contents(opened)

    taken = opened.claim_due("", now=NOW + SECOND, limit=9)
    opened.put_off(job.id, until=NOW)
    advanced = opened.advance(latest=NOW - SECOND)

    assert (taken, advanced) == ([], 0)
    assert contents(opened) == before


@pytest.mark.parametrize(("name", "source"), legal(LOUD))
def test_of_many_threads_at_one_move_exactly_one_wins(opened, name, source):
    job = BRING_TO[source](opened)

    won = race(lambda: moves(lambda: LOUD[name][0](opened, job)))

    assert won.count(True) == 1
    assert opened.job(job.id).state == LOUD[name][2]


@pytest.mark.parametrize(
    ("bring", "operation"),
    [
        (accepted, lambda one, job: one.claim(now=NOW)),
        (running, lambda one, job: one.put_back([job.id])),
        (
            lambda one: delivering(one, due_at=NOW),
            lambda one, job: one.claim_due("", now=NOW, limit=9),
        ),
    ],
    ids=["claim", "put back", "claim due"],
)
def test_of_many_threads_that_take_exactly_one_gets_it(opened, bring, operation):
    job = bring(opened)

    taken = race(lambda: bool(operation(opened, job)))

    assert taken.count(True) == 1


UNKNOWN = model.new_job(postback_url=None, receiver="", forwarded={}, now=NOW)._replace(id="f" * 32)


@pytest.mark.parametrize(
    "operation",
    [
        *(operation for operation, _, _ in LOUD.values()),
        lambda one, job: one.job(job.id),
        lambda one, job: one.detail(job.id),
    ],
    ids=[*LOUD, "job", "detail"],
)
def test_an_unknown_id_is_not_found(opened, operation):
    accept(opened)

    with pytest.raises(errors.JobNotFoundError) as caught:
        operation(opened, UNKNOWN)

    assert caught.value.job_id == UNKNOWN.id


@pytest.mark.parametrize(
    "operation",
    [
        lambda one: one.begin_again(UNKNOWN.id, now=NOW),
        lambda one: one.put_back([UNKNOWN.id]),
        lambda one: one.put_off(UNKNOWN.id, until=NOW),
        lambda one: one.claim_due("https://unknown", now=NOW, limit=9),
        lambda one: one.accepted_before("unknown", body_sha256="sha"),
    ],
    ids=["begin again", "put back", "put off", "claim due", "accepted before"],
)
def test_of_what_is_unknown_there_is_nothing(opened, operation):
    accept(opened)

    assert not operation(opened)


# Accept


def test_an_accepted_job_is_kept_as_it_came(opened):
    job = model.new_job(
        postback_url="https://a/hook", receiver="https://a", forwarded={"traceparent": "é"}
    )

    assert opened.accept(job, BODY, idempotency_key=None, body_sha256="sha") == job.id

    found, body, event, attempts = opened.detail(job.id)
    assert model.text_of(found.created_at) == model.text_of(job.created_at)
    assert found._replace(created_at=job.created_at) == job
    assert (body, event, attempts) == (BODY, None, [])


def test_jobs_without_a_key_are_all_accepted(opened):
    ids = {accept(opened) for _ in range(3)}

    assert len(ids) == count(opened, "jobs") == count(opened, "payloads") == 3


def test_the_same_key_and_body_is_one_job_for_a_hundred_threads(opened):
    ids = race(lambda: accept(opened, key="key"), threads=100)

    assert len(set(ids)) == 1
    assert count(opened, "jobs") == count(opened, "payloads") == 1


@pytest.mark.parametrize("state", list(State))
def test_a_key_is_known_in_every_state(opened, state):
    job = BRING_TO[state](opened, key="key")

    assert accept(opened, key="key") == job.id
    assert opened.accepted_before("key", body_sha256="sha") == job.id


def test_a_key_is_known_after_a_restart(opened):
    job_id = accept(opened, key="key")
    opened.close()

    opened.open()

    assert accept(opened, key="key") == job_id


def test_a_key_with_another_body_is_refused_and_leaves_no_trace(opened):
    accept(opened, key="key")
    before = contents(opened)

    with pytest.raises(errors.KeyReusedError, match="another body"):
        accept(opened, key="key", sha="other")
    with pytest.raises(errors.KeyReusedError, match="another body"):
        opened.accepted_before("key", body_sha256="other")

    assert contents(opened) == before


@pytest.mark.parametrize(
    ("operation", "is_promised"),
    [
        (lambda one, job: accept(one), True),
        (lambda one, job: one.resend(job.id, now=NOW), True),
        (lambda one, job: one.receive(received(1)), True),
        (lambda one, job: one.probe(), False),
        (lambda one, job: one.put_off(job.id, until=NOW), False),
    ],
    ids=["accept", "resend", "receive", "probe", "put off"],
)
def test_what_is_promised_is_settled_before_the_answer(opened, monkeypatch, operation, is_promised):
    job = delivered(opened)
    opened.settle()
    syncs: list[int] = []
    monkeypatch.setattr(os, "fdatasync", syncs.append)

    operation(opened, job)
    opened.settle()

    assert len(syncs) == is_promised


@pytest.mark.parametrize(("source", "is_promised"), [(State.ACCEPTED, 1), (State.RUNNING, 0)])
def test_that_a_job_was_canceled_is_promised_that_it_ended_is_not(
    opened, monkeypatch, source, is_promised
):
    job = BRING_TO[source](opened)
    opened.settle()
    syncs: list[int] = []
    monkeypatch.setattr(os, "fdatasync", syncs.append)

    end(opened, job, source=source)
    opened.settle()

    assert len(syncs) == is_promised


@pytest.mark.parametrize("code", ["SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_BUSY"])
@pytest.mark.parametrize("number", range(1, OPERATIONS + 2))
def test_whichever_operation_fails_no_id_is_returned_without_its_row(opened, code, number):
    make_faulty(opened._storage, code, number)

    ids = [job_id for job_id in (tried(lambda: accept(opened)) for _ in range(3)) if job_id]

    assert len(ids) == 3 - (number <= OPERATIONS)
    path = opened._storage._path
    crashed = after_a_crash(path, path.parent / "crashed", "-wal")
    with closing(sqlite3.connect(crashed)) as plain:
        rows = plain.execute("SELECT id FROM jobs JOIN payloads USING (seq) ORDER BY seq")
        assert [job_id for (job_id,) in rows] == ids


@pytest.mark.parametrize("code", ["SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_BUSY"])
@pytest.mark.parametrize("number", range(1, OPERATIONS + 1))
def test_whichever_operation_fails_a_step_that_is_repeated_is_made_once(opened, code, number):
    accept(opened)
    make_faulty(opened._storage, code, number)

    job, _ = insist(lambda: opened.claim(now=NOW))
    insist(lambda: end(opened, job, source=State.RUNNING))
    insist(lambda: record(opened, job))

    assert opened._storage.failure is None
    found = opened.job(job.id)
    assert (found.state, found.starts, found.attempts) == (State.DELIVERED, 1, 1)
    assert [count(opened, table) for table in TABLES] == [1, 1, 1, 1, 0]


def test_the_last_of_those_operations_is_beyond_the_end(opened):
    faulty = make_faulty(opened._storage, "SQLITE_FULL")
    for _ in range(3):
        accept(opened)
    accepting, faulty.operations = faulty.operations, 0

    job, _ = opened.claim(now=NOW)
    end(opened, job, source=State.RUNNING)
    record(opened, job)

    assert (accepting, faulty.operations) == (OPERATIONS, OPERATIONS)


# Run


def test_the_oldest_job_is_claimed_first(opened):
    ids = [accept(opened) for _ in range(3)]

    claimed = [opened.claim(now=NOW)[0].id for _ in range(3)]

    assert claimed == ids
    assert opened.claim(now=NOW) is None


def test_a_claimed_job_has_begun_once_and_comes_with_its_body(opened):
    accept(opened)

    job, body = opened.claim(now=NOW + SECOND)

    assert (job.state, job.starts, job.started_at) == (State.RUNNING, 1, NOW + SECOND)
    assert body == BODY


def test_a_suspect_that_begins_again_counts_one_more_start(opened):
    suspect = running(opened)

    job, body = opened.begin_again(suspect.id, now=NOW + SECOND)

    assert (job.state, job.starts, job.started_at) == (State.RUNNING, 2, NOW + SECOND)
    assert body == BODY


def test_a_job_that_is_put_back_is_as_if_it_had_not_begun(opened):
    other, job = running(opened), running(opened)

    assert opened.put_back([job.id]) == 1

    found = opened.job(job.id)
    assert (found.state, found.starts, found.started_at) == (State.ACCEPTED, 0, None)
    assert opened.job(other.id).state == State.RUNNING


def test_a_suspect_that_is_put_back_keeps_its_other_starts(opened):
    suspect = running(opened)
    opened.begin_again(suspect.id, now=NOW)

    opened.put_back([suspect.id])

    assert opened.job(suspect.id).starts == 1


@pytest.mark.parametrize("due_at", [None, NOW + SECOND])
def test_a_job_that_ended_has_its_outcome_and_its_event(opened, due_at):
    job = running(opened)
    event = model.Event(body=b"thin", result='{"large": 1}')

    opened.end(job, Outcome.FAILED, event, finished_at=NOW, due_at=due_at, source=State.RUNNING)

    found, _, stored, _ = opened.detail(job.id)
    assert (found.outcome, found.finished_at) == (Outcome.FAILED, NOW)
    assert found.next_attempt_at == due_at
    assert stored == event


# Deliver


def test_a_delivered_attempt_ends_the_job(opened):
    job = delivering(opened)

    state = record(opened, job)

    found = opened.job(job.id)
    assert state == found.state == State.DELIVERED
    assert (found.attempts, found.ended_at, found.next_attempt_at) == (1, NOW, None)


def test_a_failed_attempt_makes_the_next_one_due(opened):
    job = delivering(opened)

    state = record(opened, job, error="HTTP 502", wait=2.5)

    found = opened.job(job.id)
    assert state == found.state == State.DELIVERING
    assert found.next_attempt_at == NOW + timedelta(seconds=2.5)
    assert (found.attempts, found.ended_at) == (1, None)


def test_the_last_failed_attempt_ends_the_job(opened):
    job = delivering(opened)

    state = record(opened, job, error="HTTP 502")

    found = opened.job(job.id)
    assert state == found.state == State.UNDELIVERED
    assert (found.attempts, found.ended_at, found.next_attempt_at) == (1, NOW, None)


def test_an_attempt_is_recorded_once(opened):
    job = delivering(opened)
    record(opened, job, error="HTTP 502", wait=1)
    before = contents(opened)

    with pytest.raises(errors.MoveError):
        record(opened, job)

    assert contents(opened) == before


def test_the_attempts_are_shown_in_their_order(opened):
    job = delivering(opened)
    record(opened, job, error="HTTP 502", wait=1)
    record(opened, opened.job(job.id))

    shown = {"attempted_at": "2026-01-02T03:04:05.000Z", "duration_seconds": 0.25}
    assert opened.detail(job.id).attempts == [
        {"number": 1, "status_code": 502, "error": "HTTP 502", **shown},
        {"number": 2, "status_code": 204, "error": None, **shown},
    ]


def test_attempts_that_are_due_are_taken_in_the_order_of_their_times(opened):
    late, early, later = [delivering(opened, due_at=NOW + SECOND * n).id for n in (2, 1, 3)]

    first = opened.claim_due("", now=NOW + SECOND * 2, limit=1)
    rest = opened.claim_due("", now=NOW + SECOND * 2, limit=9)

    assert [(job.id, body) for job, body in first] == [(early, EVENT.body)]
    assert [job.id for job, _ in rest] == [late]
    assert opened.job(later).next_attempt_at == NOW + SECOND * 3


def test_an_attempt_that_was_taken_is_under_way(opened):
    job = delivering(opened, due_at=NOW)

    ((taken, _),) = opened.claim_due("", now=NOW, limit=9)

    assert taken.next_attempt_at is None
    assert opened.job(job.id) == taken
    assert opened.claim_due("", now=NOW, limit=9) == []


def test_attempts_are_taken_for_one_receiver_at_a_time(opened):
    delivering(opened, receiver="https://a", due_at=NOW)
    other = delivering(opened, receiver="https://b", due_at=NOW)

    taken = opened.claim_due("https://b", now=NOW, limit=9)

    assert [job.id for job, _ in taken] == [other.id]
    assert taken[0][0].postback_url == "https://b/hook"


def test_each_receiver_has_its_earliest_attempt(opened):
    delivering(opened, receiver="https://b", due_at=NOW + SECOND * 2)
    delivering(opened, receiver="https://b", due_at=NOW + SECOND)
    delivering(opened, receiver="https://b")
    delivering(opened, due_at=NOW)
    delivering(opened, receiver="https://under-way")
    delivered(opened, receiver="https://delivered")
    accepted(opened, receiver="https://accepted")

    assert opened.earliest_attempts() == [("", NOW), ("https://b", NOW + SECOND)]


def test_a_hundred_receivers_are_all_found(opened):
    names = [f"https://{number:03}" for number in range(100)]
    due = [delivering(opened, receiver=name, due_at=NOW).receiver for name in names]

    assert opened.earliest_attempts() == [(name, NOW) for name in due]


def test_where_nothing_is_delivered_no_receiver_is_found(opened):
    accept(opened)

    assert opened.earliest_attempts() == []


def test_an_attempt_that_was_not_made_can_be_put_off(opened):
    job = delivering(opened, due_at=NOW)
    opened.claim_due("", now=NOW, limit=9)

    opened.put_off(job.id, until=NOW + SECOND)

    assert opened.earliest_attempts() == [("", NOW + SECOND)]
    assert opened.job(job.id).attempts == 0


def test_after_the_clock_was_set_back_no_attempt_is_later_than_the_schedule(opened):
    under_way = delivering(opened).id
    near, far = [delivering(opened, due_at=NOW + SECOND * n).id for n in (1, 3600)]

    assert opened.advance(latest=NOW + SECOND * 60) == 1

    due = [opened.job(job_id).next_attempt_at for job_id in (near, far, under_way)]
    assert due == [NOW + SECOND, NOW + SECOND * 60, None]


# Resend


@pytest.mark.parametrize("bring", [delivered, undelivered])
def test_a_job_that_is_resent_is_due_with_the_same_bytes_and_a_new_schedule(opened, bring):
    job = bring(opened)

    opened.resend(job.id, now=NOW + SECOND)

    ((taken, body),) = opened.claim_due("", now=NOW + SECOND, limit=9)
    assert (taken.id, body) == (job.id, EVENT.body)
    assert (taken.attempts, taken.resent_after, taken.ended_at) == (1, 1, None)
    assert taken.outcome == job.outcome


def test_attempts_are_counted_over_resends(opened):
    job = undelivered(opened)
    opened.resend(job.id, now=NOW)

    record(opened, opened.job(job.id))

    assert [one["number"] for one in opened.detail(job.id).attempts] == [1, 2]
    assert (opened.job(job.id).attempts, opened.job(job.id).resent_after) == (2, 1)


# Resume


def test_after_a_restart_suspects_come_the_least_often_begun_first(opened):
    often, seldom, seldom_too = [running(opened).id for _ in range(3)]
    opened.begin_again(often, now=NOW)
    accept(opened)
    accept(opened)
    opened.close()

    opened.open()
    suspects, waiting = opened.resume(now=NOW)

    assert [(job.id, job.starts) for job in suspects] == [(seldom, 1), (seldom_too, 1), (often, 2)]
    assert waiting == 2


def test_after_a_restart_attempts_that_were_under_way_are_due(opened):
    under_way = delivering(opened).id
    later = delivering(opened, due_at=NOW + SECOND * 9).id

    assert opened.resume(now=NOW + SECOND) == ([], 0)

    due = [opened.job(job_id).next_attempt_at for job_id in (under_way, later)]
    assert due == [NOW + SECOND, NOW + SECOND * 9]


def test_what_is_unfinished_is_counted(opened):
    for bring in (delivered, undelivered, delivering, running, accepted):
        bring(opened)

    assert opened.count_unfinished() == 3


def test_a_probe_changes_nothing(opened):
    delivered(opened)
    before = contents(opened)

    opened.probe()

    assert contents(opened) == before
    assert opened.failure is None


def test_a_journal_that_fails_says_so_until_a_probe_succeeds(opened):
    accept(opened)
    opened._storage._connection.execute("PRAGMA query_only = 1")

    with pytest.raises(errors.JournalError, match="readonly"):
        accept(opened)
    with pytest.raises(errors.JournalError, match="readonly"):
        opened.probe()
    assert opened.failure
    opened._storage._connection.execute("PRAGMA query_only = 0")
    opened.probe()

    assert opened.failure is None


# Prune


def test_ended_jobs_are_pruned_in_batches_with_all_that_is_theirs(opened):
    for bring in (delivered, undelivered, delivered):
        bring(opened)

    removed = [opened.prune(before=NOW + SECOND, limit=2) for _ in range(3)]

    assert removed == [2, 1, 0]
    assert contents(opened) == []


def test_the_oldest_are_pruned_first_and_the_youngest_are_kept(opened):
    kept = delivered(opened)
    older = delivering(opened)
    opened.record(older, attempt(older), now=NOW - SECOND)

    assert opened.prune(before=NOW, limit=9) == 1

    assert [job.id for job in opened.page(state=None, limit=9, before=None)] == [kept.id]
    assert [count(opened, table) for table in TABLES] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("state", [State.ACCEPTED, State.RUNNING, State.DELIVERING])
def test_what_is_unfinished_is_never_pruned(opened, state):
    job = BRING_TO[state](opened)

    assert opened.prune(before=NOW + timedelta(days=9999), limit=9) == 0

    assert opened.job(job.id) == job


def test_a_job_that_is_resent_is_not_pruned(opened):
    job = delivered(opened)
    opened.resend(job.id, now=NOW)

    assert opened.prune(before=NOW + SECOND, limit=9) == 0


def test_the_key_of_a_pruned_job_is_free(opened):
    job = delivered(opened, key="key")
    opened.prune(before=NOW + SECOND, limit=9)

    assert opened.accepted_before("key", body_sha256="sha") is None
    assert accept(opened, key="key", sha="other") != job.id


# Look


def ids_of(page: list[model.Job]) -> list[str]:
    return [job.id for job in page]


def test_a_page_is_newest_first_and_goes_on_before_its_last(opened):
    ids = [accept(opened) for _ in range(5)]

    first = opened.page(state=None, limit=2, before=None)
    second = opened.page(state=None, limit=9, before=first[-1].id)

    assert ids_of(first) == [ids[4], ids[3]]
    assert ids_of(second) == [ids[2], ids[1], ids[0]]
    assert opened.page(state=None, limit=9, before=ids[0]) == []


@pytest.mark.parametrize("state", list(State))
def test_a_page_of_one_state_has_no_other(opened, state):
    # The accepted one comes last: a claim takes the oldest.
    ids = {one: BRING_TO[one](opened).id for one in reversed(State)}

    page = opened.page(state=state, limit=9, before=None)

    assert ids_of(page) == [ids[state]]


def test_a_page_of_one_state_goes_on_before_any_job(opened):
    ids = [delivered(opened).id for _ in range(3)]
    other = accept(opened)

    before_other = opened.page(state=State.DELIVERED, limit=2, before=other)
    rest = opened.page(state=State.DELIVERED, limit=9, before=ids[1])

    assert ids_of(before_other) == [ids[2], ids[1]]
    assert ids_of(rest) == [ids[0]]


def test_a_job_is_shown_with_its_body_and_its_event(opened):
    job = delivered(opened)

    assert opened.detail(job.id)[:3] == (opened.job(job.id), BODY, EVENT)


def test_a_job_is_shown_as_it_was_at_one_moment(opened):
    job = delivering(opened)

    def attempt_again_and_again():
        for _ in range(100):
            record(opened, opened.job(job.id), error="HTTP 502", wait=1)

    thread = threading.Thread(target=attempt_again_and_again)
    thread.start()
    shown = [opened.detail(job.id)]
    while thread.is_alive():
        shown.append(opened.detail(job.id))
    thread.join()

    assert [one.job.attempts for one in shown] == [len(one.attempts) for one in shown]
    assert opened.job(job.id).attempts == 100


# The built-in receiver


def received(number: int, *, at: datetime = NOW, signature: str = "good") -> Received:
    return Received(
        webhook_id=f"id-{number}", received_at=at, signature=signature, body=b"\xff\x00"
    )


def test_what_is_received_is_kept_newest_first(opened):
    one, two, three = received(1), received(2, signature="none"), received(3)
    for postback in (one, two, three):
        assert opened.receive(postback)

    assert opened.received(limit=9) == [three, two, one]
    assert opened.received(limit=1) == [three]


def test_of_duplicates_the_first_is_kept(opened):
    first = received(1)
    opened.receive(first)

    assert not opened.receive(replace(first, body=b"other"))

    assert opened.received(limit=9) == [first]


def test_of_many_duplicates_at_once_exactly_one_is_new(opened):
    assert race(lambda: opened.receive(received(1))).count(True) == 1


def test_received_postbacks_are_pruned_in_batches(opened):
    for number in range(3):
        opened.receive(received(number, at=NOW + SECOND * number))

    removed = [opened.prune(before=NOW + SECOND * 2, limit=1) for _ in range(3)]

    assert removed == [1, 1, 0]
    assert [one.webhook_id for one in opened.received(limit=9)] == ["id-2"]


# A million finished jobs cost nothing

PARAMETERS = {
    "id": "f" * 32,
    "seq": 1,
    "state": "running",
    "before": None,
    "limit": 10,
    "receiver": "",
    "idempotency_key": "key",
    "now": "2000",
    "latest": "2000",
    "until": "2000",
    "next_attempt_at": "2000",
    "ids": "[]",
}

STATEMENTS = {
    "claim": journal._CLAIM,
    "claim due": journal._CLAIM_DUE,
    "earliest attempts": journal._EARLIEST_ATTEMPTS,
    "prune": journal._PRUNE_JOBS,
    "page": journal._PAGE,
    "page of a state": journal._PAGE_OF_STATE,
    "begin again": journal._BEGIN_AGAIN,
    "put back": journal._PUT_BACK,
    "put off": journal._PUT_OFF,
    "advance": journal._ADVANCE,
    "resend": journal._RESEND,
    "resume attempts": journal._RESUME_ATTEMPTS,
    "suspects": journal._SUSPECTS,
    "waiting": journal._WAITING,
    "unfinished": journal._UNFINISHED,
    "by key": journal._BY_KEY,
    "job": journal._JOB,
    "detail": journal._DETAIL,
}


@pytest.fixture(scope="module")
def finished() -> Iterator[sqlite3.Connection]:
    """Twenty thousand jobs that were delivered, and none that was not."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.executescript(journal._SCHEMA_PATH.read_text())
        connection.execute(
            """
            INSERT INTO jobs (id, state, outcome, receiver, created_at, ended_at)
            SELECT printf('%032x', value), 'delivered', 'succeeded', '', '2026', '2026'
              FROM (WITH RECURSIVE numbers (value) AS
                    (SELECT 1 UNION ALL SELECT value + 1 FROM numbers WHERE value < 20000)
                    SELECT value FROM numbers)
            """
        )
        yield connection


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_a_statement_finds_its_jobs_by_an_index(finished, statement):
    rows = finished.execute(f"EXPLAIN QUERY PLAN {statement}", PARAMETERS)
    plan = [row[3] for row in rows]

    assert any(line.startswith("SEARCH jobs USING") for line in plan), plan
    assert not [line for line in plan if line.startswith("SCAN jobs")], plan


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("claim", "jobs_by_state"),
        ("claim due", "jobs_due"),
        ("earliest attempts", "jobs_due"),
        ("page of a state", "jobs_by_state"),
        ("prune", "jobs_ended"),
    ],
)
def test_a_statement_uses_the_index_made_for_it(finished, name, index):
    rows = finished.execute(f"EXPLAIN QUERY PLAN {STATEMENTS[name]}", PARAMETERS)
    indexes = {word for row in rows for word in row[3].split() if word.startswith("jobs_")}

    assert indexes == {index}


def test_receivers_are_found_without_reading_all_that_waits_for_them(finished):
    steps = []
    finished.execute("BEGIN")
    finished.execute(
        """
        UPDATE jobs SET state = 'delivering', ended_at = NULL, next_attempt_at = '2026',
                        receiver = seq % 10
        """
    )
    finished.set_progress_handler(lambda: steps.append(1), 1)

    found = finished.execute(journal._EARLIEST_ATTEMPTS).fetchall()
    finished.set_progress_handler(None, 0)
    finished.execute("ROLLBACK")

    assert found == [(str(digit), "2026") for digit in range(10)]
    assert len(steps) < 1000


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_a_statement_takes_no_more_steps_for_many_finished_jobs(finished, statement):
    steps = []
    finished.set_progress_handler(lambda: steps.append(1), 1)

    finished.execute(statement, PARAMETERS | {"before": "2000"}).fetchall()
    finished.set_progress_handler(None, 0)

    assert 0 < len(steps) < 1000

"""The journal: every state and every move, races, resume, and what a large journal costs."""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobs import journal, model
from jobs.errors import MoveError, Refusal
from jobs.journal import Journal
from jobs.model import Alone, Job, Outcome, State
from tests.harness import MOVES

ACCEPTED, RUNNING, DELIVERING, DELIVERED, UNDELIVERED = State
ENDED = {DELIVERED, UNDELIVERED}
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SECOND = timedelta(seconds=1)
LATEST = NOW + timedelta(days=1)
BODY = b'{"data": 1}'
EVENT = model.Event(body=b'{"data": {"result": [1]}}', result_at=20)
TABLES = ("jobs", "payloads", "kept", "events", "attempts", "received")


class Committing(Journal):
    """A journal that makes a transaction of each call, as the loop makes one of many."""


def in_a_transaction(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Journal, *arguments: Any, **options: Any) -> Any:
        with self.transaction(durable=True):
            return method(self, *arguments, **options)

    return call


for _name in (
    *("accept", "accepted_before", "begin", "claim", "claim_due", "delete", "end", "keep"),
    *("receive", "record", "resend", "run_again"),
):
    setattr(Committing, _name, in_a_transaction(getattr(Journal, _name)))


@pytest.fixture
def opened(tmp_path) -> Iterator[Journal]:
    with closing(Committing(tmp_path / "journal.db", on_lost=lambda: None)) as one:
        one.open()
        yield one


def accept(one: Journal, *, key: str | None = None, receiver: str = "") -> str:
    fields: dict[str, Any] = {"postback_url": "/hook", "forwarded": {"x-request-id": "7"}}
    fields |= {"id": model.new_id(model.utc_now()), "receiver": receiver, "created_at": NOW}
    job = Job(**fields, state=ACCEPTED)
    one.accept(job, BODY, idempotency_key=key)
    return job.id


def job_of(one: Journal, job_id: str) -> Job:
    return one.detail(job_id)[0]


def claim(one: Journal, **limits: int) -> list[Job]:
    limits = {"limit": 9, "max_shared": 9, "max_interrupted": 9, **limits}
    return [job for job, _, _ in one.claim(now=NOW, **limits)]


def claim_due(one: Journal) -> list[tuple[Job, bytes]]:
    return one.claim_due("", now=NOW, limit=9)


def end(one: Journal, job: Job, *, due_at: datetime | None = None) -> None:
    ending = model.Ending(outcome=Outcome.SUCCEEDED, started_at=job.started_at, finished_at=NOW)
    one.end(job, ending, EVENT, due_at=due_at)


def record(one: Journal, job: Job, error: str | None = None, wait: float | None = None) -> State:
    made: dict[str, Any] = {
        "number": job.attempts + 1,
        "attempted_at": NOW,
        "duration_seconds": 0.25,
    }
    attempt = model.Attempt(**made, error=error, seconds_until_next=wait)
    return one.record(job, attempt, now=NOW)


def again(one: Journal, job: Job, **options: Any) -> None:
    one.run_again(job.id, model.Again(**options), now=NOW)


def resend_all(one: Journal, since: datetime = NOW, now: datetime = NOW) -> int:
    return one.resend_undelivered(since=since, now=now, limit=2)


def prune(one: Journal, before: datetime = NOW) -> int:
    return one.prune(before=before, received_before=before, limit=2)


def receive(one: Journal, name: str, *, at: datetime = NOW, body: bytes = b"\xff") -> bool:
    return one.receive(webhook_id=name, received_at=at, signature="good", body=body)


# One job in each state


def accepted(one: Journal) -> Job:
    return job_of(one, accept(one))


def running(one: Journal, receiver: str = "") -> Job:
    accept(one, receiver=receiver)
    return claim(one)[0]


def delivering(one: Journal, due_at: datetime | None = None, receiver: str = "") -> Job:
    job = running(one, receiver)
    end(one, job, due_at=due_at)
    return job_of(one, job.id)


def delivered(one: Journal, error: str | None = None) -> Job:
    job = delivering(one)
    record(one, job, error)
    return job_of(one, job.id)


def undelivered(one: Journal) -> Job:
    return delivered(one, "HTTP 502")


Step = Callable[[Journal], object]
BRINGING: list[Callable[[Journal], Job]] = [accepted, running, delivering, delivered, undelivered]
BRING_TO = dict(zip(State, BRINGING, strict=True))

#: How a job is moved, from which states, and to which. These raise where it is not allowed,
Move = tuple[Callable[[Journal, Job], object], set[State], State | None]
LOUD: dict[str, Move] = {
    "end": (end, {ACCEPTED, RUNNING}, DELIVERING),
    "run again": (again, {RUNNING}, ACCEPTED),
    "record success": (record, {DELIVERING}, DELIVERED),
    "record failure": (lambda one, job: record(one, job, "x"), {DELIVERING}, UNDELIVERED),
    "resend": (lambda one, job: one.resend(job.id, now=NOW), ENDED, DELIVERING),
}
#: these, too, and the state stays or the job goes;
OTHER: dict[str, Move] = {
    "keep": (lambda one, job: one.keep(job.id, "1"), {RUNNING}, None),
    "delete": (lambda one, job: one.delete(job.id), ENDED, None),
}
#: and these take what there is to take.
QUIET: dict[str, Move] = {
    "claim": (lambda one, job: claim(one), {ACCEPTED}, RUNNING),
    "resend all": (lambda one, job: resend_all(one), {UNDELIVERED}, DELIVERING),
}


def cases(table, *, legal: bool):
    return [(key, state) for key in table for state in State if (state in table[key][1]) is legal]


def contents(one: Journal) -> list[tuple[Any, ...]]:
    return [tuple(row) for table in TABLES for row in one._read(f"SELECT * FROM {table}")]


def race(operation: Callable[[], Any], *, threads: int = 16) -> list[Any]:
    """Return what each of so many threads gets that do the same at the same moment."""
    barrier = threading.Barrier(threads)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda _: (barrier.wait(10), operation())[1], range(threads)))


# Moves


def test_the_operations_together_make_exactly_the_moves_that_are_allowed():
    made = {(state, wanted) for _, states, wanted in (LOUD | QUIET).values() for state in states}

    assert made == {(state, wanted) for state, targets in MOVES.items() for wanted in targets}


@pytest.mark.parametrize(("name", "state"), cases(LOUD | QUIET, legal=True))
def test_a_move_that_is_allowed_is_made(opened, name, state):
    operation, _, wanted = (LOUD | QUIET)[name]
    job = BRING_TO[state](opened)

    operation(opened, job)

    assert job_of(opened, job.id).state == wanted


@pytest.mark.parametrize(("name", "state"), cases(LOUD | OTHER | QUIET, legal=False))
def test_any_other_move_changes_nothing_and_raises_where_it_names_a_job(opened, name, state):
    job = BRING_TO[state](opened)
    before = contents(opened)
    refused = pytest.raises(MoveError, match=f"^Job {job.id} is {state}, so it cannot be ")

    with nullcontext() if name in QUIET else refused:
        assert not (LOUD | OTHER | QUIET)[name][0](opened, job)

    assert contents(opened) == before


@pytest.mark.parametrize(("name", "state"), cases(LOUD, legal=True))
def test_of_many_threads_at_one_move_exactly_one_wins(opened, name, state):
    job = BRING_TO[state](opened)

    def is_moved() -> bool:
        try:
            LOUD[name][0](opened, job)
        except MoveError:
            return False
        return True

    assert race(is_moved).count(True) == 1


def test_jobs_that_must_run_alone_are_claimed_first_and_only_so_many(opened):
    ids = [accept(opened) for _ in range(4)]
    for begun, is_alone in zip(claim(opened), (False, True, True, True), strict=True):
        again(opened, begun, is_alone=is_alone, has_started=False)

    assert {job_of(opened, one).started_at for one in ids} == {None}  # none has started
    claimed = [(one.id, one.alone) for one in claim(opened, max_shared=2)]

    assert claimed == [(ids[1], Alone.SHARED), (ids[2], Alone.SHARED), (ids[0], Alone.NO)]


# Deliver


def test_due_attempts_are_taken_once_for_one_receiver_the_earliest_first(opened):
    late, early, _ = [delivering(opened, due_at=NOW + SECOND * n).id for n in (2, 1, 3)]
    delivering(opened, receiver="https://b:443", due_at=NOW)

    ((taken, event),) = opened.claim_due("", now=NOW + SECOND * 2, limit=1)
    ((other, _),) = opened.claim_due("", now=NOW + SECOND * 2, limit=9)

    assert (taken.id, other.id, event) == (early, late, EVENT.body)
    assert taken == job_of(opened, early)
    assert opened.earliest_attempts() == [("", NOW + SECOND * 3), ("https://b:443", NOW)]


def test_what_ended_after_a_resend_of_all_began_is_left_so_that_it_comes_to_an_end(opened):
    undelivered(opened)

    assert [resend_all(opened, now=now) for now in (NOW - SECOND, NOW)] == [0, 1]


# Start, stop and prune


def test_of_the_jobs_that_were_interrupted_often_only_so_many_are_claimed(opened):
    for _ in range(2):
        accept(opened)
    for _ in range(model.ALONE_FROM):
        claim(opened)
        opened.resume(now=NOW)

    claimed = [claim(opened, max_interrupted=most) for most in (0, 1)]

    assert [[one.alone for one in some] for some in claimed] == [[], [Alone.INTERRUPTED]]


def test_a_job_that_waited_for_its_own_worker_when_the_service_ended_is_not_to_blame(opened):
    job_id = running(opened).id
    again(opened, job_of(opened, job_id), is_alone=True)
    for has_begun in (False, True):
        claim(opened, max_shared=1)
        if has_begun:
            opened.begin(job_id, now=NOW)
        opened.resume(now=NOW)

        job = job_of(opened, job_id)
        assert (job.interrupted, job.starts) == (int(has_begun), 1 + has_begun)


def test_nothing_is_due_later_than_the_schedule_allows_when_the_clock_was_set_back(opened):
    waits = running(opened)
    again(opened, waits, pause_seconds=3600.0)
    near, far = [delivering(opened, due_at=NOW + SECOND * n).id for n in (1, 3600)]

    opened.advance(latest=NOW + SECOND * 60)

    due = [job_of(opened, job_id).next_attempt_at for job_id in (near, far)]
    assert due == [NOW + SECOND, NOW + SECOND * 60]
    assert job_of(opened, waits.id).next_start_at == NOW + SECOND * 60
    assert opened.release_due_starts(now=NOW + SECOND * 59) == 0
    assert opened.release_due_starts(now=NOW + SECOND * 60) == 1


def test_only_what_has_ended_is_pruned_in_batches_with_all_that_is_its(opened):
    left = [BRING_TO[state](opened).id for state in (DELIVERING, RUNNING)]
    for bring in (delivered, undelivered, delivered):
        receive(opened, bring(opened).id)

    assert [prune(opened, NOW + SECOND) for _ in range(3)] == [4, 2, 0]
    assert [job.id for job in opened.page(state=None, limit=9, before=None)] == left[::-1]
    assert len(contents(opened)) == 5  # two jobs, two payloads and an event


# Look


def test_a_page_of_one_state_has_no_other_and_the_census_counts_them(opened):
    # The accepted one comes last, because a claim takes all.
    ids = {state: BRING_TO[state](opened).id for state in reversed(State)}

    pages = {state: opened.page(state=state, limit=9, before=None) for state in State}

    assert {state: page[0].id for state, page in pages.items() if len(page) == 1} == ids
    assert opened.census() == [(state, 1, NOW) for state in State if state != DELIVERED]


def test_what_is_large_is_not_read_to_be_shown(opened, monkeypatch):
    monkeypatch.setattr(journal, "MAX_SHOWN_BYTES", 8)
    for name in "abc":
        receive(opened, name, body=b"12345")

    assert opened.detail(delivering(opened).id)[2] is None
    assert [one["webhook_id"] for one in opened.received(limit=9)] == ["c", "b"]


def test_a_job_is_shown_as_it_was_at_one_moment(opened):
    job = delivering(opened)

    def fail_often() -> None:
        for _ in range(100):
            record(opened, job_of(opened, job.id), "HTTP 502", 1)

    with ThreadPoolExecutor(1) as pool:
        failing, shown = pool.submit(fail_often), [opened.detail(job.id)]
        while not failing.done():
            shown.append(opened.detail(job.id))

    assert [one[0].attempts for one in shown] == [len(one[3]) for one in shown]


def test_a_probe_is_written(opened, tmp_path):
    accept(opened)
    before = opened.size_bytes()

    opened.probe()

    assert opened.size_bytes() > before


# The schema


@pytest.mark.parametrize(("column", "enum"), [("state", State), ("outcome", Outcome)])
def test_the_schema_allows_the_values_of_the_enum_and_no_others(opened, column, enum):
    accept(opened)
    failing = pytest.raises(Refusal, match=f"CHECK constraint failed: {column} = ")

    with failing as caught, opened.transaction():
        opened._write(f"UPDATE jobs SET {column} = 'other'")

    assert re.findall(f"{column} = '(\\w+)'", caught.value.detail) == list(enum)


# A large journal costs no more

OPERATIONS: dict[str, Step] = {
    "accept": accept,
    "accepted before": lambda one: one.accepted_before("key", BODY),
    "claim": claim,
    "release": lambda one: one.release_due_starts(now=NOW),
    "cancel": lambda one: end(one, accepted(one)),
    "claim due": claim_due,
    "earliest": Journal.earliest_attempts,
    "resend": lambda one: resend_all(one, since=LATEST, now=LATEST),
    "resume": lambda one: one.resume(now=NOW),
    "prune": prune,
    "page": lambda one: one.page(state=None, limit=9, before=accept(one)),
    "page of a state": lambda one: one.page(state=RUNNING, limit=9, before=accept(one)),
    "detail": lambda one: one.detail(accept(one)),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[Journal]:
    """A journal with 40,000 jobs that have ended, and none that has not."""
    path = tmp_path_factory.mktemp("large") / "journal.db"
    columns = ", ".join(Job.__slots__[1:])  # all but the id
    with closing(Committing(path, on_lost=lambda: None)) as one:
        one.open()
        undelivered(one)
        delivered(one)
        with one.transaction():
            one._write(
                f"""
                WITH RECURSIVE numbers (value) AS
                    (SELECT 1 UNION ALL SELECT value + 1 FROM numbers WHERE value < 20000)
                INSERT INTO jobs (id, {columns})
                SELECT value || state, {columns} FROM jobs JOIN numbers
                """
            )
        yield one


def steps_of(one: Journal, operation: Step) -> int:
    """Return how many instructions SQLite takes for an operation."""
    steps: list[int] = []
    one.census()  # so that there is a reader
    for connection in (one._connection, *one._readers.values()):
        connection.set_progress_handler(lambda: steps.append(1), 1)
    operation(one)
    return len(steps)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_takes_no_more_steps_in_a_large_journal(large, name):
    assert 0 < steps_of(large, OPERATIONS[name]) < 2000


def test_receivers_are_found_without_reading_all_that_waits_for_them(opened):
    for number in range(200):
        delivering(opened, receiver=f"https://{number % 4}:443", due_at=NOW)

    assert len(opened.earliest_attempts()) == 4
    assert steps_of(opened, Journal.earliest_attempts) < 400

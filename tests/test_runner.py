"""What the runner promises between the 200 and the postback."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from jobs import attempts, errors, model, runner, waiting
from jobs.analysis import Progress
from jobs.executors import ThreadExecutor
from jobs.journal import Journal
from jobs.model import State
from jobs.runner import Limits, Runner
from jobs.threads import Threads
from tests import analyses
from tests import receiver as behaviour
from tests.harness import events, failing, poll
from tests.receiver import Receiver

ECHO = {"ANALYSIS": "tests.analyses:echo"}
WAIT = {"ANALYSIS": "tests.analyses:wait"}
#: Nobody listens there: an attempt fails at once.
NOWHERE = "http://127.0.0.1:9"


class Postbox:
    """Stands in for the sender: keeps the jobs it is handed, and delivers from attempt `after`."""

    longest_wait_seconds = 60.0

    def __init__(self, after=1):
        self.after = after
        self.jobs = []

    def attempt(self, job, event):
        self.jobs.append(job.id)
        number = job.attempts + 1
        return model.Attempt(
            number=number,
            attempted_at=job.created_at,
            duration_seconds=0.0,
            status_code=None,
            error=None if number >= self.after else "refused",
            seconds_until_next=None if number >= self.after else 50.0,
        )


class Clock:
    """A wall clock that is set by hand."""

    def __init__(self):
        self.now = datetime(2026, 1, 2, tzinfo=UTC)

    def __call__(self):
        return self.now


@contextmanager
def journal_at(path, on_lost=lambda: None):
    journal = Journal(path, on_lost=on_lost)
    journal.open()
    try:
        yield journal
    finally:
        journal.close()


def runner_of(journal, *, analyze=analyses.echo, postbox=None, clock=model.utc_now):
    return Runner(
        journal=journal,
        executor=ThreadExecutor(analyze),
        postback=postbox or Postbox(),
        limits=Limits(
            max_running=2,
            max_pending=100,
            job_timeout_seconds=None,
            retention_seconds=3600,
            max_event_bytes=1000,
        ),
        result_url=lambda job_id: f"http://x/{job_id}",
        clock=clock,
    )


def accept(target, data=1, *, key=None, **facts):
    """Have a journal or a runner accept a job, and return its id."""
    job = model.new_job(postback_url=None, receiver="", forwarded={}, **facts)
    body = json.dumps({"data": data}).encode()
    job_id = target.accept(job, body, idempotency_key=key, body_sha256="")
    if isinstance(target, Runner):
        target.start_accepted()
    return job_id


def left_running(path, *starts):
    """Leave a journal as a crash would: a running job for each number of starts. Return the ids."""
    with journal_at(path) as journal:
        return [_begun(journal, number, count) for number, count in enumerate(starts, 1)]


def _begun(journal, data, starts):
    job_id = accept(journal, data)
    journal.claim(now=model.utc_now())
    for _ in range(starts - 1):
        journal.begin_again(job_id, now=model.utc_now())
    return job_id


def delivered_ids(receiver):
    return [event["data"]["id"] for event in events(receiver.requests)]


def states(service, query=""):
    return [job["state"] for job in service.get("/jobs" + query).json()["jobs"]]


@pytest.fixture
def journal(tmp_path):
    with journal_at(tmp_path / "journal.db") as one:
        yield one


@pytest.fixture
def hasty(monkeypatch):
    """Make the pauses between two looks short."""
    monkeypatch.setattr(attempts, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(runner, "PRUNE_SECONDS", 0.02)
    monkeypatch.setattr(waiting, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(runner, "PRUNE_PAUSE_SECONDS", 0.01)


@pytest.fixture
def no_threads(monkeypatch):
    """Let no thread of a job or an attempt start, until the returned event is set."""
    allowed = threading.Event()
    start = threading.Thread.start

    def limited(thread):
        if not allowed.is_set() and getattr(thread._target, "__func__", None) is Threads._live:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    return allowed


# Running


def test_no_more_than_max_running_analyses_run_and_the_rest_waits_in_the_journal(start, gate):
    service = start(**WAIT, MAX_RUNNING="2")
    sent = [service.process({"data": number}) for number in range(1, 6)]
    gate.wait_for(2)

    counted = sorted(states(service))

    assert counted == ["accepted"] * 3 + ["running"] * 2
    assert len(gate.begun) == 2
    gate.open()
    assert [service.wait_for(job_id)["state"] for job_id in sent] == ["delivered"] * 5


def test_jobs_begin_in_the_order_they_were_accepted(start, gate):
    service = start(**WAIT, MAX_RUNNING="1")
    for number in range(1, 9):
        service.process({"data": number})

    gate.open()

    assert gate.wait_for(8) == list(range(1, 9))


def test_a_job_runs_in_a_daemon_thread_named_by_its_id(start, gate):
    service = start(**WAIT)

    job_id = service.process({"data": 1})

    gate.wait_for(1)
    assert (gate.threads[0].name, gate.threads[0].daemon) == (job_id, True)


def test_a_receiver_that_hangs_does_not_hold_up_the_analyses(start, receiver):
    receiver.default = behaviour.hang
    service = start(
        **ECHO, POSTBACK_URL=receiver.url, POSTBACK_TIMEOUT="10s", MAX_RUNNING="1", DRAIN="50ms"
    )

    for number in range(1, 6):
        service.process({"data": number})

    assert len(receiver.wait_for(5, timeout=5)) == 5


def test_a_thread_that_cannot_start_leaves_its_job_to_be_run_later(
    start, no_threads, hasty, caplog
):
    service = start(**ECHO)
    job_id = service.process({"data": 1})
    assert service.job(job_id)["state"] == "accepted"

    no_threads.set()

    assert service.wait_for(job_id)["state"] == "delivered"
    assert "thread failed to start" in caplog.text


def test_a_thread_that_cannot_start_is_not_tried_again_at_once(
    journal, no_threads, monkeypatch, caplog
):
    monkeypatch.setattr(waiting, "RETRY_SECONDS", 0.05)
    one = runner_of(journal, postbox=Postbox())
    one.start()
    began = time.monotonic()

    accept(one)

    poll(lambda: caplog.text.count("thread failed to start") >= 6, "six tries")
    assert time.monotonic() - began >= 0.2
    no_threads.set()
    assert one.drain(5).waiting <= 1


def test_an_attempt_whose_thread_cannot_start_is_made_later(journal, no_threads, hasty):
    postbox = Postbox()
    one = runner_of(journal, postbox=postbox)
    one.start()
    job_id = accept(one)
    one.cancel(job_id)
    canceled_at = journal.job(job_id).finished_at
    poll(lambda: (journal.job(job_id).next_attempt_at or canceled_at) > canceled_at, "put off")

    no_threads.set()

    poll(lambda: journal.job(job_id).state is State.DELIVERED, "delivered")
    assert one.drain(5) == runner.Drained(finished=0, waiting=0)
    assert postbox.jobs == [job_id]


def test_a_thread_whose_job_was_canceled_before_it_began_does_nothing(journal, monkeypatch):
    held = []

    def hold(_, name, work, *args):
        held.append((work, args))
        return True

    with monkeypatch.context() as patch:
        patch.setattr(Threads, "start", hold)
        one = runner_of(journal)
        one.start()
        accept(one), accept(one)
        job_id = accept(one)
        call(held.pop())  # one ends, and makes room for the third
        one.cancel(job_id)

    for each in held:
        call(each)

    poll(lambda: journal.job(job_id).state is State.DELIVERED, "delivered")
    assert (journal.job(job_id).outcome, journal.job(job_id).starts) == ("canceled", 0)
    assert one.drain(5).waiting == 0


def call(held):
    work, args = held
    work(*args)


class Careless(ThreadExecutor):
    """Breaks the promise of executors, and raises."""

    def run(self, job_id, body, report):
        if b"spoiled" in body:
            raise RuntimeError("nobody expected this")
        return super().run(job_id, body, report)


def test_what_nobody_expected_in_a_job_is_logged_and_the_others_run(start, caplog):
    service = start(MAX_RUNNING="1")
    service.service.runner._executor = Careless(analyses.echo)

    spoiled = service.process({"data": "spoiled"})
    after = service.process({"data": 3})

    service.wait_for(after)
    poll(lambda: "thread failed" in caplog.text, "the log line")
    assert [one.job_id for one in caplog.records if one.message == "thread failed"] == [spoiled]


def test_of_two_threads_with_one_key_the_second_gets_the_job_of_the_first(tmp_path):
    class Late(Journal):
        """Looks for the key before the other thread has committed it."""

        def accepted_before(self, idempotency_key, *, body_sha256):
            return None

    late = Late(tmp_path / "journal.db", on_lost=lambda: None)
    late.open()
    postbox = Postbox()
    one = runner_of(late, postbox=postbox)
    one.start()

    first, second = (accept(one, key="key") for _ in range(2))

    poll(lambda: late.job(first).state is State.DELIVERED, "delivered")
    drained = one.drain(5)
    late.close()
    assert (second, postbox.jobs, drained.waiting) == (first, [first], 0)


# Posting back


def test_failed_attempts_are_repeated_with_the_same_id_and_bytes(start, receiver):
    receiver.answers = [500, 500, 200]
    service = start(**ECHO, POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="10ms 10ms 10ms")

    job_id = service.process({"data": 1})

    job = service.wait_for(job_id)
    sent = receiver.wait_for(3)
    assert {one.headers["webhook-id"] for one in sent} == {job_id}
    assert len({one.body for one in sent}) == 1
    assert [one.headers["webhook-attempt"] for one in sent] == ["1", "2", "3"]
    assert {one.headers["webhook-attempt-max"] for one in sent} == {"4"}
    assert [one["status_code"] for one in job["attempts"]] == [500, 500, 200]
    assert job["state"] == "delivered"


def test_after_the_last_attempt_a_job_is_undelivered_and_can_be_resent(start, receiver):
    receiver.answers = [500] * 3
    service = start(**ECHO, POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="10ms 10ms")
    job_id = service.process({"data": 1})
    assert service.wait_for(job_id)["state"] == "undelivered"
    receiver.answers = [500, 204]

    service.post(f"/jobs/{job_id}/resend")

    assert service.wait_for(job_id)["state"] == "delivered"
    sent = receiver.wait_for(5)
    assert len({(one.headers["webhook-id"], one.body) for one in sent}) == 1
    counts = [(one.headers["webhook-attempt"], one.headers["webhook-attempt-max"]) for one in sent]
    assert counts == [("1", "3"), ("2", "3"), ("3", "3"), ("4", "6"), ("5", "6")]


@pytest.mark.parametrize(
    "last", [410, behaviour.reply(500, headers={"webhook-delivery": "abort-message"})]
)
def test_a_receiver_that_wants_no_more_is_left_alone_until_a_resend(start, receiver, last):
    receiver.answers = [last]
    service = start(**ECHO, POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="10ms 10ms")
    job_id = service.process({"data": 1})
    given_up = service.wait_for(job_id)

    service.post(f"/jobs/{job_id}/resend")

    assert (given_up["state"], given_up["attempts_made"]) == ("undelivered", 1)
    assert service.wait_for(job_id)["state"] == "delivered"


def test_a_receiver_that_was_down_gets_its_postbacks_when_it_is_up(start):
    # Below the ports that the system gives to connections: an attempt could get this very one.
    with Receiver(port=20_000 + os.getpid() % 10_000) as closed:
        port = closed.port
    service = start(
        **ECHO, POSTBACK_URL=f"http://127.0.0.1:{port}/", POSTBACK_SCHEDULE="20ms " * 100
    )
    job_id = service.process({"data": 1})
    poll(lambda: service.job(job_id)["attempts"], "an attempt that fails")

    with Receiver(port=port) as up:
        assert up.wait_for(1)[0].headers["webhook-id"] == job_id
        assert service.wait_for(job_id)["state"] == "delivered"


def test_a_connection_the_receiver_has_closed_costs_no_postback(start, receiver):
    receiver.default = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"  # says keep-alive, closes
    service = start(**ECHO, POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="10ms 10ms")

    jobs = [service.wait_for(service.process({"data": number})) for number in range(1, 6)]

    assert {job["state"] for job in jobs} == {"delivered"}


def test_a_dead_receiver_does_not_hold_up_a_good_one(start, receiver, monkeypatch):
    monkeypatch.setattr(attempts, "MAX_ATTEMPTS_PER_RECEIVER", 2)
    released = threading.Event()
    with Receiver(default=lambda *_: released.wait(10) and 204) as slow:
        service = start(
            **ECHO, POSTBACK_URL=NOWHERE, POSTBACK_ALLOW=f"{slow.origin} {receiver.origin}"
        )
        waiting = [
            service.process({"data": number, "postback_url": slow.url}) for number in range(1, 7)
        ]
        slow.wait_for(2)

        good = service.process({"data": 7, "postback_url": receiver.url})

        assert service.wait_for(good)["state"] == "delivered"
        assert len(slow.requests) == 2
        released.set()
        assert [service.wait_for(one)["state"] for one in waiting] == ["delivered"] * 6
        assert sorted(delivered_ids(slow)) == sorted(waiting)


def test_an_attempt_whose_place_came_free_before_it_was_due_is_made_at_once(journal, monkeypatch):
    postbox = Postbox()
    one = runner_of(journal, postbox=postbox)
    end = journal.end

    def end_late(*args, **kwargs):
        monkeypatch.setattr(attempts, "MAX_ATTEMPTS_PER_RECEIVER", 32)
        end(*args, **kwargs)

    monkeypatch.setattr(attempts, "MAX_ATTEMPTS_PER_RECEIVER", 0)
    monkeypatch.setattr(journal, "end", end_late)
    one.start()

    job_id = accept(one)

    poll(lambda: postbox.jobs == [job_id], "the attempt", timeout=5)
    one.drain(1)


def test_the_clock_set_back_puts_no_attempt_off_for_ever(journal, hasty):
    clock, postbox = Clock(), Postbox(after=2)
    one = runner_of(journal, postbox=postbox, clock=clock)
    one.start()
    job_id = accept(one, now=clock.now)
    poll(lambda: journal.job(job_id).next_attempt_at, "a failed attempt")

    clock.now -= timedelta(days=1)

    latest = clock.now + timedelta(seconds=60)
    poll(lambda: journal.job(job_id).next_attempt_at == latest, "brought forward")
    clock.now += timedelta(seconds=61)
    poll(lambda: journal.job(job_id).state is State.DELIVERED, "delivered")
    one.drain(1)


# Cancel and time out


def test_a_job_that_waits_can_be_canceled_and_never_runs(start, gate, receiver):
    service = start(**WAIT, POSTBACK_URL=receiver.url, MAX_RUNNING="1", MAX_PENDING="1")
    service.process({"data": 1})
    gate.wait_for(1)
    waiting = service.process({"data": 2})

    service.post(f"/jobs/{waiting}/cancel")

    (event,) = events(receiver.wait_for(1))
    assert (event["type"], event["data"]["id"]) == ("job.canceled", waiting)
    assert event["data"]["error"] == {"type": "canceled", "message": "The job was canceled."}
    last = service.process({"data": 3})  # its place among the waiting is free
    gate.open()
    service.wait_for(last)
    assert gate.begun == [1, 3]


def test_the_late_result_of_a_canceled_job_is_ignored(start, gate, receiver, caplog):
    caplog.set_level("INFO")
    service = start(**WAIT, POSTBACK_URL=receiver.url)
    job_id = service.process({"data": 1})
    gate.wait_for(1)
    service.post(f"/jobs/{job_id}/cancel")
    service.wait_for(job_id)

    gate.open()

    poll(lambda: "late result ignored" in caplog.text, "the log line")
    assert service.job(job_id)["outcome"] == "canceled"
    assert len(receiver.requests) == 1


def test_of_cancel_and_end_exactly_one_is_posted(start, gate, receiver):
    service = start(**WAIT, POSTBACK_URL=receiver.url)
    sent = [service.process({"data": number}) for number in range(1, 21)]
    gate.wait_for(20)

    with ThreadPoolExecutor(21) as callers:
        cancels = [callers.submit(service.post, f"/jobs/{one}/cancel") for one in sent]
        callers.submit(gate.open)

    jobs = [service.wait_for(job_id) for job_id in sent]
    canceled = [{200: "canceled", 409: "succeeded"}[one.result().status_code] for one in cancels]
    assert [job["outcome"] for job in jobs] == canceled
    posted = {event["data"]["id"]: event["data"]["outcome"] for event in events(receiver.requests)}
    assert len(receiver.requests) == 20
    assert posted == {job["id"]: job["outcome"] for job in jobs}


def test_a_job_over_its_time_is_posted_as_timed_out_and_its_late_result_ignored(
    start, gate, receiver, caplog
):
    caplog.set_level("INFO")
    service = start(**WAIT, POSTBACK_URL=receiver.url, JOB_TIMEOUT="50ms")

    job_id = service.process({"data": 1})

    (event,) = events(receiver.wait_for(1))
    assert event["type"] == "job.timed_out"
    assert "0.05 s" in event["data"]["error"]["message"]
    gate.open()
    poll(lambda: "late result ignored" in caplog.text, "the log line")
    assert service.wait_for(job_id)["outcome"] == "timed_out"
    assert len(receiver.requests) == 1


def test_a_job_within_its_time_is_not_touched(start, receiver):
    service = start(**ECHO, POSTBACK_URL=receiver.url, JOB_TIMEOUT="5s")

    assert service.wait_for(service.process({"data": 1}))["outcome"] == "succeeded"


# Stop and resume


def test_a_drain_lets_what_runs_end_and_posts_it_and_begins_nothing_more(start, gate, receiver):
    service = start(**WAIT, POSTBACK_URL=receiver.url, MAX_RUNNING="1")
    running, waiting = service.process({"data": 1}), service.process({"data": 2})
    gate.wait_for(1)
    with ThreadPoolExecutor(1) as stopper:
        drained = stopper.submit(service.service.runner.drain, 10)
        poll(lambda: service.get("/readyz").status_code == 503, "draining")

        gate.open()

        assert drained.result() == runner.Drained(finished=1, waiting=1)
    assert delivered_ids(receiver) == [running]
    assert gate.begun == [1]
    assert service.job(waiting)["state"] == "accepted"


def test_a_drain_cuts_what_hangs_without_counting_the_start(start, gate, receiver):
    service = start(**WAIT, POSTBACK_URL=receiver.url, DRAIN="50ms")
    job_id = service.process({"data": 1})
    gate.wait_for(1)

    left = service.restart()

    assert left == 1
    gate.wait_for(2)
    assert service.job(job_id)["starts"] == 1
    gate.open()
    assert service.wait_for(job_id)["outcome"] == "succeeded"


def test_attempts_that_wait_are_taken_up_after_a_restart(start, receiver):
    receiver.answers = [500]
    service = start(**ECHO, POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="300ms")
    job_id = service.process({"data": 1})
    poll(lambda: service.job(job_id)["attempts"], "the first attempt")

    left = service.restart()

    assert left == 1
    assert service.wait_for(job_id)["state"] == "delivered"
    assert [one.headers["webhook-attempt"] for one in receiver.requests] == ["1", "2"]


def test_an_attempt_cut_by_a_crash_is_made_again_without_the_analysis(start, tmp_path, receiver):
    with journal_at(tmp_path / "journal.db") as before:
        one = runner_of(before, postbox=Postbox(after=9))
        one.start()
        job_id = accept(one, "kept")
        poll(lambda: before.job(job_id).next_attempt_at, "a failed attempt")
        one.drain(1)
        before.claim_due("", now=model.utc_now() + timedelta(hours=1), limit=1)
    service = start(ANALYSIS="tests.analyses:fail", POSTBACK_URL=receiver.url)

    job = service.wait_for(job_id)

    assert (job["outcome"], job["result"], job["starts"]) == ("succeeded", "kept", 1)


def test_suspects_run_one_at_a_time_before_all_others_fewest_starts_first(start, gate, tmp_path):
    twice, once = left_running(tmp_path / "journal.db", 2, 1)
    with journal_at(tmp_path / "journal.db") as journal:
        after = accept(journal, 3)
    service = start(**WAIT, MAX_RUNNING="8")

    orders = [list(gate.wait_for(1))]
    gate.open(1)
    orders.append(list(gate.wait_for(2)))
    gate.open(1)
    orders.append(list(gate.wait_for(3)))

    gate.open()
    assert orders == [[2], [2, 1], [2, 1, 3]]
    jobs = [service.wait_for(job_id) for job_id in (twice, once, after)]
    assert [(job["outcome"], job["starts"]) for job in jobs] == [
        ("succeeded", 3),
        ("succeeded", 2),
        ("succeeded", 1),
    ]


def test_a_job_that_ended_the_process_three_times_is_posted_as_crashed(start, tmp_path, receiver):
    (job_id,) = left_running(tmp_path / "journal.db", 3)
    service = start(**WAIT, POSTBACK_URL=receiver.url)

    (event,) = events(receiver.wait_for(1))

    assert (event["type"], event["data"]["id"]) == ("job.crashed", job_id)
    assert "3 times" in event["data"]["error"]["message"]
    assert service.wait_for(job_id)["starts"] == 3


def test_a_suspect_can_be_canceled_while_it_waits_for_its_turn(start, gate, tmp_path, receiver):
    first, second = left_running(tmp_path / "journal.db", 1, 1)
    service = start(**WAIT, POSTBACK_URL=receiver.url)
    gate.wait_for(1)

    service.post(f"/jobs/{second}/cancel")

    gate.open()
    last = service.process({"data": 3})
    jobs = [service.wait_for(job_id) for job_id in (first, second, last)]
    assert [job["outcome"] for job in jobs] == ["succeeded", "canceled", "succeeded"]
    assert gate.begun == [1, 3]


# The journal fails


def test_a_result_that_cannot_be_stored_is_kept_until_it_can(start, gate, receiver, hasty, caplog):
    service = start(**WAIT, POSTBACK_URL=receiver.url)
    job_id = service.process({"data": 1})
    gate.wait_for(1)

    with failing(service.journal):
        gate.open()
        poll(lambda: "journal failed" in caplog.text, "the log line")
        assert receiver.requests == []

    assert service.wait_for(job_id)["outcome"] == "succeeded"
    assert len(receiver.requests) == 1
    assert service.job(job_id)["starts"] == 1


def test_an_attempt_that_cannot_be_recorded_is_not_made_twice(start, receiver, hasty):
    answered, allowed = threading.Event(), threading.Event()

    def hold(*_):
        answered.set()
        return 204 if allowed.wait(10) else None

    receiver.default = hold
    service = start(**ECHO, POSTBACK_URL=receiver.url)
    job_id = service.process({"data": 1})
    answered.wait(10)

    with failing(service.journal):
        allowed.set()
        poll(lambda: service.journal.failure, "a record that is refused")

    assert service.wait_for(job_id)["state"] == "delivered"
    assert len(receiver.requests) == 1


def test_a_stop_does_not_wait_for_a_journal_that_fails(journal, gate):
    one = runner_of(journal, analyze=analyses.wait)
    one.start()
    job_id = accept(one)
    gate.wait_for(1)

    with failing(journal):
        gate.open()
        poll(lambda: journal.failure, "a result that is refused")
        begun_at = time.monotonic()
        with pytest.raises(errors.JournalError):
            one.drain(0.05)
        poll(lambda: not one._running, "the place is free again")

    assert time.monotonic() - begun_at < 3
    assert journal.job(job_id).state is State.RUNNING


def test_a_lost_journal_ends_the_threads_without_a_postback(tmp_path, gate):
    lost, postbox = threading.Event(), Postbox()
    with journal_at(tmp_path / "journal.db", on_lost=lost.set) as journal:
        one = runner_of(journal, analyze=analyses.wait, postbox=postbox)
        one.start()
        accept(one)
        gate.wait_for(1)
        (tmp_path / "journal.db").unlink()

        assert isinstance(one.refusal(), errors.JournalLostError)
        gate.open()

        assert lost.wait(5)
        poll(lambda: not one._running, "the place is free again")
        with pytest.raises(errors.JournalLostError):
            one.drain(0.05)
    assert postbox.jobs == []


def test_a_late_result_of_a_job_that_was_removed_takes_no_place(journal, gate):
    one = runner_of(journal, analyze=analyses.wait, postbox=Postbox())
    one.start()
    accept(one)
    gate.wait_for(1)
    journal._storage.write(lambda connection: connection.execute("DELETE FROM jobs"))

    gate.open()

    poll(lambda: not one._running, "the place is free again")
    assert not one._attempts.are_under_way


def test_what_nobody_expected_in_the_scheduler_is_logged_and_it_goes_on(journal, hasty, caplog):
    one = runner_of(journal, postbox=Postbox(after=2))
    one.start()
    job_id = accept(one)
    poll(lambda: journal.job(job_id).next_attempt_at, "a failed attempt")

    _due(journal, "garbage")
    poll(lambda: "scheduler failed" in caplog.text, "the log line")
    _due(journal, "2026-01-01T00:00:00.000Z")

    poll(lambda: journal.job(job_id).state is State.DELIVERED, "delivered")
    one.drain(1)


def _due(journal, text):
    journal._storage.write(
        lambda connection: connection.execute("UPDATE jobs SET next_attempt_at = ?", (text,))
    )


# Pruning


def test_ended_jobs_are_removed_after_retention_in_batches(start, receiver, hasty, monkeypatch):
    monkeypatch.setattr(runner, "PRUNE_BATCH", 2)
    service = start(**ECHO, POSTBACK_URL=receiver.url, RETENTION="1ms")

    sent = [service.process({"data": number}) for number in range(1, 6)]

    receiver.wait_for(5)
    poll(lambda: not states(service), "all removed")
    assert service.get(f"/jobs/{sent[0]}").status_code == 404


def test_what_has_not_ended_is_not_removed(start, gate, hasty):
    service = start(**WAIT, MAX_RUNNING="1", RETENTION="1ms")
    sent = [service.process({"data": number}) for number in (1, 2)]
    gate.wait_for(1)

    gate.open(1)

    poll(lambda: service.get(f"/jobs/{sent[0]}").status_code == 404, "the first removed")
    assert states(service) == ["running"]


def test_a_suspect_that_hangs_holds_up_nobody_once_it_has_timed_out(start, gate, tmp_path):
    suspects = left_running(tmp_path / "journal.db", 1, 1)
    service = start(**WAIT, JOB_TIMEOUT="300ms", DRAIN="1s")

    after = service.process({"data": "after"})

    gate.wait_for(3)
    ended = [service.wait_for(job_id) for job_id in [*suspects, after]]
    assert [job["outcome"] for job in ended] == ["timed_out"] * 3


def test_a_stop_does_not_wait_for_a_job_that_was_canceled(journal, gate):
    one = runner_of(journal, analyze=analyses.wait)
    one.start()
    job_id = accept(one)
    gate.wait_for(1)
    one.cancel(job_id)
    poll(lambda: journal.job(job_id).state is State.DELIVERED, "delivered")

    drained = one.drain(20)  # the gate is shut: its thread would take all of that

    assert (drained.waiting, list(one._running)) == (0, [job_id])


def test_a_time_out_is_declared_as_soon_as_the_journal_takes_it(start, gate, hasty):
    service = start(**WAIT, JOB_TIMEOUT="100ms")
    job_id = service.process({"data": 1})
    gate.wait_for(1)

    with failing(service.journal):
        poll(lambda: service.journal.failure, "a time-out that is refused")

    assert service.wait_for(job_id)["outcome"] == "timed_out"


@pytest.mark.parametrize(
    ("verb", "states", "word"),
    [("cancel", ("delivered",), "canceled"), ("resend", ("running",), "resent")],
)
def test_a_conflict_says_what_cannot_be_done(start, gate, verb, states, word):
    service = start(**WAIT)
    job_id = service.process({"data": 1})
    gate.wait_for(1)
    gate.open(1 if "delivered" in states else 0)
    service.wait_for(job_id, *states)

    answer = service.post(f"/jobs/{job_id}/{verb}")

    assert answer.status_code == 409
    assert answer.json()["detail"] == f"Job {job_id} is {states[0]}; it cannot be {word}."


def test_a_report_of_an_analysis_that_has_ended_is_dropped(journal):
    one = runner_of(journal)

    one._report("nobody", Progress(fraction=0.5, note="", at=model.utc_now()))

    assert one.progress("nobody") is None


def test_a_time_out_at_the_moment_of_the_end_changes_nothing(journal):
    one = runner_of(journal)
    one.start()
    job_id = accept(one)
    poll(lambda: journal.job(job_id).state is State.DELIVERED, "delivered")

    one._time_out(job_id)

    assert journal.job(job_id).outcome == "succeeded"
    one.drain(1)

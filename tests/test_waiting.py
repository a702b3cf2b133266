"""How threads wait for something to do, and for the journal."""

import sqlite3
import threading
import time

import pytest

from jobs import errors, waiting
from jobs.waiting import Alarm


def sleeper(alarm: Alarm, seconds: float) -> threading.Thread:
    """Return a thread that sleeps by the alarm."""
    thread = threading.Thread(target=alarm.sleep, args=[seconds], daemon=True)
    thread.start()
    return thread


def test_a_ring_ends_the_sleep():
    alarm = Alarm()
    thread = sleeper(alarm, 60)

    alarm.ring()

    thread.join(5)
    assert not thread.is_alive()


def test_a_ring_before_the_sleep_is_not_lost_and_counts_once():
    alarm = Alarm()
    alarm.ring()
    alarm.ring()

    alarm.sleep(60)
    began = time.monotonic()
    alarm.sleep(0.05)

    assert time.monotonic() - began >= 0.05


def test_of_all_moments_that_were_asked_for_the_first_one_counts():
    alarm = Alarm()
    thread = sleeper(alarm, 60)
    began = time.monotonic()

    for seconds in (3600, 0.05, 30):
        alarm.ring_by(began + seconds)

    thread.join(5)
    assert not thread.is_alive()
    assert time.monotonic() - began >= 0.05


def test_a_moment_that_was_asked_for_before_the_sleep_counts():
    alarm = Alarm()
    began = time.monotonic()
    alarm.ring_by(began + 0.05)

    alarm.sleep(60)

    assert 0.05 <= time.monotonic() - began < 50


def test_a_write_is_tried_until_the_journal_takes_it(monkeypatch):
    monkeypatch.setattr(waiting, "RETRY_SECONDS", 0.001)
    answers = [errors.JournalError("full"), errors.JournalError("full")]

    def write() -> str:
        if answers:
            raise answers.pop()
        return "written"

    assert waiting.insist(write, threading.Event()) == "written"


@pytest.mark.parametrize(
    ("error", "is_stopped"),
    [(errors.JournalLostError("gone"), False), (errors.JournalError("full"), True)],
    ids=["lost", "stopped"],
)
def test_a_write_is_not_tried_again_when_that_is_in_vain(error, is_stopped):
    stopped, calls = threading.Event(), []
    if is_stopped:
        stopped.set()

    def write() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        waiting.insist(write, stopped)

    assert len(calls) == 1


def test_what_is_no_fault_of_the_journal_is_raised_at_once():
    def write() -> None:
        raise sqlite3.ProgrammingError("a mistake of ours")

    with pytest.raises(sqlite3.ProgrammingError):
        waiting.insist(write, threading.Event())

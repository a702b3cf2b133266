"""Threads that are kept for the next piece of work."""

import threading
import weakref
from concurrent.futures import Future

import pytest

from jobs import threads
from jobs.threads import Threads
from tests.harness import poll


@pytest.fixture
def kept():
    one = Threads()
    yield one
    one.close()


def told(one: Threads, name: str) -> "Future[threading.Thread]":
    """Have a thread tell which it is."""
    future: Future[threading.Thread] = Future()
    one.start(name, lambda: future.set_result(threading.current_thread()))
    return future


def test_a_thread_is_a_daemon_with_the_name_of_its_work(kept):
    seen: Future[tuple[str, bool]] = Future()

    def work(answer):
        me = threading.current_thread()
        seen.set_result((me.name + answer, me.daemon))

    kept.start("first", work, "!")

    assert seen.result(5) == ("first!", True)


def test_a_thread_that_is_done_does_the_next_work_under_its_name(kept):
    first = told(kept, "first").result(5)
    poll(lambda: kept._idle, "idle again")

    second = told(kept, "second").result(5)

    assert second is first
    assert second.name == "second"


def test_work_that_comes_meanwhile_has_a_thread_of_its_own(kept):
    release = threading.Event()
    kept.start("busy", release.wait, 10)

    other = told(kept, "other").result(5)

    release.set()
    assert other.name == "other"


def test_no_more_than_some_idle_threads_are_kept(kept, monkeypatch):
    monkeypatch.setattr(threads, "MAX_IDLE", 1)
    release = threading.Event()
    for number in range(3):
        kept.start(f"busy {number}", release.wait, 10)

    release.set()

    poll(lambda: sum("busy" in one.name for one in threading.enumerate()) == 1, "one is left")


def test_a_close_ends_idle_threads_and_each_other_when_it_is_done(kept):
    release = threading.Event()
    idle = told(kept, "idle").result(5)
    poll(lambda: kept._idle, "idle again")
    busy: Future[threading.Thread] = Future()

    def work():
        busy.set_result(threading.current_thread())
        release.wait(10)

    kept.start("busy", work)
    busy.result(5)
    kept.close()
    release.set()

    for thread in (idle, busy.result(5)):
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_payload_is_not_kept_by_an_idle_thread(kept, is_first):
    class Payload:
        pass

    gone = threading.Event()
    payload = Payload()
    if not is_first:
        told(kept, "warm up").result(5)
        poll(lambda: kept._idle, "idle again")
    weakref.finalize(payload, gone.set)
    kept.start("work", lambda _: None, payload)

    del payload

    assert gone.wait(5)
    assert len(kept._idle) == 1

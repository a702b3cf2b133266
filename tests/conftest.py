"""Fixtures: each stops what it starts, and asserts that it stopped."""

import itertools
import os
import threading
from collections.abc import Iterator

import pytest

from tests.harness import Gate, InProcess, Mailbox, RealProcess, environment, executed
from tests.receiver import Receiver

#: The analysis does what the data says, and failed attempts are repeated soon.
ACT = {"ANALYSIS": "tests.analyses:act", "POSTBACK_SCHEDULE": "50ms 50ms 50ms"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No setting of the machine reaches a test; each has a journal of its own."""
    wanted = environment({"JOURNAL": str(tmp_path / "journal.db")})
    for name in os.environ.keys() - wanted.keys():
        monkeypatch.delenv(name)
    for name in ("PORT", "DRAIN", "JOURNAL"):
        monkeypatch.setenv(name, wanted[name])


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver for this test alone."""
    with Receiver() as one:
        yield one


# Shared by all tests: what a test does to a service must not be felt by the next one.


@pytest.fixture(scope="session")
def mailboxes() -> Iterator[tuple[Receiver, dict[str, Mailbox]]]:
    boxes: dict[str, Mailbox] = {}

    def answer(_, request):
        box = boxes.get(request.path)
        answer = box.answer() if box else 204
        return answer(_, request) if callable(answer) else answer

    with Receiver(default=answer) as one:
        yield one, boxes


@pytest.fixture(scope="session")
def shared(mailboxes, tmp_path_factory):
    """Return a function that returns the running service with an executor."""
    started: dict[str, RealProcess] = {}

    def shared(executor: str) -> RealProcess:
        if executor not in started or started[executor].process_.poll() is not None:
            folder = tmp_path_factory.mktemp(executor)
            settings = {"JOURNAL": str(folder / "journal.db"), **executed(executor, workers=2)}
            settings |= {**ACT, "POSTBACK_ALLOW": mailboxes[0].origin}
            started[executor] = RealProcess(settings)
        return started[executor]

    yield shared

    for one in started.values():
        assert one.end() in (0, 75)


@pytest.fixture
def mailbox(mailboxes, counter=itertools.count(1)) -> Mailbox:  # noqa: B008 - of the session
    """A receiver for this test: give its url to a shared service."""
    receiver, boxes = mailboxes
    path = f"/{next(counter)}"
    box = boxes[path] = Mailbox(receiver, path)
    return box


@pytest.fixture
def service(shared) -> Iterator[RealProcess]:
    """The service with its defaults, for any number of tests."""
    one = shared("thread")
    yield one
    assert one.process_.poll() is None


@pytest.fixture(params=["thread", "process"])
def either(request, shared) -> Iterator[RealProcess]:
    """The same service, once with each executor."""
    one = shared(request.param)
    yield one
    assert one.process_.poll() is None


# For one test


@pytest.fixture
def gate(tmp_path) -> Iterator[Gate]:
    """Holds up the jobs that are given its `data`."""
    one = Gate(tmp_path / "gate")
    yield one
    one.open()


@pytest.fixture
def start(monkeypatch):
    """Return a function that starts the service in this process, with these settings."""
    started: list[InProcess] = []
    before = set(threading.enumerate())

    def start(**settings: str) -> InProcess:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        started.append(InProcess())
        return started[-1]

    yield start

    for one in started:
        one.stop()
    left = set(threading.enumerate()) - before
    assert not [thread.name for thread in left if thread.name == "server"]


@pytest.fixture
def start_process(tmp_path):
    """Return a function that starts the real process, with these settings."""
    started = []

    def start(*, command: tuple[str, ...] = ("app.py",), **settings: str) -> RealProcess:
        defaults = {"JOURNAL": str(tmp_path / "journal.db"), "ANALYSIS": ACT["ANALYSIS"]}
        started.append(RealProcess({**defaults, **settings}, command=command))
        return started[-1]

    yield start

    for one in started:
        one.process_.kill()
        one.wait()

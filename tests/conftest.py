"""Fixtures: each stops what it starts, and asserts that it stopped."""

import os
import threading
from collections.abc import Iterator

import pytest

from tests import analyses
from tests.harness import InProcess, RealProcess
from tests.receiver import Receiver


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No setting of the machine reaches a test; each has a journal of its own."""
    for name in list(os.environ):
        if name.startswith(("POSTBACK_", "API_TOKEN", "JOURNAL", "PUBLIC_URL", "ANALYSIS")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PORT", "0")
    monkeypatch.setenv("JOURNAL", str(tmp_path / "journal.db"))
    monkeypatch.setenv("DRAIN", "5s")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as one:
        yield one


@pytest.fixture
def gate() -> Iterator[analyses.Gate]:
    """Hold up ANALYSIS=tests.analyses:wait until the test lets it on."""
    with analyses.gated() as one:
        yield one


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
    assert not [thread.name for thread in left if thread.name in ("server", "scheduler")]


@pytest.fixture
def start_process(tmp_path):
    """Return a function that starts the real process, with these settings."""
    started = []

    def start(*, command: tuple[str, ...] = ("app.py",), **settings: str) -> RealProcess:
        env = {"JOURNAL": str(tmp_path / "journal.db"), "PORT": "0", **settings}
        started.append(RealProcess(env, command=command))
        return started[-1]

    yield start

    for one in started:
        one.process_.kill()
        one.wait()


@pytest.fixture
def service(start, receiver):
    """The service with its defaults, posting to `receiver`."""
    return start(POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="50ms 50ms 50ms")

"""What the fault tests share: a service for many cases, and what a case leaves behind."""

import contextlib

import pytest

from tests.harness import InProcess, poll


@contextlib.contextmanager
def running(folder, **settings: str):
    """Run the service, echoing unless a setting says otherwise, with its journal in a folder."""
    defaults = {
        "PORT": "0",
        "JOURNAL": str(folder / "journal.db"),
        "ANALYSIS": "tests.analyses:echo",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (defaults | settings).items():
            patch.setenv(name, value)
        service = InProcess()
    yield service
    service.stop()


def ids(service) -> set[str]:
    """Return the ids of all jobs in the journal."""
    return {job.id for job in service.journal.page(state=None, limit=100_000, before=None)}


@contextlib.contextmanager
def leaving(service, rows: int):
    """Expect so many new rows of the block, then that a normal job is delivered."""
    before = ids(service)
    yield
    assert len(ids(service) - before) == rows
    assert service.wait_for(service.process({"data": "normal"}))["state"] == "delivered"


def delivered(receiver, job_id: str, timeout: float = 10):
    """Return the requests that posted a job back, as soon as there is one."""
    return poll(
        lambda: [one for one in receiver.requests if one.headers.get("webhook-id") == job_id],
        f"a postback of {job_id}",
        timeout,
    )

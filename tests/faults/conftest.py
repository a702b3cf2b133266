"""One service for all cases of a module: what a case does to it, the next one would feel."""

import pytest

from tests.faults.world import running
from tests.receiver import Receiver


@pytest.fixture(scope="module")
def listening():
    """The receiver of `shared`."""
    with Receiver() as one:
        yield one


@pytest.fixture(scope="module")
def shared(listening, tmp_path_factory):
    """The service with its defaults, echoing, and posting to `listening`."""
    folder = tmp_path_factory.mktemp("journal")
    with running(folder, POSTBACK_URL=listening.url, POSTBACK_SCHEDULE="50ms") as service:
        yield service

"""Groups E and I: slow callers, many callers, large results."""

import contextlib
import resource
import threading
from pathlib import Path

import pytest

from tests import wire
from tests.faults.world import here
from tests.harness import act, poll

#: What a caller may leave half sent.
HALVES = [b"", b"POST /process HTTP/1.1\r\nHost: localhost\r\n", here(wire.post(length=100))]


@pytest.mark.soak
@pytest.mark.timeout(90)
def test_e01_a_slow_upload_is_accepted_and_others_wait_for_nothing(service):
    sent = here(wire.post())
    with wire.connected(service) as (conn, stream):
        conn.settimeout(60)
        took = []
        for place in range(30):  # more than 20 s, after which a silent connection is closed
            conn.sendall(sent[place : place + 1])
            took.append(wire.seconds(service, here(wire.get())))
            threading.Event().wait(1)
        conn.sendall(sent[30:])

        assert wire.answer(stream)[0] == 200
    assert sorted(took)[-2] < 0.05


@pytest.mark.slow
def test_e02_h04_thousands_of_silent_connections_stop_nobody(start_process):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 10_000:
        pytest.skip("raise the hard limit of open files to 10,000")
    service = start_process()

    with many_descriptors(), contextlib.ExitStack() as held:
        for number in range(4000):
            conn = held.enter_context(wire.open_socket(service, timeout=10))
            conn.sendall(HALVES[number % len(HALVES)])
        poll(lambda: len(list(Path(f"/proc/{service.pid}/fd").iterdir())) > 4000, "all of them")
        job = service.wait_for(service.send(1))
        took = wire.seconds(service, here(wire.get()))

    assert job["state"] == "delivered"
    assert took < 1


@contextlib.contextmanager
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_i30_a_large_result_is_not_read_only_to_be_left_out(start_process, receiver):
    service = start_process(POSTBACK_URL=receiver.url)
    job_id = service.send(act("large", 60_000_000))
    service.wait_for(job_id, timeout=25)

    before = bytes_read(service)
    shown = [len(wire.exchange(service, here(wire.get(f"/jobs/{job_id}")))[2]) for _ in range(3)]

    assert max(shown) < 10_000
    assert bytes_read(service) - before < 10_000_000


def bytes_read(service) -> int:
    return int(Path(f"/proc/{service.pid}/io").read_text().split()[1])  # rchar

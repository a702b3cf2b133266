"""Groups E and I: slow callers, many callers, large results."""

import contextlib
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.slow
def test_i30_who_asks_for_a_job_with_a_large_result_holds_up_nobody(start_process, receiver):
    service = start_process(POSTBACK_URL=receiver.url)
    job_id = service.send(act("large", 60_000_000))
    service.wait_for(job_id, timeout=25)
    enough = threading.Event()

    def ask() -> int:
        sizes = 0
        while not enough.is_set():
            sizes = max(sizes, len(wire.exchange(service, here(wire.get(f"/jobs/{job_id}")))[2]))
        return sizes

    with ThreadPoolExecutor(3) as callers:
        asking = [callers.submit(ask) for _ in range(3)]
        took = sorted(wire.seconds(service, here(wire.post())) for _ in range(100))
        enough.set()

    assert max(one.result() for one in asking) < 10_000
    assert took[-2] < 0.25  # 663 ms where a result is read only to be left out

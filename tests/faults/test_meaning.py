"""Groups D and I: valid JSON that asks for what is not allowed, and analyses that misbehave."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import wire
from tests.cluster import Cluster
from tests.conftest import ACT
from tests.faults.world import EXECUTORS, here, serves
from tests.harness import (
    ROOT,
    Caller,
    RealProcess,
    act,
    environment,
    executed,
    free_port,
    poll,
    refusal,
)
from tests.receiver import Receiver

MISBEHAVING = "tests.misbehaving:act"


# Where to post


@pytest.fixture(scope="module")
def forbidden() -> Iterator[Receiver]:
    """A listener that nothing may reach."""
    with Receiver() as one:
        yield one


@pytest.fixture(scope="module", params=["http://allowed.example", "http://allowed.example *"])
def guarded(request, tmp_path_factory) -> Iterator[RealProcess]:
    """The service, with some receivers allowed."""
    journal = tmp_path_factory.mktemp("guarded") / "journal.db"
    service = RealProcess({**ACT, "JOURNAL": str(journal), "POSTBACK_ALLOW": request.param})
    yield service
    assert service.end() == 0


REFUSED = {
    "D04": ["http://other.example:{}/"],
    "D05": ["http://allowed.example@127.0.0.1:{}/", "http://127.0.0.1:{}/#@allowed.example"],
    "D05 backslash": ["http://127.0.0.1:{}\\@allowed.example", "http://allowed.example\\@127.1:{}"],
    "D05 name": ["http://allowed.example.evil.example:{}/", "http://evil.example/allowed.example"],
    "D06": ["http://allowed.example:{}/", "ftp://allowed.example/"],
    "D07 number": ["https://2130706433:{}/", "https://0x7f000001:{}/", "https://017700000001:{}/"],
    "D07 short": ["https://0x7f.1:{}/", "https://0177.0.0.1:{}/", "https://127.1:{}/"],
    "D07 plain": ["https://127.0.0.1:{}/", "https://0.0.0.0:{}/", "https://0:{}/"],
    "D07 IPv6": ["https://[::1]:{}/", "https://[::]:{}/", "https://[fd00:ec2::254]/"],
    "D07 in IPv6": ["https://[::ffff:7f00:1]:{}/", "https://[64:ff9b::7f00:1]:{}/"],
    "D07 metadata": ["https://169.254.169.254/", "https://[::ffff:169.254.169.254]/"],
    "D07 digits": ["https://①②⑦.⓪.⓪.①:{}/", "https://127。0。0。1:{}/"],
    "D12": ["file:///etc/passwd", "gopher://127.0.0.1:{}/_x", "data:text/plain,x", ""],
    "D12 odd": ["javascript:alert(1)", "//127.0.0.1:{}/", "http:127.0.0.1:{}"],
    "D13": ["http://allowed.example/" + "x" * 10_000, "http://allowed.example/\r\nHost: 127.1"],
    "D13 odd": ["http://allowed.example/\0", "http://ällowed.example/"],
}


@pytest.mark.parametrize(
    "url",
    [pytest.param(url, id=f"{case} {url[:40]}") for case, urls in REFUSED.items() for url in urls],
)
def test_a_url_that_is_not_allowed_reaches_nothing(guarded, forbidden, url):
    fields = {"data": 1, "postback_url": url.format(forbidden.port)}

    answer = guarded.post("/process", json=fields)

    assert refusal(answer, 422)
    assert guarded.ids() == []
    assert forbidden.connections == 0


# What an analysis does to its process


@contextlib.contextmanager
def without_streams(**settings: str) -> Iterator[Caller]:
    """Run the service with its standard streams closed."""
    port = free_port()
    env = environment({**settings, "PORT": str(port)})
    shell = ["/bin/sh", "-c", 'exec "$0" app.py <&- >&- 2>&-', sys.executable]
    with subprocess.Popen(shell, cwd=ROOT, env=env) as child:
        service = Caller(f"http://127.0.0.1:{port}")
        try:
            poll(lambda: serves(service.base_url), "the service")
            yield service
            child.terminate()
            assert child.wait(10) == 0
        finally:
            service.close()
            child.kill()


#: What is done one after the other, and how it ends.
MEDDLING = [
    ("print", "succeeded"),
    ("write natively", "succeeded"),
    *[("change directory", "succeeded")] * 2,
    ("set a handler", "failed"),  # Python refuses it outside of the main thread
    ("close all", "crashed"),
    ("close output", "succeeded"),
    ("write natively", "succeeded"),  # and not into what now has the number of the output
]


@pytest.mark.parametrize(
    ("executor", "closed"), [("thread", True), ("process", True), ("process", False)]
)
def test_i07_d18_who_meddles_with_a_process_hurts_nobody(start_process, tmp_path, executor, closed):
    settings = {"ANALYSIS": MISBEHAVING, **executed(executor, workers=1)}
    journal = {"JOURNAL": str(tmp_path / "journal.db")}

    with contextlib.ExitStack() as stack:
        unheard = without_streams(**settings, **journal) if closed else None
        service = stack.enter_context(unheard) if unheard else start_process(**settings)
        jobs = [service.wait_for(service.send(act("meddle", way))) for way, _ in MEDDLING]

    assert [(job["data"]["with"], job["outcome"]) for job in jobs] == MEDDLING
    assert {job["starts"] for job in jobs} == {1}


@EXECUTORS
def test_i09_who_keeps_the_interpreter_holds_up_no_answer(start_process, tmp_path, executor):
    service = start_process(ANALYSIS=MISBEHAVING, **executed(executor, workers=1))
    mark = tmp_path / "held"
    held = service.send(act("hold", [str(mark), 3]))
    poll(mark.exists, "an analysis that keeps the interpreter")

    took = [wire.seconds(service, here(sent)) for sent in (wire.get(), wire.post(), wire.get())]

    assert max(took) < 1
    assert service.job(held)["state"] == "running"
    assert {job["outcome"] for job in service.wait_for_all(service.ids())} == {"succeeded"}


@EXECUTORS
def test_i11_a_child_that_outlives_its_analysis_holds_up_nothing(start_process, executor):
    service = start_process(ANALYSIS=MISBEHAVING, **executed(executor, workers=1))
    with wire.connected(service) as (conn, stream):
        service.wait_for(service.send(act("leave_behind")))

        conn.sendall(b"GET /livez HTTP/1.0\r\n\r\n")

        assert stream.read().startswith(b"HTTP/1.0 200")
    assert service.end(timeout=5) == 0  # and nothing is left that could write to its log


# Dask


@pytest.mark.slow
def test_i14_neither_the_absence_of_a_cluster_nor_its_queue_counts_as_time(start_process, tmp_path):
    pytest.importorskip("distributed", reason="pip install -r requirements-dask.txt")
    nap = "import threading\ndef nap(data):\n    threading.Event().wait(data)\n    return data\n"
    (tmp_path / "naps.py").write_text(nap, encoding="ascii")
    cluster = Cluster(tmp_path)
    service = start_process(
        EXECUTOR="dask",
        DASK_SCHEDULER=cluster.address,
        DASK_UPLOAD=str(tmp_path / "naps.py"),
        ANALYSIS="naps:nap",
        JOB_TIMEOUT="1500ms",
    )
    sent = [service.send(0.5) for _ in range(6)]  # one after the other, they take 3 s

    try:
        cluster.start_scheduler()  # it takes a while
        service.wait_for_log("cluster connected")
        cluster.start_worker("--nthreads", "1")
        jobs = service.wait_for_all(sent)
    finally:
        cluster.kill()

    assert [job["outcome"] for job in jobs] == ["succeeded"] * 6

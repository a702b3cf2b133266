"""What every answer has in common, seen from the socket."""

import contextlib
import gc
import json
import logging
import re
import resource
import select
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
import weakref
from http.client import HTTPConnection
from urllib.error import HTTPError

import bottle
import pytest
from waitress import wasyncore

from jobs import errors
from tests.wire import answer, chunked, connected, exchange, get, post
from web import intake, server
from web.server import Application, Server, json_answer

MAX_BODY = 300_000
LIVEZ = get("/livez")


class Turn:
    """A transaction that does nothing, until it is told to wait or to fail at its end."""

    def __init__(self):
        self.failure = None
        self.count = 0
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    @contextlib.contextmanager
    def __call__(self):
        self.count += 1
        yield
        self.entered.set()
        assert self.gate.wait(10)
        if self.failure:
            raise self.failure


class Service:
    """A server with the handlers that a test gives it, and what it tells."""

    def __init__(self, application, host="127.0.0.1"):
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # as logs.configure does
        self.turn, self.answers = Turn(), []
        self.answered = threading.Condition()
        self.server = Server(host=host, port=0, max_body_bytes=MAX_BODY)
        self.base_url = f"http://127.0.0.1:{self.server.port}"
        self.server.start(application, self.turn, on_answer=self.told)

    def told(self, answer):
        with self.answered:
            self.answers.append(answer)
            self.answered.notify_all()

    def wait_for(self, number):
        with self.answered:
            assert self.answered.wait_for(lambda: len(self.answers) >= number, timeout=5)
        return self.answers


@pytest.fixture
def serve():
    """Return a function that serves these handlers by their paths, for GET and POST."""
    services = []

    def serve(handlers=None, *, host="127.0.0.1", **options):
        application = Application(**options)
        for path, handler in {"/livez": lambda: {"a": 1}, **(handlers or {})}.items():
            application.serve("GET", path, handler)
            application.serve("POST", path, handler, open_to_all=path == "/postprocessed")
        application.serve_page()
        services.append(Service(application, host))
        return services[-1]

    yield serve

    for one in services:
        one.turn.gate.set()
        one.server.stop()
        assert not one.server._thread.is_alive()


def accept():
    """Do what a handler of POST /process does first."""
    environ = bottle.request.environ
    intake.read_payload(environ, max_bytes=MAX_BODY)
    environ["postback.write"] = lambda: json_answer({"state": "accepted"})


@pytest.fixture
def process(serve):
    return serve({"/process": accept})


def detail(body):
    return json.loads(body)["detail"]


# Problems


@pytest.mark.parametrize("exc", [ValueError("secret"), RecursionError(), MemoryError()])
def test_an_unexpected_error_is_a_500_without_a_traceback_and_logged_once(serve, caplog, exc):
    def handler():
        raise exc

    code, _, body = exchange(serve({"/x": handler}), get("/x"))

    assert (code, json.loads(body)["status"]) == (500, 500)
    assert b"secret" not in body
    assert caplog.messages == ["request failed"]


@pytest.mark.parametrize("path", ["/page/x", "/page/%2e%2e%2fx"])
def test_a_file_that_is_not_of_the_page_is_not_served(process, path):
    code, headers, body = exchange(process, get(path))

    assert (code, json.loads(body)["status"]) in ((404, 404), (403, 403))
    assert headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("path", ["/", "/page/page.css", "/page/page.js", "/page/icon.svg"])
def test_the_page_is_open_to_all_and_works_below_any_path_without_anything_else(serve, path):
    code, headers, body = exchange(serve(api_tokens=("a",)), get(path))

    assert code == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")
    for harmless in (b"http://www.w3.org/2000/svg", b"https://example.com/results", b"// "):
        body = body.replace(harmless, b"")
    assert not re.search(rb"//|[\"'`(]/\w", body)  # no other host, and no path from the root


# Framing


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (post(length=10**9), "Request Entity Too Large"),
        (post(extra="no colon\r\n"), "Bad Request"),
        (get("/" + "x" * 40_000), "Request Header Fields Too Large"),
    ],
)
def test_what_the_server_itself_refuses_has_a_reason(process, sent, reason):
    exchange(process, sent)

    assert [(one.route, one.reason) for one in process.wait_for(1)] == [("none", reason)]


def test_a_caller_that_has_finished_sending_gets_its_answer(process):
    assert exchange(process, post(), finish=True)[0] == 200


def test_a_100_comes_before_the_body_and_not_before_a_413(process):
    head, _, body = post(extra="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with connected(process) as (conn, stream):
        for _ in range(2):
            conn.sendall(head + b"\r\n\r\n")
            first = answer(stream)
            conn.sendall(body)
            assert (first[0], answer(stream)[0]) == (100, 200)

        conn.sendall(post(b"", length=10**9, extra="Expect: 100-continue\r\n"))
        assert answer(stream)[0] == 413


def test_a_100_does_not_overtake_the_answer_before_it(process):
    head, _, body = post(extra="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with connected(process) as (conn, stream):
        conn.sendall(post() + head + b"\r\n\r\n")

        assert answer(stream)[0] == 200
        conn.sendall(body)
        assert answer(stream)[0] in (100, 200)


# A refusal reaches callers that send everything first

TOO_LARGE = MAX_BODY + server.HEADROOM_BYTES + 500_000


def test_urllib_reads_a_413(process):
    request = urllib.request.Request(f"{process.base_url}/process", data=b"x" * TOO_LARGE)

    with pytest.raises(HTTPError) as refused:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5)

    with refused.value as found:
        assert found.code == 413


@pytest.mark.parametrize("options", [(), ("-H", "Expect:"), ("-H", "Transfer-Encoding: chunked")])
@pytest.mark.skipif(not shutil.which("curl"), reason="apt install curl")
def test_curl_reads_a_413(process, tmp_path, options):
    path = tmp_path / "body"
    path.write_bytes(b"x" * TOO_LARGE)
    url = f"{process.base_url}/process"
    command = ["curl", "-s", *options, "-w", "%{http_code}", "--data-binary", f"@{path}", url]

    done = subprocess.run(command, check=False, capture_output=True, timeout=10)

    assert (done.returncode, done.stdout[-3:]) == (0, b"413")


@pytest.mark.skipif(not shutil.which("node"), reason="apt install nodejs")
def test_node_reads_a_413(process):
    code = (
        f"fetch('{process.base_url}/process', {{method: 'POST', body: 'x'.repeat({TOO_LARGE})}})"
        ".then(async a => console.log(a.status, (await a.json()).status))"
    )

    done = subprocess.run(["node", "-e", code], check=False, capture_output=True, timeout=20)

    assert done.stdout == b"413 413\n", done.stderr


def test_a_refused_caller_that_never_ends_is_cut_off(process):
    with connected(process) as (conn, _):
        conn.sendall(post(b"", length=10**9))

        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            conn.sendall(b"x" * 100_000_000)


def test_a_refused_caller_that_only_waits_is_cut_off(process, monkeypatch):
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.1)
    monkeypatch.setattr(server, "TICK_SECONDS", 0.05)
    with connected(process) as (conn, stream):
        conn.sendall(post(b"", length=10**9))
        answer(stream)

        gone(process)


def gone(service):
    """Wait until the server has no connection left."""
    for _ in range(1000):
        if not service.server.active_channels:
            return
        threading.Event().wait(0.005)
    raise AssertionError("a connection is left")


# Turns: what is promised leaves after the commit


def named():
    """Answer by which threads a request is checked and stored."""
    checks = threading.current_thread().name
    bottle.request.environ["postback.write"] = lambda: json_answer(
        {"checks": checks, "stores": threading.current_thread().name}
    )


@pytest.mark.parametrize(
    ("sent", "in_loop"),
    [
        (post(path="/postprocessed"), True),
        (LIVEZ, True),
        (get("/readyz"), True),
        (post(b"x" * server.SHORT_BYTES), True),
        (chunked(b"x" * 100), True),
        (post(b"x" * (server.SHORT_BYTES + 1)), False),
        (post(b"," * server.SHORT_MARKS), True),
        (post(b"[{" * (server.SHORT_MARKS // 2) + b","), False),
        (chunked(b"x" * server.SHORT_BYTES), True),
        (chunked(b"x" * (server.SHORT_BYTES + 1)), False),
        (post(path="/x"), False),
    ],
)
def test_the_loop_checks_what_is_short_and_stores_everything(serve, sent, in_loop):
    paths = ("/process", "/postprocessed", "/livez", "/readyz", "/x")
    service = serve(dict.fromkeys(paths, named))

    names = json.loads(exchange(service, sent)[2])

    assert (names["checks"] == "server") is in_loop
    assert (names["stores"], service.turn.count) == ("server", 1)


def test_large_bodies_are_checked_one_by_one_and_hold_up_nobody_else(serve):
    entered, gate = threading.Semaphore(0), threading.Event()

    def check():
        entered.release()
        assert gate.wait(10)
        named()

    service = serve({"/process": check, "/x": dict})
    with connected(service) as one, connected(service) as other:
        for (conn, _), path in ((one, "/process"), (other, "//process")):
            conn.sendall(post(b"x" * (server.SHORT_BYTES + 1), path=path))
        assert entered.acquire(timeout=5)

        assert [exchange(service, get("/x"))[0] for _ in range(40)] == [200] * 40

        assert not entered.acquire(timeout=0)  # the second body waits
        gate.set()
        assert [answer(stream)[0] for _, stream in (one, other)] == [200, 200]


def test_no_answer_leaves_before_the_commit(process):
    process.turn.gate.clear()
    with connected(process) as (conn, stream):
        conn.sendall(post())
        assert process.turn.entered.wait(5)
        assert not select.select([conn], [], [], 0.05)[0]

        process.turn.gate.set()

        assert answer(stream)[0] == 200


def test_requests_that_come_during_a_commit_share_the_next(process):
    process.turn.gate.clear()
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(connected(process)) for _ in range(20)]
        ends[0][0].sendall(post())
        assert process.turn.entered.wait(5)
        for conn, _ in ends[1:]:
            conn.sendall(post())

        process.turn.gate.set()

        assert [answer(stream)[0] for _, stream in ends] == [200] * 20
    assert process.turn.count == 2


def test_a_turn_ends_early_when_its_checks_take_long(serve):
    def check():
        until = time.monotonic() + server.TURN_SECONDS
        while time.monotonic() < until:
            pass
        named()

    service = serve({"/process": check})
    service.turn.gate.clear()
    with connected(service) as first, connected(service) as second, connected(service) as third:
        first[0].sendall(post())
        assert service.turn.entered.wait(5)
        for conn, _ in (second, third):
            conn.sendall(post())
        service.turn.gate.set()

        assert [answer(stream)[0] for _, stream in (first, second, third)] == [200] * 3
    assert service.turn.count == 3


@pytest.mark.parametrize(
    ("failure", "logged"),
    [(errors.JournalError("The disk is full."), []), (OSError("odd"), ["requests not answered"])],
)
def test_a_failed_commit_makes_a_503_of_every_promise(serve, caplog, failure, logged):
    after = []

    def handler():
        environ = bottle.request.environ
        environ["postback.after"].append(lambda: after.append(1))
        environ["postback.write"] = lambda: json_answer({"a": 1})

    service = serve({"/process": handler})
    service.turn.failure = failure
    with connected(service) as (conn, stream), connected(service) as (other, alive):
        conn.sendall(post() * 2)
        other.sendall(LIVEZ)
        code, headers, body = answer(stream)

        assert (code, headers["Retry-After"]) == (503, "5")
        assert detail(body) == (
            str(failure) if not logged else "The service failed; its log says why."
        )
        assert (answer(stream)[0], answer(alive)[0]) == (503, 200)

    service.turn.failure = None
    assert exchange(service, post())[0] == 200
    service.wait_for(4)
    assert (after, set(caplog.messages)) == ([1], set(logged))


def test_a_turn_that_cannot_begin_is_a_503(process):
    process.turn.__class__ = type("Broken", (Turn,), {"__call__": lambda self: 1 / 0})

    assert [exchange(process, sent)[0] for sent in (post(), LIVEZ)] == [503, 200]


def test_a_request_that_cannot_be_handled_fails_no_other(process, monkeypatch, caplog):
    problems, prepare = [MemoryError], server._Task.get_environment

    def prepare_or_fail(task):
        if problems:
            raise problems.pop()
        return prepare(task)

    process.turn.gate.clear()
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(connected(process)) for _ in range(3)]
        ends[0][0].sendall(post())
        assert process.turn.entered.wait(5)
        monkeypatch.setattr(server._Task, "get_environment", prepare_or_fail)
        for conn, _ in ends[1:]:
            conn.sendall(post())
        process.turn.gate.set()

        assert sorted(answer(stream)[0] for _, stream in ends) == [200, 200, 500]
    assert caplog.messages == ["request failed"]
    assert exchange(process, post())[0] == 200


@pytest.mark.parametrize("path", ["/process", "/x"])
def test_what_is_to_be_done_after_the_answer_is_done_then(serve, caplog, path):
    done = threading.Event()
    order = []

    def handler():
        after = bottle.request.environ["postback.after"]
        after.append(lambda: order.append(select.select([conn], [], [], 5)[0] == [conn]))
        after.append(lambda: 1 / 0)
        after.append(done.set)
        return {"a": 1}

    with connected(serve({path: handler})) as (conn, stream):
        conn.sendall(post(path=path))
        assert done.wait(5)
        assert answer(stream)[0] == 200

    assert order == [True]
    assert caplog.messages.count("answer not followed up") == 1


@pytest.mark.parametrize("path", ["/process", "/x"])
def test_an_answer_is_not_kept_until_the_garbage_collector_runs(serve, path):
    kept = []

    def handler():
        def write():
            return json_answer({"environ": len(environ)})

        environ = bottle.request.environ
        environ["postback.write"] = write
        kept.append(weakref.ref(write))

    service = serve({path: handler})
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):  # bottle keeps the last request of each thread
            exchange(service, post(path=path, extra="Connection: close\r\n"))
        gone(service)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_an_answer_is_told_with_its_facts(serve):
    def handler():
        bottle.response.set_header("Location", "http://x/postback/jobs/abc")
        return {"a": 1}

    service = serve({"/process": handler, "/jobs/<job_id>": lambda job_id: {"id": job_id}})
    exchange(service, post(path="/process?token=secret"))
    exchange(service, get("/jobs/def"))

    accepted, asked = service.wait_for(2)

    assert accepted[:4] == ("POST", "/process", "/process", 200)
    assert (accepted.job_id, accepted.reason) == ("abc", None)
    assert asked[:4] == ("GET", "/jobs/def", "/jobs/<job_id>", 200)
    assert asked.job_id == "def"
    assert 0 < asked.seconds < 5


# Slow and silent callers


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(server, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(server, "TICK_SECONDS", 0.05)


def test_slow_readers_of_large_answers_hold_up_nobody(serve):
    service = serve({"/x": lambda: b"x" * 24_000_000, "/y": lambda: b"y"})
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(connected(service)) for _ in range(6)]
        for conn, _ in ends:
            conn.sendall(get("/x"))
        service.wait_for(6)

        assert exchange(service, get("/y"))[0] == 200
        assert len(answer(ends[0][1])[2]) == 24_000_000


def test_a_large_answer_arrives_though_its_caller_sends_more(serve, impatient, monkeypatch):
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.1)
    service = serve({"/x": lambda: b"x" * 12_000_000})
    with connected(service) as (conn, _):
        conn.sendall(get("/x").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        service.wait_for(1)
        conn.sendall(b"\r\n")

        received = 0
        while service.server.active_channels:  # only as fast as needed
            received += len(conn.recv(10_000))
            threading.Event().wait(0.0001)
        while piece := conn.recv(1_000_000):
            received += len(piece)

        assert received > 12_000_000


def test_an_answer_that_finds_no_room_on_the_disk_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/does/not/exist")
    service = serve({"/x": lambda: b"x" * 24_000_000})
    with connected(service) as (conn, stream):
        conn.sendall(get("/x"))

        assert len(stream.read()) < 24_000_000
    assert exchange(service, LIVEZ)[0] == 200


def test_a_caller_that_asks_for_more_than_it_reads_is_cut_off(serve, impatient, monkeypatch):
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", 1_000_000)
    service = serve({"/x": lambda: b"x" * 8_000_000})

    with connected(service) as (conn, _):
        conn.sendall(get("/x") * 50)
        gone(service)

    assert len(service.answers) < 50


def test_a_body_that_finds_no_room_on_the_disk_is_a_503(process, monkeypatch):
    large = post(b"x" * (MAX_BODY + server.HEADROOM_BYTES - 1))
    monkeypatch.setattr(tempfile, "tempdir", "/does/not/exist")
    monkeypatch.setattr(process.server.adj, "inbuf_overflow", 1)

    code, headers, body = exchange(process, large)

    assert (code, headers["Retry-After"]) == (503, "5")
    assert "could not be stored (No such file or directory)" in detail(body)


def test_a_caller_that_never_reads_is_cut_off_without_an_error(serve, impatient, caplog):
    service = serve({"/x": lambda: b"x" * 1_000_000})
    with connected(service) as (conn, _):
        conn.sendall(get("/x") * 9)
        service.wait_for(9)
        gone(service)

    assert exchange(service, LIVEZ)[0] == 200
    assert caplog.messages == []


@pytest.mark.parametrize("sent", [b"", b"POST /process HT", post(length=100), get("/x")])
def test_a_connection_that_is_silent_for_too_long_is_closed(serve, impatient, monkeypatch, sent):
    service = serve({"/x": lambda: b"x" * 24_000_000})
    with connected(service) as (conn, _):
        conn.sendall(sent)
        assert exchange(service, LIVEZ)[0] == 200
        monkeypatch.setattr(time, "time", lambda: 0.0)  # somebody sets the clock back

        gone(service)


def test_a_caller_that_goes_on_sending_what_is_refused_holds_up_nobody(process, caplog):
    large = post(b"x" * 3_000_000)
    with connected(process) as (conn, stream), contextlib.suppress(OSError):
        conn.sendall(large)
        assert answer(stream)[0] == 413

    gone(process)
    assert "server failed" not in caplog.messages


def test_requests_that_threads_answer_quickly_are_answered_in_their_order(serve):
    service = serve({"/x": lambda: bottle.request.query.n})
    for _ in range(30):
        with connected(service) as (conn, stream):
            for n in range(0, 300, 50):
                conn.sendall(b"".join(get(f"/x?n={one}") for one in range(n, n + 50)))

            assert [answer(stream)[2] for _ in range(300)] == [b"%d" % n for n in range(300)]


def test_of_many_requests_at_once_a_few_are_parsed_at_a_time(serve):
    began, gate = threading.Event(), threading.Event()

    def wait():
        began.set()
        return str(gate.wait(10))

    service = serve({"/x": wait})
    with connected(service) as (conn, stream):
        conn.sendall(get("/x") + LIVEZ * 300)
        assert began.wait(5)

        (channel,) = service.server.active_channels.values()
        assert len(channel.requests) <= server.PIECE_BYTES / len(LIVEZ) + 1
        gate.set()
        assert [answer(stream)[0] for _ in range(301)] == [200] * 301


@pytest.mark.parametrize("has_epoll", [True, False])
def test_a_connection_that_was_silent_is_still_served(serve, monkeypatch, has_epoll):
    if not has_epoll:
        monkeypatch.delattr(select, "epoll")
    with connected(serve()) as (conn, stream):
        for part in (LIVEZ, LIVEZ[:9], LIVEZ[9:], LIVEZ):
            conn.sendall(part)
            threading.Event().wait(0.02)

        assert [answer(stream)[0] for _ in range(3)] == [200] * 3


# The socket


def test_it_raises_the_limit_of_descriptors(serve):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))

    serve()

    raised = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised == min(4 * server.CONNECTIONS, hard)


def test_more_connections_than_allowed_wait(serve, monkeypatch, caplog):
    monkeypatch.setattr(server, "_connection_limit", lambda: 10)
    monkeypatch.setattr(server, "TICK_SECONDS", 0.05)
    service = serve()
    with contextlib.ExitStack() as first:
        for _ in range(10):
            first.enter_context(connected(service))
        with connected(service) as (conn, stream):
            conn.sendall(LIVEZ)
            assert not select.select([conn], [], [], 0.1)[0]
            first.close()

            assert answer(stream)[0] == 200
    assert "connection not accepted" in caplog.messages


@pytest.mark.parametrize(
    ("host", "addresses"),
    [("::", ["127.0.0.1", "::1"]), ("::1", ["::1"]), ("localhost", ["127.0.0.1"])],
)
def test_it_listens_on_both_families_where_it_is_to(serve, host, addresses):
    port = serve(host=host).server.port

    for address in addresses:
        with contextlib.closing(HTTPConnection(address, port, timeout=5)) as caller:
            caller.request("GET", "/livez")
            assert caller.getresponse().status == 200


def test_an_unexpected_error_in_the_loop_is_logged_and_it_goes_on(serve, monkeypatch, caplog):
    poll, failed = wasyncore.poll2, threading.Event()

    def fail_once(*args):
        if not failed.is_set():
            failed.set()
            raise MemoryError
        poll(*args)

    monkeypatch.setattr(wasyncore, "poll2", fail_once)

    assert exchange(serve(), LIVEZ)[0] == 200
    assert caplog.messages == ["server failed"]


# The stop


@pytest.mark.parametrize("sent", [post(), get("/x")])
def test_a_stop_lets_answers_leave_and_closes_idle_connections(serve, sent):
    entered, gate = threading.Event(), threading.Event()

    def handler():
        entered.set()
        assert gate.wait(10)
        return b"x" * 8_000_000

    service = serve({"/process": handler, "/x": handler})
    with connected(service) as (_, idle), connected(service) as (conn, stream):
        conn.sendall(sent)
        assert entered.wait(5)
        stopping = threading.Thread(target=service.server.stop)
        stopping.start()
        gate.set()

        assert len(answer(stream)[2]) == 8_000_000
        assert idle.read() == b""
        stopping.join(10)
        with pytest.raises(ConnectionRefusedError):
            exchange(service, LIVEZ)


def test_a_stop_does_not_wait_for_ever(serve, monkeypatch):
    monkeypatch.setattr(server, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(server, "TICK_SECONDS", 0.05)
    service = serve({"/x": lambda: b"x" * 24_000_000})
    with connected(service) as (conn, stream):
        conn.sendall(get("/x"))
        service.wait_for(1)

        service.server.stop()

        assert len(stream.read()) < 24_000_000

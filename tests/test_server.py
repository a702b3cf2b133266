"""What every answer has in common, seen from the socket."""

import contextlib
import json
import resource
import select
import socket
import threading

import bottle
import pytest
import requests

from jobs import errors
from tests.harness import poll
from tests.wire import answer, chunked, connected, exchange, padded, post
from tests.wire import get as wire_get
from web import server
from web.server import CONNECTIONS, STATUS_CODES, Application, Server

MAX_BODY = 1000


@pytest.fixture
def serve():
    """Return a function that serves one handler at GET /, and gives the URL of the server."""
    servers: list[Server] = []

    def serve(handler, *, host="127.0.0.1", settle=lambda: None, **hooks):
        application = Application()
        application.serve("GET", "/", handler)
        application.serve("POST", "/", handler)
        servers.append(Server(host=host, port=0, max_body_bytes=MAX_BODY))
        servers[-1].start(application, settle=settle, **hooks)
        return f"http://{f'[{host}]' if ':' in host else host}:{servers[-1].port}"

    serve.servers = servers  # type: ignore[attr-defined]
    yield serve

    for one in servers:
        one.stop()


@pytest.fixture
def echo(start, receiver):
    return start(ANALYSIS="tests.analyses:echo", POSTBACK_URL=receiver.url, MAX_BODY=str(MAX_BODY))


def get(url, **options):
    with requests.Session() as session:
        session.trust_env = False
        return session.get(url, timeout=10, **options)


def raising(exc):
    def handler():
        raise exc

    return handler


def rows(service):
    return len(service.get("/jobs").json()["jobs"])


# Problems


@pytest.mark.parametrize("kind", STATUS_CODES)
def test_each_error_becomes_a_problem_with_its_status(serve, kind):
    exc = {
        errors.JobNotFoundError: errors.JobNotFoundError("x"),
        errors.MoveError: errors.MoveError("x", state="accepted", wanted="delivered"),
    }.get(kind) or kind("do this")

    found = get(serve(raising(exc)))

    assert found.status_code == found.json()["status"] == STATUS_CODES[kind]
    assert found.json()["detail"] == str(exc)
    assert found.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    "kind", [errors.FullError, errors.DrainingError, errors.JournalError, errors.JournalLostError]
)
def test_whatever_passes_says_when_to_come_again(serve, kind):
    found = get(serve(raising(kind("later"))))

    assert (found.status_code, found.headers["Retry-After"]) == (503, "5")


@pytest.mark.parametrize("exc", [ValueError("secret text"), KeyError("x"), RecursionError()])
def test_what_nobody_expected_is_a_500_without_a_traceback_logged_once(serve, caplog, exc):
    found = get(serve(raising(exc)))

    assert (found.status_code, found.json()["status"]) == (500, 500)
    assert found.headers["Content-Type"] == "application/problem+json"
    assert "Traceback" not in found.text
    assert "secret" not in found.text
    assert [one.message for one in caplog.records] == ["request failed"]


@pytest.mark.parametrize(
    "path",
    [
        "/process/",
        "/PROCESS",
        "/process%00",
        "/jobs/a/b",
        "/<script>alert(1)</script>",
        "/jobs//cancel",
        "/..%2f..%2fetc%2fpasswd",
    ],
)
def test_there_is_nothing_elsewhere_and_the_path_is_not_repeated(echo, path):
    found = echo.get(path)

    assert (found.status_code, found.json()["status"]) == (404, 404)
    assert found.headers["Content-Type"] == "application/problem+json"
    assert "script" not in found.text


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/process", "POST"),
        ("PUT", "/process", "POST"),
        ("DELETE", "/process", "POST"),
        ("BREW", "/process", "POST"),
        ("OPTIONS", "/process", "POST"),
        ("TRACE", "/process", "POST"),
        ("POST", "/jobs", "GET"),
        ("DELETE", "/jobs/x", "GET"),
        ("GET", "/jobs/x/cancel", "POST"),
        ("GET", "/jobs/x/resend", "POST"),
        ("POST", "/livez", "GET"),
    ],
)
def test_another_method_is_told_which_it_could_be(echo, method, path, allow):
    found = echo.request(method, path)

    assert (found.status_code, found.json()["status"]) == (405, 405)
    assert allow in found.headers["Allow"]


@pytest.mark.parametrize(("path", "status_code"), [("/livez", 200), ("/process", 405), ("/x", 404)])
def test_head_is_answered_without_a_body(echo, path, status_code):
    found = echo.request("HEAD", path)

    assert (found.status_code, found.content) == (status_code, b"")


# Framing


def test_a_thousand_bytes_are_a_payload_and_one_more_is_not(echo):
    exact = exchange(echo, post(padded(MAX_BODY)))
    over = exchange(echo, post(padded(MAX_BODY + 1)))

    assert (exact[0], over[0]) == (200, 413)
    assert json.loads(over[2])["status"] == 413
    assert rows(echo) == 1


def test_many_requests_fit_on_one_connection(echo):
    with connected(echo) as (conn, stream):
        codes = []
        for _ in range(200):
            conn.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            codes.append(answer(stream)[0])

    assert codes == [200] * 200


def test_pipelined_requests_are_answered_in_order(echo):
    with connected(echo) as (conn, stream):
        conn.sendall(post() + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")

        accepted, alive = answer(stream), answer(stream)

    assert (accepted[0], alive[0]) == (200, 200)
    assert json.loads(accepted[2])["state"] == "accepted"
    assert json.loads(alive[2]) == {"status": "alive"}


@pytest.mark.parametrize(
    "sent",
    [
        chunked(b'{"data"', b": 1}"),
        chunked(padded(MAX_BODY)),
        chunked(b'{"data": 1}', extra="Content-Length: 3\r\n"),
        b"\r\n\r\n" + post(),
        post(extra="Content_Type: text/plain\r\n"),
        post(extra="X-Forwarded-For: 10.0.0.1\r\nHost: user@y\r\n"),
        post(path="//process"),
    ],
)
def test_what_is_unusual_but_right_is_accepted(echo, sent):
    code, *_ = exchange(echo, sent)

    assert code == 200
    assert rows(echo) == 1


@pytest.mark.parametrize(
    ("sent", "codes"),
    [
        (chunked(padded(MAX_BODY + 1)), {413}),
        (chunked(b"x" * 200_000), {413}),
        (chunked(b'{"data": 1}', end=b"zz\r\n"), {400}),
        (chunked(b'{"data": 1}', end=b"-5\r\n\r\n"), {400}),
        (chunked(b'{"data": 1}', end=b"0x5\r\n\r\n"), {400}),
        (post(length=10**30), {413}),
        (post(length=-5), {400}),
        (post(length="+3"), {400}),
        (post(length="1_0"), {400}),
        (post(length="abc"), {400}),
        (post(extra="Content-Length: 11\r\n"), {400}),
        (post(extra="Content-Length: 12\r\n"), {400}),
        (post(b"", length=0), {400}),
        (post().replace(b"Content-Length: 11\r\n", b""), {411}),
        (post(length=5, body=b'{"dat"a": 1}'), {400}),
        (post(extra="Transfer-Encoding: gzip, chunked\r\n"), {400, 501}),
        (post(extra="Transfer-Encoding: identity\r\n"), {400, 501}),
        (post(extra="X-Long: " + "x" * 100_000 + "\r\n"), {431}),
        (post(path="/process?" + "x" * 100_000), {400, 414, 431}),
        (post(extra="X : y\r\n"), {400}),
        (post(extra="no colon\r\n"), {400}),
        (b"\x16\x03\x01 hello\r\n\r\n", {0, 400, 404}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {0, 400, 404, 505}),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", {200, 404, 405}),
    ],
)
def test_what_is_wrongly_framed_is_refused_without_a_row(echo, sent, codes):
    code, *_ = exchange(echo, sent)

    assert code in codes
    assert rows(echo) == 0


@pytest.mark.parametrize("sent", [post(length=100), chunked(b'{"data": 1}', end=b"")])
def test_a_body_that_ends_early_leaves_no_row(echo, sent):
    code, *_ = exchange(echo, sent, finish=True)

    assert code in (0, 400)
    assert rows(echo) == 0


def test_a_caller_that_has_finished_sending_still_gets_its_answer(echo):
    code, *_ = exchange(echo, post(), finish=True)

    assert code == 200


def test_who_waits_for_a_100_gets_it_then_the_answer(echo):
    with connected(echo) as (conn, stream):
        head, _, body = post(extra="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
        conn.sendall(head + b"\r\n\r\n")
        first = answer(stream)
        conn.sendall(body)

        assert (first[0], answer(stream)[0]) == (100, 200)


def test_a_refused_body_is_not_taken_for_a_request(echo):
    smuggled = post()
    with connected(echo) as (conn, stream):
        conn.sendall(post(length=10**9, body=smuggled))

        assert answer(stream)[0] == 413
        assert answer(stream)[0] == 0
    assert rows(echo) == 0


# The socket


def test_it_raises_the_descriptors_as_far_as_the_machine_allows(serve):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))

    alive = get(serve(lambda: {"a": 1})).json()

    raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (alive, raised) == ({"a": 1}, min(2 * CONNECTIONS, hard))


def test_without_epoll_it_answers_all_the_same(serve, monkeypatch):
    monkeypatch.delattr(select, "epoll")

    assert get(serve(lambda: {"a": 1})).json() == {"a": 1}


def test_a_connection_that_was_silent_long_is_still_served(serve, monkeypatch):
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.05)
    url = serve(lambda: {"a": 1})

    with requests.Session() as session:
        answers = [session.get(url, timeout=10).json()]
        threading.Event().wait(0.2)
        answers.append(session.get(url, timeout=10).json())

    assert answers == [{"a": 1}] * 2


def test_an_address_that_is_taken_is_refused_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(errors.ConfigError, match=f"PORT={port}: cannot listen there"):
            Server(host="127.0.0.1", port=port, max_body_bytes=MAX_BODY)


def test_it_listens_on_an_address_of_version_6(serve):
    assert get(serve(lambda: {"a": 1}, host="::1")).json() == {"a": 1}


def test_a_stop_ends_the_connections_that_are_open(start):
    service = start(ANALYSIS="tests.analyses:echo")
    with connected(service) as (conn, stream):
        conn.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        answer(stream)

        service.restart()

        assert stream.read() == b""


@pytest.mark.parametrize(
    ("sent", "status_code"),
    [
        (post(length=10**9), 413),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (post(extra="Transfer-Encoding: gzip\r\n"), 501),
    ],
)
def test_what_the_server_itself_refuses_is_a_problem_too(echo, sent, status_code):
    found, headers, body = exchange(echo, sent)

    assert (found, json.loads(body)["status"]) == (status_code, status_code)
    assert headers["Content-Type"] == "application/problem+json"
    assert "max_body" not in json.loads(body)["detail"]


# Answers that are kept until they are settled


class At:
    """Where a server answers, for tests/wire.py."""

    def __init__(self, url: str) -> None:
        self.base_url = url


def promise() -> bytes:
    """Return a request whose answer may promise something."""
    return post(path="/")


def test_no_answer_leaves_before_it_is_settled(serve):
    entered, release = threading.Event(), threading.Event()

    def settle():
        entered.set()
        assert release.wait(10)

    with connected(At(serve(lambda: {"a": 1}, settle=settle))) as (conn, stream):
        conn.sendall(promise())
        assert entered.wait(5)
        readable, _, _ = select.select([conn], [], [], 0.05)
        assert not readable
        release.set()
        assert answer(stream)[0] == 200


def test_what_cannot_be_settled_is_never_answered(serve, caplog):
    def settle():
        raise errors.JournalLostError("the disk failed")

    assert exchange(At(serve(lambda: {"a": 1}, settle=settle)), promise()) == (0, {}, b"")
    assert not caplog.records


def test_a_settle_that_breaks_its_promise_is_logged_and_answers_nothing(serve, caplog):
    def settle():
        raise ValueError("odd")

    assert exchange(At(serve(lambda: {"a": 1}, settle=settle)), promise()) == (0, {}, b"")
    assert caplog.messages == ["requests not answered"]


def test_answers_do_not_wait_long_for_others(serve, monkeypatch):
    monkeypatch.setattr(server, "THREADS", 1)
    monkeypatch.setattr(server, "MAX_KEPT_SECONDS", 0.0)
    settled: list[int] = []

    at = At(serve(lambda: {"a": 1}, settle=lambda: settled.append(1)))
    with connected(at) as (conn, stream):
        conn.sendall(promise() * 6)
        assert [answer(stream)[0] for _ in range(6)] == [200] * 6

    assert len(settled) == 6


def test_requests_that_come_together_are_settled_together(serve, monkeypatch):
    monkeypatch.setattr(server, "THREADS", 1)
    monkeypatch.setattr(server, "MAX_KEPT_SECONDS", 10.0)
    entered, release, settled = threading.Event(), threading.Event(), []

    def settle():
        settled.append(1)
        entered.set()
        assert release.wait(10)

    at = At(serve(lambda: {"a": 1}, settle=settle))
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(connected(at)) for _ in range(6)]
        ends[0][0].sendall(promise())
        assert entered.wait(5)
        for conn, _ in ends[1:]:
            conn.sendall(promise())
        waiting = serve.servers[-1]._answerers._waiting
        poll(lambda: waiting.qsize() == 5, "the others wait")
        release.set()
        assert [answer(stream)[0] for _, stream in ends] == [200] * 6

    assert len(settled) == 2


def test_what_promises_nothing_waits_for_no_disk(serve):
    url = serve(lambda: {"a": 1}, settle=lambda: pytest.fail("settled"))

    assert get(url).status_code == 200


def test_a_request_that_may_take_long_holds_up_no_promise(serve, monkeypatch):
    monkeypatch.setattr(server, "THREADS", 1)
    entered, release, order = threading.Event(), threading.Event(), []

    def handle():
        order.append(bottle.request.method)
        entered.set()
        assert release.wait(10)
        return {"a": 1}

    at = At(serve(handle, settle=lambda: order.append("settled")))
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(connected(at)) for _ in range(3)]
        (first, second, third), answers = zip(*callers, strict=True)
        first.sendall(promise())
        assert entered.wait(5)
        second.sendall(wire_get("/"))
        waiting = serve.servers[-1]._answerers._waiting
        poll(lambda: waiting.qsize() == 1, "the second waits")
        third.sendall(promise())
        poll(lambda: waiting.qsize() == 2, "the third waits")
        release.set()
        assert [answer(one)[0] for one in answers] == [200] * 3

    assert order == ["POST", "settled", "GET", "POST", "settled"]  # the second before the third


def test_a_stop_lets_the_answer_that_is_being_settled_leave(serve):
    entered, release = threading.Event(), threading.Event()

    def settle():
        entered.set()
        assert release.wait(10)

    at = At(serve(lambda: {"a": 1}, settle=settle))
    with connected(at) as (conn, stream):
        conn.sendall(promise())
        assert entered.wait(5)
        stopping = threading.Thread(target=serve.servers.pop().stop)
        stopping.start()
        release.set()
        assert answer(stream)[0] == 200
        stopping.join(10)


def test_who_asks_for_more_than_he_takes_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", 1_000_000)
    at = At(serve(lambda: {"a": "x" * 8_000_000}))

    with connected(at) as (conn, stream):
        conn.sendall(wire_get("/") * 50)
        threading.Event().wait(0.2)
        received = len(stream.read())

    assert received < 50 * 8_000_000


def test_who_never_takes_anything_is_closed_once_he_is_silent(serve, monkeypatch):
    monkeypatch.setattr(server, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.05)
    at = At(serve(lambda: {"a": "x" * 8_000_000}))

    with connected(at) as (conn, _):
        conn.sendall(wire_get("/"))
        sockets = serve.servers[-1]._server._map
        poll(lambda: server._has_unsent(sockets), "an answer that waits")
        poll(lambda: not server._has_unsent(sockets), "its end")


def test_a_stop_lets_a_large_answer_leave(serve):
    text = "x" * 8_000_000

    with connected(At(serve(lambda: {"a": text}))) as (conn, stream):
        conn.sendall(wire_get("/"))
        one = serve.servers.pop()
        poll(lambda: server._has_unsent(one._server._map), "an answer that waits")
        stopping = threading.Thread(target=one.stop)
        stopping.start()
        body = answer(stream)[2]
        stopping.join(10)

    assert len(json.loads(body)["a"]) == len(text)


def test_who_expects_a_100_without_a_body_gets_the_answer(serve):
    sent = b"GET / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n"

    with connected(At(serve(lambda: {"a": 1}))) as (conn, stream):
        conn.sendall(sent * 2)

        assert [answer(stream)[0] for _ in range(2)] == [200, 200]


def test_what_nobody_expected_in_the_server_is_logged_and_it_goes_on(serve, monkeypatch, caplog):
    turn, failed = server._turn, threading.Event()

    def fail_once(*args, **kwargs):
        if not failed.is_set():
            failed.set()
            raise MemoryError
        turn(*args, **kwargs)

    monkeypatch.setattr(server, "_turn", fail_once)

    assert get(serve(lambda: {"a": 1})).status_code == 200
    assert caplog.messages == ["server failed"]


def test_pipelined_answers_are_kept_together_and_leave_in_order(serve):
    counted = iter(range(100))

    with connected(At(serve(lambda: {"n": next(counted)}))) as (conn, stream):
        conn.sendall(wire_get("/") * 20)
        found = [json.loads(answer(stream)[2])["n"] for _ in range(20)]

    assert found == list(range(20))


def test_a_large_answer_is_sent_whole(serve):
    text = "x" * (20 * 1024 * 1024)

    assert len(get(serve(lambda: {"a": text})).json()["a"]) == len(text)


def test_who_wants_to_hear_is_told_after_the_answer(serve):
    left = threading.Event()
    url = serve(lambda: {"a": 1}, on_answered=left.set)

    assert get(url).status_code == 200

    assert left.wait(5)

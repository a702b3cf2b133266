"""One POST: which address, within which time, on which connection."""

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import certifi
import pytest
import requests

from jobs import errors
from tests.receiver import Receiver
from web import outbound, transport
from web.transport import Transport


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def transport_with():
    made = []

    def make(*, public_only=False, resolve=outbound.resolve):
        made.append(Transport(ca_path=certifi.where(), public_only=public_only, resolve=resolve))
        return made[-1]

    yield make
    for one in made:
        one.close()


def post(one: Transport, url: str, *, body=b"{}", timeout=5.0) -> requests.Response:
    request = requests.PreparedRequest()
    request.method, request.url, request.body = "POST", url, body
    request.headers = {"Content-Length": str(len(body))}  # type: ignore[assignment]
    return one.send(request, timeout=timeout)


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """Give the URL of a server that answers what comes first on each connection like this."""

    def serve() -> None:
        with contextlib.suppress(OSError):  # the other side has ended
            for answer in answers:
                with server.accept()[0] as connection:
                    while connection.recv(65536):
                        connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


# Which address


@pytest.mark.parametrize(
    "answers",
    [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::1", "8.8.8.8"], ["8.8.8.8", "not an address"]],
)
def test_one_address_that_is_not_public_blocks_the_attempt(transport_with, listener, answers):
    one = transport_with(public_only=True, resolve=lambda host: answers)

    with pytest.raises(errors.ReceiverRefusedError, match=r"address of a\.example is not public"):
        post(one, f"http://a.example:{listener.getsockname()[1]}/")

    listener.settimeout(0)
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_an_address_that_was_checked_is_the_one_connected_to(transport_with, receiver):
    answers = iter([["127.0.0.1"], ["192.0.2.1"]])
    one = transport_with(resolve=lambda host: next(answers))

    answer = post(one, receiver.url.replace("127.0.0.1", "a.example"))

    assert answer.status_code == 204
    assert receiver.requests[0].headers["host"].startswith("a.example:")
    assert list(answers) == [["192.0.2.1"]]


def test_a_literal_address_is_not_looked_up(transport_with, receiver):
    one = transport_with(resolve=lambda host: pytest.fail("looked up"))

    assert post(one, receiver.url).status_code == 204


def test_the_next_address_is_tried_when_one_does_not_answer(transport_with, receiver):
    one = transport_with(resolve=lambda host: ["127.0.0.2", "127.0.0.1"])

    assert post(one, receiver.url.replace("127.0.0.1", "a.example")).status_code == 204


@pytest.mark.parametrize("answers", [["127.0.0.2"], []])
def test_no_address_that_answers_is_an_os_error(transport_with, receiver, answers):
    one = transport_with(resolve=lambda host: answers)

    with pytest.raises(OSError, match=r"refused|no address"):
        post(one, receiver.url.replace("127.0.0.1", "a.example"))


def test_a_name_server_that_hangs_is_left_behind(transport_with):
    release = threading.Event()
    one = transport_with(resolve=lambda host: release.wait(20) and [])
    began = time.monotonic()

    with pytest.raises(TimeoutError, match="not resolved"):
        post(one, "http://a.example/", timeout=0.1)

    release.set()
    assert time.monotonic() - began < 5


# Within which time


def test_the_time_of_all_waits_together_is_bounded(transport_with):
    with answering(b"HTTP/1.1 100 Continue\r\n\r\n") as url:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            post(transport_with(), url, timeout=0.3)

    assert 0.25 < time.monotonic() - began < 3


def test_what_is_written_to_one_who_does_not_read_is_bounded_too(transport_with, listener):
    with pytest.raises(TimeoutError):
        post(
            transport_with(),
            f"http://127.0.0.1:{listener.getsockname()[1]}/",
            body=bytes(32 * 1024 * 1024),
            timeout=0.3,
        )


def test_no_time_at_all_is_no_answer(transport_with, receiver):
    with pytest.raises(TimeoutError):
        post(transport_with(), receiver.url, timeout=0.0)


# On which connection


def serves_again(one: Transport, answer: bytes) -> bool:
    """Tell whether a second request uses the connection of the first."""
    with answering(answer, answer) as url:
        post(one, url)
        kept = bool(one._kept.get(outbound.parts(url).origin))
        post(one, url)
        one.close()
    return kept


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200\nContent-Length: 2\n\nok",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Made\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_a_connection_serves_again_once_its_answer_is_whole(transport_with, answer):
    assert serves_again(transport_with(), answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 0\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + bytes(5000),
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\na: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 3000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 10_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_a_connection_whose_answer_may_go_on_is_closed(transport_with, answer):
    assert not serves_again(transport_with(), answer)


def test_a_body_that_never_comes_costs_a_delivery_a_second_at_most(transport_with, monkeypatch):
    monkeypatch.setattr(transport, "MAX_BODY_SECONDS", 0.1)

    assert not serves_again(transport_with(), b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")


def test_a_kept_connection_that_was_closed_is_not_used(transport_with):
    one = transport_with()
    with Receiver() as first:
        port = first.port
        post(one, first.url)
    with Receiver(port=port) as second:
        answer = post(one, second.url)

    assert answer.status_code == 204
    assert len(second.requests) == 1


def test_a_connection_that_was_kept_long_is_not_used_again(transport_with, monkeypatch):
    monkeypatch.setattr(transport, "MAX_KEPT_SECONDS", 0.0)

    with Receiver(default=b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as receiver:
        one = transport_with()
        post(one, receiver.url)
        (kept,) = one._kept[receiver.origin]
        post(one, receiver.url)

    assert kept[1].fileno() == -1


def test_a_connection_that_fails_takes_those_beside_it_along(transport_with):
    one = transport_with()
    with Receiver() as receiver:
        together = threading.Barrier(2)
        receiver.default = lambda *_: together.wait(5) * 0 + 200
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: post(one, receiver.url), range(2)))
        receiver.default = lambda *_: None
        with pytest.raises(http.client.RemoteDisconnected):
            post(one, receiver.url)

        assert not one._kept


def test_connections_are_kept_to_the_last_few_receivers(transport_with, monkeypatch):
    monkeypatch.setattr(transport, "MAX_ORIGINS", 2)
    one = transport_with()
    with Receiver() as a, Receiver() as b, Receiver() as c:
        for receiver in (a, b, a, c):
            post(one, receiver.url)

        assert sorted(one._kept) == sorted([a.origin, c.origin])


def test_what_is_closed_during_a_request_keeps_nothing(transport_with):
    one = transport_with()
    with Receiver() as receiver:
        receiver.default = lambda *_: one.close() or 200
        post(one, receiver.url)

    assert not one._kept


# What is no HTTP


@pytest.mark.parametrize(
    "answer",
    [
        b"hello\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 20\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 101 + b"\r\n",
        b"HTTP/1.1 200 OK\r\na: " + b"b" * 70_000,
    ],
)
def test_what_is_not_http_is_told(transport_with, answer):
    with answering(answer) as url, pytest.raises(http.client.HTTPException):
        post(transport_with(), url)


def test_who_answers_before_all_is_sent_is_heard(transport_with, listener):
    def refuse() -> None:
        with listener.accept()[0] as connection:
            connection.recv(10)
            connection.sendall(b"HTTP/1.1 413 Too Large\r\n\r\n")
            connection.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=refuse)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"

    with contextlib.suppress(OSError):  # a reset may overtake the answer
        assert post(transport_with(), url, body=bytes(64 * 1024 * 1024)).status_code == 413

    thread.join(5)


def test_certificates_and_names_are_checked_whatever_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))

    context = transport.tls_context.__wrapped__(certifi.where())

    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert not context.keylog_filename


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))

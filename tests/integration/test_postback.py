"""Attempts over real sockets. Receivers misbehave as group F of the fault catalogue describes."""

import logging
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pycurl
import pytest
from standardwebhooks.webhooks import Webhook

import config
import postback
from jobs import model
from tests import receiver as script
from tests.certificates import Certificates
from tests.harness import ROOT, poll
from tests.receiver import Receiver
from web import outbound, signatures

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_" + "QUJD" * 10
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EVENT = b'{"type": "job.succeeded", "data": {"id": "job_1", "result": "\xc3\xa9"}}'
OK = b"HTTP/1.1 200 OK\r\n"
LATE = "no answer within 0.3 s"
CLOSED = "the connection was closed without an answer"
NOT_HTTP = "the answer is not proper HTTP"


#: How a test calls what a sender takes from the configuration.
SETTINGS = {
    "policy": "postback_allow",
    "secrets": "postback_secret",
    "headers": "postback_headers",
    "timeout_seconds": "postback_timeout_seconds",
    "schedule": "postback_schedule_seconds",
    "ca_path": "postback_ca_bundle",
}


def sender_to(url, *, clock=lambda: NOW, random=lambda: 0.5, own_urls=frozenset(), **changes):
    settings = {"timeout_seconds": 5.0, "schedule": [2.0] * 7, **changes}
    changed = replace(config.load(), **{SETTINGS[name]: settings[name] for name in settings})
    options = {"clock": clock, "random": random, "own_urls": own_urls}
    return postback.Sender(changed, url=url, **options)


@pytest.fixture
def sender_with(monkeypatch):
    """Make senders. `resolve` fixes addresses: host:port:a,b."""

    def make(url, *, resolve="", **changes):
        monkeypatch.setitem(outbound._OPTIONS, pycurl.RESOLVE, [resolve] if resolve else [])
        return sender_to(url, **changes)

    return make


@pytest.fixture
def sender(receiver, sender_with):
    """A sender to `receiver`."""
    return sender_with(receiver.url)


@pytest.fixture
def hasty(receiver, sender_with):
    """The same with 0.3 s for an attempt."""
    return sender_with(receiver.url, timeout_seconds=0.3)


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("tls"))


def attempt(sender, url=None, *, number=1, event=EVENT, forwarded=None):
    """Make one attempt to the configured URL, or to one that a caller named."""
    begun = begin(sender, url, number=number, event=event, forwarded=forwarded)
    return wait_for(sender, [begun])[0]


def begin(sender, url=None, *, number=1, event=EVENT, forwarded=None):
    """Begin an attempt, and return a list that it will be in."""
    made: list[model.Attempt] = []
    job = model.Job(
        id="job_1",
        state=model.State.DELIVERING,
        postback_url=url,
        receiver="",
        forwarded=forwarded or {},
        created_at=NOW,
        attempts=number - 1,
    )
    sender.attempt(job, event, made.append)
    return made


def wait_for(sender, begun):
    """Return the attempts that were begun, once all have ended."""
    while not all(begun):
        seconds = sender.transport.due_at() - time.monotonic()
        sender.transport.selector.select(min(max(seconds, 0.0), 5.0))
        sender.transport.work()
    return [made for [made] in begun]


def case(number, answer, *expected):
    return pytest.param(answer, *expected, id=number)


def status(code, **headers):
    return script.reply(code, headers={name.replace("_", "-"): headers[name] for name in headers})


# What is sent


def test_the_event_is_sent_byte_for_byte_with_the_headers_of_a_webhook(sender_with, receiver):
    sender = sender_with(receiver.url_for("/hook?q={1}"), secrets=[SECRET])

    attempt(sender, number=3)

    [request] = receiver.wait_for(1)
    assert (request.method, request.path, request.body) == ("POST", "/hook?q=%7B1%7D", EVENT)
    signature = request.headers.pop("webhook-signature")
    assert re.fullmatch(r"v1,[A-Za-z0-9+/]{43}=", signature)
    assert request.headers == {
        "host": f"127.0.0.1:{receiver.port}",
        "accept": "*/*",
        "content-type": "application/json",
        "content-length": str(len(EVENT)),
        "user-agent": f"postback/{postback.VERSION}",
        "accept-encoding": "identity",
        "webhook-id": "job_1",
        "webhook-timestamp": str(int(NOW.timestamp())),
        "webhook-attempt": "3",
        "webhook-attempt-max": "8",
    }


def test_f25_f26_each_attempt_verifies_under_each_secret_two_hours_later_too(sender_with, receiver):
    ticks = iter([datetime.now(UTC) - timedelta(hours=2), datetime.now(UTC)])
    sender = sender_with(receiver.url, secrets=[SECRET, OTHER], clock=lambda: next(ticks))

    attempt(sender, number=1)
    attempt(sender, number=2)

    first, second = receiver.wait_for(2)
    for secret in (SECRET, OTHER):
        Webhook(secret).verify(second.body, second.headers)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.headers["webhook-signature"] != second.headers["webhook-signature"]


def test_i34_a_caller_that_names_our_own_receiver_changes_no_secret(sender_with, receiver):
    with Receiver() as own:
        sender = sender_with(
            receiver.url,
            own_urls=frozenset({own.url}),
            policy=outbound.Policy.of(f"{receiver.origin} {own.origin}"),
            secrets=[SECRET],
            clock=lambda: datetime.now(UTC),
        )
        for url in (receiver.url, own.url, f"{own.origin}/of-somebody-else"):
            attempt(sender, url)

        ours, other = [*receiver.wait_for(1), own.wait_for(2)[0]], own.requests[1]
        for request in ours:
            Webhook(SECRET).verify(request.body, request.headers)
        secret = signatures.secret_for(SECRET, own.origin)
        Webhook(secret).verify(other.body, other.headers)


def test_headers_of_the_caller_and_of_the_operator_are_sent_too(sender_with, receiver):
    operator = {"Authorization": "Bearer token", "Traceparent": "00-0", "X-Empty": ""}
    sender = sender_with(receiver.url, headers=operator)

    attempt(sender, forwarded={"traceparent": "00-1-2-01", "X-Request-ID": "r"})

    headers = receiver.wait_for(1)[0].headers
    assert (headers["authorization"], headers["x-empty"]) == ("Bearer token", "")
    assert (headers["traceparent"], headers["x-request-id"]) == ("00-1-2-01", "r")


def test_f19_nothing_of_the_environment_is_used(sender_with, receiver, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    for name in ("http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("no_proxy", raising=False)

    made = attempt(sender_with(receiver.url))

    assert made.delivered
    assert "authorization" not in receiver.wait_for(1)[0].headers


def test_f18_a_cookie_is_not_sent_back(sender, receiver):
    receiver.default = status(200, Set_Cookie="a=b; Path=/")

    attempt(sender)
    attempt(sender)

    assert "cookie" not in receiver.wait_for(2)[1].headers


# What counts


@pytest.mark.parametrize("status_code", [200, 201, 202, 204, 206, 299])
def test_f08_any_2xx_is_delivered(sender, receiver, status_code):
    receiver.answers = [status_code]

    made = attempt(sender, number=2)

    assert (made.delivered, made.seconds_until_next, made.answer) == (True, None, None)
    assert (made.status_code, made.number, made.attempted_at) == (status_code, 2, NOW)
    assert 0 < made.duration_seconds < 5


@pytest.mark.parametrize(
    ("status_code", "error"),
    [
        *((400, "400 Bad Request"), (401, "401 Unauthorized"), (403, "403 Forbidden")),
        *((404, "404 Not Found"), (429, "429 Too Many Requests"), (502, "502 Bad Gateway")),
        *((500, "500 Internal Server Error"), (504, "504 Gateway Timeout")),
        *((503, "503 Service Unavailable"), (599, "599"), (999, "999")),
    ],
)
def test_f10_f13_any_other_status_is_a_failed_attempt(sender, receiver, status_code, error):
    receiver.answers = [status_code]

    made = attempt(sender)

    assert (made.error, made.status_code, made.seconds_until_next) == (error, status_code, 2.0)
    assert made.hold_seconds == 0


@pytest.mark.parametrize(
    ("status_code", "place"),
    [
        *((status_code, "/postback") for status_code in (301, 302, 303, 304, 307, 308)),
        (302, "http://169.254.169.254/latest/meta-data"),
    ],
)
def test_f07_d11_a_redirect_is_a_failure_and_not_followed(sender, receiver, status_code, place):
    receiver.answers = [status(status_code, Location=place)]

    made = attempt(sender)

    assert made.error.endswith("redirects are not followed")
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        case("F06 body drips", script.drip_body),
        case("F14 reset", script.reset_after(OK + b"Content-Length: 9\r\n\r\n")),
        case("F14 truncated", script.TRUNCATED),
        case("F14 longer than it says", script.TOO_LONG),
        case("F14 bad chunk", OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
        case("F14 204 with a body", b"HTTP/1.1 204 No Content\r\n\r\na body all the same"),
        case("F16 300 MB", script.huge_body),
        case("F16 endless", script.endless_body),
        case("F16 bomb", script.flood(OK + b"Content-Encoding: gzip\r\n\r\n\x1f", b"\0" * 9999)),
        case("F17 200 headers", OK + b"A: b\r\n" * 200 + b"\r\n"),
        case("F17 64 KiB line", OK + b"A: " + b"b" * 65536 + b"\r\n\r\n"),
        case("odd", OK + b"Content-Type: \xff; charset=\xff\r\nSet-Cookie: \xff;;=\r\n\r\n"),
        case("HTTP/1.0", b"HTTP/1.0 200 OK\r\n\r\nold"),
        case("after 100", b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"\r\n"),
        case("after 103", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK + b"\r\n"),
        case("abort-message", status(200, Webhook_Delivery="abort-message")),
    ],
)
def test_a_2xx_header_is_a_receipt_whatever_the_body_does(hasty, receiver, answer):
    receiver.answers = [answer]
    before_kib = resident_kib()

    made = attempt(hasty)

    assert (made.delivered, made.status_code // 100) == (True, 2)
    assert made.duration_seconds < 0.5
    assert resident_kib() - before_kib < 5 * 1024


def resident_kib():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        case("F05 F22 hangs", script.hang, LATE),
        case("F06 drips the status line", script.drip(b"HTTP/1.1 200 O", b"K"), LATE),
        case("F06 drips 100 Continue", script.drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), LATE),
        case("F06 drips headers", script.drip_headers, LATE),
        case("F06 drips one header", script.drip(OK + b"X: ", b"y"), LATE),
        case("F09 100 only", b"HTTP/1.1 100 Continue\r\n\r\n", CLOSED),
        case("F09 flood of 100", script.continue_flood, "the connection failed: .*"),
        case("F09 0 bytes", b"", CLOSED),
        case("F09 garbage", script.GARBAGE, NOT_HTTP),
        case("F09 HTTP/0.9", script.HTTP_09, NOT_HTTP),
        case("F09 short status", b"HTTP/1.1 20 OK\r\n\r\n", NOT_HTTP),
        case("F09 cut header", OK + b"A: b\r\n", "the connection was closed within the header .*"),
        case("F15 closed", script.close, CLOSED),
        case("F15 reset", script.reset, "the connection failed: Connection reset by peer"),
        case("F17 400 KiB line", OK + b"A: " + b"b" * 409600 + b"\r\n\r\n", NOT_HTTP),
        case("F17 200,000 headers", OK + b"A: b\r\n" * 200_000 + b"\r\n", NOT_HTTP),
        case("private words", b"HTTP/1.1 500 private\r\nprivate\r\n\r\nprivate", NOT_HTTP),
    ],
)
def test_without_a_whole_header_it_is_a_failed_attempt(hasty, receiver, caplog, answer, error):
    caplog.set_level(logging.DEBUG)
    receiver.answers = [answer]

    made = attempt(hasty)

    assert re.fullmatch(error, made.error)
    assert (made.status_code, made.seconds_until_next, made.answer) == (None, 2.0, None)
    assert made.duration_seconds == pytest.approx(0.3, abs=0.1) or made.error != LATE
    assert made.duration_seconds < 0.5
    assert caplog.records == []


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        case("text", "naïve ☃".encode(), "naïve ☃"),
        case("not text", b"\xff\x00x", "\ufffd\x00x"),
        case("nothing", b"", None),
        case("long", b"x" * 100_000, "x" * 512),
        case("cut within a character", "☃".encode() * 2000, "☃" * 512),
    ],
)
def test_the_start_of_a_failed_answer_is_kept_for_the_operator(sender, receiver, body, answer):
    receiver.answers = [script.reply(500, body), script.reply(410, body), script.reply(200, body)]

    assert [attempt(sender).answer for _ in range(3)] == [answer, answer, None]


# In time


def test_f02_a_name_that_does_not_exist_is_a_failed_attempt(sender_with):
    # libcurl never looks up names that end in .onion.
    made = attempt(sender_with("http://no.onion/?key=private"))

    assert made.error == "the host name could not be resolved"


def test_f03_a_connect_that_hangs_ends_in_time(sender_with):
    with script.silent_port("127.0.0.1") as port:
        made = attempt(sender_with(f"http://127.0.0.1:{port}/", timeout_seconds=0.3))

    assert made.error == LATE
    assert made.duration_seconds == pytest.approx(0.3, abs=0.1)


def test_f06_a_receiver_that_does_not_read_is_left_in_time(sender_with):
    released = threading.Event()
    with Receiver(greeting=lambda conn: released.wait(5)) as receiver:
        made = attempt(sender_with(receiver.url, timeout_seconds=0.3), event=bytes(20_000_000))
        released.set()

    assert made.error == LATE
    assert made.duration_seconds == pytest.approx(0.3, abs=0.15)


def test_receivers_that_send_without_end_do_not_hold_up_another(sender_with, receiver):
    all_came = threading.Event()

    def endless(conn, request):
        all_came.wait(30)
        script.flood(OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x" * 9999)(conn, request)

    with Receiver() as flooding:
        flooding.default = endless
        policy = outbound.Policy.of(flooding.origin)
        sender = sender_with(receiver.url, policy=policy, timeout_seconds=30.0)
        floods = [begin(sender, flooding.url) for _ in range(70)]
        while len(flooding.requests) < 70:
            sender.transport.work()
        all_came.set()

        assert attempt(sender).delivered
        assert not any(floods)


HANGING_NAMES = """
import fcntl, socket, struct, time
import tests.integration.test_postback as test
from tests.receiver import Receiver

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent, Receiver() as receiver:
    fcntl.ioctl(silent, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS: up
    silent.bind(("127.0.0.1", 53))
    origins = [f"http://slow{number}.example" for number in range(60)]
    policy = test.outbound.Policy.of(" ".join([*origins, f"http://fast.example:{receiver.port}"]))
    sender = test.sender_to("http://a/", policy=policy, timeout_seconds=0.3)
    slow = [test.begin(sender, f"http://slow{number}.example/") for number in range(60)]
    fast = test.attempt(sender, f"http://fast.example:{receiver.port}/")
    slow = test.wait_for(sender, slow)
    test.outbound.MAX_IDLE_SECONDS = 0
    began = time.monotonic()
    sender.transport.work()
    is_quick = max(fast.duration_seconds, time.monotonic() - began) < 0.25
    print({one.error for one in slow}, fast.error, is_quick)
"""


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.call(["unshare", "-rmn", "true"]) != 0,
    reason="needs namespaces of users, mounts and networks",
)
def test_f02_names_whose_look_up_hangs_hold_up_no_receiver_that_is_known(tmp_path):
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost fast.example\n")
    mounts = "".join(f"mount --bind {one} /etc/{one.name}; " for one in tmp_path.iterdir())
    command = ["unshare", "-rmn", "sh", "-ec", f'{mounts} exec "$@"', "sh"]

    run = subprocess.run(
        [*command, sys.executable, "-c", HANGING_NAMES],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )

    assert (run.stdout, run.stderr) == (f"{{'{LATE}'}} None True\n", "")


# Connections


@pytest.mark.parametrize("address", ["127.0.0.2", "::1"])
def test_i18_a_silent_first_address_costs_less_than_a_second(sender_with, receiver, address):
    with script.silent_port(address, receiver.port):
        shown = f"[{address}]" if ":" in address else address
        made = attempt(
            sender_with(
                f"http://two.example:{receiver.port}/",
                resolve=f"two.example:{receiver.port}:{shown},127.0.0.1",
            )
        )

    assert made.delivered
    assert made.duration_seconds < 1


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (204, [1, 1]),
        (500, [1, 1]),
        (script.reply(200, b"x" * 4000), [1, 1]),
        (script.reply(200, b"x" * 5000), [1, 2]),  # more than is read
        (script.TRUNCATED, [1, 2]),
    ],
)
def test_a_connection_is_kept_unless_something_is_left_on_it(sender, receiver, answer, connections):
    receiver.answers = [answer, 204]

    made = [attempt(sender) for _ in range(2)]

    assert made[1].delivered
    assert [request.connection for request in receiver.wait_for(2)] == connections


def test_i19_f20_a_kept_connection_that_was_closed_costs_no_attempt(sender, receiver):
    closed = threading.Event()

    def answer_and_close(conn, request):
        conn.sendall(OK + b"Content-Length: 0\r\n\r\n")
        conn.shutdown(socket.SHUT_RDWR)
        closed.set()

    receiver.answers = [answer_and_close]
    attempt(sender)
    assert closed.wait(5)

    assert attempt(sender).delivered


def test_i19_a_connection_that_is_closed_at_the_next_request_costs_no_attempt(sender, receiver):
    receiver.answers = [200, script.close, 200]

    made = [attempt(sender).delivered for _ in range(2)]

    assert made == [True, True]
    assert [request.connection for request in receiver.wait_for(3)] == [1, 1, 2]


@pytest.mark.parametrize("left", [b"ok", b"HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\n"])
def test_what_lies_on_a_kept_connection_is_no_answer(sender, receiver, left):
    sent = threading.Event()

    def answer_and_more(conn, request):
        conn.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        sent.wait(5)
        conn.sendall(left)
        sent.clear()

    receiver.answers = [answer_and_more]
    assert attempt(sender).delivered
    sent.set()
    poll(lambda: not sent.is_set(), "more than an answer")

    assert attempt(sender).delivered
    assert receiver.wait_for(2)[-1].connection == 2


def test_i19_what_receivers_have_closed_does_not_stay_half_open(sender, receiver, monkeypatch):
    receiver.default = lambda conn, request: OK + b"Content-Length: 0\r\n\r\n"

    wait_for(sender, [begin(sender) for _ in range(20)])

    assert half_open(receiver.port) > 0
    monkeypatch.setattr(outbound, "MAX_IDLE_SECONDS", 0)
    sender.transport.work()
    poll(lambda: half_open(receiver.port) == 0, "closing")


def half_open(port):
    """Count our connections to a port in the state CLOSE_WAIT."""
    lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    return sum(
        line.split()[2].endswith(f":{port:04X}") and line.split()[3] == "08" for line in lines
    )


# Where to


def test_a_url_that_is_not_listed_is_refused(sender, receiver):
    made = attempt(sender, receiver.url)

    assert made.error.startswith(f"refused: postback_url: {receiver.origin} is not listed")
    assert (made.seconds_until_next, made.status_code, receiver.connections) == (2.0, None, 0)


@pytest.mark.parametrize(
    "addresses",
    [
        case("D08", "127.0.0.1"),
        case("D08 metadata", "169.254.169.254"),
        case("D09", "8.8.8.8,127.0.0.1"),
        case("D09 other order", "127.0.0.1,8.8.8.8"),
        case("D09 two families", "[2606:4700::1111],127.0.0.1"),
        case("D09 private IPv6", "8.8.8.8,[::1]"),
    ],
)
def test_a_name_with_an_address_that_is_not_public_is_blocked(sender_with, receiver, addresses):
    host = f"evil.example:{receiver.port}"
    sender = sender_with("http://a", policy=outbound.Policy.of("*"), resolve=f"{host}:{addresses}")

    made = attempt(sender, f"https://{host}/?key=private")

    assert made.error == "refused: The address of the host is not public."
    assert (made.delivered, made.seconds_until_next, receiver.connections) == (False, 2.0, 0)


def test_d10_an_address_that_becomes_private_after_it_was_checked_is_not_connected_to(receiver):
    request = outbound._Request(lambda _: None, 1.0)
    request.asked, request.approved = {"8.8.8.8"}, {"8.8.8.8"}
    address = type("Address", (), {"addr": ("127.0.0.1", receiver.port)})

    assert request.open_socket(0, address) == -1
    assert not all(map(outbound.is_public, request.asked))


@pytest.fixture
def public_localhost(monkeypatch, tls):
    """A receiver whose address counts as a public one."""
    monkeypatch.setattr(outbound, "is_public", lambda address: address == "127.0.0.1")
    with Receiver(tls=tls.server("localhost")) as one:
        yield one


@pytest.mark.parametrize(
    ("addresses", "connections"), [("127.0.0.1", [1, 1]), ("127.0.0.1,10.0.0.1", [])]
)
def test_d09_a_public_address_is_connected_to_only_if_the_others_are_public(
    sender_with, tls, public_localhost, addresses, connections
):
    sender = sender_with(
        "http://a",
        policy=outbound.Policy.of("*"),
        ca_path=tls.ca,
        resolve=f"localhost:{public_localhost.port}:{addresses}",
    )

    made = [attempt(sender, public_localhost.url).delivered for _ in range(2)]

    assert made == [bool(connections)] * 2
    assert [request.connection for request in public_localhost.requests] == connections
    assert public_localhost.connections == len(set(connections))


def test_a_url_that_only_the_star_allows_gets_no_secret(sender_with, tls, public_localhost):
    public_localhost.answers = [script.reply(500, b"private", headers={"Retry-After": "60"})]
    sender = sender_with(
        "http://a",
        policy=outbound.Policy.of("*"),
        ca_path=tls.ca,
        headers={"Authorization": "Bearer token"},
        resolve=f"localhost:{public_localhost.port}:127.0.0.1",
    )

    made = attempt(sender, public_localhost.url)

    assert (made.status_code, made.answer, made.seconds_until_next) == (500, None, 60.0)
    [request] = public_localhost.requests
    assert "authorization" not in request.headers
    assert request.headers["webhook-id"] == "job_1"


def test_a_trusted_connection_never_serves_a_url_that_only_the_star_allows(sender_with, tls):
    with Receiver(tls=tls.server("localhost")) as receiver:
        sender = sender_with(receiver.url, policy=outbound.Policy.of("*"), ca_path=tls.ca)
        made = [attempt(sender), attempt(sender, receiver.url)]

    assert [one.error for one in made] == [None, "refused: The address of the host is not public."]
    assert len(receiver.requests) == 1


# TLS


def test_i20_f06_a_private_authority_is_trusted_and_the_connection_kept(sender_with, tls):
    with Receiver([204, script.drip_headers], tls=tls.server("localhost")) as receiver:
        sender = sender_with(receiver.url, ca_path=tls.ca, timeout_seconds=0.3)
        made = [attempt(sender) for _ in range(2)]

    assert [one.error for one in made] == [None, LATE]
    assert [request.connection for request in receiver.requests] == [1, 1]
    assert made[1].duration_seconds == pytest.approx(0.3, abs=0.1)


def old_tls(tls):
    context = tls.server("localhost")
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
    return context


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1 is deprecated")
@pytest.mark.parametrize(
    ("context", "error"),
    [
        case("F04 old", lambda tls: tls.server("localhost", until="20210101000000Z"), "expired"),
        case("F04 self-signed", lambda tls: tls.self_signed("localhost"), "self-signed"),
        case("F04 wrong name", lambda tls: tls.server("other.example"), "localhost"),
        case("F04 TLS 1.0", old_tls, "version"),
    ],
)
def test_a_bad_certificate_is_a_failed_attempt(sender_with, tls, context, error):
    with Receiver(tls=context(tls)) as receiver:
        made = attempt(sender_with(receiver.url_for("/?key=private"), ca_path=tls.ca))

    assert made.error.startswith("TLS failed: ")
    assert error in made.error
    assert "private" not in made.error
    assert receiver.requests == []


def test_f19_the_environment_adds_no_authority(sender_with, tls, monkeypatch):
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, tls.ca)

    with Receiver(tls=tls.server("localhost")) as receiver:
        made = attempt(sender_with(receiver.url))

    assert made.error.startswith("TLS failed: ")


@pytest.mark.parametrize(
    ("greeting", "error"),
    [
        case("F04 plain http", lambda conn: conn.sendall(OK + b"\r\n"), "TLS failed: .*"),
        case("F04 waits for http", None, "TLS failed: .*|the connection failed: .*|" + LATE),
        case("F04 hangs", script.hang, LATE),
        case("F04 drips", script.drip(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc", b"\x00"), LATE),
    ],
)
def test_what_is_not_tls_is_a_failed_attempt(sender_with, greeting, error):
    with Receiver(greeting=greeting) as receiver:
        sender = sender_with(f"https://localhost:{receiver.port}/", timeout_seconds=0.3)
        made = attempt(sender)

    assert re.fullmatch(error, made.error)
    assert made.duration_seconds < 0.5
    assert receiver.requests == []


# When to try again


@pytest.mark.parametrize(
    ("number", "chance", "expected"),
    [(1, 0.5, 2.0), (1, 0.0, 1.6), (1, 1.0, 2.4), (2, 0.5, 10.0), (3, 0.0, 48.0)],
)
def test_the_wait_is_that_of_the_schedule_give_or_take_a_fifth(receiver, number, chance, expected):
    receiver.answers = [500]
    sender = sender_to(receiver.url, schedule=[2.0, 10.0, 60.0], random=lambda: chance)

    assert attempt(sender, number=number).seconds_until_next == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("1", 1), ("3600", 3600), ("1000000000", 3600)),
        *(("0", 0), ("-5", 0), ("abc", 0), ("", 0), ("\xb2", 0), ("9" * 5000, 0)),
        *(("1.5", 1), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Fri, 99 Jan 2026 03:04:35 GMT", 0)),
    ],
)
def test_f12_retry_after_is_obeyed_up_to_an_hour(sender, receiver, text, expected):
    receiver.answers = [status(code, Retry_After=text) for code in (429, 503, 500, 200)]

    made = [attempt(sender) for _ in range(4)]

    for one in made[:3]:
        assert one.seconds_until_next == pytest.approx(max(2.0, expected), abs=30)
    held = [one.hold_seconds for one in made]
    assert held == pytest.approx([expected, expected, 0, 0], abs=30)
    assert made[3].seconds_until_next is None


@pytest.mark.parametrize(("seconds", "expected"), [(90, 90), (90 * 86400, 3600)])
def test_f12_retry_after_may_be_a_date(sender, receiver, seconds, expected):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
    receiver.answers = [status(503, Retry_After=date)]

    assert attempt(sender).hold_seconds == pytest.approx(expected, abs=10)


def test_a_trailer_is_no_header(sender, receiver):
    trailer = b"0\r\nwebhook-delivery: abort-message\r\n\r\n"
    receiver.answers = [b"HTTP/1.1 500 x\r\nTransfer-Encoding: chunked\r\n\r\n" + trailer]

    assert attempt(sender).seconds_until_next


def test_an_error_that_nobody_expected_is_a_failed_attempt(sender):
    made = attempt(sender, forwarded={"X-A": "\u20ac"})

    assert made.error == "UnicodeEncodeError"

import logging
import re
import socket
import ssl
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook

import postback
from jobs import model
from tests import receiver as script
from tests.certificates import Certificates
from tests.receiver import Receiver
from web import outbound

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_" + "QUJD" * 10
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EVENT = b'{"type": "job.succeeded", "data": {"id": "job_1", "result": "\xc3\xa9"}}'
NONE = outbound.Policy.of("")
ANY = outbound.Policy.of("*")


@pytest.fixture
def receiver():
    with Receiver() as one:
        yield one


@pytest.fixture
def sender_with():
    """Make senders that are closed, and whose watchdog ends, with the test."""
    senders = []

    def make(**changes):
        options = {
            "url": "http://127.0.0.1:9/",
            "policy": NONE,
            "secrets": [],
            "headers": {},
            "timeout_seconds": 5.0,
            "schedule": [2.0] * 7,
            "clock": lambda: NOW,
            "random": lambda: 0.5,
        }
        senders.append(postback.Sender(**{**options, **changes}))
        return senders[-1]

    yield make
    for one in senders:
        one.close()
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def sender(sender_with):
    return sender_with()


def attempt(sender, url, *, trusted=True, number=1, event=EVENT, forwarded=None, job_id="job_1"):
    """Make one attempt to the configured URL, or, not trusted, to one that a caller named."""
    sender._url = url
    job = model.new_job(postback_url=None if trusted else url, receiver="", forwarded={})
    facts = {"id": job_id, "attempts": number - 1, "forwarded": forwarded or {}}
    return sender.attempt(job._replace(**facts), event)


# What is sent


def test_the_event_is_sent_byte_for_byte_with_the_headers_of_a_webhook(sender_with, receiver):
    sender = sender_with(secrets=[SECRET])

    attempt(sender, receiver.url_for("/hook?q=1"), number=3)

    [request] = receiver.wait_for(1)
    assert (request.method, request.path, request.body) == ("POST", "/hook?q=1", EVENT)
    signature = request.headers.pop("webhook-signature")
    assert re.fullmatch(r"v1,[A-Za-z0-9+/]{43}=", signature)
    assert request.headers == {
        "host": f"127.0.0.1:{receiver.port}",
        "content-type": "application/json",
        "content-length": str(len(EVENT)),
        "user-agent": f"postback/{postback.VERSION}",
        "accept-encoding": "identity",
        "webhook-id": "job_1",
        "webhook-timestamp": str(int(NOW.timestamp())),
        "webhook-attempt": "3",
        "webhook-attempt-max": "8",
    }


def test_without_a_secret_nothing_is_signed(sender, receiver):
    attempt(sender, receiver.url)

    assert "webhook-signature" not in receiver.wait_for(1)[0].headers


def test_the_reference_library_verifies_each_attempt_with_each_secret(sender_with, receiver):
    start = datetime.now(UTC)
    ticks = iter([start, start + timedelta(seconds=2)])
    sender = sender_with(secrets=[SECRET, OTHER], clock=lambda: next(ticks))

    attempt(sender, receiver.url, number=1)
    attempt(sender, receiver.url, number=2)

    first, second = receiver.wait_for(2)
    for secret in (SECRET, OTHER):
        Webhook(secret).verify(first.body, first.headers)
        Webhook(secret).verify(second.body, second.headers)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.headers["webhook-timestamp"] != second.headers["webhook-timestamp"]


def test_headers_of_the_caller_and_of_the_operator_travel_along(sender_with, receiver):
    sender = sender_with(headers={"Authorization": "Bearer token", "X-Team": "a"})

    attempt(sender, receiver.url, forwarded={"traceparent": "00-1-2-01", "X-Request-ID": "r"})

    headers = receiver.wait_for(1)[0].headers
    assert (headers["authorization"], headers["x-team"]) == ("Bearer token", "a")
    assert (headers["traceparent"], headers["x-request-id"]) == ("00-1-2-01", "r")


def test_headers_of_the_operator_do_not_go_to_what_a_caller_chose_among_all(sender_with):
    sender = sender_with(headers={"Authorization": "Bearer token"}, policy=outbound.Policy.of("*"))
    job = model.new_job(postback_url="https://a.example/", receiver="a", forwarded={})
    sent = []
    sender._transports[True].send = lambda request, **_: sent.append(request.headers)

    sender.attempt(job, EVENT)

    assert "Authorization" not in sent[0]
    assert sent[0]["webhook-id"] == job.id


@pytest.mark.parametrize("name", ["Webhook-Id", "content-type", "Content-Length", "User-Agent"])
def test_our_headers_win_over_those_of_the_caller_and_the_operator(sender_with, receiver, name):
    sender = sender_with(headers={name: "9999"})

    attempt(sender, receiver.url, forwarded={name: "9999"})

    [request] = receiver.wait_for(1)
    assert (request.body, "9999" in request.headers.values()) == (EVENT, False)


def test_an_empty_event_is_sent_with_its_length(sender, receiver):
    attempt(sender, receiver.url, event=b"")

    assert receiver.wait_for(1)[0].headers["content-length"] == "0"


def test_nothing_of_the_environment_is_used(sender, receiver, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)

    made = attempt(sender, receiver.url)

    assert made.delivered
    assert "authorization" not in receiver.wait_for(1)[0].headers


def test_a_cookie_is_not_sent_back(sender, receiver):
    receiver.default = script.reply(200, headers={"Set-Cookie": "a=b; Path=/"})

    attempt(sender, receiver.url)
    attempt(sender, receiver.url)

    assert "cookie" not in receiver.wait_for(2)[1].headers


# What counts


@pytest.mark.parametrize("status_code", [200, 201, 202, 204, 206, 299])
def test_any_2xx_is_delivered(sender, receiver, status_code):
    receiver.answers = [status_code]

    made = attempt(sender, receiver.url, number=2)

    assert (made.delivered, made.seconds_until_next, made.error) == (True, None, None)
    assert (made.status_code, made.number, made.attempted_at) == (status_code, 2, NOW)
    assert 0 < made.duration_seconds < 5


@pytest.mark.parametrize(
    ("status_code", "error"),
    [
        (304, "304 Not Modified: redirects are not followed"),
        (400, "400 Bad Request"),
        (401, "401 Unauthorized"),
        (403, "403 Forbidden"),
        (404, "404 Not Found"),
        (422, "422 Unprocessable Entity"),
        (429, "429 Too Many Requests"),
        (500, "500 Internal Server Error"),
        (502, "502 Bad Gateway"),
        (503, "503 Service Unavailable"),
        (504, "504 Gateway Timeout"),
        (599, "599"),
        (999, "999"),
    ],
)
def test_any_other_status_is_a_failed_attempt_that_may_be_repeated(
    sender, receiver, status_code, error
):
    receiver.answers = [status_code]

    made = attempt(sender, receiver.url)

    # 3.13 has another phrase for 422.
    assert made.error.replace("Content", "Entity") == error
    assert (made.delivered, made.seconds_until_next, made.status_code) == (False, 2.0, status_code)


@pytest.mark.parametrize("status_code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["/postback", "http://169.254.169.254/latest/meta-data"])
def test_a_redirect_is_a_failure_and_not_followed(sender, receiver, status_code, place):
    receiver.answers = [script.reply(status_code, headers={"Location": place})]

    made = attempt(sender, receiver.url)

    assert made.error.endswith("redirects are not followed")
    assert len(receiver.requests) == 1


def test_gone_is_final(sender, receiver):
    receiver.answers = [410]

    made = attempt(sender, receiver.url)

    assert (made.delivered, made.seconds_until_next, made.error) == (False, None, "410 Gone")


@pytest.mark.parametrize(("status_code", "delivered"), [(500, False), (200, True)])
def test_an_answer_may_ask_for_no_further_attempt(sender, receiver, status_code, delivered):
    receiver.answers = [script.reply(status_code, headers={"Webhook-Delivery": "abort-message"})]

    made = attempt(sender, receiver.url)

    assert (made.seconds_until_next, made.delivered) == (None, delivered)


@pytest.mark.parametrize(
    "answer",
    [
        script.TRUNCATED,
        script.TOO_LONG,
        b"HTTP/1.1 204 No Content\r\n\r\na body all the same",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=\xff\r\nSet-Cookie: \xff;;=\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nold",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        script.reset_after(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"),
        script.huge_body,
        script.endless_body,
        script.flood(
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 9999999\r\n\r\n\x1f\x8b",
            b"\0" * 9999,
        ),
    ],
    ids=[
        "truncated",
        "too-long",
        "204-with-a-body",
        "odd-length",
        "bad-chunk",
        "odd-headers",
        "http-1.0",
        "after-100",
        "reset",
        "huge",
        "endless",
        "gzip",
    ],
)
def test_after_a_2xx_header_the_body_does_not_matter(sender, receiver, answer):
    receiver.answers = [answer]
    tracemalloc.start()

    made = attempt(sender, receiver.url)

    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.delivered
    assert made.duration_seconds < 1
    assert peak_bytes < 3_000_000


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "connection closed without an answer"),
        (script.close, "connection closed without an answer"),
        (script.reset, "Connection reset by peer"),
        (script.GARBAGE, "the answer is not proper HTTP"),
        (script.HTTP_09, "the answer is not proper HTTP"),
        (b"HTTP/1.1 2", "the answer is not proper HTTP"),
        (b"HTTP/1.1 20 OK\r\n\r\n", "the answer is not proper HTTP"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "connection closed without an answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "the answer is not proper HTTP"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 65536 + b"\r\n\r\n", "the answer is not proper HTTP"),
    ],
    ids=[
        "empty",
        "closed",
        "reset",
        "garbage",
        "http-0.9",
        "cut-status",
        "short-status",
        "only-100",
        "200-headers",
        "long-header",
    ],
)
def test_what_is_not_an_answer_is_a_failed_attempt(sender, receiver, answer, error):
    receiver.answers = [answer]

    made = attempt(sender, receiver.url)

    assert (made.delivered, made.seconds_until_next, made.status_code) == (False, 2.0, None)
    assert made.error == error


def test_a_refused_connection_is_a_failed_attempt_until_the_receiver_comes_up(sender):
    with Receiver() as first:
        port, url = first.port, first.url
    refused = attempt(sender, url)

    with Receiver(port=port) as second:
        delivered = attempt(sender, second.url)

    assert (refused.error, refused.status_code) == ("Connection refused", None)
    assert delivered.delivered


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"url": "http://" + "a" * 64 + ".example/"},
            "refused: .*",
        ),
        ({"url": "nonsense"}, "refused: .*"),
        ({"forwarded": {"X-A": "a\r\nb"}}, "ValueError"),
        ({"forwarded": {"X-A": "\u20ac"}}, "UnicodeEncodeError"),
    ],
)
def test_what_the_libraries_refuse_is_a_failed_attempt(sender, receiver, changes, error):
    made = attempt(sender, **{"url": receiver.url, **changes})

    assert re.fullmatch(error, made.error)
    assert receiver.requests == []


def test_the_answer_and_the_query_are_told_to_nobody(sender, receiver, caplog):
    caplog.set_level(logging.DEBUG)
    body = b"HTTP/1.1 500 private phrase\r\nbad header\r\n\r\nprivate body"
    receiver.answers = [body, b"private garbage\r\n\r\n"]

    made = [attempt(sender, receiver.url_for("/?key=private")) for _ in range(2)]

    assert "private" not in caplog.text + str(made)


# In time


def test_a_flood_of_interim_answers_ends_the_attempt(sender_with, receiver):
    receiver.answers = [script.continue_flood]

    made = attempt(sender_with(timeout_seconds=10), receiver.url)

    assert (made.delivered, made.error) == (False, "the answer is not proper HTTP")
    assert made.duration_seconds < 10


@pytest.mark.parametrize(
    "answer",
    [
        script.hang,
        script.drip_headers,
        script.drip(b"", b"H"),
        script.drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        script.drip(b"HTTP/1.1 200 OK\r\nX: ", b"y"),
    ],
    ids=["hang", "headers", "status-line", "continue", "header"],
)
def test_an_attempt_ends_at_its_deadline_whatever_the_receiver_drips(sender_with, receiver, answer):
    sender = sender_with(timeout_seconds=0.3)
    receiver.answers = [answer]

    made = attempt(sender, receiver.url)

    assert made.duration_seconds == pytest.approx(0.3, abs=0.1)
    assert (made.delivered, made.status_code) == (False, None)
    assert made.error == "no answer within 0.3 s"


def test_a_dripping_body_ends_at_the_deadline_too_and_is_delivered(sender_with, receiver):
    sender = sender_with(timeout_seconds=0.3)
    receiver.answers = [script.drip_body]

    made = attempt(sender, receiver.url)

    assert made.duration_seconds == pytest.approx(0.3, abs=0.1)
    assert (made.delivered, made.status_code) == (True, 200)


def test_a_receiver_that_does_not_read_is_left_at_the_deadline(sender_with):
    with Receiver(greeting=lambda conn: released.wait(5)) as receiver:
        released = threading.Event()
        sender = sender_with(timeout_seconds=0.3)

        made = attempt(sender, receiver.url, event=b"x" * 20_000_000)

        released.set()
    assert made.duration_seconds == pytest.approx(0.3, abs=0.15)
    assert made.error == "no answer within 0.3 s"


def test_a_connection_that_is_used_again_has_the_same_deadline(sender_with, receiver):
    sender = sender_with(timeout_seconds=0.3)
    receiver.answers = [200, script.drip_headers]

    first, second = attempt(sender, receiver.url), attempt(sender, receiver.url)

    assert [request.connection for request in receiver.wait_for(2)] == [1, 1]
    assert (first.delivered, second.error) == (True, "no answer within 0.3 s")
    assert second.duration_seconds == pytest.approx(0.3, abs=0.1)


def test_many_attempts_end_each_at_its_own_deadline(sender_with, receiver):
    sender = sender_with(timeout_seconds=0.5)
    receiver.default = script.hang

    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(lambda _: attempt(sender, receiver.url), range(20)))

    assert [one.duration_seconds for one in made] == pytest.approx([0.5] * 20, abs=0.2)


def test_an_answer_just_before_the_deadline_is_delivered_and_just_after_is_not(
    sender_with, receiver
):
    sender = sender_with(timeout_seconds=0.4)
    receiver.answers = [_late(0.3), _late(0.5)]

    before, after = attempt(sender, receiver.url), attempt(sender, receiver.url)

    assert (before.delivered, after.delivered) == (True, False)


def _late(seconds):
    def behave(conn, request):
        threading.Event().wait(seconds)
        return 204

    return behave


def test_a_name_server_that_hangs_does_not_hold_the_attempt(sender_with):
    released = threading.Event()
    sender = sender_with(timeout_seconds=0.2, resolve=lambda host: released.wait(5) and [])

    made = attempt(sender, "http://slow.example/")

    released.set()
    assert made.duration_seconds == pytest.approx(0.2, abs=0.1)
    assert made.error == "no answer within 0.2 s"


def test_a_name_that_does_not_exist_is_a_failed_attempt(sender_with):
    def resolve(host):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    made = attempt(sender_with(resolve=resolve), "http://none.example/")

    assert (made.error, made.status_code) == ("Name or service not known", None)


def test_a_connect_that_hangs_ends_at_the_deadline(sender_with):
    with socket.socket() as full, socket.socket() as filler:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        filler.connect(full.getsockname())

        made = attempt(
            sender_with(timeout_seconds=0.3), f"http://127.0.0.1:{full.getsockname()[1]}/"
        )

    assert made.duration_seconds == pytest.approx(0.3, abs=0.1)
    assert made.error == "no answer within 0.3 s"


# Connections


def test_a_connection_is_kept_for_the_next_attempt(sender, receiver):
    receiver.answers = [204, 200, script.reply(200, b"x" * 4096), 202]

    made = [attempt(sender, receiver.url) for _ in range(4)]

    assert all(one.delivered for one in made)
    assert {request.connection for request in receiver.wait_for(4)} == {1}


@pytest.mark.parametrize(
    "answer",
    [script.reply(200, b"x" * 5000), script.reply(500, b"x"), script.TRUNCATED],
    ids=["long", "failed", "truncated"],
)
def test_a_connection_with_something_left_on_it_is_not_used_again(sender, receiver, answer):
    receiver.answers = [answer, 204]

    attempt(sender, receiver.url)
    made = attempt(sender, receiver.url)

    assert made.delivered
    assert [request.connection for request in receiver.wait_for(2)] == [1, 2]


def test_a_kept_connection_that_the_receiver_has_closed_is_noticed(sender, receiver):
    closed = threading.Event()

    def answer_and_close(conn, request):
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        conn.shutdown(socket.SHUT_RDWR)
        closed.set()

    receiver.answers = [answer_and_close]
    attempt(sender, receiver.url)
    assert closed.wait(5)

    assert attempt(sender, receiver.url).delivered


def test_256_attempts_at_once_are_made_in_silence(sender, receiver, caplog):
    caplog.set_level(logging.DEBUG)

    with ThreadPoolExecutor(256) as pool:
        made = list(pool.map(lambda _: attempt(sender, receiver.url), range(256)))

    assert all(one.delivered for one in made)
    assert caplog.records == []


def test_a_closed_sender_leaves_no_descriptor_and_fails_further_attempts(sender_with):
    before = _descriptors()
    sender = sender_with(timeout_seconds=0.2)
    with Receiver([204, script.hang, script.reset, 500, script.drip_headers]) as receiver:
        made = [attempt(sender, receiver.url) for _ in range(6)]

        sender.close()
        refused = attempt(sender, receiver.url)

    assert [one.delivered for one in made] == [True, False, False, False, False, True]
    assert (refused.delivered, refused.error) == (False, "RuntimeError")
    assert _descriptors() == before


# Where to


def test_a_url_of_a_caller_is_refused_when_it_is_not_listed(sender, receiver):
    made = attempt(sender, receiver.url, trusted=False)

    assert (made.delivered, made.seconds_until_next, made.status_code) == (False, 2.0, None)
    assert made.error.startswith("refused: ")
    assert "POSTBACK_ALLOW" in made.error
    assert receiver.connections == 0


def test_a_listed_origin_may_be_private(sender_with, receiver):
    sender = sender_with(policy=outbound.Policy.of(receiver.origin))

    assert attempt(sender, receiver.url, trusted=False).delivered


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["169.254.169.254"]]
)
def test_a_name_behind_which_an_address_is_private_is_blocked(sender_with, receiver, addresses):
    sender = sender_with(policy=ANY, resolve=lambda host: addresses)

    made = attempt(sender, f"https://evil.example:{receiver.port}/?key=private", trusted=False)

    assert made.error == "refused: the address of evil.example is not public"
    assert (made.delivered, made.seconds_until_next, receiver.connections) == (False, 2.0, 0)


def test_a_name_that_changes_its_address_is_looked_up_once_an_attempt(sender_with, receiver):
    answers = iter([["127.0.0.1"], ["127.0.0.1"]])
    sender = sender_with(policy=ANY, resolve=lambda host: next(answers))

    attempt(sender, f"https://evil.example:{receiver.port}/", trusted=False)

    assert (list(answers), receiver.connections) == ([["127.0.0.1"]], 0)


def test_a_trusted_connection_never_serves_an_attempt_that_must_be_public(sender_with, tls):
    sender = sender_with(policy=ANY, ca_bundle=tls.ca)
    with Receiver(tls=tls.server("localhost")) as receiver:
        kept = attempt(sender, receiver.url)

        refused = attempt(sender, receiver.url, trusted=False)

    assert (kept.delivered, refused.error) == (
        True,
        "refused: the address of localhost is not public",
    )
    assert len(receiver.requests) == 1


# TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("tls"))


def test_a_certificate_of_the_configured_authority_is_accepted_and_the_connection_kept(
    sender_with, tls
):
    sender = sender_with(ca_bundle=tls.ca)
    with Receiver(tls=tls.server("localhost")) as receiver:
        made = [attempt(sender, receiver.url) for _ in range(2)]

    assert [one.error for one in made] == [None, None]
    assert [request.connection for request in receiver.requests] == [1, 1]


@pytest.mark.parametrize(
    ("context", "error"),
    [
        (lambda tls: tls.server("localhost", until="20210101000000Z"), "certificate has expired"),
        (lambda tls: tls.self_signed("localhost"), "self-signed certificate"),
        (lambda tls: tls.server("other.example"), "not valid for 'localhost'"),
    ],
    ids=["expired", "self-signed", "wrong-name"],
)
def test_a_bad_certificate_is_a_failed_attempt(sender_with, tls, context, error):
    sender = sender_with(ca_bundle=tls.ca)
    with Receiver(tls=context(tls)) as receiver:
        made = attempt(sender, receiver.url)

    assert made.error.startswith("certificate refused: ")
    assert error in made.error
    assert receiver.requests == []


def test_the_environment_adds_no_authority(sender, tls, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", tls.ca)
    monkeypatch.setenv("CURL_CA_BUNDLE", tls.ca)
    monkeypatch.setenv("SSL_CERT_FILE", tls.ca)

    with Receiver(tls=tls.server("localhost")) as receiver:
        made = attempt(sender, receiver.url)

    assert made.error.startswith("certificate refused: ")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1 is deprecated")
def test_an_outdated_version_of_tls_is_a_failed_attempt(sender_with, tls):
    context = tls.server("localhost")
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
    with Receiver(tls=context) as receiver:
        made = attempt(sender_with(ca_bundle=tls.ca), receiver.url)

    assert made.error.startswith("TLS failed: ")


def test_plain_http_behind_https_is_a_failed_attempt(sender_with, receiver):
    sender = sender_with(timeout_seconds=0.3)

    made = attempt(sender, receiver.url.replace("http://", "https://"))

    assert (made.delivered, receiver.requests) == (False, [])


def test_an_answer_in_the_clear_to_a_handshake_is_a_failed_attempt(sender):
    answer = b"HTTP/1.1 200 OK\r\n\r\n"
    with Receiver(greeting=lambda conn: conn.sendall(answer)) as receiver:
        made = attempt(sender, f"https://localhost:{receiver.port}/")

    assert made.error.startswith("TLS failed: ")


@pytest.mark.parametrize(
    "greeting",
    [script.hang, script.drip(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc", b"\x00")],
    ids=["hang", "drip"],
)
def test_a_handshake_that_does_not_end_is_left_at_the_deadline(sender_with, greeting):
    sender = sender_with(timeout_seconds=0.3)
    with Receiver(greeting=greeting) as receiver:
        made = attempt(sender, f"https://localhost:{receiver.port}/")

    assert made.duration_seconds == pytest.approx(0.3, abs=0.1)
    assert made.error == "no answer within 0.3 s"


def test_a_dripping_answer_over_tls_is_left_at_the_deadline(sender_with, tls):
    sender = sender_with(timeout_seconds=0.3, ca_bundle=tls.ca)
    with Receiver([204, script.drip_headers], tls=tls.server("localhost")) as receiver:
        first, second = attempt(sender, receiver.url), attempt(sender, receiver.url)

    assert (first.delivered, second.error) == (True, "no answer within 0.3 s")
    assert second.duration_seconds == pytest.approx(0.3, abs=0.1)


# When to try again


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1", 1),
        ("3600", 3600),
        ("1000000000", 3600),
        ("1" + "0" * 30, 3600),
        ("9" * 5000, 3600),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW + timedelta(days=90), usegmt=True), 3600),
        (format_datetime(NOW - timedelta(days=90), usegmt=True), 0),
        ("Fri, 02 Jan 2026 03:04:35 -0000", 30),
        ("-5", None),
        ("1.5", None),
        ("abc", None),
        ("", None),
        ("\xb2", None),
        ("1e3", None),
        ("Fri, 99 Jan 2026 03:04:35 GMT", None),
        ("Fri, 02 Jan 99999 03:04:35 GMT", None),
    ],
)
def test_retry_after_is_read_when_it_makes_sense(sender, receiver, text, expected):
    receiver.answers = [script.reply(429, headers={"Retry-After": text})]

    made = attempt(sender, receiver.url)

    assert (made.seconds_until_next, made.status_code) == (max(2.0, expected or 0), 429)


def test_retry_after_of_a_delivered_event_is_of_no_interest(sender, receiver):
    receiver.answers = [script.reply(200, headers={"Retry-After": "5"})]

    assert attempt(sender, receiver.url).seconds_until_next is None


@settings(deadline=None, max_examples=50)
@given(
    st.text()
    | st.from_regex(r"[A-Z][a-z]{2}, ?[0-9-]{1,9} [A-Z][a-z]{2} [0-9]{1,9} .*", fullmatch=True)
)
def test_no_retry_after_raises_or_waits_more_than_an_hour(text):
    seconds = postback._retry_after({"retry-after": text}, NOW)

    assert seconds is None or 0 <= seconds <= 3600


SCHEDULE = (2.0, 10.0, 60.0)


@pytest.mark.parametrize(
    ("number", "chance", "expected"),
    [(1, 0.5, 2.0), (1, 0.0, 1.6), (1, 1.0, 2.4), (2, 0.5, 10.0), (3, 0.0, 48.0)],
)
def test_the_wait_is_that_of_the_schedule_give_or_take_a_fifth(number, chance, expected):
    wait = postback.seconds_until_next(number, SCHEDULE, random=lambda: chance)

    assert wait == pytest.approx(expected)


@pytest.mark.parametrize(("number", "schedule"), [(4, SCHEDULE), (5, SCHEDULE), (1, ())])
def test_after_the_last_attempt_there_is_no_wait(number, schedule):
    assert postback.seconds_until_next(number, schedule, retry_after_seconds=5) is None


@pytest.mark.parametrize(
    ("retry_after", "expected"), [(1.0, 2.0), (30.0, 30.0), (None, 2.0), (0, 2.0)]
)
def test_the_wait_is_at_least_what_the_receiver_asks_for(retry_after, expected):
    wait = postback.seconds_until_next(
        1, SCHEDULE, retry_after_seconds=retry_after, random=lambda: 0.5
    )

    assert wait == pytest.approx(expected)


def _descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))

"""Group F: receivers that misbehave on the wire. Each job has its 200, and ends as it should."""

import re
import socket
import ssl
import threading
import time
import warnings
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import requests.adapters
from standardwebhooks.webhooks import Webhook

import postback
from jobs import model
from tests import receiver as script
from tests.certificates import Certificates
from tests.faults.world import delivered, running
from tests.harness import poll
from tests.receiver import Receiver
from web import outbound, server

SECRETS = ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_" + "QUJD" * 10)
RETRIED = ("delivered", 2)  # the first attempt failed, the second did not
AT_ONCE = ("delivered", 1)
GIVEN_UP = ("undelivered", 1)

FAST = {
    "ANALYSIS": "tests.analyses:echo",
    "POSTBACK_TIMEOUT": "300ms",
    "POSTBACK_SCHEDULE": "20ms 20ms",
}

#: The start of 100 MB of gzip.
GZIP = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 99999999\r\n\r\n\x1f\x8b\x08"

REDIRECTS = (301, 302, 303, 307, 308)


@pytest.fixture
def posting(start, receiver):
    """The service, posting to `receiver`, with a short deadline."""
    return start(**FAST, POSTBACK_URL=receiver.url)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """The same for a whole table of cases, and its receiver."""
    folder = tmp_path_factory.mktemp("journal")
    with Receiver() as one, running(folder, **FAST, POSTBACK_URL=one.url) as service:
        yield service, one


def late(seconds: float):
    """Answer after so many seconds."""

    def behave(conn, request):
        threading.Event().wait(seconds)
        return 204

    return behave


def status(code: int, **headers: str):
    return script.reply(
        code, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )


def case(number: str, answer: object, ending: tuple[str, int] = RETRIED):
    return pytest.param(answer, ending, id=number)


@pytest.mark.parametrize(
    ("answer", "ending"),
    [
        case("F05", script.hang),
        case("F06 drips the status line", script.drip(b"", b"H")),
        case("F06 drips the header", script.drip_headers),
        case("F06 drips the body", script.drip_body, AT_ONCE),
        case("F06 100 Continue for ever", script.drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n")),
        *(case(f"F07 {code}", status(code, Location="/again")) for code in REDIRECTS),
        case("F07 other host", status(302, Location="http://169.254.169.254/")),
        *(case(f"F08 {code}", code, AT_ONCE) for code in (200, 201, 202, 204, 206, 299)),
        case("F09 100 only", b"HTTP/1.1 100 Continue\r\n\r\n"),
        case("F09 flood of 100", script.continue_flood),
        case("F09 0 bytes", b""),
        case("F09 garbage", script.GARBAGE),
        case("F09 HTTP/0.9", script.HTTP_09),
        *(case(f"F10 {code}", code) for code in (400, 401, 403, 404, 422)),
        case("F11 410", 410, GIVEN_UP),
        case("F11 abort-message", status(500, webhook_delivery="abort-message"), GIVEN_UP),
        case(
            "F11 abort-message beside a 200", status(200, webhook_delivery="abort-message"), AT_ONCE
        ),
        case("F12 absent", 429),
        case("F12 -5", status(429, Retry_After="-5")),
        case("F12 abc", status(429, Retry_After="abc")),
        case("F12 1.5", status(429, Retry_After="1.5")),
        case("F12 date in the past", status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")),
        *(case(f"F13 {code}", code) for code in (500, 502, 503, 504, 599, 999)),
        case(
            "F14 reset",
            script.reset_after(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"),
            AT_ONCE,
        ),
        case("F14 truncated", script.TRUNCATED, AT_ONCE),
        case("F14 longer than it says", script.TOO_LONG, AT_ONCE),
        case("F15 reset before the answer", script.reset),
        case("F15 closed before the answer", script.close),
        case("F16 300 MB", script.huge_body, AT_ONCE),
        case("F16 endless", script.endless_body, AT_ONCE),
        case("F16 gzip bomb", script.flood(GZIP, b"\0" * 9999), AT_ONCE),
        case("F17 200 headers", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n"),
        case("F17 64 KiB line", b"HTTP/1.1 200 OK\r\nA: " + b"b" * 65536 + b"\r\n\r\n"),
    ],
)
def test_a_job_ends_as_it_should(scripted, answer, ending):
    service, receiver = scripted
    receiver.answers, before = [answer], len(receiver.requests)

    job = service.wait_for(service.process({"data": 1}))

    state, attempts = ending
    assert (job["state"], len(job["attempts"])) == (state, attempts)
    ids = [one.headers["webhook-id"] for one in receiver.requests[before:]]
    assert ids == [job["id"]] * attempts
    assert max(one["duration_seconds"] for one in job["attempts"]) < 2  # of 0.3
    assert service.get("/livez").status_code == 200


def test_f01_f15_the_receiver_comes_up_later(start):
    with Receiver() as first:
        port, url = first.port, first.url
    service = start(**FAST | {"POSTBACK_SCHEDULE": " ".join(["50ms"] * 40)}, POSTBACK_URL=url)
    job_id = service.process({"data": 1})
    poll(lambda: service.job(job_id)["attempts"], "a refused attempt")

    with Receiver(port=port):
        job = service.wait_for(job_id)

    assert job["state"] == "delivered"
    assert job["attempts"][0]["error"] == "Connection refused"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        pytest.param(socket.EAI_NONAME, "Name or service not known", id="F02 NXDOMAIN"),
        pytest.param(socket.EAI_AGAIN, "try again", id="F02 SERVFAIL"),
        pytest.param(None, "no answer within 0.3 s", id="F02 hang"),
    ],
)
def test_a_name_that_is_not_resolved_is_tried_again(start, monkeypatch, error, told):
    released, real = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host, *rest, **more):
        if host != "name.example":
            return real(host, *rest, **more)
        if error is None:
            released.wait(10)
        raise socket.gaierror(error, told)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    service = start(**FAST, POSTBACK_URL="http://name.example/")

    job = service.wait_for(service.process({"data": 1}))

    released.set()
    assert (job["state"], {one["error"] for one in job["attempts"]}) == ("undelivered", {told})
    assert len(job["attempts"]) == 3
    assert max(one["duration_seconds"] for one in job["attempts"]) < 2  # of 0.3


def test_f03_a_connect_that_hangs_is_tried_again(start):
    with socket.socket() as full, socket.socket() as filler:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        filler.connect(full.getsockname())
        service = start(**FAST, POSTBACK_URL=f"http://127.0.0.1:{full.getsockname()[1]}/")

        job = service.wait_for(service.process({"data": 1}))

    assert [one["error"] for one in job["attempts"]] == ["no answer within 0.3 s"] * 3


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


def outdated(certificates):
    """Return a server that speaks TLS 1.0 only."""
    context = certificates.server("localhost")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def drip_handshake(conn):
    script.drip(b"\x16\x03\x03\x40\x00", b"\x02")(conn, None)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        pytest.param(
            lambda one: Receiver(tls=one.server("localhost", until="20210101000000Z")),
            "certificate has expired",
            id="F04 expired",
        ),
        pytest.param(
            lambda one: Receiver(tls=one.self_signed("localhost")),
            "self-signed certificate",
            id="F04 self-signed",
        ),
        pytest.param(
            lambda one: Receiver(tls=one.server("other.example")),
            "not valid for 'localhost'",
            id="F04 wrong name",
        ),
        pytest.param(lambda one: Receiver(tls=outdated(one)), "TLS failed", id="F04 TLS 1.0"),
        pytest.param(
            lambda one: Receiver(
                tls=one.server("localhost"),
                greeting=lambda conn: conn.sendall(b"HTTP/1.1 200 OK\r\n\r\n"),
            ),
            "TLS failed",
            id="F04 plain http",
        ),
        pytest.param(
            lambda one: Receiver(tls=one.server("localhost"), greeting=drip_handshake),
            "no answer within",
            id="F04 drips the handshake",
        ),
    ],
)
def test_f04_bad_tls_is_tried_again_and_never_given_way_to(
    start, monkeypatch, certificates, make, told
):
    monkeypatch.setattr(requests.adapters, "DEFAULT_CA_BUNDLE_PATH", certificates.ca)
    with make(certificates) as receiver:
        service = start(**FAST, POSTBACK_URL=receiver.url)

        job = service.wait_for(service.process({"data": 1}))

    assert (job["state"], len(job["attempts"]), receiver.requests) == ("undelivered", 3, [])
    assert told in job["attempts"][0]["error"]


def test_f04_good_tls_is_delivered(start, monkeypatch, certificates):
    monkeypatch.setattr(requests.adapters, "DEFAULT_CA_BUNDLE_PATH", certificates.ca)
    with Receiver(tls=certificates.server("localhost")) as receiver:
        service = start(**FAST, POSTBACK_URL=receiver.url)

        assert service.wait_for(service.process({"data": 1}))["state"] == "delivered"


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [
        pytest.param("1", 0.9, 2, id="F12 1"),
        pytest.param("3600", 3590, 3601, id="F12 3600"),
        pytest.param("1000000000", 3590, 3601, id="F12 10^9"),
        pytest.param(
            format_datetime(datetime.now(UTC) + timedelta(hours=5), usegmt=True),
            3590,
            3601,
            id="F12 date in the future",
        ),
    ],
)
def test_f12_retry_after_is_obeyed_up_to_an_hour(posting, receiver, retry_after, least, most):
    receiver.answers = [status(429, Retry_After=retry_after)]
    before = datetime.now(UTC)
    job_id = posting.process({"data": 1})

    poll(lambda: posting.job(job_id)["attempts"], "an attempt")

    due_at = datetime.fromisoformat(posting.job(job_id)["next_attempt_at"])
    assert least < (due_at - before).total_seconds() < most


def test_f13_the_waits_grow_and_are_never_the_same(start, receiver):
    receiver.default = 500
    service = start(**FAST | {"POSTBACK_SCHEDULE": "40ms 200ms"}, POSTBACK_URL=receiver.url)

    jobs = [service.wait_for(service.process({"data": 1})) for _ in range(3)]

    came = [
        [one.received_at for one in receiver.requests if one.headers["webhook-id"] == job["id"]]
        for job in jobs
    ]
    waits = [(second - first, third - second) for first, second, third in came]
    assert all(0.032 <= short < long and long >= 0.16 for short, long in waits)
    assert len({long for _, long in waits}) == 3


def test_f16_a_huge_answer_takes_no_memory_and_no_time(posting, receiver):
    posting.wait_for(posting.process({"data": 1}))
    receiver.answers = [script.huge_body]
    before_kib = resident_kib()

    job = posting.wait_for(posting.process({"data": 1}))

    assert job["attempts"][0]["duration_seconds"] < 1
    assert resident_kib() - before_kib < 5 * 1024


def resident_kib() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_f18_a_cookie_is_not_sent_back(posting, receiver):
    receiver.answers = [status(200, Set_Cookie="a=b; Path=/")]

    for _ in range(2):
        posting.wait_for(posting.process({"data": 1}))

    assert ["cookie" in one.headers for one in receiver.requests] == [False, False]


def test_f19_nothing_of_the_environment_is_used(start, receiver, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    (tmp_path / ".netrc").chmod(0o600)
    for name, value in {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / ".netrc"),
        "http_proxy": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "REQUESTS_CA_BUNDLE": "/nowhere",
        "CURL_CA_BUNDLE": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    service = start(**FAST, POSTBACK_URL=receiver.url)

    job = service.wait_for(service.process({"data": 1}))

    assert (job["state"], len(job["attempts"])) == ("delivered", 1)
    assert "authorization" not in receiver.requests[0].headers


def test_f20_a_connection_that_was_closed_meanwhile_costs_one_attempt_at_most(posting, receiver):
    closed = threading.Event()

    def answer_and_close(conn, request):
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        conn.shutdown(socket.SHUT_RDWR)
        closed.set()

    receiver.answers = [answer_and_close]
    posting.wait_for(posting.process({"data": 1}))
    assert closed.wait(5)

    job = posting.wait_for(posting.process({"data": 1}))

    assert (job["state"], len(job["attempts"])) == ("delivered", 1)


def test_f21_a_dead_receiver_does_not_hold_up_a_good_one(start, receiver):
    with Receiver(default=script.hang) as dead:
        service = start(
            **FAST | {"POSTBACK_TIMEOUT": "2s", "MAX_RUNNING": "64"},
            POSTBACK_ALLOW=f"{dead.origin} {receiver.origin}",
        )
        for _ in range(100):
            service.process({"data": 1, "postback_url": dead.url})
        began = time.monotonic()

        job_id = service.process({"data": 2, "postback_url": receiver.url})

        assert delivered(receiver, job_id)[0].received_at - began < 0.5


def test_f22_just_before_the_deadline_is_delivered_and_just_after_is_tried_again(posting, receiver):
    receiver.answers = [late(0.25), late(0.6)]

    before = posting.wait_for(posting.process({"data": 1}))
    after = posting.wait_for(posting.process({"data": 2}))

    assert [len(job["attempts"]) for job in (before, after)] == [1, 2]
    assert [one.headers["webhook-id"] for one in receiver.requests[1:]] == [after["id"]] * 2


def test_f23_what_was_given_up_is_kept_and_can_be_resent(start):
    with Receiver() as first:
        port, url = first.port, first.url
    service = start(**FAST, POSTBACK_URL=url)
    job = service.wait_for(service.process({"data": [1, 2]}))
    listed = service.get("/jobs", params={"state": "undelivered"}).json()["jobs"]

    with Receiver(port=port) as second:
        service.post(f"/jobs/{job['id']}/resend")
        resent = service.wait_for(job["id"], "delivered")
        (request,) = second.requests

    assert (job["state"], [one["id"] for one in listed]) == ("undelivered", [job["id"]])
    assert (resent["result"], request.headers["webhook-id"]) == ([1, 2], job["id"])


def test_f24_it_posts_to_itself_with_one_thread_that_answers(start, monkeypatch):
    monkeypatch.setattr(server, "THREADS", 1)
    service = start(ANALYSIS="tests.analyses:echo")

    job_ids = [service.process({"data": n}) for n in range(1, 6)]

    assert {service.wait_for(job_id)["state"] for job_id in job_ids} == {"delivered"}


@pytest.mark.parametrize("secrets", [SECRETS[:1], SECRETS])
def test_f25_every_attempt_verifies_under_each_secret_with_a_new_time_and_the_same_id(
    start, receiver, secrets
):
    receiver.answers = [500]
    service = start(
        **FAST | {"POSTBACK_SCHEDULE": "1s"},
        POSTBACK_URL=receiver.url,
        POSTBACK_SECRET=" ".join(secrets),
    )

    job_id = service.process({"data": "é"})

    requests_ = receiver.wait_for(2)
    for secret in secrets:
        for one in requests_:
            Webhook(secret).verify(one.body, one.headers)
    assert [one.headers["webhook-id"] for one in requests_] == [job_id] * 2
    assert requests_[0].headers["webhook-timestamp"] < requests_[1].headers["webhook-timestamp"]


def test_f26_an_attempt_after_two_hours_has_a_new_timestamp(receiver):
    start_at = datetime.now(UTC) - timedelta(hours=2)
    clock = iter([start_at, datetime.now(UTC)])
    sender = postback.Sender(
        url=receiver.url,
        policy=outbound.Policy.of(""),
        secrets=SECRETS,
        headers={},
        timeout_seconds=5,
        schedule=[1],
        clock=lambda: next(clock),
    )
    job = model.new_job(postback_url=None, receiver="", forwarded={})

    for _ in range(2):
        sender.attempt(job, b"{}")

    sender.close()
    early, now = receiver.requests
    Webhook(SECRETS[0]).verify(now.body, now.headers)
    assert int(now.headers["webhook-timestamp"]) - int(early.headers["webhook-timestamp"]) >= 7199

"""What the built-in receiver promises to whoever posts to it."""

import base64
import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.client import HTTPConnection

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import errors, model
from jobs import journal as journal_module
from jobs.journal import Journal
from tests.harness import failing
from web import receiver as receiver_module
from web import signatures
from web.receiver import Receiver
from web.server import Application, Server

SECRET = "whsec_" + base64.b64encode(b"r" * 32).decode()
OTHER = "whsec_" + base64.b64encode(b"o" * 32).decode()
BODY = b'{"type": "job.succeeded", "data": {"result": 1.5}}'
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def signed(start):
    """The service with a secret."""
    return start(ANALYSIS="tests.analyses:echo", POSTBACK_SECRET=SECRET)


@pytest.fixture
def open_to_all(start):
    """The service without a secret."""
    return start(ANALYSIS="tests.analyses:echo")


def headers(body=BODY, *, webhook_id="job-1", secret=SECRET, seconds_off=0):
    at = model.utc_now() + timedelta(seconds=seconds_off)
    signature = signatures.sign([secret], webhook_id=webhook_id, timestamp=at, body=body)
    return JSON | {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": signature,
    }


def post(service, body=BODY, sent=None):
    return service.post(
        "/postprocessed", data=body, headers=headers(body) if sent is None else sent
    )


def received(service, query=""):
    return service.get("/postprocessed" + query).json()["received"]


def test_a_signed_event_is_stored_once_and_listed(signed):
    answers = [post(signed) for _ in range(3)]

    statuses = [(one.status_code, one.json()["status"]) for one in answers]
    assert statuses == [(200, "received"), (200, "duplicate"), (200, "duplicate")]
    (one,) = received(signed)
    assert (one["webhook_id"], one["signature"], one["event"]) == (
        "job-1",
        "good",
        json.loads(BODY),
    )
    assert one["received_at"].endswith("Z")


def test_of_many_at_once_one_is_new(signed):
    with ThreadPoolExecutor(16) as senders:
        answers = list(senders.map(lambda _: post(signed).json()["status"], range(16)))

    assert sorted(answers) == ["duplicate"] * 15 + ["received"]


@pytest.mark.parametrize(
    "sent",
    [
        lambda: JSON,
        lambda: headers(secret=OTHER),
        lambda: headers(body=b"{}"),
        lambda: headers() | {"webhook-id": "job-2"},
        lambda: headers() | {"webhook-signature": ""},
        lambda: headers() | {"webhook-signature": "v1,abc"},
        lambda: headers() | {"webhook-signature": "v1"},
        lambda: headers() | {"webhook-signature": "é".encode()},
    ],
    ids=["no headers", "other secret", "other body", "other id", "empty", "short", "bare", "bytes"],
)
def test_an_event_whose_signature_does_not_fit_is_refused(signed, sent):
    answer = post(signed, sent=sent())

    assert answer.status_code == answer.json()["status"] == 401
    assert received(signed) == []


@pytest.mark.parametrize("seconds_off", [-310, 310])
def test_an_event_of_another_time_is_refused(signed, seconds_off):
    answer = post(signed, sent=headers(seconds_off=seconds_off))

    assert answer.status_code == 400
    assert "webhook-timestamp" in answer.json()["detail"]
    assert received(signed) == []


@pytest.mark.parametrize("timestamp", ["", "abc", "1.5", "-1", "9" * 13])
def test_a_timestamp_that_is_none_is_refused(signed, timestamp):
    answer = post(signed, sent=headers() | {"webhook-timestamp": timestamp})

    assert answer.status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[1]",
        b"1",
        b"null",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\xff"}',
        b'{"a": %s}' % (b"9" * 5000),
        b"[" * 100_000,
        b'{"a": %s%s}' % (b"[" * 900, b"]" * 900),
        b'{"a": %s%s}' % (b"[" * 300, b"]" * 300),
        b"",
    ],
)
def test_what_is_no_event_is_refused_and_spoils_no_listing(open_to_all, body):
    answer = post(open_to_all, body)

    assert answer.status_code == answer.json()["status"] == 400
    assert received(open_to_all) == []


@pytest.mark.parametrize(
    ("sent", "status_code"), [({"Content-Type": "text/plain"}, 415), (JSON, 413)]
)
def test_size_and_type_are_checked_before_the_signature(start, sent, status_code):
    service = start(POSTBACK_SECRET=SECRET, MAX_BODY="1KiB", POSTBACK_MAX_BYTES="1KiB")

    answer = post(service, BODY if status_code == 415 else b"x" * 70_000, sent)

    assert answer.status_code == status_code


def test_without_a_secret_the_listing_says_that_nothing_was_verified(open_to_all):
    post(open_to_all, sent=JSON | {"webhook-id": "x", "webhook-signature": "v1,garbage"})

    assert [(one["webhook_id"], one["signature"]) for one in received(open_to_all)] == [
        ("x", "none")
    ]


def test_an_event_without_an_id_is_known_by_its_bytes(open_to_all):
    bodies = [BODY, BODY, BODY + b" "]

    statuses = [post(open_to_all, body, JSON).json()["status"] for body in bodies]

    assert statuses == ["received", "duplicate", "received"]


def test_the_newest_is_listed_first_and_no_more_than_the_limit(open_to_all):
    for number in range(1, 4):
        post(open_to_all, sent=JSON | {"webhook-id": f"job-{number}"})

    listed = [one["webhook_id"] for one in received(open_to_all, "?limit=2")]

    assert listed == ["job-3", "job-2"]


def test_what_cannot_be_stored_is_not_said_to_be_received(signed):
    with failing(signed.journal):
        refused = post(signed)

    assert refused.status_code == refused.json()["status"] == 503
    assert received(signed) == []
    assert post(signed).json() == {"status": "received"}


def test_a_long_event_is_stored_even_where_it_cannot_be_shown(tmp_path):
    journal = Journal(tmp_path / "received.db", on_lost=lambda: None)
    journal.open()
    shown: list[str] = []
    one = Receiver(journal, secrets=[], max_body_bytes=10_000, show=shown.append)
    deaf = Receiver(journal, secrets=[], max_body_bytes=10_000, show=_closed)
    application = Application()
    application.serve("POST", "/shown", one.receive)
    application.serve("POST", "/deaf", deaf.receive)
    server = Server(host="127.0.0.1", port=0, max_body_bytes=10_000)
    server.start(application, settle=journal.settle)
    bodies = [json.dumps({"a": "x" * n + "ä" * 500}, ensure_ascii=False).encode() for n in (0, 1)]

    answers = [_posted(server.port, "/shown", body) for body in bodies]
    answers += [_posted(server.port, "/deaf", BODY)]

    server.stop()
    stored = len(journal.received(limit=10))
    journal.close()
    assert answers == [200, 200, 200]
    assert (len(shown), stored) == (2, 3)


def _closed(text):
    raise BrokenPipeError


def _posted(port, path, body, sent=JSON):
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("POST", path, body, sent)
        return connection.getresponse().status


ANYTHING = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"))
EVENTS = st.dictionaries(st.text(), st.none() | st.integers() | st.text()).map(
    lambda event: json.dumps(event).encode()
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.binary() | EVENTS,
    fields=st.fixed_dictionaries(
        {"webhook-id": ANYTHING, "webhook-timestamp": ANYTHING | st.just("1614265330")},
        optional={"webhook-signature": ANYTHING, "webhook-x": ANYTHING, "content-type": ANYTHING},
    ),
)
@pytest.mark.parametrize("secret", ["", SECRET])
def test_garbage_is_never_answered_500(start, secret, body, fields):
    service = _one(start, secret)
    port = int(service.base_url.rpartition(":")[2])
    sent = JSON | {name: value.encode("latin-1") for name, value in fields.items()}

    code = _posted(port, "/postprocessed", body, sent)

    assert code in (200, 400, 401, 415)
    assert service.get("/postprocessed").status_code == 200


def _one(start, secret, started={}):  # noqa: B006 - one service serves all examples
    if started.get("start") is not start:
        started.update(start=start, service=start(POSTBACK_SECRET=secret))
    return started["service"]


def test_a_page_of_large_postbacks_is_cut_short(open_to_all, monkeypatch):
    monkeypatch.setattr(journal_module, "MAX_PAGE_BYTES", 1000)
    large = [b'{"n": %d, "x": "%s"}' % (n, b"x" * 600) for n in range(4)]
    for body in large:
        assert post(open_to_all, body, JSON).status_code == 200

    listed = received(open_to_all)

    assert [one["event"]["n"] for one in listed] == [3, 2]


def test_a_secret_in_a_file_is_verified_by_a_receiver_alone(tmp_path):
    path = tmp_path / "secret"
    path.write_text(f"{SECRET} {OTHER}\n")

    secrets = receiver_module._secrets({"POSTBACK_SECRET_FILE": str(path)})

    assert secrets == (SECRET, OTHER)


@pytest.mark.parametrize("text", [None, "", "changeme"])
def test_a_receiver_alone_refuses_a_secret_file_without_a_secret(tmp_path, text):
    path = tmp_path / "secret"
    if text is not None:
        path.write_text(text)

    with pytest.raises(errors.ConfigError, match="POSTBACK_SECRET"):
        receiver_module._secrets({"POSTBACK_SECRET_FILE": str(path)})


def test_what_is_shown_cannot_steer_a_terminal(tmp_path):
    shown: list[str] = []
    body = '{"x": "\x9b31m"}'.encode()
    with contextlib.closing(Journal(tmp_path / "r.db", on_lost=lambda: None)) as journal:
        journal.open()
        one = Receiver(journal, secrets=[], max_body_bytes=1000, show=shown.append)
        serving = Server(host="127.0.0.1", port=0, max_body_bytes=1000)
        application = Application()
        application.serve("POST", "/postprocessed", one.receive)
        serving.start(application, settle=lambda: None)
        requests.post(f"http://127.0.0.1:{serving.port}/postprocessed", data=body, headers=JSON)
        serving.stop()

    assert len(shown) == 1
    assert shown[0].isprintable()
    assert shown[0].isascii()

"""What the built-in receiver promises to whoever posts to it."""

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from http.client import HTTPConnection

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import errors, model
from jobs.journal import Journal
from tests.harness import ROOT, poll
from web import signatures
from web.receiver import Receiver
from web.server import Application, Server

SECRET = "whsec_" + base64.b64encode(b"r" * 32).decode()
OTHER = "whsec_" + base64.b64encode(b"o" * 32).decode()
BODY = b'{"type": "job.succeeded", "data": {"result": 1.5}}'
JSON = {"Content-Type": "application/json"}


class Service:
    """A receiver behind a server, with a journal of its own."""

    def __init__(self, path, secrets):
        self.shown: list[str] = []
        self.failure: Exception | None = None
        self.journal = Journal(path, on_lost=lambda: None)
        self.journal.open()
        receiver = Receiver(
            self.journal, secrets=secrets, max_body_bytes=100_000, show=self.shown.append
        )
        application = Application()
        application.serve("POST", "/postprocessed", receiver.receive)
        application.serve("GET", "/postprocessed", lambda: receiver.listing(limit=50))
        self.server = Server(host="127.0.0.1", port=0, max_body_bytes=100_000)
        self.server.start(application, self.turn)

    @contextlib.contextmanager
    def turn(self):
        with self.journal.transaction(durable=True):
            yield
            if self.failure:
                raise self.failure

    def close(self):
        self.server.stop()
        self.journal.close()

    def post(self, body=BODY, sent=None):
        """Return the status code and the document of the answer."""
        return call(self.server.port, "POST", body, signed(body) if sent is None else sent)

    def received(self):
        return call(self.server.port, "GET")[1]["received"]


def call(port, method, body=None, headers=JSON):
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, "/postprocessed", body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def signed(body=BODY, *, webhook_id="job-1", secret=SECRET, seconds_off=0):
    at = model.utc_now() + timedelta(seconds=seconds_off)
    signature = signatures.sign([secret], webhook_id=webhook_id, timestamp=at, body=body)
    return JSON | {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": signature,
    }


@pytest.fixture
def with_secret(tmp_path):
    with contextlib.closing(Service(tmp_path / "received.db", [SECRET])) as service:
        yield service


@pytest.fixture
def without_secret(tmp_path):
    with contextlib.closing(Service(tmp_path / "received.db", [])) as service:
        yield service


def test_a_signed_event_is_stored_once_and_listed(with_secret):
    answers = [with_secret.post() for _ in range(3)]

    statuses = [(code, document["status"]) for code, document in answers]
    assert statuses == [(200, "received"), (200, "duplicate"), (200, "duplicate")]
    (one,) = with_secret.received()
    assert one.pop("received_at").endswith("Z")
    assert one == {"webhook_id": "job-1", "signature": "good", "event": json.loads(BODY)}


@pytest.mark.parametrize(
    ("status_code", "sent"),
    [
        (401, lambda: JSON),
        (401, lambda: signed(secret=OTHER)),
        (401, lambda: signed(body=b"{}")),
        (401, lambda: signed() | {"webhook-id": "job-2"}),
        (401, lambda: signed() | {"webhook-signature": "é".encode()}),
        (400, lambda: signed() | {"webhook-timestamp": "1"}),
        (415, lambda: {"Content-Type": "x"}),
    ],
    ids=["no headers", "other secret", "other body", "other id", "bytes", "other time", "no JSON"],
)
def test_an_event_whose_signature_does_not_fit_is_refused(with_secret, status_code, sent):
    code, document = with_secret.post(sent=sent())

    assert code == document["status"] == status_code
    assert with_secret.received() == []


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[1]", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\xff"}'),
        b'{"a": %s}' % (b"9" * 5000),
        b'{"a": %s%s}' % (b"[" * 300, b"]" * 300),
    ],
)
def test_what_is_no_event_is_refused_and_spoils_no_listing(without_secret, body):
    code, document = without_secret.post(body)

    assert code == document["status"] == 400
    assert without_secret.received() == []


def test_an_event_without_an_id_is_known_by_its_bytes(without_secret):
    statuses = [without_secret.post(body, JSON)[1]["status"] for body in (BODY, BODY, BODY + b" ")]

    assert statuses == ["received", "duplicate", "received"]


def test_what_cannot_be_stored_is_neither_answered_nor_shown(without_secret):
    without_secret.failure = errors.JournalError("The disk is full.")
    assert without_secret.post()[0] == 503
    assert (without_secret.received(), without_secret.shown) == ([], [])

    without_secret.failure = None
    assert without_secret.post() == (200, {"status": "received"})
    without_secret.server.stop()
    assert len(without_secret.shown) == 1


def test_what_is_shown_cannot_steer_a_terminal(without_secret):
    without_secret.post('{"x": "\x9b31m"}'.encode())
    without_secret.server.stop()

    (line,) = without_secret.shown
    assert line.isprintable()
    assert line.isascii()


ANYTHING = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"))
EVENTS = st.dictionaries(st.text(), st.none() | st.integers() | st.text()).map(
    lambda event: json.dumps(event).encode()
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.binary() | EVENTS,
    fields=st.fixed_dictionaries(
        {"webhook-id": ANYTHING, "webhook-timestamp": ANYTHING | st.just("1614265330")},
        optional={"webhook-signature": ANYTHING, "webhook-x": ANYTHING, "content-type": ANYTHING},
    ),
)
@pytest.mark.parametrize("name", ["with_secret", "without_secret"])
def test_garbage_is_never_answered_500(request, name, body, fields):
    service = request.getfixturevalue(name)
    sent = JSON | {name: value.encode("latin-1") for name, value in fields.items()}

    code, _ = service.post(body, sent)

    assert code in (200, 400, 401, 415)
    assert isinstance(service.received(), list)


# Alone


@contextlib.contextmanager
def alone(tmp_path, **env):
    """Run `./run receiver`; yield its port, its process, and what it is signed with."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("POSTBACK")}
    command = [sys.executable, "-m", "web.receiver", "--port=0", f"--journal={tmp_path / 'r.db'}"]
    with subprocess.Popen(
        command, cwd=ROOT, env=kept | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            found = re.search(r":(\d+)/postprocessed$", process.stdout.readline())
            yield int(found[1]) if found else 0, process
        finally:
            process.kill()


@pytest.mark.service
def test_alone_it_verifies_prints_lists_for_a_token_and_ends(tmp_path):
    (tmp_path / "token").write_text("t1 t2\n")
    env = {"POSTBACK_SECRET": SECRET, "API_TOKEN_FILE": str(tmp_path / "token")}
    with alone(tmp_path, **env) as (port, process):
        assert call(port, "POST", BODY)[0] == 401
        assert call(port, "POST", BODY, signed())[0] == 200
        assert call(port, "GET")[0] == 401
        code, listing = call(port, "GET", headers={"Authorization": "Bearer t2"})
        process.send_signal(signal.SIGTERM)

        assert (code, len(listing["received"]), process.wait(10)) == (200, 1, 0)
        assert "postback received job-1" in process.stdout.read()


@pytest.mark.service
def test_alone_it_refuses_a_foreign_host(tmp_path):
    with alone(tmp_path) as (port, _):
        assert call(port, "GET", headers={"Host": "evil.example"})[0] == 403
        assert call(port, "GET")[0] == 200


@pytest.mark.service
def test_alone_it_keeps_postbacks_for_retention(tmp_path):
    with contextlib.closing(Journal(tmp_path / "r.db", on_lost=lambda: None)) as journal:
        journal.open()
        long_ago = model.utc_now() - timedelta(hours=1)
        with journal.transaction():
            journal.receive(webhook_id="old", received_at=long_ago, signature="none", body=BODY)
    env = {"RETENTION": "1m", "POSTBACK_SCHEDULE": "none"}
    with alone(tmp_path, **env) as (port, _):
        assert call(port, "POST", BODY)[0] == 200

        poll(lambda: "old" not in str(call(port, "GET")[1]["received"]), "the old one removed")
        assert len(call(port, "GET")[1]["received"]) == 1


@pytest.mark.service
def test_alone_it_refuses_wrong_settings_in_one_line(tmp_path):
    with alone(tmp_path, POSTBACK_SECRET="changeme") as (_, process):
        assert process.wait(10) == 78
        assert process.stderr.read().startswith("POSTBACK_SECRET=***: expected whsec_")


def test_alone_it_refuses_a_port_that_is_none():
    command = [sys.executable, "-m", "web.receiver", "--port=99999"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 78
    assert done.stderr.endswith("PORT=99999: cannot listen there: bind(): port must be 0-65535.\n")

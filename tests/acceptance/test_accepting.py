"""A 200 is a promise: what is checked before it, what it says, and what is refused."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ACT
from tests.harness import Gate, RealProcess, act, events, poll, refusal

JSON = {"Content-Type": "application/json"}


def post(service, body=b'{"data": 1}', **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return service.post("/process", data=body, headers=JSON | named)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Iterator[RealProcess]:
    """A service that runs one job, while another one fills its queue; bodies are of 1 KiB."""
    folder = tmp_path_factory.mktemp("full")
    gate = Gate(folder / "gate")
    limits = {"MAX_BODY": "1KiB", "MAX_RUNNING": "1", "MAX_PENDING": "1"}
    service = RealProcess({**ACT, **limits, "JOURNAL": str(folder / "journal.db")})
    running = post(service, json.dumps({"data": gate.data}), Idempotency_Key="k").json()["id"]
    gate.wait_for(1)
    assert service.job(running)["state"] == "running"
    service.process({"data": 2})
    yield service
    gate.open()
    assert service.end() in (0, 75)


# What is answered


def test_a_payload_is_answered_at_once_and_its_result_posted_back(service, mailbox, gate):
    answer = service.post("/process", json={"data": gate.data, "postback_url": mailbox.url})

    job_id = answer.json()["id"]
    status_url = f"{service.base_url}/jobs/{job_id}"
    assert (answer.status_code, answer.headers["Location"]) == (200, status_url)
    assert answer.json() == {"id": job_id, "state": "accepted", "status_url": status_url}
    gate.wait_for(1)
    assert mailbox.requests == []
    gate.open()
    (event,) = events(mailbox.wait_for(1))
    assert (event["type"], event["data"]["result"]) == ("job.succeeded", "waited")


def test_without_a_postback_url_the_service_posts_to_its_own_receiver(service):
    job_id = service.send("here")

    service.wait_for(job_id)

    received = service.get("/postprocessed").json()["received"][0]
    assert (received["webhook_id"], received["signature"]) == (job_id, "none")
    assert received["event"]["data"]["result"] == "here"


@pytest.mark.parametrize(
    ("prefer", "status_code", "applied"),
    [
        ("Respond-Async ; wait=10", 202, "respond-async"),
        ('foo="a, b", respond-async', 202, "respond-async"),
        ("respond-asynchronously", 200, None),
        ("wait=10; respond-async", 200, None),
        ('foo="a, respond-async, b"', 200, None),
        (r'foo="\", respond-async"', 200, None),
    ],
)
def test_a_202_is_answered_to_who_prefers_it(service, prefer, status_code, applied):
    answer = post(service, Prefer=prefer)

    assert answer.status_code == status_code
    assert answer.headers.get("Preference-Applied") == applied


@pytest.mark.parametrize("data", [0, False, 0.0, "naïve ☃ 😀", [0], {"": 0}])
def test_what_only_looks_empty_is_data(service, data):
    job = service.wait_for(service.send(data))

    assert (job["data"], job["result"]) == (data, data)


def test_metadata_is_repeated_in_the_event_the_job_and_the_list(service, mailbox):
    order = {"order": 17, "tags": ["ä"]}
    job_id = service.send(1, mailbox, metadata=order)

    (event,) = events(mailbox.wait_for(1))

    (listed,) = service.get("/jobs?limit=1").json()["jobs"]
    assert listed["id"] == job_id
    assert [event["data"]["metadata"], listed["metadata"]] == [order, order]
    assert service.job(job_id)["metadata"] == order


def test_the_headers_that_trace_a_request_reach_the_postback(service, mailbox):
    traced = {"traceparent": "00-1-2-01", "tracestate": "a=b", "X-Request-ID": "r-1"}

    service.process({"data": 1, "postback_url": mailbox.url}, headers=traced)

    sent = mailbox.wait_for(1)[0].headers
    assert [sent[name.lower()] for name in traced] == list(traced.values())


# What is refused


@pytest.mark.parametrize(
    ("body", "headers", "status_code", "named"),
    [
        (b"{}", {}, 400, "data"),
        (b'{"data": null}', {}, 400, "data"),
        (b'{"data": ""}', {}, 400, "data"),
        (b'{"data": []}', {}, 400, "data"),
        (b'{"data": {}}', {}, 400, "data"),
        (b'{"data": 1, "date": 2}', {}, 400, "date"),
        (b'{"data": 1, "postback_url": 5}', {}, 400, "postback_url"),
        (b'{"data": 1, "metadata": []}', {}, 400, "metadata"),
        (b'{"data": 1, "metadata": "x"}', {}, 400, "metadata"),
        (b"[1]", {}, 400, "object"),
        (b'{"data": "\xe4"}', {"Content-Type": "application/json; charset=latin-1"}, 400, "UTF-8"),
        (b"", {}, 400, "empty"),
        (b'{"data": 1}', {"Content-Encoding": "gzip"}, 415, "Content-Encoding"),
        (b'{"data": 1}', {"Idempotency-Key": "a\tb"}, 400, "Idempotency-Key"),
        (b'{"data": 1, "postback_url": "http://127.0.0.1/"}', {}, 422, "http://127.0.0.1"),
        # What comes first is told: size, type, JSON, fields, policy, idempotency, capacity.
        (b"x" * 2000, {"Content-Type": "text/plain"}, 413, "1024"),
        (b"{", {"Content-Type": "text/plain"}, 415, "application/json"),
        (b'{"postback_url": "ftp://x"}', {}, 400, "data"),
        (b'{"data": 2, "postback_url": "ftp://x"}', {"Idempotency-Key": "k"}, 422, "http"),
        (b'{"data": 2}', {"Idempotency-Key": "k"}, 422, "another body"),
        (b'{"data": 2}', {}, 503, "MAX_PENDING"),
    ],
)
def test_a_refused_request_is_told_why_and_leaves_no_trace(full, body, headers, status_code, named):
    before = full.ids()

    answer = full.post("/process", data=body, headers=JSON | headers)

    assert named in refusal(answer, status_code)
    assert full.ids() == before


@pytest.mark.parametrize(("size", "status_code"), [(4096, 200), (4097, 400)])
def test_metadata_may_have_4096_bytes(service, size, status_code):
    metadata = {"é": "x" * (size - len('{"":""}') - 2)}

    answer = service.post("/process", json={"data": 1, "metadata": metadata})

    assert answer.status_code == status_code, answer.text


@pytest.mark.parametrize(
    ("url", "named"), [("file:///etc/passwd", "http://"), ("https://a.example/x?token=1", "a.exam")]
)
def test_a_postback_url_that_is_not_allowed_is_refused_with_what_is_wrong(service, url, named):
    answer = service.post("/process", json={"data": 1, "postback_url": url})

    assert named in refusal(answer, 422)
    assert "token" not in answer.text


# Idempotency


@pytest.mark.parametrize("form", ["{}", '"{}"'])
def test_the_same_key_and_body_give_the_same_answer_and_one_run(service, mailbox, form):
    body = json.dumps({"data": 1, "postback_url": mailbox.url})
    first = post(service, body, Idempotency_Key=mailbox.url)
    service.wait_for(first.json()["id"])

    second = post(service, body, Idempotency_Key=form.format(mailbox.url))

    assert (second.status_code, second.json()) == (200, first.json())
    assert len(mailbox.requests) == 1


def test_a_hundred_requests_with_one_key_are_one_job(service, mailbox):
    body = json.dumps({"data": 1, "postback_url": mailbox.url})

    with ThreadPoolExecutor(32) as callers:
        sent = callers.map(lambda _: post(service, body, Idempotency_Key=mailbox.url), range(100))
        job_ids = {answer.json()["id"] for answer in sent}

    assert len(job_ids) == 1
    service.wait_for(*job_ids)
    assert len(mailbox.requests) == 1


# Full, and failing


def test_past_max_pending_the_answer_is_503_until_a_job_has_started(start_process, gate):
    service = start_process(MAX_RUNNING="1", MAX_PENDING="1")
    service.send(gate.data)
    gate.wait_for(1)
    assert service.get("/readyz").json() == {"status": "ready"}
    service.send(gate.data)

    full = service.post("/process", json={"data": 3})
    unready = service.get("/readyz")

    assert "MAX_PENDING" in refusal(full, 503)
    assert int(full.headers["Retry-After"]) >= 1
    assert "MAX_PENDING" in refusal(unready, 503)
    gate.open()
    poll(lambda: service.get("/readyz").status_code == 200, "ready")
    service.wait_for(service.send(4))


def test_while_the_journal_cannot_be_written_the_answer_is_503(start_process, tmp_path):
    service = start_process()
    service.wait_for(service.send(1))
    before = service.ids()

    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = service.post("/process", json={"data": 1})
        unready = service.get("/readyz")

    assert "journal" in refusal(answer, 503)
    assert answer.headers["Retry-After"]
    assert "journal" in refusal(unready, 503)
    poll(lambda: service.get("/readyz").status_code == 200, "ready again")
    assert service.ids() == before
    service.wait_for(service.send(act("echo", 2)))

"""What each route promises, asked over HTTP of the service in this process."""

import hashlib
import json
import os
import signal
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import app
from jobs import errors
from tests.harness import events, failing, poll

ECHO = {"ANALYSIS": "tests.analyses:echo"}
WAIT = {"ANALYSIS": "tests.analyses:wait"}
JSON = {"Content-Type": "application/json"}
LATER = {"POSTBACK_SCHEDULE": "1h"}

#: Nothing listens there, and nothing is sent: a URL that is allowed, but never reached in a test.
ELSEWHERE = "http://127.0.0.1:9"


def refusal(answer, status_code):
    """Return the detail of an answer that refuses, once its form is seen to be right."""
    problem = answer.json()
    assert answer.status_code == problem["status"] == status_code, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert sorted(problem) == ["detail", "status", "title", "type"]
    return problem["detail"]


def send(service, body=b'{"data": 1}', **headers):
    return service.post(
        "/process", data=body, headers=JSON | {k.replace("_", "-"): v for k, v in headers.items()}
    )


def ids(service, query=""):
    return [job["id"] for job in service.get("/jobs" + query).json()["jobs"]]


# POST /process


def test_a_payload_is_answered_200_and_its_result_posted_back(start, receiver):
    service = start(**ECHO, POSTBACK_URL=receiver.url)

    answer = service.post("/process", json={"data": [1, {"ä": None}]})

    job_id = answer.json()["id"]
    assert answer.status_code == 200
    assert answer.headers["Location"] == f"/jobs/{job_id}"
    assert answer.json() == {
        "id": job_id,
        "state": "accepted",
        "status_url": f"{service.base_url}/jobs/{job_id}",
    }
    (event,) = events(receiver.wait_for(1))
    assert event["type"] == "job.succeeded"
    assert event["data"]["result"] == [1, {"ä": None}]


@pytest.mark.parametrize(
    ("prefer", "status_code", "applied"),
    [
        ("respond-async", 202, "respond-async"),
        ("wait=10, respond-async", 202, "respond-async"),
        ("return=minimal", 200, None),
    ],
)
def test_a_202_is_answered_to_who_prefers_it(service, prefer, status_code, applied):
    answer = send(service, Prefer=prefer)

    assert answer.status_code == status_code
    assert answer.headers.get("Preference-Applied") == applied
    assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"


@pytest.mark.parametrize("data", [0, False, 0.0, "x", [0], {"": 0}])
def test_what_only_looks_empty_is_data(start, receiver, data):
    service = start(**ECHO, POSTBACK_URL=receiver.url)

    service.process({"data": data})

    assert events(receiver.wait_for(1))[0]["data"]["result"] == data


@pytest.mark.parametrize(
    ("body", "headers", "status_code", "named"),
    [
        (b"{}", {}, 400, "Missing data"),
        (b'{"data": null}', {}, 400, "Missing data"),
        (b'{"data": ""}', {}, 400, "Missing data"),
        (b'{"data": []}', {}, 400, "Missing data"),
        (b'{"data": {}}', {}, 400, "Missing data"),
        (b'{"data": 1, "date": 2}', {}, 400, "date"),
        (b'{"data": 1, "postback_url": 5}', {}, 400, "postback_url"),
        (b"[1]", {}, 400, "object"),
        (b"{", {}, 400, "JSON"),
        (b'{"data": NaN}', {}, 400, "NaN"),
        (b'{"data": "\xe4"}', {"Content-Type": "application/json; charset=latin-1"}, 400, "UTF-8"),
        (b'{"data": %s1%s}' % (b"[" * 490, b"]" * 490), {}, 400, "deep"),
        (b"", {}, 400, "empty"),
        (b'{"data": 1}', {"Content-Type": "text/plain"}, 415, "application/json"),
        (b'{"data": 1}', {"Content-Type": "application/problem+json"}, 415, "application/json"),
        (b'{"data": 1}', {"Content-Encoding": "gzip"}, 415, "unencoded"),
        (b'{"data": "%s"}' % (b"x" * 1024), {}, 413, "1024"),
        (b'{"data": 1}', {"Idempotency-Key": ""}, 400, "Idempotency-Key"),
        (b'{"data": 1}', {"Idempotency-Key": "k" * 300}, 400, "Idempotency-Key"),
        (b'{"data": 1}', {"Idempotency-Key": "a\tb"}, 400, "Idempotency-Key"),
        (b'{"data": 1, "postback_url": "http://127.0.0.1/"}', {}, 422, "POSTBACK_ALLOW"),
    ],
)
def test_a_refused_request_names_the_reason_and_leaves_no_row(
    start, body, headers, status_code, named
):
    service = start(**ECHO, MAX_BODY="1KiB")

    answer = service.post("/process", data=body, headers=JSON | headers)

    assert named in refusal(answer, status_code)
    assert ids(service) == []


@pytest.mark.parametrize(
    ("body", "headers", "status_code"),
    [
        (b"x" * 2000, {"Content-Type": "text/plain"}, 413),  # size before type
        (b"{", {"Content-Type": "text/plain"}, 415),  # type before JSON
        (b'{"postback_url": "ftp://x"}', {}, 400),  # fields before the policy
        (b'{"data": 2, "postback_url": "ftp://x"}', {"Idempotency-Key": "k"}, 422),
        (b'{"data": 2}', {"Idempotency-Key": "k"}, 422),  # idempotency before capacity
        (b'{"data": 2}', {}, 503),
    ],
)
def test_the_checks_come_in_their_order(start, gate, body, headers, status_code):
    service = start(**WAIT, MAX_BODY="1KiB", MAX_RUNNING="1", MAX_PENDING="1")
    send(service, Idempotency_Key="k")
    gate.wait_for(1)
    send(service)

    answer = service.post("/process", data=body, headers=JSON | headers)

    assert refusal(answer, status_code)
    gate.open()


# Idempotency


@pytest.mark.parametrize("again", ["key-1", '"key-1"'])
def test_the_same_key_and_body_give_the_same_answer_and_one_run(start, receiver, again):
    service = start(**ECHO, POSTBACK_URL=receiver.url)
    first = send(service, Idempotency_Key="key-1")
    service.wait_for(first.json()["id"])

    second = send(service, Idempotency_Key=again)

    assert (second.status_code, second.json()) == (200, first.json())
    assert ids(service) == [first.json()["id"]]
    assert len(receiver.requests) == 1


def test_a_key_is_remembered_over_a_restart(start, receiver):
    service = start(**ECHO, POSTBACK_URL=receiver.url)
    first = send(service, Idempotency_Key="key-1").json()["id"]
    service.wait_for(first)

    service.restart()

    assert send(service, Idempotency_Key="key-1").json()["id"] == first
    assert ids(service) == [first]


def test_a_key_with_another_body_is_refused(service):
    send(service, Idempotency_Key="key-1")

    answer = send(service, b'{"data":1}', Idempotency_Key="key-1")

    assert "another body" in refusal(answer, 422)
    assert len(ids(service)) == 1


def test_a_hundred_requests_with_one_key_are_one_job(start, receiver):
    service = start(**ECHO, POSTBACK_URL=receiver.url)

    with ThreadPoolExecutor(32) as callers:
        answers = list(
            callers.map(lambda _: send(service, Idempotency_Key="one").json()["id"], range(100))
        )

    assert len(set(answers)) == 1
    assert ids(service) == [answers[0]]
    service.wait_for(answers[0])
    assert len(receiver.requests) == 1


# Full, draining, failing


def test_past_max_pending_the_answer_is_503_until_a_job_has_begun(start, gate):
    service = start(**WAIT, MAX_RUNNING="1", MAX_PENDING="1")
    first = send(service, Idempotency_Key="k")
    gate.wait_for(1)
    waiting = service.process({"data": 2})

    full = service.post("/process", json={"data": 3})

    assert "MAX_PENDING" in refusal(full, 503)
    assert int(full.headers["Retry-After"]) >= 1
    assert "MAX_PENDING" in refusal(service.get("/readyz"), 503)
    assert send(service, Idempotency_Key="k").json() == first.json()
    assert ids(service) == [waiting, first.json()["id"]]
    gate.open()
    gate.wait_for(2)
    assert service.get("/readyz").status_code == 200
    service.process({"data": 4})


def test_while_it_drains_nothing_is_accepted_but_it_lives(start):
    service = start(**ECHO)
    service.service.runner.drain(1)

    answer = service.post("/process", json={"data": 1})

    assert "stopping" in refusal(answer, 503)
    assert answer.headers["Retry-After"]
    assert "stopping" in refusal(service.get("/readyz"), 503)
    assert service.get("/livez").json() == {"status": "alive"}


def test_a_failing_journal_refuses_until_it_recovers_by_itself(start, receiver):
    service = start(**ECHO, POSTBACK_URL=receiver.url)

    with failing(service.journal):
        answer = service.post("/process", json={"data": 1})
        assert "journal" in refusal(service.get("/readyz"), 503)

    assert "journal" in refusal(answer, 503)
    assert answer.headers["Retry-After"]
    poll(lambda: service.get("/readyz").status_code == 200, "ready again")
    assert ids(service) == []
    service.wait_for(service.process({"data": 2}))


# The token


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/process"),
        ("GET", "/jobs"),
        ("GET", "/jobs/x"),
        ("GET", "/jobs/x/result"),
        ("POST", "/jobs/x/cancel"),
        ("POST", "/jobs/x/resend"),
        ("GET", "/postprocessed"),
    ],
)
@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic c2VjcmV0", "secret"])
def test_the_token_is_needed(start, method, path, authorization):
    service = start(**ECHO, API_TOKEN="secret")

    answer = service.request(method, path, headers={"Authorization": authorization})

    assert "Bearer" in refusal(answer, 401)
    assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("method", "path", "status_code"),
    [
        ("GET", "/livez", 200),
        ("GET", "/readyz", 200),
        ("POST", "/postprocessed", 200),
    ],
)
def test_some_routes_need_no_token(start, method, path, status_code):
    service = start(**ECHO, API_TOKEN="secret")

    answer = service.request(method, path, json={"type": "job.succeeded"})

    assert answer.status_code == status_code


def test_the_token_opens_and_its_scheme_has_no_case(start):
    service = start(**ECHO, API_TOKEN="secret")

    answer = send(service, Authorization="bearer secret")

    assert answer.status_code == 200


# To whom


def test_the_headers_that_trace_a_request_reach_the_postback(service, receiver):
    traced = {"traceparent": "00-1-2-01", "tracestate": "a=b", "X-Request-ID": "r-1"}

    service.process({"data": 1}, headers=traced)

    sent = receiver.wait_for(1)[0].headers
    assert [sent[name.lower()] for name in traced] == list(traced.values())


def test_a_header_that_cannot_be_sent_on_refuses_nothing(service, receiver):
    service.process({"data": 1}, headers={"X-Request-ID": "ä".encode()})

    assert "x-request-id" not in receiver.wait_for(1)[0].headers


def test_an_allowed_postback_url_is_posted_to(start, receiver):
    service = start(**ECHO, POSTBACK_URL=ELSEWHERE, POSTBACK_ALLOW=receiver.origin)

    job_id = service.process({"data": 1, "postback_url": receiver.url_for("/here")})

    assert receiver.wait_for(1)[0].path == "/here"
    assert service.wait_for(job_id)["postback_url"] == receiver.url_for("/here")


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/",
        "http://allowed.example@evil.example/",
        "http://evil.example/#@allowed.example",
        "http://allowed.example\\@evil.example",
        "http://allowed.example.evil.example/",
        "http://evil.example/allowed.example",
        "http://allowed.example:81/",
        "https://allowed.example/",
        "http://2130706433/",
        "http://[::1]/",
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "javascript:1",
        "//allowed.example/",
        "",
        "http://allowed.example/\r\nX: y",
        "http://allowed.example/\x00",
        "http://ällowed.example/",
        "http://allowed.example/" + "x" * 10_000,
    ],
)
@pytest.mark.parametrize("allow", ["", "http://allowed.example"])
def test_another_postback_url_is_refused(start, url, allow):
    service = start(**ECHO, POSTBACK_ALLOW=allow)

    answer = service.post("/process", json={"data": 1, "postback_url": url})

    assert refusal(answer, 422)
    assert ids(service) == []


# GET /jobs


def test_jobs_are_listed_newest_first_in_pages(start):
    service = start(**ECHO)
    sent = [service.process({"data": number}) for number in range(1, 6)]

    pages = [ids(service, "?limit=2")]
    pages += [ids(service, f"?limit=2&before={pages[0][-1]}")]
    pages += [ids(service, f"?limit=2&before={pages[1][-1]}")]

    assert pages == [[sent[4], sent[3]], [sent[2], sent[1]], [sent[0]]]


def test_jobs_are_listed_by_state_without_what_is_large(start, gate):
    service = start(**WAIT, MAX_RUNNING="1")
    running, waiting = service.process({"data": 1}), service.process({"data": 2})
    gate.wait_for(1)

    listed = service.get("/jobs?state=accepted").json()["jobs"]

    assert [job["id"] for job in listed] == [waiting]
    assert ids(service, "?state=running") == [running]
    assert not {"data", "result", "error"} & set(listed[0])


@pytest.mark.parametrize(
    ("query", "status_code"),
    [
        ("state=done", 400),
        ("state=", 400),
        ("limit=0", 400),
        ("limit=1001", 400),
        ("limit=-1", 400),
        ("limit=x", 400),
        ("limit=", 400),
        ("limit=%C2%B2", 400),
        ("limit=0000000011001", 400),
        ("limit=" + "9" * 5000, 400),
        ("limit=000000001" + "9" * 5000, 400),
        ("before=unknown", 404),
        ("before=", 404),
        ("before=%FF%00", 404),
    ],
)
def test_a_listing_of_nonsense_is_refused(start, query, status_code):
    service = start(**ECHO)

    answer = service.get(f"/jobs?{query}")

    assert refusal(answer, status_code)


# One job


def test_everything_about_a_delivered_job_is_told(start, receiver):
    service = start(**ECHO, POSTBACK_URL=receiver.url)
    job_id = service.process({"data": {"a": 1}})

    job = service.wait_for(job_id)

    assert job["id"] == job_id
    assert (job["state"], job["outcome"], job["starts"]) == ("delivered", "succeeded", 1)
    assert (job["data"], job["result"], job["error"]) == ({"a": 1}, {"a": 1}, None)
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] <= job["ended_at"]
    assert (job["next_attempt_at"], job["attempts_made"]) == (None, 1)
    assert [(one["number"], one["status_code"]) for one in job["attempts"]] == [(1, 204)]


def test_a_job_that_runs_has_neither_outcome_nor_result(start, gate):
    service = start(**WAIT)
    job_id = service.process({"data": 1})
    gate.wait_for(1)

    job = service.job(job_id)

    assert (job["state"], job["outcome"], job["result"], job["error"]) == ("running",) + (None,) * 3
    assert "wanted" not in refusal(service.get(f"/jobs/{job_id}/result"), 409)


def test_a_failed_attempt_tells_when_the_next_one_is(start, receiver):
    receiver.answers = [503]
    service = start(**ECHO, **LATER, POSTBACK_URL=receiver.url)
    job_id = service.process({"data": 1})

    job = poll(lambda: (one := service.job(job_id))["attempts"] and one, "an attempt")

    assert job["state"] == "delivering"
    assert job["next_attempt_at"] > job["finished_at"]
    assert "503" in job["attempts"][0]["error"]


@pytest.mark.parametrize(
    ("analysis", "kind", "message"),
    [
        ("fail", "ValueError", "cannot analyze 7"),
        ("leave", "SystemExit", "left at 7"),
        ("interrupt", "KeyboardInterrupt", ""),
        ("exhaust", "MemoryError", ""),
        ("nan", "not_serialisable", "Out of range float values"),
        ("unserialisable", "not_serialisable", "set"),
        ("circular", "not_serialisable", "Circular"),
        ("deep", "not_serialisable", ""),
    ],
)
def test_an_analysis_that_fails_is_posted_back_with_its_error(
    start, receiver, analysis, kind, message
):
    service = start(ANALYSIS=f"tests.analyses:{analysis}", POSTBACK_URL=receiver.url)

    job_id = service.process({"data": 7})

    (event,) = events(receiver.wait_for(1))
    assert event["type"] == "job.failed"
    assert event["data"]["error"]["type"] == kind
    assert message in event["data"]["error"]["message"]
    assert "Traceback" not in str(event)
    assert service.wait_for(job_id)["error"] == event["data"]["error"]
    assert "failed" in refusal(service.get(f"/jobs/{job_id}/result"), 409)


def test_an_analysis_that_changes_its_input_does_not_change_the_payload(start, receiver):
    service = start(ANALYSIS="tests.analyses:change", POSTBACK_URL=receiver.url)

    job = service.wait_for(service.process({"data": [1, 2]}))

    assert (job["data"], job["result"]) == ([1, 2], "emptied")


def test_a_large_result_is_posted_as_a_link_to_the_bytes_that_were_told(start, receiver):
    service = start(
        ANALYSIS="tests.analyses:large", POSTBACK_URL=receiver.url, POSTBACK_MAX_BYTES="1KiB"
    )
    job_id = service.process({"data": 5000})
    ending = events(receiver.wait_for(1))[0]["data"]

    answer = service.get(ending["result_url"].removeprefix(service.base_url))

    assert "result" not in ending
    assert answer.headers["Content-Type"] == "application/json"
    assert hashlib.sha256(answer.content).hexdigest() == ending["result_sha256"]
    assert len(answer.content) == ending["result_bytes"] == 5002
    assert service.job(job_id)["result_url"] == ending["result_url"]


def test_a_result_that_was_posted_whole_can_be_got_alone(service):
    job = service.wait_for(service.process({"data": [1, 2]}))

    assert service.get(f"/jobs/{job['id']}/result").json() == job["result"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/jobs/nobody"),
        ("GET", "/jobs/nobody/result"),
        ("POST", "/jobs/nobody/cancel"),
        ("POST", "/jobs/nobody/resend"),
        ("GET", "/jobs/%00%C3%A4"),
    ],
)
def test_an_unknown_job_is_404(service, method, path):
    answer = service.request(method, path)

    assert "No job has the id" in refusal(answer, 404)


@pytest.mark.parametrize("operation", ["cancel", "resend"])
def test_what_the_state_does_not_allow_is_409(start, gate, receiver, operation):
    service = start(**WAIT, POSTBACK_URL=receiver.url, MAX_RUNNING="1")
    gate.open(1)
    ended, running = service.process({"data": 1}), service.process({"data": 2})
    service.wait_for(ended)
    gate.wait_for(2)

    answer = service.post(f"/jobs/{({'cancel': ended, 'resend': running})[operation]}/{operation}")

    assert refusal(answer, 409)


def test_a_resent_job_is_delivered_again_under_the_same_id(service, receiver):
    job_id = service.process({"data": 1})
    service.wait_for(job_id)

    answer = service.post(f"/jobs/{job_id}/resend")

    assert (answer.status_code, answer.json()["state"]) == (200, "delivering")
    first, second = receiver.wait_for(2)
    assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])


def test_a_canceled_job_is_told_so_at_once(start, gate, receiver):
    service = start(**WAIT, POSTBACK_URL=receiver.url)
    job_id = service.process({"data": 1})
    gate.wait_for(1)

    answer = service.post(f"/jobs/{job_id}/cancel")

    assert (answer.status_code, answer.json()["outcome"]) == (200, "canceled")
    assert events(receiver.wait_for(1))[0]["type"] == "job.canceled"


# The built-in receiver, in the same service


def test_by_default_the_service_posts_back_to_itself(start):
    service = start(**ECHO)
    job_id = service.process({"data": "here"})

    service.wait_for(job_id)

    (received,) = service.get("/postprocessed").json()["received"]
    assert received["webhook_id"] == job_id
    assert received["signature"] == "none"
    assert received["event"]["data"]["result"] == "here"


@pytest.mark.parametrize("limit", ["0", "x"])
def test_a_listing_of_postbacks_takes_a_limit(start, limit):
    service = start(**ECHO)

    assert "limit" in refusal(service.get(f"/postprocessed?limit={limit}"), 400)


# Wiring


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("::", "http://[::1]:80"),
        ("box.example", "http://box.example:80"),
    ],
)
def test_the_address_is_told_as_this_machine_reaches_it(host, url):
    assert app._own_url(host, 80) == url


def test_links_begin_with_the_public_url(start):
    service = start(**ECHO, PUBLIC_URL="https://jobs.example/api")
    service.base_url = f"http://127.0.0.1:{service.service._server.port}"

    answer = send(service).json()

    assert answer["status_url"] == f"https://jobs.example/api/jobs/{answer['id']}"


def test_the_journal_of_a_stopped_service_tells_the_same_to_sqlite(start, tmp_path):
    service = start(**ECHO)
    job_id = service.process({"data": 1})
    service.wait_for(job_id)
    service.restart()
    service.service._journal.close()

    connection = sqlite3.connect(tmp_path / "journal.db")
    rows = connection.execute("SELECT id, state FROM jobs").fetchall()
    connection.close()

    service.service._journal.open()
    assert rows == [(job_id, "delivered")]


def test_a_stop_tells_how_many_jobs_wait_for_the_next_start(start, gate):
    service = start(**WAIT, MAX_RUNNING="1", DRAIN="100ms")
    sent = [service.process({"data": number}) for number in (1, 2)]
    gate.wait_for(1)

    left = service.restart()

    gate.open()
    assert left == 2
    assert [service.wait_for(job_id)["starts"] for job_id in sent] == [1, 1]


@pytest.mark.parametrize(("jobs", "code"), [(0, 0), (1, app.EXIT_WAITING)])
def test_a_signal_ends_in_the_code_that_tells_whether_jobs_wait(start, gate, jobs, code):
    service = start(**WAIT, DRAIN="50ms")
    [service.process({"data": 1}) for _ in range(jobs)]
    gate.wait_for(jobs)

    service.service._on_signal(signal.SIGUSR2, None)

    found = service.service.run()

    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    service.start_again()
    assert found == code


def test_a_stop_with_a_failing_journal_ends_in_its_own_code(start):
    service = start(**ECHO)
    service.service._happened.put(signal.SIGTERM)

    with failing(service.journal):
        code = service.service.run()

    service.service._server.stop()
    service.service._sender.close()
    service.journal.close()
    service.start_again()
    assert code == app.EXIT_LOST


def test_a_service_that_is_in_use_is_refused(start):
    start(**ECHO)

    with pytest.raises(errors.ConfigError, match="pid"):
        start(**ECHO)


def test_a_postback_is_shown_on_a_terminal_only(monkeypatch):
    master, slave = os.openpty()
    with open(slave, "w") as terminal:  # noqa: PTH123 - a descriptor
        monkeypatch.setattr(sys, "stdout", terminal)

        app._print_to_terminal("postback received")

        assert os.read(master, 100) == b"postback received\r\n"
    os.close(master)


def test_elsewhere_nothing_is_shown(capsys):
    app._print_to_terminal("postback received")

    assert capsys.readouterr().out == ""


def test_the_event_is_json_with_an_unchanging_form(start, receiver):
    service = start(**ECHO, POSTBACK_URL=receiver.url)
    service.process({"data": 1})

    event = json.loads(receiver.wait_for(1)[0].body)

    assert list(event) == ["type", "timestamp", "data"]
    assert sorted(event["data"]) == [
        "created_at",
        "error",
        "finished_at",
        "id",
        "outcome",
        "result",
        "started_at",
    ]

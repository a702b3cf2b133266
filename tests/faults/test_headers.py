"""Group B: headers, paths and methods."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import wire
from tests.faults.world import delivered, leaving

LATIN = '{"data": "ä"}'.encode("latin-1")
JSON = "application/json"


def case(number: str, sent: bytes, code: int, rows: int = 0):
    return pytest.param(sent, code, rows, id=number)


def line(text: str) -> bytes:
    """Return a request without a body, by its first line."""
    return f"{text} HTTP/1.1\r\nHost: x\r\n\r\n".encode("latin-1")


def typed(media: str) -> bytes:
    return wire.post(media=media)


def headed(header: str) -> bytes:
    return wire.post(extra=f"{header}\r\n")


@pytest.mark.parametrize(
    ("sent", "code", "rows"),
    [
        case("B01 none", typed(""), 415),
        case("B01 text", typed("text/plain"), 415),
        case("B01 form", typed("application/x-www-form-urlencoded"), 415),
        case("B01 multipart", typed("multipart/form-data; boundary=x"), 415),
        case("B01 two", typed(f"{JSON}, text/plain"), 415),
        case("B02 charset", typed(f"{JSON}; charset=utf-8"), 200, 1),
        case("B02 upper case", typed("APPLICATION/JSON"), 200, 1),
        case("B02 spaces", typed(f"  {JSON} ; charset = UTF-8 "), 200, 1),
        case("B03", typed("application/problem+json"), 415),
        case("B04", wire.post(LATIN, media=f"{JSON}; charset=latin-1"), 400),
        case("B05 gzip", headed("Content-Encoding: gzip"), 415),
        case("B05 identity", headed("Content-Encoding: identity"), 200, 1),
        case("B06 header of 100 KB", headed("X: " + "x" * 100_000), 431),
        case("B06 URL of 100 KB", wire.post(path="/process?" + "x" * 100_000), 431),
        case("B06 2,000 headers", headed("\r\n".join(["X: 12345"] * 2000)), 200, 1),
        case("B06 4,000 headers", headed("\r\n".join(["X: 12345"] * 4000)), 431),
        case("B07 space", headed("X : y"), 400),
        case("B07 no colon", headed("nothing"), 400),
        case("B07 no name", headed(": y"), 400),
        case("B08 two", headed("Host: y"), 200, 1),
        case("B08 none", wire.post().replace(b"Host: x\r\n", b""), 200, 1),
        case("B08 userinfo", wire.post().replace(b"Host: x", b"Host: a:b@c"), 200, 1),
        case("B09", headed("Content_Type: text/plain"), 200, 1),
        case("B10", headed("X-Forwarded-For: 10.0.0.1\r\nForwarded: for=10.0.0.1"), 200, 1),
        case("B11 GET", line("GET /process"), 405),
        case("B11 PUT", line("PUT /process"), 405),
        case("B11 DELETE", line("DELETE /process"), 405),
        case("B11 PATCH", line("PATCH /process"), 405),
        case("B11 BREW", line("BREW /process"), 405),
        case("B12 OPTIONS", line("OPTIONS /process"), 405),
        case("B12 TRACE", line("TRACE /process"), 405),
        case("B12 CONNECT", line("CONNECT evil.example:443"), 404),
        case("B13 trailing slash", wire.post(path="/process/"), 404),
        case("B13 upper case", wire.post(path="/PROCESS"), 404),
        case("B13 %00", wire.post(path="/process%00"), 404),
        case("B13 //", wire.post(path="//process"), 200, 1),
        case("B13 %ff", wire.post(path="/process%ff"), 200, 1),
        case("B13 /%ff", line("GET /%ff"), 200),
        case("B13 dots", wire.post(path="/x/../process"), 404),
        case("B14", line("GET /<script>alert(1)</script>"), 404),
        case("B15 absolute", wire.post(path="http://evil.example/process"), 200, 1),
        case("B15 OPTIONS *", line("OPTIONS *"), 404),
        case("B16 empty", headed("Idempotency-Key:"), 400),
        case("B16 quoted empty", headed('Idempotency-Key: ""'), 400),
        case("B16 300 characters", headed("Idempotency-Key: " + "k" * 300), 400),
        case("B16 tab", headed("Idempotency-Key: a\tb"), 400),
        case("B16 DEL", headed("Idempotency-Key: a\x7fb"), 400),
        case("B16 not ASCII", headed("Idempotency-Key: \xe4"), 400),
        case("B16 two", headed("Idempotency-Key: a\r\nIdempotency-Key: b"), 200, 1),
    ],
)
def test_headers_and_paths(shared, sent, code, rows):
    with leaving(shared, rows):
        assert wire.status_code(shared, sent) == code


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(typed("text/plain"), 415, id="B01"),
        pytest.param(line("GET /process"), 405, id="B11"),
        pytest.param(wire.post(path="/process%00"), 404, id="B13"),
        pytest.param(line("GET /<script>alert(1)</script>"), 404, id="B14"),
        pytest.param(headed("Idempotency-Key:"), 400, id="B16"),
    ],
)
def test_what_the_application_refuses_is_json_and_reflects_nothing(shared, sent, code):
    with leaving(shared, 0):
        _, headers, body = wire.exchange(shared, sent)

    assert headers["Content-Type"] == "application/problem+json"
    assert json.loads(body)["status"] == code
    assert b"script" not in body


def test_b08_b10_b15_no_header_of_the_caller_changes_the_links(shared):
    sent = wire.post(
        path="http://evil.example/process",
        extra="Host: evil.example\r\nX-Forwarded-Host: evil.example\r\nForwarded: host=y\r\n",
    )

    with leaving(shared, 1):
        _, headers, body = wire.exchange(shared, sent)

    assert json.loads(body)["status_url"].startswith(shared.base_url + "/jobs/")
    assert headers["Location"].startswith("/jobs/")


def test_b11_a_wrong_method_is_told_the_right_one(shared):
    with leaving(shared, 0):
        _, headers, _ = wire.exchange(shared, line("BREW /process"))

    assert headers["Allow"] == "POST"


def test_b12_head_is_answered_without_a_body(shared):
    with leaving(shared, 0), wire.connected(shared) as (conn, stream):
        conn.sendall(line("HEAD /process") + b"GET /livez HTTP/1.0\r\n\r\n")

        head, _, rest = stream.read().partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 405")
    assert rest.startswith(b"HTTP/1.0 200")


def test_b17_the_same_key_and_body_in_sequence_are_one_job(shared):
    sent = wire.post(b'{"data": "b17"}', extra="Idempotency-Key: b17\r\n")

    with leaving(shared, 1):
        answers = [json.loads(wire.exchange(shared, sent)[2]) for _ in range(2)]

    assert answers[0] == answers[1]


def test_b17_the_same_key_and_body_fifty_times_at_once_are_one_job(shared, listening):
    sent = wire.post(b'{"data": "b17"}', extra="Idempotency-Key: b17 at once\r\n")

    with leaving(shared, 1), ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: wire.exchange(shared, sent), range(50)))

    assert {code for code, _, _ in answers} == {200}
    (job_id,) = {json.loads(body)["id"] for _, _, body in answers}
    assert len(delivered(listening, job_id)) == 1


def test_b18_a_key_with_another_body_is_refused(shared):
    first, other = (wire.post(b'{"data":%d}' % n, extra="Idempotency-Key: b18\r\n") for n in (1, 2))

    with leaving(shared, 1):
        assert [wire.status_code(shared, one) for one in (first, other, first)] == [200, 422, 200]


def test_b19_what_nobody_expected_is_a_500_without_a_traceback_logged_once(
    shared, monkeypatch, caplog
):
    def broken(job_id):
        raise ValueError("secret")

    monkeypatch.setattr(shared.journal, "detail", broken)

    code, headers, body = wire.exchange(shared, wire.get("/jobs/x"))

    monkeypatch.undo()
    assert (code, headers["Content-Type"]) == (500, "application/problem+json")
    assert b"secret" not in body
    assert [one.message for one in caplog.records] == ["request failed"]

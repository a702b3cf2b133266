"""Group B: headers, paths and methods."""

import json

import pytest

from tests import wire
from tests.faults.world import answers, case, check

LATIN = '{"data": "ä"}'.encode("latin-1")
JSON = "application/json"


def line(text: str) -> bytes:
    """Return a request without a body, by its first line."""
    return f"{text} HTTP/1.1\r\nHost: x\r\n\r\n".encode("latin-1")


def typed(media: str) -> bytes:
    return wire.post(media=media)


def headed(header: str) -> bytes:
    return wire.post(extra=f"{header}\r\n")


def hosted(header: str) -> bytes:
    return wire.post().replace(b"Host: x\r\n", header.encode())


@pytest.mark.parametrize(
    ("sent", "codes", "rows"),
    [
        case("B01 none", typed(""), 415),
        case("B01 text", typed("text/plain"), 415),
        case("B01 form", typed("application/x-www-form-urlencoded"), 415),
        case("B01 two", typed(f"{JSON}, text/plain"), 415),
        case("B02 charset", typed(f"{JSON}; charset=utf-8"), 200, rows=1),
        case("B02 upper case", typed("APPLICATION/JSON"), 200, rows=1),
        case("B02 spaces", typed(f"  {JSON} ; charset = UTF-8 "), 200, rows=1),
        case("B03", typed("application/problem+json"), 415),
        case("B04", wire.post(LATIN, media=f"{JSON}; charset=latin-1"), 400),
        case("B05 gzip", headed("Content-Encoding: gzip"), 415),
        case("B05 identity", headed("Content-Encoding: identity"), 200, rows=1),
        case("B06 header of 100 KB", headed("X: " + "x" * 100_000), 431),
        case("B06 URL of 100 KB", wire.post(path="/process?" + "x" * 100_000), 431),
        case("B06 2,000 headers", headed("\r\n".join(["X: 12345"] * 2000)), 200, rows=1),
        case("B06 4,000 headers", headed("\r\n".join(["X: 12345"] * 4000)), 431),
        case("B07 space", headed("X : y"), 400),
        case("B07 no colon", headed("nothing"), 400),
        case("B07 no name", headed(": y"), 400),
        case("B08 foreign", hosted("Host: evil.example\r\n"), 403),
        case("B08 two", hosted("Host: localhost\r\nHost: evil.example\r\n"), 403),
        case("B08 userinfo", hosted("Host: localhost:80@evil.example\r\n"), 403),
        case("B08 none", hosted(""), 200, rows=1),
        case("B09", headed("Content_Type: text/plain"), 200, rows=1),
        case("B10", headed("X-Forwarded-For: 10.0.0.1\r\nForwarded: for=10.0.0.1"), 200, rows=1),
        case("B11 GET", line("GET /process"), 405),
        case("B11 PUT", line("PUT /process"), 405),
        case("B11 DELETE", line("DELETE /process"), 405),
        case("B11 BREW", line("BREW /process"), 405),
        case("B12 OPTIONS", line("OPTIONS /process"), 405),
        case("B12 TRACE", line("TRACE /process"), 405),
        case("B12 CONNECT", line("CONNECT evil.example:443"), 404),
        case("B13 trailing slash", wire.post(path="/process/"), 404),
        case("B13 upper case", wire.post(path="/PROCESS"), 404),
        case("B13 %00", wire.post(path="/process%00"), 404),
        case("B13 //", wire.post(path="//process"), 200, rows=1),
        case("B13 %ff", wire.post(path="/process%ff"), 200, rows=1),
        case("B13 dots", wire.post(path="/x/../process"), 404),
        case("B14", line("GET /<script>alert(1)</script>"), 404),
        case("B15 absolute", wire.post(path="http://evil.example/process"), 200, rows=1),
        case("B15 OPTIONS *", line("OPTIONS *"), 404),
        case("B16 empty", headed("Idempotency-Key:"), 400),
        case("B16 quoted empty", headed('Idempotency-Key: ""'), 400),
        case("B16 300 characters", headed("Idempotency-Key: " + "k" * 300), 400),
        case("B16 DEL", headed("Idempotency-Key: a\x7fb"), 400),
        case("B16 not ASCII", headed("Idempotency-Key: \xe4"), 400),
        case("B16 two", headed("Idempotency-Key: a\r\nIdempotency-Key: b"), 200, rows=1),
    ],
)
def test_headers_and_paths(service, sent, codes, rows):
    check(service, sent, codes, rows)


def test_b12_head_is_answered_without_a_body(service):
    with wire.connected(service) as (conn, stream):
        conn.sendall(line("HEAD /process") + b"GET /livez HTTP/1.0\r\n\r\n")

        head, _, rest = stream.read().partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 405")
    assert rest.startswith(b"HTTP/1.0 200")


def test_b13_a_path_that_is_not_utf_8_is_read_as_the_page(service):
    assert answers(service, line("GET /%ff"), 1)[0][0] == 200


def test_b10_b15_no_header_of_the_caller_changes_the_links(service):
    extra = "X-Forwarded-Host: evil.example\r\nForwarded: host=evil.example\r\n"

    sent = wire.post(path="http://evil.example/process", extra=extra)
    _, headers, body = answers(service, sent, 1)[0]

    assert headers["Location"] == json.loads(body)["status_url"]
    assert headers["Location"].startswith(service.base_url + "/jobs/")

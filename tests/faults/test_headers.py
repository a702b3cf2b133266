"""Group B: headers, paths and methods."""

import json
import socket

import pytest

from tests import wire
from tests.faults.world import answers, cases, check, here

LATIN = '{"data": "ä"}'.encode("latin-1")
JSON = "application/json"


def line(text: str) -> bytes:
    """Return a request without a body, by its first line."""
    return f"{text} HTTP/1.1\r\nHost: x\r\n\r\n".encode("latin-1")


def typed(media: str) -> bytes:
    return wire.post(media=media)


def headed(header: str) -> bytes:
    return wire.post(extra=f"{header}\r\n")


def keyed(key: str) -> bytes:
    return headed(f"Idempotency-Key: {key}")


def to(path: str) -> bytes:
    return wire.post(path=path)


def hosted(header: str) -> bytes:
    return wire.post().replace(b"Host: x\r\n", header.encode())


@pytest.mark.parametrize(
    ("sent", "codes", "rows"),
    [
        *cases("B01", 415, typed(""), typed("text/plain"), typed(f"{JSON}, text/plain")),
        *cases("B01 form", 415, typed("application/x-www-form-urlencoded")),
        *cases("B02", 200, typed(f"{JSON}; charset=utf-8"), typed("APPLICATION/JSON")),
        *cases("B02 spaces", 200, typed(f"  {JSON} ; charset = UTF-8 ")),
        *cases("B03", 415, typed("application/problem+json"), typed("application/jsonp")),
        *cases("B04", 400, wire.post(LATIN, media=f"{JSON}; charset=latin-1")),
        *cases("B05", 415, headed("Content-Encoding: gzip")),
        *cases("B05 identity", 200, headed("Content-Encoding: identity")),
        *cases("B06", 431, headed("X: " + "x" * 100_000), wire.post(path="/?" + "x" * 100_000)),
        *cases("B06 2,000 headers", 200, headed("\r\n".join(["X: 12345"] * 2000))),
        *cases("B06 4,000 headers", 431, headed("\r\n".join(["X: 12345"] * 4000))),
        *cases("B07", 400, headed("X : y"), headed("nothing"), headed(": y")),
        *cases("B08", 403, hosted("Host: evil.example\r\n"), hosted("Host: localhost:80@a.b\r\n")),
        *cases("B08 two", 403, hosted("Host: localhost\r\nHost: evil.example\r\n")),
        *cases("B08 none", 200, hosted("")),
        *cases("B09", 200, headed("Content_Type: text/plain")),
        *cases("B10", 200, headed("X-Forwarded-For: 10.0.0.1\r\nForwarded: for=10.0.0.1")),
        *cases("B11", 405, line("GET /process"), line("PUT /process"), line("DELETE /process")),
        *cases("B11 BREW", 405, line("BREW /process")),
        *cases("B12", 405, line("OPTIONS /process"), line("TRACE /process")),
        *cases("B12 CONNECT", 404, line("CONNECT evil.example:443")),
        *cases("B13", 404, *map(to, ("/process/", "/PROCESS", "/process%00", "/x/../process"))),
        *cases("B13 the same", 200, to("//process"), to("/process%ff")),
        *cases("B14", 404, line("GET /<script>alert(1)</script>")),
        *cases("B15", 200, to("http://evil.example/process")),
        *cases("B15 OPTIONS *", 404, line("OPTIONS *")),
        *cases("B16", 400, *map(keyed, ("", '""', "k" * 300, "a\x7fb", "\xe4"))),
        *cases("B16 quotes", 400, *map(keyed, (f'"{"k" * 256}"', '"abc', r'"a\b"', '"a", "b"'))),
        *cases("B16 two", 200, keyed("a\r\nIdempotency-Key: b")),
    ],
)
def test_headers_and_paths(service, sent, codes, rows):
    check(service, sent, codes, rows)


def test_b12_head_is_answered_without_a_body(service):
    with wire.connected(service) as (conn, stream):
        conn.sendall(here(line("HEAD /process") + line("HEAD /jobs/x") + line("GET /livez")))
        conn.shutdown(socket.SHUT_WR)

        *heads, _ = stream.read().split(b"\r\n\r\n")

    assert [int(head.split()[1]) for head in heads] == [405, 404, 200]


def test_b13_a_path_that_is_not_utf_8_is_read_as_the_page(service):
    assert answers(service, line("GET /%ff"), 1)[0][0] == 200


def test_b10_b15_no_header_of_the_caller_changes_the_links(service):
    extra = "X-Forwarded-Host: evil.example\r\nForwarded: host=evil.example\r\n"

    sent = wire.post(path="http://evil.example/process", extra=extra)
    _, headers, body = answers(service, sent, 1)[0]

    assert headers["Location"] == json.loads(body)["status_url"]
    assert headers["Location"].startswith(service.base_url + "/jobs/")

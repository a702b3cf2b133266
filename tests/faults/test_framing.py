"""Group A: what is wrong, or only odd, in the framing of a request, as bytes on a socket."""

import contextlib
import socket
import ssl
import struct
from pathlib import Path

import pytest

from tests import wire
from tests.faults.world import MAX, case, cases, check, here
from tests.harness import poll
from tests.receiver import GARBAGE

BODY = b'{"data": 1}'
CODINGS = ("gzip, chunked", "identity", "xchunked")
OPTIONS = "Connection: TE\r\nConnection: x, Close\r\n"
SMUGGLED = here(wire.post(b'{"data": "smuggled"}'))


def client_hello() -> bytes:
    """Return the first bytes that a TLS client sends."""
    sent = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname="x")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


@pytest.mark.parametrize(
    ("sent", "codes", "rows"),
    [
        *cases("A01", 200, wire.post()),
        *cases("A02", 200, wire.chunked(BODY), wire.chunked(*(BODY[n : n + 1] for n in range(11)))),
        *cases("A02 MAX", 200, wire.chunked(wire.padded(MAX))),
        *cases("A02 of 1", 200, wire.chunked(*(b"%c" % one for one in wire.padded(200_000)))),
        *cases("A03", 413, wire.chunked(wire.padded(MAX + 1)), wire.chunked(b"x" * 2 * MAX)),
        *cases("A04", 400, *(wire.chunked(BODY, end=end + b"\r\n\r\n") for end in (b"zz", b"-5"))),
        *cases("A04 0x5", 400, wire.chunked(BODY, end=b"0x5\r\nabcde\r\n0\r\n\r\n")),
        case("A04 empty", wire.chunked(BODY, end=b"\r\n\r\n")),
        case("A05", wire.chunked(BODY, end=b"")),
        case("A05 within a chunk", wire.chunked(end=b"b\r\n{")),
        *cases("A06", 200, wire.chunked(end=b'b;a="b"\r\n' + BODY + b"\r\n0\r\n\r\n")),
        *cases("A06 trailer", 200, wire.chunked(BODY, end=b"0\r\nX-Trailer: 1\r\n\r\n")),
        *cases("A06 too long", 400, *(wire.chunked(end=end * 9_000) for end in (b"0", b"0;a"))),
        *cases("A06 trailer too long", 400, wire.chunked(BODY, end=b"0\r\nX: " + b"x" * 9_000)),
        case("A07", wire.chunked(BODY, extra="Content-Length: 3\r\n") + wire.get(), 200, rows=1),
        *cases("A08", 501, *(wire.chunked(BODY, coding=coding) for coding in CODINGS)),
        case("A08 HTTP/1.0", wire.chunked(SMUGGLED).replace(b"/1.1", b"/1.0"), 400),
        *cases("A09", 400, *(wire.post(extra=f"Content-Length: {n}\r\n") for n in (11, 12))),
        *cases("A10", 400, *(wire.post(length=n) for n in (-5, "+3", "1_0", "abc", "0x3"))),
        *cases("A10 trailing blank", 200, wire.post(length="11 ")),
        *cases("A11", 413, wire.post(b"", length=10**30)),
        *cases("A11 5,000 digits", 400, *(wire.post(length=n * 4999 + "11") for n in "09")),
        case("A11 pipelined", wire.post() + wire.post(length="9" * 5000), 200, 400, rows=1),
        *cases("A12 zero", 400, wire.post(b"")),
        *cases("A12 neither", 411, wire.post().replace(b"Content-Length: 11\r\n", b"")),
        case("A13", wire.post(length=100)),
        case("A15", wire.post(b'{"dat"a": 1, more}\r\n\r\n', length=5), 400, 400),
        case("A16", wire.post() + wire.get() + wire.get("/nothing"), 200, 200, 404, rows=1),
        case("A17 length", wire.post(SMUGGLED, length=10**9), 413),
        case("A17 within the headroom", wire.post(SMUGGLED + b"x" * MAX) + wire.get(), 413, 200),
        case("A17 chunked", wire.chunked(SMUGGLED, b"x" * 2 * MAX) + wire.get(), 413),
        *cases(
            "A18", 400, *(wire.post(extra=f"{bad}\r\n") for bad in ("X: a\rb", "X: a\0", "X\0: a"))
        ),
        *cases("A18 obs-fold", 200, wire.post(extra="X: a\r\n b\r\n")),
        case("A18 bare LF", wire.post().replace(b"\r\n", b"\n")),
        case("A19 HTTP/0.9", b"GET /livez\r\n\r\n", 200),
        case("A19 HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
        case("A19 HTTP/9.9", b"GET /livez HTTP/9.9\r\n\r\n", 200),
        case("A19 TLS", client_hello()),
        case("A19 target", b"GET http://[x/ HTTP/1.1\r\n\r\n", 400),
        case("A19 garbage", GARBAGE, 400),
        *cases("A20", 200, *(b"\r\n" * count + wire.post() for count in (2, 30_001))),
        case("Connection with options", wire.post(extra=OPTIONS) + wire.get(), 200, rows=1),
        case("A22", wire.post(extra="Idempotency-Key: a22\r\n") * 1000, *[200] * 1000, rows=1),
    ],
)
def test_framing(service, sent, codes, rows):
    check(service, sent, codes, rows)


def test_a03_a_body_that_is_too_large_leaves_no_file(service):
    check(service, wire.chunked(b"x" * 2 * MAX), [413], 0)

    poll(lambda: not unlinked(service.pid), "no open file without a name")


def unlinked(pid: int) -> list[str]:
    """Return the files that a process holds and that have no name any more."""
    links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return [link for link in links if link.endswith("(deleted)")]


def test_a23_a_job_is_run_though_its_caller_has_gone(service, mailbox):
    body = b'{"data": 1, "postback_url": "%s"}' % mailbox.url.encode()

    with wire.open_socket(service) as conn:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        conn.sendall(here(wire.post(body)))

    assert len(mailbox.wait_for(1)) == 1

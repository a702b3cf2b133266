"""Group A: what is wrong, or only odd, in the framing of a request, as bytes on a socket."""

import contextlib
import socket
import ssl
import struct
from pathlib import Path

import pytest

from tests import wire
from tests.faults.world import MAX, case, check, here
from tests.harness import poll
from tests.receiver import GARBAGE

BODY = b'{"data": 1}'
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
        case("A01", wire.post(), 200, rows=1),
        case("A02 one chunk", wire.chunked(BODY), 200, rows=1),
        case("A02 many", wire.chunked(*(BODY[n : n + 1] for n in range(11))), 200, rows=1),
        case("A02 MAX", wire.chunked(wire.padded(MAX)), 200, rows=1),
        case("A03 MAX+1", wire.chunked(wire.padded(MAX + 1)), 413),
        case("A03 twice MAX", wire.chunked(b"x" * 2 * MAX), 413),
        case("A04 zz", wire.chunked(BODY, end=b"zz\r\n\r\n"), 400),
        case("A04 -5", wire.chunked(BODY, end=b"-5\r\n\r\n"), 400),
        case("A04 0x5", wire.chunked(BODY, end=b"0x5\r\nabcde\r\n0\r\n\r\n"), 400),
        case("A04 empty", wire.chunked(BODY, end=b"\r\n\r\n")),
        case("A05", wire.chunked(BODY, end=b"")),
        case("A05 within a chunk", wire.chunked(end=b"b\r\n{")),
        case(
            "A06 extension", wire.chunked(end=b'b;a="b"\r\n' + BODY + b"\r\n0\r\n\r\n"), 200, rows=1
        ),
        case("A06 trailer", wire.chunked(BODY, end=b"0\r\nX-Trailer: 1\r\n\r\n"), 200, rows=1),
        case("A07", wire.chunked(BODY, extra="Content-Length: 3\r\n"), 200, rows=1),
        case("A08 gzip, chunked", wire.chunked(BODY, coding="gzip, chunked"), 501),
        case("A08 identity", wire.chunked(BODY, coding="identity"), 501),
        case("A08 xchunked", wire.chunked(BODY, coding="xchunked"), 501),
        case("A09 the same", wire.post(extra="Content-Length: 11\r\n"), 400),
        case("A09 another", wire.post(extra="Content-Length: 12\r\n"), 400),
        case("A10 -5", wire.post(length=-5), 400),
        case("A10 +3", wire.post(length="+3"), 400),
        case("A10 1_0", wire.post(length="1_0"), 400),
        case("A10 abc", wire.post(length="abc"), 400),
        case("A10 0x3", wire.post(length="0x3"), 400),
        case("A10 trailing blank", wire.post(length="11 "), 200, rows=1),
        case("A11", wire.post(b"", length=10**30), 413),
        case("A12 zero", wire.post(b""), 400),
        case("A12 neither", wire.post().replace(b"Content-Length: 11\r\n", b""), 411),
        case("A13", wire.post(length=100)),
        case("A15", wire.post(b'{"dat"a": 1, more}\r\n\r\n', length=5), 400, 400),
        case("A16", wire.post() + wire.get() + wire.get("/nothing"), 200, 200, 404, rows=1),
        case("A17 length", wire.post(SMUGGLED, length=10**9), 413),
        case("A17 within the headroom", wire.post(SMUGGLED + b"x" * MAX) + wire.get(), 413, 200),
        case("A17 chunked", wire.chunked(SMUGGLED, b"x" * 2 * MAX) + wire.get(), 413),
        case("A18 bare CR", wire.post(extra="X: a\rb\r\n"), 400),
        case("A18 NUL in a value", wire.post(extra="X: a\0b\r\n"), 400),
        case("A18 NUL in a name", wire.post(extra="X\0: a\r\n"), 400),
        case("A18 obs-fold", wire.post(extra="X: a\r\n b\r\n"), 200, rows=1),
        case("A18 bare LF", wire.post().replace(b"\r\n", b"\n")),
        case("A19 HTTP/0.9", b"GET /livez\r\n\r\n", 200),
        case("A19 HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
        case("A19 HTTP/9.9", b"GET /livez HTTP/9.9\r\n\r\n", 200),
        case("A19 TLS", client_hello()),
        case("A19 garbage", GARBAGE, 400),
        case("A20", b"\r\n\r\n" + wire.post(), 200, rows=1),
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

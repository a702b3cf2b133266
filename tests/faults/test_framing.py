"""Group A: what is wrong, or only odd, in the framing of a request, as bytes on a socket."""

import contextlib
import json
import socket
import ssl
import struct
import tempfile
from pathlib import Path

import pytest

from tests import receiver as script
from tests import wire
from tests.faults.world import delivered, ids, leaving
from tests.harness import poll

MAX = 1024 * 1024
BODY = b'{"data": 1}'
SMUGGLED = wire.post(b'{"data": "smuggled"}')


def case(number: str, sent: bytes, code: int, rows: int = 0, *, finish: bool = False):
    return pytest.param(sent, code, rows, finish, id=number)


def client_hello() -> bytes:
    """Return the first bytes that a TLS client sends."""
    sent = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname="x")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


@pytest.mark.parametrize(
    ("sent", "code", "rows", "finish"),
    [
        case("A01", wire.post(), 200, 1),
        case("A02 one chunk", wire.chunked(BODY), 200, 1),
        case("A02 many chunks", wire.chunked(*(BODY[n : n + 1] for n in range(11))), 200, 1),
        case("A02 MAX", wire.chunked(wire.padded(MAX)), 200, 1),
        case("A03 MAX+1", wire.chunked(wire.padded(MAX + 1)), 413),
        case("A03 twice MAX", wire.chunked(b"x" * 2 * MAX), 413),
        case("A04 zz", wire.chunked(BODY, end=b"zz\r\n\r\n"), 400),
        case("A04 -5", wire.chunked(BODY, end=b"-5\r\n\r\n"), 400),
        case("A04 0x5", wire.chunked(BODY, end=b"0x5\r\nabcde\r\n0\r\n\r\n"), 400),
        case("A04 empty", wire.chunked(BODY, end=b"\r\n\r\n"), 0, finish=True),
        case("A05", wire.chunked(BODY, end=b""), 0, finish=True),
        case("A05 within a chunk", wire.chunked(end=b"b\r\n{"), 0, finish=True),
        case("A06 extension", wire.chunked(end=b'b;a="b"\r\n' + BODY + b"\r\n0\r\n\r\n"), 200, 1),
        case("A06 trailer", wire.chunked(BODY, end=b"0\r\nX-Trailer: 1\r\n\r\n"), 200, 1),
        case("A07", wire.chunked(BODY, extra="Content-Length: 3\r\n"), 200, 1),
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
        case("A10 trailing blank", wire.post(length="11 "), 200, 1),
        case("A11", wire.post(length=10**30), 413),
        case("A12 zero", wire.post(b""), 400),
        case("A12 neither", wire.post().replace(b"Content-Length: 11\r\n", b""), 411),
        case("A13", wire.post(length=100), 0, finish=True),
        case("A18 bare CR", wire.post(extra="X: a\rb\r\n"), 400),
        case("A18 NUL in a value", wire.post(extra="X: a\0b\r\n"), 400),
        case("A18 NUL in a name", wire.post(extra="X\0: a\r\n"), 400),
        case("A18 obs-fold", wire.post(extra="X: a\r\n b\r\n"), 200, 1),
        case("A18 bare LF", wire.post().replace(b"\r\n", b"\n"), 0, finish=True),
        case("A19 HTTP/0.9", b"GET /livez\r\n\r\n", 200),
        case("A19 HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
        case("A19 HTTP/9.9", b"GET /livez HTTP/9.9\r\nHost: x\r\n\r\n", 200),
        case("A19 TLS", client_hello(), 0, finish=True),
        case("A20", b"\r\n\r\n" + wire.post(), 200, 1),
        case("A24", wire.post(), 200, 1, finish=True),
    ],
)
def test_framing(shared, sent, code, rows, finish):
    with leaving(shared, rows):
        assert wire.status_code(shared, sent, finish=finish) == code


def test_a03_a_body_that_is_too_large_leaves_no_file(shared):
    directory = Path(tempfile.gettempdir())
    before = set(directory.iterdir()), unlinked()

    with leaving(shared, 0):
        assert wire.status_code(shared, wire.chunked(b"x" * 2 * MAX)) == 413

    assert poll(lambda: unlinked() == before[1], "the spooled body is gone")
    ours = [path for path in set(directory.iterdir()) - before[0] if path.name.startswith("tmp")]
    assert [path for path in ours if path.is_file() and path.stat().st_size >= MAX] == []


def unlinked() -> int:
    """Return how many files this process holds that have no name any more."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(link.readlink()).endswith("(deleted)")
    return found


def test_a11_a_length_beyond_all_bounds_is_refused_before_the_body(shared):
    with leaving(shared, 0), wire.connected(shared) as (conn, stream):
        conn.sendall(wire.post(b"", length=10**30))

        assert wire.answer(stream)[0] == 413


def test_a15_what_follows_the_length_is_a_bad_request_of_its_own(shared):
    with leaving(shared, 0), wire.connected(shared) as (conn, stream):
        conn.sendall(wire.post(b'{"dat"a": 1, more}\r\n\r\n', length=5))

        assert [wire.answer(stream)[0] for _ in range(3)] == [400, 400, 0]


def test_a16_pipelined_requests_are_answered_in_order(shared):
    with leaving(shared, 1), wire.connected(shared) as (conn, stream):
        conn.sendall(wire.post() + wire.get() + wire.get("/nothing"))

        answers = [wire.answer(stream) for _ in range(3)]

    assert [code for code, _, _ in answers] == [200, 200, 404]
    assert json.loads(answers[0][2])["state"] == "accepted"


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(wire.post(SMUGGLED, length=10**9), id="A17 length"),
        pytest.param(wire.post(SMUGGLED + b"x" * MAX), id="A17 within the headroom"),
        pytest.param(wire.chunked(SMUGGLED, b"x" * 2 * MAX), id="A17 chunked"),
    ],
)
def test_a_refused_body_is_never_read_as_a_request(shared, sent):
    with leaving(shared, 0), wire.connected(shared) as (conn, stream):
        with contextlib.suppress(OSError):
            conn.sendall(sent + wire.get())

        codes = [wire.answer(stream)[0] for _ in range(2)]

    assert codes in ([413, 200], [413, 0])


def test_a21_who_waits_for_a_100_gets_it_then_the_answer(shared):
    head, _, body = wire.post(extra="Expect: 100-continue\r\n").partition(b"\r\n\r\n")

    with leaving(shared, 1), wire.connected(shared) as (conn, stream):
        conn.sendall(head + b"\r\n\r\n")
        first = wire.answer(stream)
        conn.sendall(body)

        assert (first[0], wire.answer(stream)[0]) == (100, 200)


def test_a21_a_body_over_the_limit_is_refused_after_the_100(shared):
    head = wire.post(b"", length=3 * MAX, extra="Expect: 100-continue\r\n")
    sent = 0

    with leaving(shared, 0), wire.connected(shared) as (conn, stream):
        conn.sendall(head)
        codes = [wire.answer(stream)[0]]
        with contextlib.suppress(OSError):
            while sent < 3 * MAX:
                sent += conn.send(b"x" * 65536)
        codes.append(wire.answer(stream)[0])

    assert codes in ([100, 413], [100, 0], [413, 0])


def test_a22_a_connection_serves_a_thousand_requests(shared):
    with leaving(shared, 1), wire.connected(shared) as (conn, stream):
        codes = set()
        for _ in range(1000):
            conn.sendall(wire.post(extra="Idempotency-Key: a22\r\n"))
            codes.add(wire.answer(stream)[0])

    assert codes == {200}


def test_a23_a_job_is_run_though_its_caller_has_gone(shared, listening):
    before = ids(shared)

    with wire.open_socket(shared) as conn:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        conn.sendall(wire.post(b'{"data": "a23"}'))
        # The server has read all of it, when the job is there.
        (job_id,) = poll(lambda: ids(shared) - before, "the job")

    assert b"a23" in delivered(listening, job_id)[0].body


def test_a24_an_answer_reaches_who_reads_it_late(shared):
    with leaving(shared, 1), wire.connected(shared) as (conn, stream):
        conn.sendall(wire.post())
        conn.shutdown(socket.SHUT_WR)
        code, headers, body = wire.answer(stream)

    assert (code, headers["Location"]) == (200, f"/jobs/{json.loads(body)['id']}")


def test_what_the_scripted_receiver_would_answer_is_no_request(shared):
    with leaving(shared, 0):
        assert wire.status_code(shared, script.GARBAGE, finish=True) in (0, 400)

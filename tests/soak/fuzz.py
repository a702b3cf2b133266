"""Sends mutations of valid requests to a real service: garbage must be refused, and cost nothing.

`./run fuzz [N] [seed]` sends N of them (a million unless told otherwise) to POST /process and
POST /postprocessed, each on a connection of its own that is half-closed after it. What is sent
depends on the seed and the number of the mutation alone, the time in signatures aside. No answer
may be a 5xx but 503 (501 comes from the server itself, for a Transfer-Encoding that it does not
know), no connection may be left hanging, and at the end the service and its worker must have no
more memory, threads and descriptors than after the first tenth. Otherwise the exit code is 1.
"""

import itertools
import json
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from tests import wire
from tests.harness import RealProcess, poll
from tests.soak.kills import usage
from web import signatures

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

SETTINGS = {
    "ANALYSIS": "tests.analyses:echo",
    "POSTBACK_SECRET": SECRET,
    "POSTBACK_ALLOW": "http://127.0.0.1:9",
    "POSTBACK_SCHEDULE": "100ms",
    "RETENTION": "1s",
    "MAX_BODY": "64KiB",
    "LOG_LEVEL": "error",
}

#: Statuses that a caller may cause.
ALLOWED = {100, 200, 202, 400, 401, 403, 404, 405, 409, 411, 413, 415, 422, 431, 501, 503}

CALLERS = 8
PATIENCE_SECONDS = 10.0

#: What may grow, and by how much. The service posts to itself by up to 32 connections, both of
#: whose ends are its own.
ROOM = {"resident MiB": 20, "threads": 4, "descriptors": 64}

#: What is put in, or in place of something.
TOKENS = (
    *(b"\0", b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b":", b'"', b"\\", b"{", b"}", b"["),
    *(b"]", b",", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b"NaN", b"-0"),
    *(b"1e999", b"9" * 41, b"-1", b"0x10", b"1_0", b"+3", b"null", b"true", b'"data":', b"[" * 70),
    *(b'{"a":' * 70, b"a" * 300, b"x" * 40_000, b"chunked", b"gzip", b"Expect: 100-continue\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Idempotency-Key: k\r\n"),
    *(b"Prefer: respond-async\r\n", b"HTTP/1.1", b"HTTP/0.9", b"/jobs/", b"GET ", b"%00", b"%ff"),
    *(b"../", b"*", b"http://127.0.0.1:9/", b"file:///", b"webhook-id: x\r\n", b"v1,", b"whsec_"),
)

#: What stands in the header of a valid request.
EXTRAS = (
    "",
    "Idempotency-Key: k-1\r\n",
    'Prefer: respond-async\r\ntracestate: a=b\r\nIdempotency-Key: "k 2"\r\n',
    "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n",
    "Authorization: Bearer x\r\nX-Request-ID: 1\r\nX-Forwarded-For: 10.0.0.1\r\n",
)

#: What is sent, and what beside it.
DATA: tuple[Any, ...] = ([3, 1, 4], {"a": [None, True, 1.5e3]}, "text \u00e9", 0, [[[[]]]], -1.0)
FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"postback_url": "http://127.0.0.1:9/"},
    {"metadata": {"order": [17]}},
)


def mutated(seed: str, number: int) -> bytes:
    """Return one mutation, the same for the same seed and number but for the time it is signed."""
    dice = random.Random(f"{seed} {number}")
    text = bytearray(_request(dice).replace(b"Host: x", b"Host: localhost", 1))
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        _mutate(text, dice)
    return bytes(text)


def _request(dice: random.Random) -> bytes:
    if dice.randrange(3) == 0:
        return _postprocessed(dice)
    payload: dict[str, Any] = {"data": dice.choice(DATA), **dice.choice(FIELDS)}
    body = json.dumps(payload, ensure_ascii=dice.random() < 0.5).encode()
    cut = dice.randrange(1, len(body))
    extra = dice.choice(EXTRAS)
    whole, chunks = wire.post(body, extra=extra), wire.chunked(body[:cut], body[cut:], extra=extra)
    return dice.choice((whole, chunks))


def _postprocessed(dice: random.Random) -> bytes:
    job_id, now = f"{dice.getrandbits(64):x}", datetime.now(UTC)
    body = b'{"type": "job.succeeded", "data": {"id": "%s"}}' % job_id.encode()
    signature = signatures.sign([SECRET], webhook_id=job_id, timestamp=now, body=body)
    signed = f"webhook-id: {job_id}\r\nwebhook-timestamp: {int(now.timestamp())}\r\n"
    extra = f"{signed}webhook-signature: {signature}\r\n"
    return wire.post(body, path="/postprocessed", extra=extra)


def _mutate(text: bytearray, dice: random.Random) -> None:
    """Change one place of a text, or the order of its lines."""
    lines = bytes(text).split(b"\r\n")
    at, token = dice.randrange(len(text)), dice.choice(TOKENS)
    number = dice.choice([*re.finditer(rb"\d+", text), re.match(b"", text)])
    piece = text[at : at + dice.choice((1, 2, 10, 60))]
    changes = (
        (at, at + 1, bytes([text[at] ^ 1 << dice.randrange(8)])),
        (at, at + 1, dice.randbytes(1)),
        (at, at, token),
        (at, at + len(token), token),
        (at, at + len(piece), b""),
        (at, at, piece * dice.choice((1, 2, 50))),
        (*number.span(), dice.choice((b"", b"-1", b"0", b"99999999999999999999", b"1.5"))),
        (0, len(text), b"\r\n".join(dice.sample(lines, len(lines)))),
    )
    start, end, new = dice.choice(changes)
    text[start:end] = new
    text += b"" if text else b" "


class Fuzz:
    """One run: what was sent and what came of it."""

    def __init__(self, address: tuple[str, int], seed: str) -> None:
        self._address = address
        self._seed = seed
        self._lock = threading.Lock()
        self.codes: Counter[int] = Counter()
        self.sent = 0
        self.longest_seconds = 0.0
        self.faults: list[str] = []

    def send(self, numbers: Iterator[int]) -> None:
        """Send these mutations from several callers at once; stop at the first fault."""
        with ThreadPoolExecutor(CALLERS) as pool:
            for one in [pool.submit(self._call, numbers) for _ in range(CALLERS)]:
                one.result()

    def line(self) -> str:
        codes = ", ".join(f"{n} x {code or 'closed'}" for code, n in sorted(self.codes.items()))
        many = f"{self.sent} mutations, seed {self._seed}"
        return f"{many}: {codes}; longest {self.longest_seconds:.2f} s"

    def _call(self, numbers: Iterator[int]) -> None:
        while not self.faults:
            with self._lock:
                number = next(numbers, None)
            if number is None:
                return
            began, sent = time.monotonic(), mutated(self._seed, number)
            codes = self._exchange(sent)
            with self._lock:
                self.sent += 1
                self.codes.update(codes or [0])
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
                if not ALLOWED.issuperset(codes):
                    self.faults.append(f"mutation {number}: {codes}: {sent!r}")

    def _exchange(self, sent: bytes) -> list[int]:
        """Send bytes and no more; return the statuses that came until the other side closed."""
        received = b""
        try:
            with socket.create_connection(self._address, PATIENCE_SECONDS) as conn:
                conn.sendall(sent)
                conn.shutdown(socket.SHUT_WR)
                while piece := conn.recv(65536):
                    received += piece
        except TimeoutError:
            return [-1]  # which is not allowed
        except (ConnectionResetError, BrokenPipeError):
            pass
        return [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)]


def _idle_usage(service: RealProcess) -> tuple[int, ...]:
    """Return the usage of the service and its worker once every job has ended."""
    poll(lambda: not service.is_busy(), "the end", 60)
    both = [usage(pid) for pid in (service.pid, *service.workers())]
    return tuple(map(sum, zip(*both, strict=True)))


def run(count: int, seed: str) -> list[str]:
    """Fuzz a service of our own; print the counts, and return what was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        service = RealProcess({**SETTINGS, "JOURNAL": f"{folder}/journal.db"})
        host, _, port = service.base_url.removeprefix("http://").partition(":")
        fuzz, numbers = Fuzz((host, int(port)), seed), iter(range(count))
        try:
            fuzz.send(itertools.islice(numbers, count // 10))
            before = _idle_usage(service)
            fuzz.send(numbers)
            after = _idle_usage(service)
            code = service.end()
        finally:
            service.process_.kill()
    print(fuzz.line())
    print(f"{', '.join(ROOM)}: {before}, at the end {after}", flush=True)
    figures = zip(ROOM, before, after, ROOM.values(), strict=True)
    faults = [f"{name} grew from {old} to {new}" for name, old, new, n in figures if new > old + n]
    faults += [service.log()] * ("Traceback" in service.log()) + [f"exit code {code}"] * bool(code)
    return fuzz.faults + faults


def main(arguments: list[str]) -> None:
    count = int(arguments[0]) if arguments else 1_000_000
    seed = arguments[1] if len(arguments) > 1 else str(random.randrange(10**6))
    print(f"seed {seed}", flush=True)
    sys.exit("\n".join(run(count, seed)) or 0)


if __name__ == "__main__":
    main(sys.argv[1:])

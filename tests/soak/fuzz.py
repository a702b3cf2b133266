"""Sends mutations of valid requests to a real service: garbage must be refused, and cost nothing.

`./run fuzz [N] [seed]` sends N of them (a million unless told otherwise) to POST /process and
POST /postprocessed, each on a connection of its own that is half-closed after it. What is sent
depends on the seed and the number of the mutation alone, the time in signatures aside. No answer
may be a 5xx but 503 (501 comes from the server itself, for a Transfer-Encoding that it does not
know), no connection may be left hanging, and in the end the service must have no more memory,
threads and descriptors than after the first tenth. Otherwise the exit code is 1.
"""

import concurrent.futures
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
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.harness import RealProcess, poll
from web import signatures

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

SETTINGS = {
    "PORT": "0",
    "ANALYSIS": "tests.analyses:echo",
    "POSTBACK_SECRET": SECRET,
    "POSTBACK_ALLOW": "http://127.0.0.1:9",
    "POSTBACK_SCHEDULE": "100ms",
    "RETENTION": "1s",
    "MAX_BODY": "64KiB",
    "LOG_LEVEL": "error",
}

UNFINISHED = ("accepted", "running", "delivering")

#: Statuses that a caller may cause.
ALLOWED = {200, 202, 400, 401, 404, 405, 409, 411, 413, 415, 422, 431, 501, 503}

CALLERS = 8
PATIENCE_SECONDS = 10.0
MAX_GROWTH_BYTES = 20 * 1024 * 1024

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

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


def request(dice: random.Random) -> bytes:
    """Return a valid request to one of the two routes."""
    return dice.choice((_process, _process_in_chunks, _postprocessed))(dice)


def mutated(seed: str, number: int) -> bytes:
    """Return one mutation, the same for the same seed and number but for the time it is signed."""
    dice = random.Random(f"{seed} {number}")
    text = bytearray(request(dice))
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        dice.choice(MUTATIONS)(text, dice)
    return bytes(text)


def _process(dice: random.Random) -> bytes:
    return _with_length("/process", _payload(dice), dice.choice(_EXTRAS))


def _process_in_chunks(dice: random.Random) -> bytes:
    body = _payload(dice)
    cut = dice.randrange(1, len(body))
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in (body[:cut], body[cut:]))
    return _head("/process", "Transfer-Encoding: chunked\r\n") + chunks + b"0\r\n\r\n"


def _postprocessed(dice: random.Random) -> bytes:
    job_id = f"{dice.getrandbits(64):x}"
    now = datetime.now(UTC)
    body = b'{"type": "job.succeeded", "data": {"id": "%s"}}' % job_id.encode()
    signature = signatures.sign([SECRET], webhook_id=job_id, timestamp=now, body=body)
    signed = f"webhook-id: {job_id}\r\nwebhook-timestamp: {int(now.timestamp())}\r\n"
    return _with_length("/postprocessed", body, f"{signed}webhook-signature: {signature}\r\n")


def _payload(dice: random.Random) -> bytes:
    data: Any = dice.choice(
        ([3, 1, 4], {"a": [None, True, 1.5e3]}, "text \u00e9", 0, [[[[]]]], -1.0)
    )
    fields = {"data": data} | dice.choice(({}, {}, {"postback_url": "http://127.0.0.1:9/"}))
    return json.dumps(fields, ensure_ascii=dice.random() < 0.5).encode()


def _with_length(path: str, body: bytes, extra: str) -> bytes:
    return _head(path, f"Content-Length: {len(body)}\r\n{extra}") + body


def _head(path: str, extra: str) -> bytes:
    kind = "Content-Type: application/json\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{kind}{extra}\r\n".encode()


_EXTRAS = (
    "",
    "",
    "Idempotency-Key: k-1\r\n",
    'Prefer: respond-async\r\ntracestate: a=b\r\nIdempotency-Key: "k 2"\r\n',
    "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n",
    "Authorization: Bearer x\r\nX-Request-ID: 1\r\nX-Forwarded-For: 10.0.0.1\r\n",
)


def _flip(text: bytearray, dice: random.Random) -> None:
    text[dice.randrange(len(text))] ^= 1 << dice.randrange(8)


def _replace(text: bytearray, dice: random.Random) -> None:
    text[dice.randrange(len(text))] = dice.randrange(256)


def _insert(text: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(text))
    text[at:at] = dice.choice(TOKENS)


def _overwrite(text: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(text))
    token = dice.choice(TOKENS)
    text[at : at + len(token)] = token


def _remove(text: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(text))
    del text[at : min(at + dice.choice((1, 2, 10, 60)), len(text) - 1)]


def _repeat(text: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(text))
    piece = text[at : at + dice.choice((1, 10, 60))]
    text[at:at] = piece * dice.choice((1, 2, 50))


def _number(text: bytearray, dice: random.Random) -> None:
    found = dice.choice(list(re.finditer(rb"\d+", text)) or [None])
    if found:
        text[slice(*found.span())] = dice.choice(
            (b"", b"-1", b"0", b"99999999999999999999", b"1.5")
        )


def _swap_lines(text: bytearray, dice: random.Random) -> None:
    lines = bytes(text).split(b"\r\n")
    dice.shuffle(lines)
    text[:] = b"\r\n".join(lines) or b" "


MUTATIONS = (_flip, _replace, _insert, _overwrite, _remove, _repeat, _number, _swap_lines)


def exchange(address: tuple[str, int], sent: bytes) -> tuple[list[int], float]:
    """Send bytes and no more; return the statuses that came until the other side closed.

    Raises:
        TimeoutError: It neither answers nor closes.
    """
    began, received = time.monotonic(), b""
    with socket.create_connection(address, PATIENCE_SECONDS) as conn:
        try:
            conn.sendall(sent)
            conn.shutdown(socket.SHUT_WR)
            while piece := conn.recv(65536):
                received += piece
        except (ConnectionResetError, BrokenPipeError, OSError) as exc:
            if isinstance(exc, TimeoutError):
                raise
    return [int(code) for code in _STATUS.findall(received)], time.monotonic() - began


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

    def send(self, numbers: Iterable[int]) -> None:
        """Send these mutations from several callers at once; stop at the first fault."""
        shared = iter(numbers)
        with concurrent.futures.ThreadPoolExecutor(CALLERS) as pool:
            for one in [pool.submit(self._call, shared) for _ in range(CALLERS)]:
                one.result()

    def _call(self, shared: Iterable[int]) -> None:
        while not self.faults:
            with self._lock:
                number = next(iter(shared), None)
            if number is None:
                return
            self._one(number)

    def _one(self, number: int) -> None:
        sent = mutated(self._seed, number)
        try:
            codes, seconds = exchange(self._address, sent)
        except OSError as exc:
            codes, seconds = [], 0.0
            self.faults.append(f"mutation {number}: {exc!r}: {sent!r}")
        with self._lock:
            self.sent += 1
            self.codes.update(codes or [0])
            self.longest_seconds = max(self.longest_seconds, seconds)
            if bad := set(codes) - ALLOWED - {100}:
                self.faults.append(f"mutation {number}: {bad}: {sent!r}")

    def line(self) -> str:
        codes = ", ".join(f"{n} x {code or 'closed'}" for code, n in sorted(self.codes.items()))
        return (
            f"{self.sent} mutations, seed {self._seed}: {codes}; "
            f"longest {self.longest_seconds:.2f} s"
        )


def usage(pid: int) -> tuple[int, int, int]:
    """Return the resident bytes, the threads and the descriptors of a process."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    resident, threads = (
        int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("VmRSS", "Threads")
    )
    return resident * 1024, threads, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def settled(service: RealProcess) -> tuple[int, int, int]:
    """Return the usage once every job has ended."""

    def ended() -> bool:
        pages = [service.get(f"/jobs?limit=1&state={state}").json() for state in UNFINISHED]
        return not any(page["jobs"] for page in pages)

    poll(ended, "the jobs have ended", 60)
    return usage(service.pid)


def growth(before: tuple[int, int, int], after: tuple[int, int, int]) -> list[str]:
    """Return a line for each that has grown."""
    # The service posts to itself by up to 32 connections, both of whose ends are its own.
    slack = (MAX_GROWTH_BYTES, 4, 64)
    names = ("resident bytes", "threads", "descriptors")
    return [
        f"{name} grew from {old} to {new}"
        for name, old, new, room in zip(names, before, after, slack, strict=True)
        if new > old + room
    ]


def run(count: int, seed: str) -> list[str]:
    """Fuzz a service of our own; print the counts, and return what was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        service = RealProcess({**SETTINGS, "JOURNAL": f"{folder}/journal.db"})
        host, _, port = service.base_url.removeprefix("http://").partition(":")
        fuzz = Fuzz((host, int(port)), seed)
        try:
            numbers = iter(range(count))
            fuzz.send(itertools.islice(numbers, count // 10))
            before = settled(service)
            fuzz.send(numbers)
            after = settled(service)
            faults = fuzz.faults + growth(before, after)
            if "Traceback" in service.log():
                faults.append(service.log())
            print(fuzz.line())
            print(f"resident bytes, threads, descriptors: {before}, in the end {after}", flush=True)
            faults += [f"exit code {code}" for code in [service.end()] if code]
        finally:
            service.process_.kill()
    return faults


def main(arguments: list[str]) -> None:
    count = int(arguments[0]) if arguments else 1_000_000
    seed = arguments[1] if len(arguments) > 1 else str(random.randrange(10**6))
    print(f"seed {seed}", flush=True)
    sys.exit("\n".join(run(count, seed)) or 0)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Kills the real service and its workers at random under load, and holds it to its promises.

`./run soak [seconds] [seed]` sends jobs without a pause to a service that is ended by SIGKILL again
and again, also while it starts, and started anew on the same journal, with one executor or the
other. In between its workers are killed. A ledger is kept on this side: who was promised what, and
what came. The first broken promise ends the run with exit code 1. At the end the service is left
alone until everything promised has come.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import model
from tests.harness import ROOT, environment, executed

#: Connections that send jobs, each the next as soon as the last is answered.
CALLERS = 12

#: Callers wait while so many jobs are on their way, or the end of a run would take long.
MAX_WAITING = 1500

#: Seconds from the ready line until something comes that an earlier process promised.
RESUME_SECONDS = 2.0

#: Of a hundred kills, those that come while the service starts.
WHILE_STARTING = 15

#: Seconds for the last process to end everything, and for any process to be ready.
PATIENCE_SECONDS = 60.0

SETTINGS = {
    "ANALYSIS": "tests.faults.misbehaving:work",
    "POSTBACK_SCHEDULE": " ".join(["200ms"] * 20),
    "RETENTION": "20s",  # pruning goes on beside all this
    "LOG_LEVEL": "error",
}

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_ID = re.compile(rb"\r\nwebhook-id: *([0-9a-f]+)", re.IGNORECASE)

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Ledger:
    """What was sent, promised and delivered, as seen from outside.

    Attributes:
        sent: The numbers that were sent as data.
        promised: The number behind each id that was answered 200.
        waiting: The promised ids that were not delivered yet.
        bodies: What came for each id, hashed.
        delivered: The ids whose postback was answered 200.
        owners: The id for each number.
        owed: What an earlier process promised, until the first of it comes.
        ready_at: When the process was ready (monotonic).
        violation: The first broken promise.
    """

    sent: set[float] = field(default_factory=set)
    promised: dict[str, float] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    bodies: dict[str, int] = field(default_factory=dict)
    delivered: set[str] = field(default_factory=set)
    owners: dict[float, str] = field(default_factory=dict)
    owed: set[str] = field(default_factory=set)
    ready_at: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    violation: str = ""

    def promise(self, job_id: str, number: float) -> None:
        """Note an answer 200."""
        self.demand(job_id not in self.promised, f"{job_id} was given to two jobs")
        self._own(job_id, number)
        self.promised[job_id] = number
        if job_id not in self.delivered:
            self.waiting.add(job_id)

    def receive(self, job_id: str, body: bytes, *, answer: int) -> None:
        """Note a postback, and how it is answered."""
        event, is_new = json.loads(body)["data"], job_id not in self.bodies
        self.demand(event["id"] == job_id, f"{job_id} came with the event of {event['id']}")
        self.demand(self.bodies.setdefault(job_id, hash(body)) == hash(body), f"{job_id} changed")
        if event["outcome"] != "crashed":
            self.demand(event["outcome"] == "succeeded", f"{job_id} ended as {event['outcome']}")
            self.demand(event["result"] in self.sent, f"{job_id} was never sent")
            self._own(job_id, event["result"])
        elif is_new:
            self._explain_crash(job_id, event["error"]["message"])
        if answer == 200:
            self.counts["repeats"] += job_id in self.delivered
            self.delivered.add(job_id)
            self.waiting.discard(job_id)
        if job_id in self.owed:
            self.owed.clear()
            took = round(1000 * (time.monotonic() - self.ready_at))
            self.keep_largest(resumed_ms=took)
            self.demand(took < 1000 * RESUME_SECONDS, f"postbacks resumed after {took} ms")

    def demand(self, holds: bool, violation: str) -> None:  # noqa: FBT001 - reads like assert
        """Note a broken promise, unless the first argument holds."""
        if not holds:
            self.violation = self.violation or violation

    def keep_largest(self, **figures: int) -> None:
        for name, value in figures.items():
            self.counts[name] = max(self.counts[name], value)

    def line(self) -> str:
        """Return all counts in one line."""
        counts = {
            "accepted": len(self.promised),
            "delivered": len(self.delivered),
            "lost": len(self.waiting) - self.counts["undelivered"],
            "unanswered": len(self.sent) - len(self.promised),
            **self.counts,
        }
        return " ".join(f"{name}={value}" for name, value in counts.items())

    def _explain_crash(self, job_id: str, message: str) -> None:
        # With a killed worker at most one job crashes: the one that was alone in it.
        self.counts["crashed"] += 1
        possible = self.counts["worker_kills"]
        if "signal 9" not in message:  # it ran at so many kills of the service
            possible += self.counts["kills"] // model.MAX_INTERRUPTED * CALLERS
        is_explained = self.counts["crashed"] <= possible
        self.demand(is_explained, f"{job_id} crashed, which no kill explains")

    def _own(self, job_id: str, number: float) -> None:
        owner = self.owners.setdefault(number, job_id)
        self.demand(owner == job_id, f"{job_id} and {owner} are for the same payload")
        known = self.promised.get(job_id, number)
        self.demand(known == number, f"{job_id} came with another payload")


class Soak:
    """The service, who calls it, who kills it, and a receiver that does not always answer well."""

    #: Of a hundred postbacks, those answered 500, and those whose connection is cut.
    failing, cut = 1, 1
    settings: Mapping[str, str] = SETTINGS

    def __init__(self, directory: Path, seed: int) -> None:
        self.ledger = Ledger()
        self._chance = random.Random(seed)  # of the kills alone, so that the seed repeats them
        self._luck = random.Random(seed + 1)  # of the receiver
        self._journal, self._log = directory / "journal.db", directory / "log"
        self._numbers = itertools.count(1)
        self._port = 0
        self._up = asyncio.Event()

    async def run(self, seconds: float, kills: int) -> None:
        """Kill and start for so long, and at least so often; then wait for what was promised."""
        server = await self._listen()
        callers = [asyncio.create_task(self._call()) for _ in range(CALLERS)]
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline or self.ledger.counts["kills"] < kills:
                await self._live()
                if self.ledger.violation:
                    return
            for caller in callers:
                caller.cancel()
            await self._leave_alone()
        finally:
            await self._end(signal.SIGKILL)
            server.close()

    async def _live(self) -> None:
        """Start the service, kill some of its workers, and then itself, at some moments."""
        await self._start(**executed(self._chance.choice(("thread", "process")), workers=2))
        if self._chance.randrange(100) < WHILE_STARTING:
            await asyncio.sleep(self._chance.uniform(0.0, 0.8))
            self.ledger.counts["kills_while_starting"] += 1
        else:
            await self._ready()
            for _ in range(self._chance.randrange(3)):
                await asyncio.sleep(self._chance.uniform(0.05, 0.8))
                self._kill_a_worker()
            await asyncio.sleep(self._chance.uniform(0.05, 1.2))
            self._measure()
        code, log = self._process.returncode, self._log.read_text()[-2000:]
        self.ledger.demand(code is None, f"the service ended with {code}: {log}")
        self.ledger.counts["kills"] += 1
        await self._end(signal.SIGKILL)

    async def _leave_alone(self) -> None:
        """Start the service a last time, and let it deliver all."""
        await self._start()
        await self._ready()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while await self._has_unfinished() and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        for job_id in sorted(self.ledger.waiting):
            status, job = await self._ask(f"/jobs/{job_id}")
            is_kept = job.get("state") == "undelivered"
            self.ledger.counts["undelivered"] += is_kept
            self.ledger.demand(is_kept, f"{job_id} is lost: {status} {job.get('state')}")
        code = await self._end(signal.SIGTERM)
        self.ledger.demand(code == 0, f"the last process exited with {code}")

    async def _has_unfinished(self) -> bool:
        """Whether a job has not ended yet, also one whose answer never came."""
        states = ("accepted", "running", "delivering")
        pages = [await self._ask(f"/jobs?limit=1&state={state}") for state in states]
        return any(page["jobs"] for _, page in pages) and not self.ledger.violation

    # The process

    async def _start(self, **settings: str) -> None:
        more = {"JOURNAL": str(self._journal), "POSTBACK_URL": self._url, **settings}
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "app.py"),
                cwd=ROOT,
                env=environment({**self.settings, **more}),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )

    async def _ready(self) -> None:
        owed = set(self.ledger.waiting)
        assert self._process.stdout
        line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE_SECONDS)
        if b"listens on" not in line:
            raise AssertionError(f"the service did not start: {self._log.read_text()[-2000:]}")
        self._port = int(line.rsplit(b":", 1)[1])
        self.ledger.owed, self.ledger.ready_at = owed, time.monotonic()
        self._up.set()

    def _kill_a_worker(self) -> None:
        workers = []
        for path in Path(f"/proc/{self._process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread has ended
                workers += sorted(map(int, path.read_text().split()))
        if workers:
            self.ledger.counts["worker_kills"] += 1
            self.ledger.owed = set()  # how soon it comes depends on the next worker now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._chance.choice(workers), signal.SIGKILL)

    async def _end(self, number: signal.Signals) -> int:
        self._up.clear()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        return await asyncio.wait_for(self._process.wait(), PATIENCE_SECONDS)

    def _measure(self) -> None:
        """Keep the largest figures that any process came to."""
        with contextlib.suppress(OSError):  # it has ended
            rss_mib, threads, fds = usage(self._process.pid)
            wal_mib = Path(f"{self._journal}-wal").stat().st_size // 1024**2
            self.ledger.keep_largest(rss_mib=rss_mib, threads=threads, fds=fds, wal_mib=wal_mib)

    # Callers

    async def _call(self) -> None:
        """Send one job after the other, on a new connection whenever one breaks."""
        while True:
            await self._up.wait()
            with contextlib.suppress(OSError, EOFError):
                connection = await self._connect()
                with contextlib.closing(connection[1]):
                    while len(self.ledger.waiting) < MAX_WAITING:
                        number = next(self._numbers)
                        await self._send(connection, number, b'{"data": %d}' % number)
            await asyncio.sleep(0.005)

    async def _send(self, connection: Connection, number: float, body: bytes) -> int:
        """Send a job, and return the status of the answer."""
        self.ledger.sent.add(number)
        status, answer = await self._request(connection, "POST", "/process", body)
        if status == 200:
            self.ledger.promise(answer["id"], number)
        self.ledger.demand(status in (200, 503), f"a valid payload was answered {status}")
        return status

    async def _ask(self, path: str) -> tuple[int, Any]:
        connection = await self._connect()
        with contextlib.closing(connection[1]):
            return await self._request(connection, "GET", path, b"")

    async def _connect(self) -> Connection:
        return await asyncio.open_connection("127.0.0.1", self._port)

    async def _request(
        self, connection: Connection, method: str, path: str, body: bytes
    ) -> tuple[int, Any]:
        reader, writer = connection
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answered, found = await _read(reader)
        return int(answered.split()[1]), json.loads(found)

    # The receiver

    async def _listen(self) -> asyncio.Server:
        """Listen for postbacks."""
        server = await asyncio.start_server(self._receive, "127.0.0.1", 0, backlog=1024)
        self._url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        return server

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Note each postback, and answer then."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                head, body = await _read(reader)
                luck = self._luck.randrange(100)
                status = (
                    500 if luck < self.failing else 0 if luck < self.failing + self.cut else 200
                )
                (job_id,) = _ID.findall(head)
                self.ledger.receive(job_id.decode(), body, answer=status)
                if not status:
                    break
                writer.write(b"HTTP/1.1 %d Noted\r\nContent-Length: 0\r\n\r\n" % status)
        writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return the head and the body of a request or an answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return head, await reader.readexactly(int(length[1]) if length else 0)


def usage(pid: int) -> tuple[int, int, int]:
    """Return the resident MiB, the threads and the descriptors of a process.

    Raises:
        OSError: It has ended.
    """
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+).*Threads:\s+(\d+)", text, re.DOTALL)
    if not found:
        raise ProcessLookupError(pid)
    return int(found[1]) // 1024, int(found[2]), len(list(Path(f"/proc/{pid}/fd").iterdir()))


def soak(seconds: float, seed: int, *, kills: int = 0) -> Ledger:
    """Run for so long, and for at least so many kills; return the ledger."""

    async def run(directory: str) -> Ledger:
        one = Soak(Path(directory), seed)
        await one.run(seconds, kills)
        return one.ledger

    with tempfile.TemporaryDirectory(prefix="postback-soak-") as directory:
        return asyncio.run(run(directory))


def main(arguments: list[str]) -> int:
    """Soak as long as asked, by default a minute; print the seed first and the counts last."""
    seconds = float(arguments[0]) if arguments else 60.0
    seed = int(arguments[1]) if arguments[1:] else random.SystemRandom().randrange(10**6)
    print(f"soak: {seconds:g} s, seed {seed}", flush=True)
    ledger = soak(seconds, seed)
    print(ledger.line())
    if ledger.violation:
        print(f"BROKEN: {ledger.violation}")
    return bool(ledger.violation)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

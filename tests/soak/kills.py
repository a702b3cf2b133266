"""Kills the real service at random moments under load, and holds it to its promises.

`./run soak [seconds] [seed]` sends jobs without a pause to a service that is ended by SIGKILL again
and again, also while it starts, and started anew on the same journal. A ledger is kept on this
side: who was promised what, and what came. The first broken promise ends the run with exit code 1.
In the end the service is left alone until everything promised has come.
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

ROOT = Path(__file__).parent.parent.parent

#: Connections that send jobs, each the next as soon as the last is answered.
CALLERS = 12

#: Callers wait while so many jobs are on their way, or the end of a run would take long.
MAX_WAITING = 1500

#: Seconds from the ready line until what an earlier process promised comes.
RESUME_SECONDS = 2.0

#: Of a hundred kills, those that come while the service starts.
WHILE_STARTING = 15

#: Seconds for the last process to end everything, and for any process to be ready.
PATIENCE_SECONDS = 60.0

SETTINGS = {
    "PORT": "0",
    "ANALYSIS": "tests.analyses:echo",
    "POSTBACK_SCHEDULE": " ".join(["200ms"] * 20),
    "RETENTION": "20s",  # pruning goes on beside all this
    "LOG_LEVEL": "error",
}

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_ID = re.compile(rb"\r\nwebhook-id: *([0-9a-f]+)", re.IGNORECASE)


@dataclass
class Ledger:
    """What was sent, promised and delivered, as seen from outside.

    Attributes:
        sent: The numbers that were sent as data.
        promised: The number behind each id that was answered 200.
        waiting: The promised ids that were not delivered yet.
        bodies: What came for each id, hashed.
        delivered: The ids whose postback was answered 200.
        resumed_seconds: From each ready line to the first postback that an earlier process owed.
        violation: The first broken promise.
    """

    sent: set[float] = field(default_factory=set)
    promised: dict[str, float] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    bodies: dict[str, int] = field(default_factory=dict)
    delivered: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    resumed_seconds: list[float] = field(default_factory=list)
    violation: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _ids: dict[float, str] = field(default_factory=dict)
    _owed: set[str] = field(default_factory=set)
    _ready_at: float = 0.0

    def promise(self, job_id: str, number: float) -> None:
        """Note an answer 200."""
        self._demand(job_id not in self.promised, f"{job_id} was given to two jobs")
        self._own(job_id, number)
        self.promised[job_id] = number
        if job_id not in self.delivered:
            self.waiting.add(job_id)

    def receive(self, job_id: str, body: bytes, *, answer: int) -> None:
        """Note a postback."""
        event = json.loads(body)["data"]
        self._demand(event["id"] == job_id, f"{job_id} came with the event of {event['id']}")
        self._demand(self.bodies.setdefault(job_id, hash(body)) == hash(body), f"{job_id} changed")
        self.counts[event["outcome"]] += job_id not in self.delivered and answer == 200
        self.counts["repeats"] += job_id in self.delivered
        self._receive_result(job_id, event)
        if answer == 200:
            self.delivered.add(job_id)
            self.waiting.discard(job_id)
        if job_id in self._owed:
            self._owed.clear()
            self.resumed_seconds.append(time.monotonic() - self._ready_at)

    def ready(self, owed: set[str]) -> None:
        """Note that a process is ready which owes what an earlier one promised."""
        self._owed, self._ready_at = owed, time.monotonic()

    def killed(self) -> None:
        """Note that the process has ended."""
        late = bool(self._owed) and time.monotonic() - self._ready_at > RESUME_SECONDS
        slow = max(self.resumed_seconds, default=0.0) > RESUME_SECONDS
        self._demand(not (late or slow), f"postbacks did not resume within {RESUME_SECONDS} s")
        self._owed = set()

    def fail(self, violation: str) -> None:
        """Note a broken promise."""
        self.violation = self.violation or violation
        self.changed.set()

    def line(self) -> str:
        """Return all counts in one line."""
        counts = {
            "kills": self.counts["kills"],
            "while_starting": self.counts["while_starting"],
            "accepted": len(self.promised),
            "delivered": len(self.delivered),
            "undelivered": self.counts["undelivered"],
            "lost": len(self.waiting) - self.counts["undelivered"],
            "repeats": self.counts["repeats"],
            "crashed": self.counts["crashed"],
            "unanswered": len(self.sent) - len(self.promised),
            "slowest_resume_seconds": round(max(self.resumed_seconds, default=0.0), 3),
            **{name: self.counts[name] for name in ("rss_mib", "fds", "threads", "wal_mib")},
        }
        return " ".join(f"{name}={value}" for name, value in counts.items())

    def _receive_result(self, job_id: str, event: Any) -> None:
        if event["outcome"] == "crashed":  # it ran at three kills, and has no result
            return
        self._demand(event["outcome"] == "succeeded", f"{job_id} ended as {event['outcome']}")
        self._demand(event["result"] in self.sent, f"{job_id} was never sent")
        self._own(job_id, event["result"])

    def _own(self, job_id: str, number: float) -> None:
        owner = self._ids.setdefault(number, job_id)
        self._demand(owner == job_id, f"{job_id} and {owner} are for the same payload")
        known = self.promised.get(job_id, number)
        self._demand(known == number, f"{job_id} came with another payload")

    def _demand(self, holds: bool, violation: str) -> None:  # noqa: FBT001 - reads like assert
        if not holds:
            self.fail(violation)


class Receiver(asyncio.Protocol):
    """One connection of a receiver that notes first and answers then, not always well."""

    def __init__(self, ledger: Ledger, chance: random.Random, failing: int, cut: int) -> None:
        self._failing, self._cut = failing, cut
        self._ledger = ledger
        self._chance = chance
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length and len(rest) >= int(length[1]):
            self._buffer = b""
            self._answer(_ID.search(head), rest)

    def _answer(self, job_id: re.Match[bytes] | None, body: bytes) -> None:
        luck = self._chance.randrange(100)
        status = 500 if luck < self._failing else 200 if luck >= self._failing + self._cut else 0
        assert job_id
        self._ledger.receive(job_id[1].decode(), body, answer=status)
        if status:
            self._transport.write(b"HTTP/1.1 %d Noted\r\nContent-Length: 0\r\n\r\n" % status)
        else:
            self._transport.abort()


class Soak:
    """The service, who calls it, who kills it."""

    #: Of a hundred postbacks, those answered 500, and those whose connection is cut.
    failing, cut = 1, 1
    settings: Mapping[str, str] = SETTINGS

    def __init__(self, directory: Path, seed: int) -> None:
        self.ledger = Ledger()
        self._chance = random.Random(seed)  # of the kills alone, so that the seed repeats them
        self._luck = random.Random(seed + 1)  # of the receiver
        self._journal = directory / "journal.db"
        self._log = directory / "log"
        self._numbers = itertools.count(1)
        self._port = 0
        self._up = asyncio.Event()

    async def run(self, seconds: float, kills: int) -> None:
        """Kill and start for so long, and at least so often; then wait for what was promised."""
        server = await self._listen()
        callers = [asyncio.create_task(self._call()) for _ in range(CALLERS)]
        deadline = time.monotonic() + seconds
        try:
            while not self.ledger.violation and (
                time.monotonic() < deadline or self.ledger.counts["kills"] < kills
            ):
                await self._live()
            await self._stop_calling(callers)
            if not self.ledger.violation:
                await self._leave()
        finally:
            await self._end(signal.SIGKILL)
            server.close()

    async def _listen(self) -> asyncio.Server:
        """Listen for postbacks, and know how to start the service that sends them."""
        server = await asyncio.get_running_loop().create_server(
            lambda: Receiver(self.ledger, self._luck, self.failing, self.cut),
            "127.0.0.1",
            0,
            backlog=1024,
        )
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        self._env = {
            **os.environ,
            **self.settings,
            "JOURNAL": str(self._journal),
            "POSTBACK_URL": url,
        }
        return server

    async def _live(self) -> None:
        """Start the service and kill it, at some moment."""
        await self._start()
        if self._chance.randrange(100) < WHILE_STARTING:
            await self._pause(self._chance.uniform(0.0, 0.6))
            self.ledger.counts["while_starting"] += 1
        else:
            await self._ready()
            await self._pause(self._chance.uniform(0.05, 1.6))
            self._measure()
        self._must_run()
        await self._end(signal.SIGKILL)
        self.ledger.killed()
        self.ledger.counts["kills"] += 1

    async def _stop_calling(self, callers: list[asyncio.Task[None]]) -> None:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)

    async def _leave(self) -> None:
        """Start the service a last time, and let it deliver all."""
        await self._start()
        await self._ready()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.ledger.violation and time.monotonic() < deadline:
            if not await self._unfinished():
                break
            await self._pause(0.1)
        for job_id in sorted(self.ledger.waiting):
            await self._look_for(job_id)
        self.ledger.killed()
        code = await self._end(signal.SIGTERM)
        if code:
            self.ledger.fail(f"the last process exited with {code}")

    async def _unfinished(self) -> bool:
        """Whether a job has not ended yet, also one whose answer never came."""
        connection = await self._connect()
        with contextlib.closing(connection[1]):
            for state in ("accepted", "running", "delivering"):
                path = f"/jobs?limit=1&state={state}"
                if (await self._request(*connection, "GET", path, b""))[1]["jobs"]:
                    return True
        return False

    async def _look_for(self, job_id: str) -> None:
        """A promised job that was not delivered must be shown as undelivered."""
        status, job = await self._request(*await self._connect(), "GET", f"/jobs/{job_id}", b"")
        if status == 200 and job["state"] == "undelivered":
            self.ledger.counts["undelivered"] += 1
        else:
            self.ledger.fail(f"{job_id} is lost: {status} {job.get('state')}")

    # The process

    async def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "app.py", cwd=ROOT, env=self._env, stdout=-1, stderr=log
            )

    async def _ready(self) -> None:
        owed = set(self.ledger.waiting)
        assert self._process.stdout
        line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE_SECONDS)
        if b"listens on" not in line:
            self.ledger.fail(f"the service did not start: {self._log.read_text()[-2000:]}")
            return
        self._port = int(line.rsplit(b":", 1)[1])
        self.ledger.ready(owed)
        self._up.set()

    async def _end(self, number: signal.Signals) -> int:
        self._up.clear()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        return await asyncio.wait_for(self._process.wait(), PATIENCE_SECONDS)

    def _must_run(self) -> None:
        """Nothing but a kill ends the service."""
        if self._process.returncode is not None:
            log = self._log.read_text()[-2000:]
            self.ledger.fail(f"the service ended with {self._process.returncode}: {log}")

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ledger.changed.wait(), seconds)

    def _measure(self) -> None:
        """Keep the largest figures that any process came to."""
        directory = Path(f"/proc/{self._process.pid}")
        with contextlib.suppress(OSError, KeyError):  # it has ended
            status = dict(
                line.split(":", 1) for line in (directory / "status").read_text().splitlines()
            )
            self._keep("rss_mib", int(status["VmRSS"].split()[0]) // 1024)
            self._keep("threads", int(status["Threads"]))
            self._keep("fds", len(list((directory / "fd").iterdir())))
            self._keep("wal_mib", Path(f"{self._journal}-wal").stat().st_size // 1024**2)

    def _keep(self, name: str, value: int) -> None:
        self.ledger.counts[name] = max(self.ledger.counts[name], value)

    # Callers

    async def _call(self) -> None:
        while True:
            await self._up.wait()
            with contextlib.suppress(OSError, EOFError):
                await self._call_on(*await self._connect())
            await asyncio.sleep(0.005)

    async def _call_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send one job after the other, until the connection breaks."""
        with contextlib.closing(writer):
            while True:
                while len(self.ledger.waiting) > MAX_WAITING:
                    await asyncio.sleep(0.01)
                number = next(self._numbers)
                self.ledger.sent.add(number)
                body = b'{"data": %d}' % number
                status, answer = await self._request(reader, writer, "POST", "/process", body)
                if status == 200:
                    self.ledger.promise(answer["id"], number)
                elif status != 503:
                    self.ledger.fail(f"a valid payload was answered {status}")

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)

    async def _request(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        body: bytes,
    ) -> tuple[int, Any]:
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answered = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(answered)
        assert length
        return int(answered.split()[1]), json.loads(await reader.readexactly(int(length[1])))


def soak(seconds: float, seed: int, *, kills: int = 0) -> Ledger:
    """Run for so long, and for at least so many kills; return the ledger."""
    with tempfile.TemporaryDirectory(prefix="postback-soak-") as directory:

        async def run() -> Ledger:
            one = Soak(Path(directory), seed)
            await one.run(seconds, kills)
            return one.ledger

        return asyncio.run(run())


def main(arguments: list[str]) -> int:
    """Soak as long as asked, by default a minute; print the seed first and the counts last."""
    seconds = float(arguments[0]) if arguments else 60.0
    seed = int(arguments[1]) if arguments[1:] else random.SystemRandom().randrange(10**6)
    print(f"soak: {seconds:g} s, seed {seed}", flush=True)
    ledger = soak(seconds, seed)
    print(ledger.line())
    if ledger.violation:
        print(f"BROKEN: {ledger.violation}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Load without kills: `python -m tests.soak.load [case ...]` runs cases of docs/reliability.md.

Each prints one line of counts, and a broken promise ends the run with exit code 1: without faults
each job is delivered once, and no answer is other than 200 or 503.
"""

import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.kills import SETTINGS, Soak


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load.

    Attributes:
        requests: How many are sent, also those that are refused.
        seconds: How long each analysis takes.
        callers: Who send at once.
        failing, cut: Of a hundred postbacks, those answered 500 and those never answered.
    """

    requests: int
    seconds: float
    callers: int
    failing: int = 0
    cut: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)


CASES = {
    "H01": Case(requests=1000, seconds=5, callers=100, settings={"MAX_RUNNING": "1000"}),
    "H02": Case(requests=10_000, seconds=1, callers=100, settings={"MAX_RUNNING": "500"}),
    "H03": Case(
        requests=20_000,
        seconds=0.1,
        callers=100,
        settings={"MAX_RUNNING": "16", "MAX_PENDING": "200"},
    ),
    "H05": Case(requests=5000, seconds=0, callers=32, failing=10, cut=15),
    "E05": Case(requests=10_000, seconds=1, callers=100, settings={"MAX_RUNNING": "100"}),
}


class Load(Soak):
    """A service that is not killed."""

    def __init__(self, directory: Path, case: Case) -> None:
        super().__init__(directory, seed=1)
        self._case = case
        self.failing, self.cut = case.failing, case.cut
        self.settings = {
            **SETTINGS,
            "ANALYSIS": "tests.analyses:sleep",
            "MAX_PENDING": "20000",
            "RETENTION": "1h",
            **case.settings,
        }
        self._answered_seconds: list[float] = []

    async def load(self) -> str:
        """Send all, wait for all, and return one line."""
        server = await self._listen()
        began = time.monotonic()
        try:
            await self._start()
            await self._ready()
            shares = [self._share(caller) for caller in range(self._case.callers)]
            await asyncio.gather(*shares)
            self._measure()
            accepted_seconds = time.monotonic() - began
            await self._leave_alone()
        finally:
            await self._end(signal.SIGKILL)
            server.close()
        answers = sorted(self._answered_seconds)
        p99 = answers[len(answers) * 99 // 100]
        return (
            f"accepted={len(self.ledger.promised)} refused={self.ledger.counts['refused']} "
            f"p99_ms={1000 * p99:.0f} max_ms={1000 * answers[-1]:.0f} "
            f"accepted_seconds={accepted_seconds:.0f} seconds={time.monotonic() - began:.0f} "
            f"delivered={len(self.ledger.delivered)} repeats={self.ledger.counts['repeats']} "
            f"rss_mib={self.ledger.counts['rss_mib']} threads={self.ledger.counts['threads']}"
        )

    async def _share(self, caller: int) -> None:
        """Send every so-manieth request on one connection."""
        reader, writer = await self._connect()
        with contextlib.closing(writer):
            for number in range(self._case.requests)[caller :: self._case.callers]:
                data = round(self._case.seconds + number * 1e-9, 9)  # each its own
                self.ledger.sent.add(data)
                began = time.monotonic()
                body = b'{"data": %.9f}' % data
                status, answer = await self._request(reader, writer, "POST", "/process", body)
                if status == 200:
                    self._answered_seconds.append(time.monotonic() - began)
                    self.ledger.promise(answer["id"], data)
                else:
                    self.ledger.counts["refused"] += 1
                    if status != 503:
                        self.ledger.fail(f"a valid payload was answered {status}")

    async def _leave_alone(self) -> None:
        deadline = time.monotonic() + 240
        while self.ledger.waiting and not self.ledger.violation and time.monotonic() < deadline:
            await self._pause(0.5)
            self._measure()
        if self.ledger.waiting:
            self.ledger.fail(f"{len(self.ledger.waiting)} jobs were not delivered in time")
        if self.ledger.counts["repeats"] and not (self.failing or self.cut):
            self.ledger.fail("a job was delivered twice without a fault")


async def _run(name: str) -> str:
    with tempfile.TemporaryDirectory(prefix="postback-load-") as directory:
        one = Load(Path(directory), CASES[name])
        print(f"{name}: {await one.load()}", flush=True)
        return one.ledger.violation


def main(arguments: list[str]) -> int:
    """Run the cases that are named, by default all."""
    for name in arguments or CASES:
        if violation := asyncio.run(_run(name)):
            print(f"BROKEN: {violation}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

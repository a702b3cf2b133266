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

#: Seconds for all jobs to end after the last was accepted.
PATIENCE_SECONDS = 240.0


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
    callers: int = 100
    failing: int = 0
    cut: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)


CROWDED = {"MAX_RUNNING": "16", "MAX_PENDING": "200"}

CASES = {
    "H01": Case(requests=1000, seconds=5, settings={"MAX_RUNNING": "1000"}),
    "H02": Case(requests=10_000, seconds=1, settings={"MAX_RUNNING": "500"}),
    "H03": Case(requests=20_000, seconds=0.1, settings=CROWDED),
    "H05": Case(requests=5000, seconds=0, callers=32, failing=10, cut=15),
    "E05": Case(requests=10_000, seconds=1, settings={"MAX_RUNNING": "100"}),
}


class Load(Soak):
    """A service that is not killed."""

    def __init__(self, directory: Path, case: Case) -> None:
        super().__init__(directory, seed=1)
        self._case = case
        self.failing, self.cut = case.failing, case.cut
        more = {"ANALYSIS": "tests.analyses:sleep", "MAX_PENDING": "20000", "RETENTION": "1h"}
        self.settings = {**SETTINGS, **more, **case.settings}
        self._answer_seconds: list[float] = []

    async def load(self) -> str:
        """Send all, wait for all, and return one line."""
        server = await self._listen()
        began = time.monotonic()
        try:
            await self._start()
            await self._ready()
            await asyncio.gather(*map(self._send_share, range(self._case.callers)))
            accepted_seconds = time.monotonic() - began
            await self._leave_alone()
        finally:
            await self._end(signal.SIGKILL)
            server.close()
        answers = sorted(self._answer_seconds)
        p99, slowest = answers[len(answers) * 99 // 100], answers[-1]
        return (
            f"{self.ledger.line()} p99_ms={1000 * p99:.0f} max_ms={1000 * slowest:.0f} "
            f"accepted_seconds={accepted_seconds:.0f} seconds={time.monotonic() - began:.0f}"
        )

    async def _send_share(self, caller: int) -> None:
        """Send every so-manieth request on one connection."""
        connection = await self._connect()
        with contextlib.closing(connection[1]):
            for number in range(self._case.requests)[caller :: self._case.callers]:
                data = round(self._case.seconds + number * 1e-9, 9)  # each its own
                began = time.monotonic()
                if await self._send(connection, data, b'{"data": %.9f}' % data) == 200:
                    self._answer_seconds.append(time.monotonic() - began)

    async def _leave_alone(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.ledger.waiting and not self.ledger.violation and time.monotonic() < deadline:
            self._measure()
            await asyncio.sleep(0.2)
        left = len(self.ledger.waiting)
        self.ledger.demand(not left, f"{left} jobs were not delivered in time")
        repeats = 0 if self.failing or self.cut else self.ledger.counts["repeats"]
        self.ledger.demand(not repeats, f"{repeats} jobs were delivered twice without a fault")


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

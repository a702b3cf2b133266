"""Load without kills: `python -m tests.soak.load [case ...]` runs cases of docs/reliability.md.

Each prints one line of counts, and a broken promise ends the run with exit code 1: without faults
each job is delivered once, and no answer is other than 200 or 503.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness import Caller, poll
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

    def load(self) -> str:
        """Send all, wait for all, and return one line."""
        with self._receiver:
            self._start(self._environment())
            began = time.monotonic()
            with ThreadPoolExecutor(self._case.callers) as callers:
                list(callers.map(self._send_share, range(self._case.callers)))
            accepted_seconds = time.monotonic() - began
            try:
                poll(self._is_over, "all delivered", PATIENCE_SECONDS)
            finally:
                self._service.kill()
        repeats = 0 if self.failing or self.cut else self.ledger.counts["repeats"]
        self._demand(not repeats, f"{repeats} jobs were delivered twice without a fault")
        answers = sorted(self._answer_seconds)
        p99, slowest = answers[len(answers) * 99 // 100], answers[-1]
        return (
            f"{self.ledger.line()} p99_ms={1000 * p99:.0f} max_ms={1000 * slowest:.0f} "
            f"accepted_seconds={accepted_seconds:.0f} seconds={time.monotonic() - began:.0f}"
        )

    def _send_share(self, caller: int) -> None:
        """Send every so-manieth request on one connection."""
        with contextlib.closing(Caller(self._service.base_url)) as one:
            for number in range(self._case.requests)[caller :: self._case.callers]:
                data = round(self._case.seconds + number * 1e-9, 9)  # each its own
                began = time.monotonic()
                if self._send(one, data) == 200:
                    self._answer_seconds.append(time.monotonic() - began)

    def _is_over(self) -> bool:
        self._measure()
        return not self.ledger.waiting or bool(self.ledger.violation)


def run(name: str) -> str:
    """Run a case, print its counts, and return the first broken promise."""
    with tempfile.TemporaryDirectory(prefix="postback-load-") as directory:
        one = Load(Path(directory), CASES[name])
        print(f"{name}: {one.load()}", flush=True)
        return one.ledger.violation


def main(arguments: list[str]) -> int:
    """Run the cases that are named, by default all."""
    for name in arguments or CASES:
        if violation := run(name):
            print(f"BROKEN: {violation}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

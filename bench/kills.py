"""kill -9 in the middle of a load: which answered jobs never come back.

Front and workers are killed at once, and started again; Redis goes on, as on a machine of its own.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.load import Bench, Figures, Load
from bench.rounds import warm_up
from bench.systems import NAP, Running, System, running

#: Seconds of load before the kill.
BEFORE = 1.0

#: Seconds without a result after which no more are waited for.
PATIENCE = 10.0


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a kill cost.

    Attributes:
        held: Jobs that Redis keeps for workers that are gone, and gives out again later.
        resumed: Seconds from the start to the first result; None when none came.
    """

    answered: int
    lost: int
    repeats: int
    resumed: float | None
    held: int


def table(systems: Sequence[System], *, patience: float = PATIENCE) -> Iterator[str]:
    yield "### kill -9 after 1 s of 32 clients, then a new start; an analysis of 100 ms\n"
    yield "| system | answered 200 | lost | held back | posted twice | first result after a start |"
    yield "|" + " --- |" * 6
    notes = []
    for system in systems:
        print(f"kill -9: {system.name}", file=sys.stderr, flush=True)
        loss = measure(system, patience)
        resumed = "none" if loss.resumed is None else f"{loss.resumed:.1f} s"
        cells = [system.name, loss.answered, loss.lost, loss.held, loss.repeats, resumed]
        yield f"| {' | '.join(map(str, cells))} |"
        if loss.held:
            notes.append(f"* {system.name}: {system.note}.")
    yield ""
    yield f"Lost: no result came within {patience:.0f} s; what is held back is still in Redis:\n"
    yield from [*notes, ""]


def measure(system: System, patience: float) -> Loss:
    bench = Bench()
    try:
        with running(system, NAP, bench.receiver_url) as one:
            warm_up(bench, one)
            _kill(bench, one)
            bench.finish(0.1)  # what was posted before
            restarted_at = time.perf_counter()
            one.start()
            bench.finish(patience)
            return _loss(bench.figures(), bench.first_result_after(restarted_at), _held(one))
    finally:
        bench.close()


def _kill(bench: Bench, one: Running) -> None:
    """Send as in the closed loop, and kill all after a while."""
    at = time.perf_counter() + BEFORE

    def watch() -> None:
        if time.perf_counter() >= at:
            one.kill()
            bench.stop()

    bench.run(Load(seconds=BEFORE * 10), one.place.port, watch=watch)


def _loss(figures: Figures, resumed: float | None, held: int) -> Loss:
    return Loss(
        answered=figures.answered - figures.refused,
        lost=max(0, figures.missing - held),  # what is held may have been posted
        repeats=figures.repeats,
        resumed=resumed,
        held=held,
    )


def _held(one: Running) -> int:
    if not (one.system.held_key and shutil.which("redis-cli")):
        return 0
    command = ["redis-cli", "-p", str(one.place.redis_port), "hlen", one.system.held_key]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

"""Hours at half of what the service can do: does anything grow?

Jobs that ended are removed after a minute, so that the journal has its size after a few.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

from bench import proc
from bench.load import Bench, Load
from bench.rounds import warm_up
from bench.systems import ECHO, POSTBACK, Running, running

SETTINGS = {"RETENTION": "60s"}


def table(*, minutes: int) -> Iterator[str]:
    bench = Bench()
    try:
        with running(POSTBACK, ECHO, bench.receiver_url, settings=SETTINGS) as one:
            warm_up(bench, one)
            loops = [bench.run(Load(), one.place.port).jobs_per_second for _ in range(3)]
            rate = statistics.median(loops) / 2
            yield f"### {minutes} minutes at {rate:.0f} jobs/s, half of what 32 callers get\n"
            yield (
                "| minute | answer p50 | p99 | missing | refused or broken | CPU ms/job | RSS "
                "| threads | descriptors | journal | log |"
            )
            yield "| --- |" + " --- |" * 10
            for minute in range(1, minutes + 1):
                yield _minute(minute, bench, one, rate)
            yield ""
    finally:
        bench.close()


def _minute(number: int, bench: Bench, one: Running, rate: float) -> str:
    before = one.usage().cpu_seconds
    figures = bench.run(Load(clients=64, rate=rate, seconds=60), one.place.port)
    spent_ms = 1000 * (one.usage().cpu_seconds - before) / max(figures.delivered, 1)
    journal = one.place.directory / "journal.db"
    process = Path(f"/proc/{one.pid}")
    cells = (
        number,
        f"{figures.answer_p50:.1f} ms",
        f"{figures.answer_p99:.1f} ms",
        figures.missing,
        figures.refused + figures.broken,
        f"{spent_ms:.2f}",
        f"{proc.rss_mib(one.pid):.1f} MiB",
        sum(1 for _ in (process / "task").iterdir()),
        sum(1 for _ in (process / "fd").iterdir()),
        _mib(journal),
        _mib(Path(f"{journal}-wal")),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _mib(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"

"""What all parts share: one load through one system, and tables made of several rounds.

Each round starts every system afresh, in an order that moves on by one. A figure in a table is the
median over the rounds; a ratio is made within a round first.
"""

import argparse
import contextlib
import dataclasses
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from bench import systems
from bench.load import Bench, Load, Row

T = TypeVar("T")
Options = argparse.Namespace
Rows = Mapping[str, Sequence[Row]]  # by the name of what is measured, one for each round

#: How a figure is shown, by the end of its name.
FORMS = {
    "_p50": "{:.1f} ms",
    "_p99": "{:.1f} ms",
    "_ms": "{:.2f} ms",
    "_mib": "{:.0f} MiB",
    "_seconds": "{:.2f} s",
    "": "{:,.0f}",
}


@contextlib.contextmanager
def started(
    system: systems.System,
    shape: systems.Shape,
    settings: systems.Settings | None = None,
    *,
    warm: bool = True,
) -> Iterator[tuple[Bench, systems.Running]]:
    """Start a system with callers and receivers around it, and end it with all it started."""
    bench = Bench(receivers=shape.receivers, dead=shape.dead)
    with contextlib.closing(bench), systems.empty_folder() as folder:
        one = systems.Running(system, shape, bench.origins, settings or {}, folder)
        try:
            one.start()
            if warm:
                warm_up(bench, one)
            yield bench, one
        finally:
            one.stop()


def warm_up(bench: Bench, one: systems.Running, seconds: float = 0.5) -> None:
    """Wait until a first job comes back, then send as fast as in a closed loop.

    Raises:
        RuntimeError: The system does not deliver; with the end of its log.
    """
    results = one.system.delivers
    first = Load(clients=1, count=1, seconds=20, expect_results=results, patience=20)
    row = bench.run(first, one.port)
    if row["answers"] < 1 or row["refused"] or (results and row["missing"]):
        raise RuntimeError(f"{one.system.name} delivers nothing: {one.log()}")
    bench.run(Load(seconds=seconds, until_result=results, expect_results=results), one.port)


def run(bench: Bench, one: systems.Running, load: Load) -> Row:
    """Send one load, and return what came of it and what it cost."""
    if not one.system.delivers:
        load = dataclasses.replace(load, expect_results=False)
    before = one.usage()
    row = bench.run(load, one.port)
    after = one.usage()
    spent_ms = after["cpu_ms"] - before["cpu_ms"]
    return row | after | {"cpu_ms": spent_ms / max(row["answers"], 1)}


def collect(rounds: int, every: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Measure all of these in each round, and return what came by name."""
    found: dict[str, list[T]] = {name: [] for name in every}
    names = list(every)
    for number in range(rounds if names else 0):
        by = number % len(names)
        for name in [*names[by:], *names[:by]]:
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            found[name].append(every[name]())
    return found


def table(title: str, rows: Rows, figures: str) -> Iterator[str]:
    """Yield a table in Markdown: a line for each name, a column for each figure."""
    names = figures.split()
    titles = [re.sub("_(ms|mib|seconds)$", "", name).replace("_", " ") for name in names]
    yield f"### {title}\n\n| | {' | '.join(titles)} |"
    yield f"| --- |{' --- |' * len(names)}"
    for name, mine in rows.items():
        yield f"| {name} | {' | '.join(_cell(mine, figure) for figure in names)} |"
    yield ""


def ratios(rows: Sequence[Row], others: Sequence[Row], figure: str) -> str:
    """Return a figure in ratio to another's in the same round, and what the ratio lies within."""
    pairs = zip(rows, others, strict=True)
    return span([one[figure] / (other[figure] or float("inf")) for one, other in pairs], "{:.2f}")


def span(values: Sequence[float], form: str) -> str:
    """Return a median and what it lies within, such as `1.20 (1.10 to 1.31)`."""
    middle = form.format(statistics.median(values))
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))})"


def _cell(rows: Sequence[Row], figure: str) -> str:
    form = next(form for end, form in FORMS.items() if figure.endswith(end))
    values = [row[figure] for row in rows]
    if figure.endswith(("_per_second", "_seconds")) and len(values) > 1:
        return span(values, form)
    return form.format(statistics.median(values)).replace("inf s", "none")

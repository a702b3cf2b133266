"""The rounds: the same loads through each system in turn, and what is made of the figures.

Each round starts every system afresh, in an order that moves on by one; a figure in a table is the
median over the rounds, a ratio is made within a round first.
"""

import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.load import Bench, Load
from bench.systems import BARE, BURN, ECHO, NAP, POSTBACK, Running, Shape, System, running

T = TypeVar("T")

#: Of one system under one load in one round: the fields of `Figures`, and what it cost.
Row = dict[str, float]

#: By case, system and round.
Rows = dict[str, dict[str, list[Row]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load, and how long it lasts in proportion to the others."""

    name: str
    title: str
    shape: Shape
    load: Load
    part: float
    with_bare: bool = False


CASES = (
    Case(
        name="closed",
        title="Closed loop: 32 clients, each sends the next payload once it is answered; echo",
        shape=ECHO,
        load=Load(clients=32),
        part=1.0,
    ),
    Case(
        name="open",
        title="Open loop: 100 jobs/s; echo",
        shape=ECHO,
        load=Load(clients=64, rate=100),
        part=1.0,
        with_bare=True,
    ),
    Case(
        name="large",
        title="Payloads of 100 KB, 8 clients that wait for their results; echo",
        shape=ECHO,
        load=Load(clients=8, until_result=True, payload_bytes=100_000),
        part=0.5,
    ),
    Case(
        name="nap",
        title="An analysis that sleeps 100 ms, 32 clients that wait for their results",
        shape=NAP,
        load=Load(clients=32, until_result=True),
        part=0.75,
    ),
    Case(
        name="burn",
        title="An analysis that takes 50 ms of CPU, 8 clients that wait for their results",
        shape=BURN,
        load=Load(clients=8, until_result=True),
        part=1.0,
    ),
)


def measure(
    systems: Sequence[System], cases: Sequence[Case], *, rounds: int, seconds: float
) -> Rows:
    rows: Rows = {case.name: {} for case in cases}
    shapes = list(dict.fromkeys(case.shape for case in cases))
    for number in range(rounds):
        for shape in shapes:
            same = [case for case in cases if case.shape is shape]
            for system in rotated([*systems, *_bare(same)], number):
                print(f"round {number + 1}: {system.name}", file=sys.stderr, flush=True)
                for case, row in _round(system, shape, same, seconds):
                    rows[case.name].setdefault(system.name, []).append(row)
    return rows


def _bare(cases: Sequence[Case]) -> list[System]:
    return [BARE] if any(case.with_bare for case in cases) else []


def rotated(what: Sequence[T], by: int) -> list[T]:
    by %= len(what)
    return [*what[by:], *what[:by]]


def _round(
    system: System, shape: Shape, cases: Sequence[Case], seconds: float
) -> Iterator[tuple[Case, Row]]:
    bench = Bench()
    try:
        with running(system, shape, bench.receiver_url) as one:
            warm_up(bench, one)
            for case in cases:
                if case.with_bare or system is not BARE:
                    load = dataclasses.replace(case.load, seconds=seconds * case.part)
                    yield case, run(bench, one, load)
    finally:
        bench.close()


def warm_up(bench: Bench, one: Running, seconds: float = 0.5) -> None:
    """Wait until a first job comes back, then send as fast as in a closed loop.

    Raises:
        RuntimeError: The system does not deliver; with the end of its log.
    """
    results = one.system.delivers
    first = Load(clients=1, count=1, seconds=20, expect_results=results, patience=20)
    figures = bench.run(first, one.place.port)
    if figures.answered < 1 or (results and figures.missing):
        raise RuntimeError(f"{one.system.name} delivers nothing: {one.log()[-2000:]}")
    load = Load(seconds=seconds, until_result=results, expect_results=results)
    bench.run(load, one.place.port)


def run(bench: Bench, one: Running, load: Load) -> Row:
    """Send one load, and return what came of it and what it cost."""
    load = dataclasses.replace(load, expect_results=one.system.delivers)
    before = one.usage()
    figures = bench.run(load, one.place.port)
    after = one.usage()
    return dataclasses.asdict(figures) | {
        "cpu_ms": 1000 * (after.cpu_seconds - before.cpu_seconds) / max(figures.answered, 1),
        "rss_mib": after.rss_mib,
        "processes": after.processes,
    }


# Tables


COLUMNS = (
    ("answers/s", "answers_per_second", "{:,.0f}"),
    ("answer p50", "answer_p50", "{:.1f} ms"),
    ("p99", "answer_p99", "{:.1f} ms"),
    ("jobs/s", "jobs_per_second", "{:,.0f}"),
    ("job p50", "job_p50", "{:.1f} ms"),
    ("p99", "job_p99", "{:.1f} ms"),
    ("CPU ms/job", "cpu_ms", "{:.2f}"),
    ("RSS", "rss_mib", "{:.0f} MiB"),
    ("processes", "processes", "{:.0f}"),
)

#: What is put in ratio: the figure, and which is best.
RATIOS = (
    ("jobs/s", "jobs_per_second", max),
    ("CPU ms/job", "cpu_ms", min),
    ("answer p99", "answer_p99", min),
    ("job p99", "job_p99", min),
)


def median(rows: Sequence[Row], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def table(case: Case, rows: dict[str, list[Row]], durable: dict[str, str]) -> Iterator[str]:
    """Yield the lines of a table in Markdown, and of what follows from it."""
    yield f"### {case.title}\n"
    titles = ["system", *(title for title, _, _ in COLUMNS), "jobs/s, least to most", "durable"]
    yield f"| {' | '.join(titles)} |"
    yield f"|{' --- |' * len(titles)}"
    for name, mine in sorted(rows.items(), key=_postback_first):
        delivers = median(mine, "delivered") > 0
        cells = [_cell(mine, column, form, delivers) for _, column, form in COLUMNS]
        speeds = [row["jobs_per_second"] for row in mine]
        span = f"{min(speeds):,.0f} to {max(speeds):,.0f}" if delivers else ""
        yield f"| {' | '.join([name, *cells, span, durable[name]])} |"
    yield ""
    yield from _remarks(rows)


def _postback_first(item: tuple[str, list[Row]]) -> tuple[bool, bool]:
    return item[0] != POSTBACK.name, item[0] != BARE.name


def _cell(rows: Sequence[Row], column: str, form: str, delivers: bool) -> str:  # noqa: FBT001
    return form.format(median(rows, column)) if delivers or "job" not in column else ""


def _remarks(rows: dict[str, list[Row]]) -> Iterator[str]:
    for title, column, best in RATIOS:
        ratios = list(_ratios(rows, column, best))
        if ratios:
            low, high = min(ratios), max(ratios)
            middle = statistics.median(ratios)
            yield f"* {title}: {middle:.2f} x the best peer ({low:.2f} to {high:.2f})"
    if BARE.name in rows and POSTBACK.name in rows:
        pairs = zip(rows[POSTBACK.name], rows[BARE.name], strict=True)
        middle = statistics.median(one["answer_p99"] / bare["answer_p99"] for one, bare in pairs)
        yield f"* answer p99: {middle:.2f} x the bare route"
    for name, mine in rows.items():
        for word in ("missing", "refused", "broken", "repeats"):
            count = sum(row[word] for row in mine)
            if count and name != BARE.name:
                yield f"* {name}: {count:.0f} {word}"
    own = [row["own_ms"] for mine in rows.values() for row in mine]
    yield f"* Callers and receiver cost {statistics.median(own):.3f} ms of CPU a job.\n"


def _ratios(rows: dict[str, list[Row]], column: str, best: object) -> Iterator[float]:
    """Yield, for each round, the service's figure over that of the best peer in the round."""
    peers = [mine for name, mine in rows.items() if name not in (POSTBACK.name, BARE.name)]
    for number, row in enumerate(rows.get(POSTBACK.name, [])):
        others = [mine[number][column] for mine in peers if mine[number]["delivered"]]
        if others:
            yield row[column] / best(others)  # type: ignore[operator]

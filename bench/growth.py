"""What a journal that has grown costs, a start with many jobs, and 10,000 jobs at once.

A journal is filled by copying one real job, row by row, whatever columns the tables have.
"""

import contextlib
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path

from bench import proc
from bench.load import FIRST, Bench, Load
from bench.rounds import Row, rotated, run, warm_up
from bench.systems import DATA, ECHO, POSTBACK, Running, Shape, running

FINISHED = (0, 100_000, 1_000_000)
PENDING = 100_000
AT_ONCE = 10_000

#: Nothing is pruned while we look.
KEEP = {"RETENTION": "7d"}

LONG = Shape(analysis="bench.analyses:nap_long", huey="", dramatiq="", celery="")


def table(*, rounds: int, seconds: float, quick: bool) -> Iterator[str]:
    finished = FINISHED[:2] if quick else FINISHED
    yield from _finished(finished, rounds=rounds, seconds=seconds)
    yield from _pending(PENDING)
    yield from _at_once(AT_ONCE // 10 if quick else AT_ONCE)


# Finished jobs


def _finished(counts: tuple[int, ...], *, rounds: int, seconds: float) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        journals = {}
        for count in counts:
            _say(f"fill a journal with {count} finished jobs")
            directory = stack.enter_context(tempfile.TemporaryDirectory(dir=_data()))
            journals[count] = _with_finished(Path(directory), count)
        rows: dict[int, list[dict[str, Row]]] = {count: [] for count in counts}
        for number in range(rounds):
            _say(f"growth, round {number + 1}")
            for count in rotated(counts, number):
                rows[count].append(_loads(journals[count], number + 1, seconds))
    yield "### Finished jobs in the journal\n"
    yield (
        "| finished jobs | start to ready | answer p99 at 100 jobs/s | ratio "
        "| answer p99, 32 clients | ratio | jobs/s, 32 clients | ratio | RSS |"
    )
    yield "| --- |" + " --- |" * 8
    for count in counts:
        yield _line(f"{count:,}", rows[count], rows[counts[0]])
    yield ""


def _loads(journal: Path, number: int, seconds: float) -> dict[str, Row]:
    bench = Bench(first=FIRST + 100_000 * number)  # what is left of a round may come in the next
    try:
        begun = time.perf_counter()
        with _on(journal, bench) as one:
            ready = time.perf_counter() - begun
            warm_up(bench, one)
            steady = run(bench, one, Load(clients=64, rate=100, seconds=seconds))
            closed = run(bench, one, Load(seconds=seconds / 2))
            return {"start": {"ready": ready}, "open": steady, "closed": closed}
    finally:
        bench.close()


def _line(title: str, rows: list[dict[str, Row]], first: list[dict[str, Row]]) -> str:
    cells = [title, f"{_median(rows, 'start', 'ready'):.2f} s"]
    for load, figure, form in (
        ("open", "answer_p99", "{:.1f} ms"),
        ("closed", "answer_p99", "{:.0f} ms"),
        ("closed", "jobs_per_second", "{:,.0f}"),
    ):
        pairs = zip(rows, first, strict=True)
        ratios = [one[load][figure] / other[load][figure] for one, other in pairs]
        cells += [form.format(_median(rows, load, figure)), f"{statistics.median(ratios):.2f}"]
    return f"| {' | '.join(cells)} | {_median(rows, 'closed', 'rss_mib'):.0f} MiB |"


def _median(rows: list[dict[str, Row]], load: str, figure: str) -> float:
    return statistics.median(row[load][figure] for row in rows)


# Pending jobs


def _pending(count: int) -> Iterator[str]:
    _say(f"start with {count} pending jobs")
    bench = Bench(first=FIRST + 1000)  # the copies have lower numbers
    with tempfile.TemporaryDirectory(dir=_data()) as directory:
        journal = _with_pending(Path(directory), count)
        begun = time.perf_counter()
        with _on(journal, bench) as one:
            alive = time.perf_counter() - begun
            _wait_for(one, "/readyz")
            ready = time.perf_counter() - begun
            steady = run(bench, one, Load(clients=64, rate=100, seconds=3, patience=0))
            rss = one.usage().rss_mib
    bench.close()
    yield f"### A start with {count:,} pending jobs\n"
    yield "| /livez | /readyz | answer p99 at 100 jobs/s meanwhile | RSS |"
    yield "| --- | --- | --- | --- |"
    yield f"| {alive:.2f} s | {ready:.2f} s | {steady['answer_p99']:.1f} ms | {rss:.0f} MiB |\n"


# Many at once


def _at_once(count: int) -> Iterator[str]:
    yield f"### {count:,} jobs of 1 s\n"
    yield (
        "| | MAX_RUNNING | accepted in | answer p99 | all delivered in | missing | peak RSS "
        "| CPU ms/job |"
    )
    yield "| --- |" + " --- |" * 7
    for places in (500, count):
        _say(f"{count} jobs of 1 s, MAX_RUNNING={places}")
        yield f"| sent by 100 clients {_sent(count, places)} |"
    _say(f"{count} jobs of 1 s at a start")
    yield f"| in the journal at a start {_taken_up(count)} |"
    yield ""


def _sent(count: int, places: int) -> str:
    bench = Bench()
    settings = {"MAX_RUNNING": str(places)}
    with running(POSTBACK, LONG, bench.receiver_url, settings=settings) as one:
        load = Load(clients=100, count=count, seconds=120, patience=20)
        row = run(bench, one, load)
        peak = proc.peak_mib(one.pid)
    bench.close()
    return (
        f"| {places} | {row['answered'] / row['answers_per_second']:.1f} s "
        f"| {row['answer_p99']:.0f} ms | {row['delivered'] / row['jobs_per_second']:.1f} s "
        f"| {row['missing']:.0f} | {peak:.0f} MiB | {row['cpu_ms']:.2f}"
    )


def _taken_up(count: int) -> str:
    bench = Bench(first=FIRST + 1000)
    with tempfile.TemporaryDirectory(dir=_data()) as directory:
        journal = _with_pending(Path(directory), count)
        begun = time.perf_counter()
        with _on(journal, bench, shape=LONG, MAX_RUNNING=str(count)) as one:
            came = bench.receive(count, patience=20)
            seconds = time.perf_counter() - begun
            peak, cpu = proc.peak_mib(one.pid), one.usage().cpu_seconds
    bench.close()
    return (
        f"| {count} | | | {seconds:.1f} s | {count - came} | {peak:.0f} MiB "
        f"| {1000 * cpu / count:.2f}"
    )


# Journals


def _with_finished(directory: Path, count: int) -> Path:
    bench = Bench()
    journal = directory / "journal.db"
    with _on(journal, bench) as one:
        bench.run(Load(clients=1, count=1), one.place.port)
        time.sleep(0.2)  # it notes the delivery after the receiver has it
    bench.close()
    _copy_job(journal, "delivered", count)
    return journal


def _with_pending(directory: Path, count: int) -> Path:
    bench = Bench()
    journal = directory / "journal.db"
    with _on(journal, bench, shape=LONG, MAX_RUNNING="1") as one:
        bench.run(Load(clients=1, count=3, patience=0), one.place.port)
    bench.close()
    _copy_job(journal, "accepted", count)
    return journal


def _copy_job(journal: Path, state: str, count: int) -> None:
    """Copy a job in that state, with all its rows, until there are `count` more."""
    with contextlib.closing(sqlite3.connect(journal, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        one = "SELECT max(seq) FROM jobs WHERE state = ?"
        (seq,) = connection.execute(one, (state,)).fetchone()
        tables = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
        names = [name for (name,) in connection.execute(tables).fetchall()]
        connection.execute("BEGIN")
        for name in sorted(names, key=lambda name: name != "jobs"):  # the others refer to it
            _copy_rows(connection, name, seq, count)
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.sync()  # or the next commits wait for all that


def _copy_rows(connection: sqlite3.Connection, name: str, seq: int, count: int) -> None:
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({name})").fetchall()]
    if "seq" not in columns:
        return
    made = {"seq": "numbers.n", "id": "printf('%032x', numbers.n)"}
    values = ", ".join(made.get(column, f"{name}.{column}") for column in columns)
    connection.execute(
        f"WITH RECURSIVE numbers (n) AS (SELECT 1000 UNION ALL SELECT n + 1 FROM numbers"
        f" WHERE n < 999 + {count})"
        f" INSERT INTO {name} ({', '.join(columns)}) SELECT {values} FROM numbers, {name}"
        f" WHERE {name}.seq = ? AND {count} > 0",
        (seq,),
    )


@contextlib.contextmanager
def _on(journal: Path, bench: Bench, *, shape: Shape = ECHO, **settings: str) -> Iterator[Running]:
    """The service on this journal, alive."""
    every: Mapping[str, str] = {"JOURNAL": str(journal), **KEEP, **settings}
    with running(POSTBACK, shape, bench.receiver_url, settings=every) as one:
        _wait_for(one, "/livez")
        yield one


def _wait_for(one: Running, path: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        connection = HTTPConnection("127.0.0.1", one.place.port, timeout=30)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        time.sleep(0.005)
    raise TimeoutError(f"{path} is not 200: {one.log()[-2000:]}")


def _data() -> Path:
    DATA.mkdir(exist_ok=True)
    return DATA


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""Part `growth`: a journal that has grown, a start with many jobs, and 10,000 jobs at once.

A journal is filled by copying the rows of one real job, whatever columns the tables have.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from bench.load import Load, Row
from bench.rounds import Options, collect, ratios, run, started, table, warm_up
from bench.systems import ECHO, NAP_LONG, System, empty_folder

ENDED = 1_000_000
PENDING = 100_000
AT_ONCE = 10_000
MEMORY = "rss_mib peak_mib threads"


def part(options: Options) -> Iterator[str]:
    small = 10 if options.quick else 1
    for system in options.services:
        yield from _ended(system, ENDED // small, options)
    every = {one.name: partial(_pending, one, PENDING // small) for one in options.services}
    title = f"A start with {PENDING // small:,} pending jobs, and 100 jobs/s after it"
    yield from table(title, collect(1, every), f"alive_seconds ready_seconds answer_p99 {MEMORY}")
    every = {one.name: partial(_at_once, one, AT_ONCE // small) for one in options.services}
    title = f"{AT_ONCE // small:,} jobs of 1 s from 100 clients, MAX_RUNNING=500"
    figures = "answers_seconds jobs_seconds answer_p99 missing refused cpu_ms"
    yield from table(title, collect(1, every), f"{figures} {MEMORY}")


def _ended(system: System, count: int, options: Options) -> Iterator[str]:
    with empty_folder() as folder:
        every = {}
        for ended in (0, count):
            settings = _filled(system, folder / f"{ended}.db", "delivered", ended)
            every[f"{ended:,} ended jobs"] = partial(_loads, system, settings, options.seconds)
        rows = collect(options.rounds, every)
    figures = "ready_seconds steady_p99 jobs_per_second answer_p99 cpu_ms rss_mib"
    yield from table(f"{system.name}: a journal that has grown", rows, figures)
    empty, full = rows.values()
    for figure in ("steady_p99", "jobs_per_second"):
        yield f"* {figure.replace('_', ' ')}: {ratios(full, empty, figure)} x the empty journal."
    yield "\nSteady: 100 jobs/s; the others are of 32 clients in a closed loop.\n"


def _loads(system: System, settings: Mapping[str, str], seconds: float) -> Row:
    begun = time.perf_counter()
    with started(system, ECHO, settings, warm=False) as (bench, one):
        one.wait_for("/readyz")
        ready = time.perf_counter() - begun
        warm_up(bench, one)
        steady = run(bench, one, Load(clients=64, rate=100, seconds=seconds))
        closed = run(bench, one, Load(seconds=seconds / 2))
        return closed | {"ready_seconds": ready, "steady_p99": steady["answer_p99"]}


def _pending(system: System, count: int) -> Row:
    with empty_folder() as folder:
        settings = _filled(system, folder / "journal.db", "accepted", count)
        begun = time.perf_counter()
        with started(system, ECHO, settings, warm=False) as (bench, one):
            one.wait_for("/livez")
            alive = time.perf_counter() - begun
            one.wait_for("/readyz")
            ready = time.perf_counter() - begun
            row = run(bench, one, Load(clients=64, rate=100, seconds=3, expect_results=False))
            return row | {"alive_seconds": alive, "ready_seconds": ready}


def _at_once(system: System, count: int) -> Row:
    with started(system, NAP_LONG, {"MAX_RUNNING": "500"}) as (bench, one):
        return run(bench, one, Load(clients=100, count=count, seconds=120, patience=20))


def _filled(system: System, journal: Path, state: str, count: int) -> Mapping[str, str]:
    """Fill a journal with so many jobs in that state; return the settings to use it."""
    settings = {"JOURNAL": str(journal), "RETENTION": "7d"}  # nothing is pruned while we look
    ended = state == "delivered"
    shape, few = (ECHO, {}) if ended else (NAP_LONG, {"MAX_RUNNING": "1"})
    with started(system, shape, {**settings, **few}, warm=False) as (bench, one):
        bench.run(Load(clients=3, count=3, expect_results=ended), one.port)
        time.sleep(0.2)  # it notes the delivery after the receiver has it
    with contextlib.closing(sqlite3.connect(journal, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        _copy_job(connection, state, count)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.sync()  # or the next commits wait for all that
    return settings


def _copy_job(connection: sqlite3.Connection, state: str, count: int) -> None:
    """Copy a job in that state, with all its rows, until there are `count` more."""
    (seq,) = connection.execute("SELECT max(seq) FROM jobs WHERE state = ?", (state,)).fetchone()
    tables = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
    names = [name for (name,) in connection.execute(tables).fetchall() if name != "received"]
    made = {"seq": "numbers.n", "id": "printf('%032x', numbers.n)"}
    connection.execute("BEGIN")
    for name in sorted(names, key=lambda name: name != "jobs"):  # the others refer to it
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({name})").fetchall()]
        if "seq" in columns:
            values = ", ".join(made.get(column, f"{name}.{column}") for column in columns)
            connection.execute(
                "WITH RECURSIVE numbers (n) AS (SELECT 1000 UNION ALL SELECT n + 1 FROM numbers"
                f" WHERE n < 999 + {count}) INSERT INTO {name} ({', '.join(columns)})"
                f" SELECT {values} FROM numbers, {name} WHERE {name}.seq = ? AND {count} > 0",
                (seq,),
            )
    connection.execute("COMMIT")

"""Parts `start` and `executors`: what a system costs before the work, and what computing costs."""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial

from bench.load import Load, Row
from bench.rounds import Options, collect, run, started, table
from bench.systems import BACKGROUND, ECHO, SPIN, System

#: Seconds without a request before the memory is read.
IDLE = 1.0

#: Analyses that compute all the time, and as many workers in `process`.
BUSY = 4


def start(options: Options) -> Iterator[str]:
    systems = [*options.services, *map(_in_processes, options.services), *options.peers]
    rows = collect(options.rounds, {one.name: partial(_started, one) for one in systems})
    figures = "answer_seconds rss_mib processes job_p50 job_p99"
    yield from table("Start to first answer; idle memory; then one caller", rows, figures)


def _in_processes(system: System) -> System:
    settings = {**system.settings, "EXECUTOR": "process", "WORKERS": str(BUSY)}
    return dataclasses.replace(system, name=f"{system.name}, `process`", settings=settings)


def _started(system: System) -> Row:
    begun = time.perf_counter()
    with started(system, ECHO, warm=False) as (bench, one):
        seconds = time.perf_counter() - begun
        first = bench.run(Load(clients=1, count=1, seconds=20, patience=20), one.port)
        seconds += first["answers_seconds"]  # the workers of some are ready later than their front
        time.sleep(IDLE)
        usage = one.usage()
        row = bench.run(Load(clients=1, until_result=True, seconds=1), one.port)
        return row | usage | {"answer_seconds": seconds}


def executors(options: Options) -> Iterator[str]:
    every = {f"{one.name}, nothing running": partial(_paced, one, 0) for one in options.services}
    systems = [*options.services, *map(_in_processes, options.services)]
    for one in (*systems, *(peer for peer in options.peers if peer is BACKGROUND)):
        every[one.name] = partial(_paced, one, BUSY)
    rows = collect(
        options.rounds, {name: partial(one, options.seconds) for name, one in every.items()}
    )
    title = f"The 200 at 100 jobs/s while {BUSY} analyses compute all the time"
    yield from table(title, rows, "answers_per_second answer_p50 answer_p99")


def _paced(system: System, busy: int, seconds: float) -> Row:
    with started(system, SPIN) as (bench, one):
        spin = f'"seconds": {seconds + 5}'
        bench.run(Load(clients=busy, count=busy, expect_results=False, extra=spin), one.port)
        time.sleep(0.5)
        paced = Load(clients=64, rate=100, seconds=seconds, expect_results=False)
        return run(bench, one, paced)

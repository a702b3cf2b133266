"""Parts `kill` and `resume`: kill -9 in the middle of a load, and what comes after a new start.

Front and workers are killed at once, and started again; Redis goes on, as on a machine of its own.
"""

import itertools
import subprocess
import time
from collections.abc import Iterator
from functools import partial

from bench.load import Load, Row
from bench.rounds import Options, collect, started, table
from bench.systems import NAP, NAP_LONG, Running, System

#: Seconds without a result after which no more are waited for.
PATIENCE = 10.0

#: Jobs that run when the service is killed; MAX_RUNNING is above it.
RUNNING = 24


def kill(options: Options) -> Iterator[str]:
    patience = 3.0 if options.quick else PATIENCE
    every = [*options.services, *options.peers]
    rows = collect(1, {one.name: partial(_killed, one, patience) for one in every})
    title = "kill -9 after 1 s of 32 clients, then a new start; an analysis of 100 ms"
    yield from table(title, rows, "answers refused lost held_back repeats first_result_seconds")
    yield f"Lost: no result came within {patience:.0f} s. Held back: it is still in Redis."
    yield "Dramatiq looks for such jobs after a minute, Celery gives them out after an hour.\n"


def _killed(system: System, patience: float) -> Row:
    with started(system, NAP) as (bench, one):
        bench.run(Load(seconds=1, patience=0), one.port)
        one.kill()
        bench.finish(0.1)  # what was posted before
        begun = time.perf_counter()
        one.start()
        bench.finish(patience)
        row, held = bench.figures(), _held(one)
        after = [at - begun for at in bench.delivered_at if at > begun]
    row["first_result_seconds"] = min(after, default=float("inf"))
    row["lost"] = max(0, row["missing"] - held)  # what is held may have been posted
    return row | {"held_back": held}


def _held(one: Running) -> int:
    if not one.system.held_key:
        return 0
    command = ["redis-cli", "-p", str(one.redis_port), "hlen", one.system.held_key]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def resume(options: Options) -> Iterator[str]:
    pairs = itertools.product(options.services, ("thread", "process"))
    every = {
        f"{one.name}, `{executor}`": partial(_resumed, one, executor) for one, executor in pairs
    }
    title = "kill -9 with 24 running jobs of 1 s, MAX_RUNNING=32; seconds from the new start"
    figures = "answer_seconds first_job_seconds last_job_seconds came answer_p99"
    yield from table(title, collect(options.rounds, every), figures)


def _resumed(system: System, executor: str) -> Row:
    settings = {"EXECUTOR": executor, "MAX_RUNNING": "32"}
    settings |= {"WORKERS": "32"} if executor == "process" else {}
    with started(system, NAP_LONG, settings, warm=False) as (bench, one):
        one.wait_for("/readyz")
        time.sleep(2.0)  # until all workers are there
        bench.run(Load(clients=RUNNING, count=RUNNING, expect_results=False), one.port)
        time.sleep(0.5)  # all have begun, none has ended
        one.kill()
        begun = time.perf_counter()
        one.start()
        bench.run(Load(clients=1, count=1, expect_results=False), one.port)
        answered = time.perf_counter() - begun
        row = bench.run(Load(clients=64, rate=100, seconds=3, expect_results=False), one.port)
        bench.finish(PATIENCE, strangers=RUNNING)
        came = [at - begun for at in bench.strangers_at] or [float("inf")]
    count = min(len(came), RUNNING)  # the one answered first may have come, too
    times = {"first_job_seconds": came[0], "last_job_seconds": came[count - 1], "came": count}
    return row | times | {"answer_seconds": answered}

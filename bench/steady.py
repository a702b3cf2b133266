"""Part `steady`: minutes at half of what the service can do. Does anything grow?

Jobs that ended are removed after a minute, so the journal has its size after a few.
"""

import statistics
from collections.abc import Iterator

from bench.load import Load
from bench.rounds import Options, run, started, table
from bench.systems import ECHO

FIGURES = "answer_p50 answer_p99 wait_p99 jobs missing refused broken cpu_ms rss_mib processes"
FIGURES += " threads files journal_mib wal_mib"


def part(options: Options) -> Iterator[str]:
    for system in options.services:
        with started(system, ECHO, {"RETENTION": "60s"}) as (bench, one):
            loops = [bench.run(Load(), one.port)["jobs_per_second"] for _ in range(3)]
            rate = statistics.median(loops) / 2
            title = f"{system.name}: {options.minutes} minutes at {rate:.0f} jobs/s"
            for minute in range(1, options.minutes + 1):
                row = run(bench, one, Load(clients=64, rate=rate, seconds=60))
                for name, file in (("journal_mib", "journal.db"), ("wal_mib", "journal.db-wal")):
                    row[name] = (one.folder / file).stat().st_size / 2**20
                head, rule, line, end = table(title, {f"minute {minute}": [row]}, FIGURES)
                yield from (head, rule, line) if minute == 1 else (line,)
            yield end

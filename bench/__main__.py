"""`./run bench [part ...]`: the service beside its peers, as tables in Markdown.

Parts, by default all but the last: `peers` (the same work through every system), `kill` (what a
kill -9 loses), `growth` (large journals, many jobs), `start` (time and memory), `executors` (and
the 200 beside analyses that compute), `resume` (24 running jobs after a kill -9); `steady`
(fifteen minutes, or an hour, at half of what the service can do).
"""

import argparse
import contextlib
import os
import platform
import re
import resource
import shutil
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import cases, growth, kills, load, proc, start, steady, systems

PARTS = {
    "peers": cases.part,
    "kill": kills.kill,
    "growth": growth.part,
    "start": start.start,
    "executors": start.executors,
    "resume": kills.resume,
    "steady": steady.part,
}


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or what was started would stay
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"{_machine(busy=options.busy)}\n", flush=True)
    print(load.LEGEND)
    with proc.busy_neighbour() if options.busy else contextlib.nullcontext():
        for part in options.parts or [one for one in PARTS if one != "steady"]:
            for line in PARTS[part](options):
                print(line, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="part", help=f"one of {', '.join(PARTS)}")
    add("--rounds", type=int, help="of each load (default 5)")
    add("--seconds", type=float, help="of a load (default 3)")
    add("--quick", action="store_true", help="one round of 1 s, smaller journals")
    add("--busy", action="store_true", help="keep one core busy meanwhile")
    add("--only", nargs="+", default=[], metavar="NAME", help="systems, by a part of the name")
    add("--cases", nargs="+", default=[], choices=[one.name for one in cases.CASES])
    add("--service", type=Path, metavar="FOLDER", help="another checkout, with its .venv, beside")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the service")
    add("--hour", action="store_true", help="of `steady`, in place of fifteen minutes")
    options = parser.parse_args()
    if wrong := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(wrong)}; there are {', '.join(PARTS)}")
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.seconds = options.seconds or (1.0 if options.quick else 3.0)
    options.minutes = 60 if options.hour else 1 if options.quick else 15
    settings = dict(one.split("=", 1) for one in options.set)
    roots = [systems.ROOT, *([options.service.resolve()] if options.service else [])]
    options.services = _chosen([systems.service(root, settings) for root in roots], options.only)
    options.peers = _chosen(systems.PEERS, options.only)
    if not (options.services or options.peers):
        parser.error("no system has such a name")
    return options


def _chosen(every: Sequence[systems.System], names: list[str]) -> list[systems.System]:
    if missing := [one.name for one in every if one.held_key and not shutil.which("redis-server")]:
        print(f"Left out for want of Debian's package redis-server: {', '.join(missing)}.\n")
    wanted = [name.lower() for name in names] or [""]
    chosen = [one for one in every if any(name in one.name.lower() for name in wanted)]
    return [one for one in chosen if one.name not in missing]


def _machine(*, busy: bool) -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = f"{os.cpu_count()} cores{', one of them kept busy' if busy else ''}"
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}, `{' '.join(['./run bench', *sys.argv[1:]])}`,"
        f" Python {platform.python_version()}, Linux {platform.release()}, {cores}"
        f" ({model and model[1]}), load average at the start {os.getloadavg()[0]:.2f},"
        " a commit on the disk alone p50 {:.1f} and p99 {:.1f} ms".format(*proc.disk_ms())
    )


if __name__ == "__main__":
    main()

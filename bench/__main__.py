"""`./run bench [part …]`: the service beside its peers, as tables in Markdown; about 20 minutes.

Parts, by default all of them: `peers` (the same work through every system), `kill` (what a kill -9
loses), `growth` (large journals, many jobs), `start` (time, memory, imports), `executors`; and
only when it is named `steady` (an hour at half of what the service can do).
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from bench import growth, kills, rounds, start, steady
from bench.systems import BARE, DATA, PEERS, PEERS_PYTHON, POSTBACK, ROOT, System, missing

PICTURE = "docs/bench.svg"


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or what was started would stay
    print(f"{_machine()}\n")
    for part in options.parts or USUAL:
        PARTS[part](options)


def peers(options: argparse.Namespace) -> None:
    systems = list(_chosen(options.only))
    cases = [one for one in rounds.CASES if not options.loads or one.name in options.loads]
    rows = rounds.measure(systems, cases, rounds=options.rounds, seconds=options.seconds)
    durable = {one.name: one.durable for one in (*systems, BARE)}
    for case in cases:
        print("\n".join(rounds.table(case, rows[case.name], durable)), flush=True)
    if not (options.quick or options.only or options.loads):
        (DATA / "peers.json").write_text(json.dumps({"durable": durable, "rows": rows}, indent=1))
        command = [PEERS_PYTHON, "bench/plot.py", DATA / "peers.json", PICTURE]
        subprocess.run(command, cwd=ROOT, check=True)
        print(f"The picture is {PICTURE}.\n")


def kill(options: argparse.Namespace) -> None:
    patience = 3.0 if options.quick else kills.PATIENCE
    for line in kills.table(list(_chosen(options.only)), patience=patience):
        print(line, flush=True)


def grow(options: argparse.Namespace) -> None:
    for line in growth.table(rounds=options.rounds, seconds=options.seconds, quick=options.quick):
        print(line, flush=True)


def begin(options: argparse.Namespace) -> None:
    for line in start.table(list(_chosen(options.only)), rounds=options.rounds):
        print(line, flush=True)


def executors(options: argparse.Namespace) -> None:
    command = [sys.executable, "bench/executors.py", *(["1"] if options.quick else [])]
    subprocess.run(command, check=True)


def hold(options: argparse.Namespace) -> None:
    for line in steady.table(minutes=1 if options.quick else options.minutes):
        print(line, flush=True)


USUAL = {"peers": peers, "kill": kill, "growth": grow, "start": begin, "executors": executors}
PARTS = USUAL | {"steady": hold}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5, help="of each load (default 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a load (default 3)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="systems, by a part of the name"
    )
    parser.add_argument(
        "--loads", nargs="+", default=[], choices=[one.name for one in rounds.CASES]
    )
    parser.add_argument("--minutes", type=int, default=60, help="of `steady` (default 60)")
    parser.add_argument("--quick", action="store_true", help="one short round, about 4 minutes")
    options = parser.parse_args()
    if wrong := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(wrong)}; there are {', '.join(PARTS)}")
    if options.quick:
        options.rounds, options.seconds = 1, 1.0
    return options


def _chosen(names: list[str]) -> list[System]:
    chosen = []
    for system in (POSTBACK, *PEERS):
        if not names or any(name.lower() in system.name.lower() for name in names):
            if reason := missing(system):
                print(f"{reason}\n")
            else:
                chosen.append(system)
    return chosen


def _machine() -> str:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    load = os.getloadavg()[0]
    return (
        f"{now}, Python {platform.python_version()}, Linux {platform.release()}, "
        f"{os.cpu_count()} cores ({model}), load average at the start {load:.2f}"
    )


if __name__ == "__main__":
    main()

"""From nothing to the first answer: how long, how much memory, and which import costs it."""

import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

from bench.load import Bench, Load
from bench.systems import ECHO, ROOT, System, running

#: Seconds without a request before the memory is read.
IDLE = 1.0

#: Packages below this are not listed: most of them are only looked for.
LEAST_MS = 0.2

#: Prints, for each module named, the milliseconds and MiB that its import added to those before.
IMPORTS = """
import gc, importlib, os, sys, time
page = os.sysconf("SC_PAGE_SIZE")
def rss():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * page / 2**20
bare = rss()
cost = {"Python": (0.0, bare)}
for name in sys.argv[1:]:
    begun = time.perf_counter()
    importlib.import_module(name)
    ms, now = 1000 * (time.perf_counter() - begun), rss()
    cost[name] = (ms, now - bare)
    bare = now
import json
print(json.dumps(cost))
"""

#: Of the standard library, what is worth its own line.
FIRST_IMPORTS = ("logging", "json", "http.client", "sqlite3", "ssl")


def table(systems: Sequence[System], *, rounds: int) -> Iterator[str]:
    yield "### Start and idle memory\n"
    yield "| system | start to first answer | least to most | RSS when idle | processes |"
    yield "| --- | --- | --- | --- | --- |"
    found: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for number in range(rounds):
        print(f"start, round {number + 1}", file=sys.stderr, flush=True)
        for system in systems:
            found[system.name].append(_start(system))
    for name, rows in found.items():
        seconds = [row[0] for row in rows]
        rss, processes = (statistics.median(row[at] for row in rows) for at in (1, 2))
        yield (
            f"| {name} | {statistics.median(seconds):.2f} s | {min(seconds):.2f} to "
            f"{max(seconds):.2f} s | {rss:.0f} MiB | {processes:.0f} |"
        )
    yield ""
    yield from _imports(rounds)
    yield from _import_time()


def _start(system: System) -> tuple[float, float, int]:
    """Return the seconds until the first 200, and what is held a while later."""
    bench = Bench()
    try:
        begun = time.perf_counter()
        with running(system, ECHO, bench.receiver_url) as one:
            load = Load(clients=1, count=1, seconds=20, expect_results=False)
            bench.run(load, one.place.port)
            seconds = time.perf_counter() - begun
            time.sleep(IDLE)
            usage = one.usage()
            return seconds, usage.rss_mib, usage.processes
    finally:
        bench.close()


# Imports


def _imports(rounds: int) -> Iterator[str]:
    names = [*FIRST_IMPORTS, *_dependencies(), "app"]
    runs = [json.loads(_python("-c", IMPORTS, *names).stdout) for _ in range(rounds)]
    yield "### What each import adds, in this order\n"
    yield "| import | time | RSS |"
    yield "| --- | --- | --- |"
    for name in runs[0]:
        ms, rss = (statistics.median(one[name][at] for one in runs) for at in (0, 1))
        yield f"| `{name}` | {ms:.1f} ms | {rss:.1f} MiB |"
    total = (sum(one[name][at] for name in one) for at in (0, 1) for one in runs[:1])
    ms, rss = total
    yield f"| all | {ms:.1f} ms | {rss:.1f} MiB |\n"


def _dependencies() -> list[str]:
    """Return the modules that requirements.txt asks for; what those need stands apart."""
    text = (ROOT / "requirements.txt").read_text().partition("\n\n")[0]
    lines = [line for line in text.splitlines() if "==" in line]
    return [line.partition("==")[0].replace("-", "_") for line in lines]


def _import_time() -> Iterator[str]:
    """Sum what `-X importtime` says, by package; the standard library is one."""
    own: dict[str, list[float]] = defaultdict(list)
    for line in _python("-X", "importtime", "-c", "import app").stderr.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if len(fields) == 3 and fields[0].strip().isdecimal():
            package = fields[2].strip().partition(".")[0]
            own[_origin(package)].append(int(fields[0]) / 1000)
    yield "### `python -X importtime -c 'import app'`, by package\n"
    yield "| package | modules | time |"
    yield "| --- | --- | --- |"
    for name, times in sorted(own.items(), key=lambda item: -sum(item[1])):
        if sum(times) >= LEAST_MS:
            yield f"| {name} | {len(times)} | {sum(times):.1f} ms |"
    yield f"| all | {sum(map(len, own.values()))} | {sum(map(sum, own.values())):.1f} ms |\n"


def _origin(package: str) -> str:
    if package in sys.stdlib_module_names:
        return "standard library"
    if (ROOT / package).is_dir() or (ROOT / f"{package}.py").is_file():
        return "Postback itself"
    return f"`{package}`"


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

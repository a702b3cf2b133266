"""What a system costs, all its processes together, as /proc tells; and a busy neighbour."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path


def usage(roots: Collection[int]) -> dict[str, float]:
    """Return what the processes and all below them have used so far, and hold now.

    `peak_mib` adds up the peak of each process.
    """
    row = dict.fromkeys(("cpu_ms", "rss_mib", "peak_mib", "processes", "threads", "files"), 0.0)
    for pid, stat in below(roots).items():
        with contextlib.suppress(OSError):  # it has ended
            status = Path(f"/proc/{pid}/status").read_text()
            row["cpu_ms"] += 1000 * sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK")
            row["rss_mib"] += int(status.partition("VmRSS:")[2].split()[0]) / 1024
            row["peak_mib"] += int(status.partition("VmHWM:")[2].split()[0]) / 1024
            row["processes"] += 1
            row["threads"] += int(stat[17])
            row["files"] += sum(1 for _ in os.scandir(f"/proc/{pid}/fd"))
    return row


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Keep the first core that we may use busy meanwhile."""
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    burner = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        burner.kill()
        burner.wait()


def disk_ms() -> tuple[float, float]:
    """Return p50 and p99 of a commit, done by hand, on a disk that has 100 of them a second."""
    taken = []
    with tempfile.TemporaryFile(dir=".") as file:
        for place in range(300):
            began = time.perf_counter()
            os.pwrite(file.fileno(), bytes(6 * 4120), place % 150 * 6 * 4120)  # pages of a WAL
            os.fdatasync(file.fileno())
            taken.append(1000 * (time.perf_counter() - began))
            time.sleep(0.01)
    return sorted(taken[150:])[75], sorted(taken[150:])[148]


def below(roots: Collection[int]) -> dict[int, list[str]]:
    """Return the processes of these sessions and all below them, each with its `stat`."""
    every = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended
                stat = (path / "stat").read_text()
                every[int(path.name)] = stat.rpartition(")")[2].split()
    found = {}
    for pid, stat in every.items():
        above = pid
        while above in every and above not in roots and int(every[above][3]) not in roots:
            above = int(every[above][1])
        if above in every and stat[0] != "Z":
            found[pid] = stat
    return found

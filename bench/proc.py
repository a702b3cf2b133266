"""What the processes of a session cost, with all below them, as /proc tells."""

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The sum over the processes of a system."""

    cpu_seconds: float
    rss_mib: float
    processes: int


def usage(sessions: Collection[int]) -> Usage:
    """Return what all processes of the sessions have used so far, and hold now."""
    every = list(_stats(sessions))
    return Usage(
        cpu_seconds=sum(int(one[11 + at]) for _, one in every for at in range(4)) / TICKS,
        rss_mib=sum(rss_mib(pid) for pid, _ in every),
        processes=len(every),
    )


def members(sessions: Collection[int]) -> list[int]:
    return [pid for pid, _ in _stats(sessions)]


def rss_mib(pid: int) -> float:
    return _status(pid, "VmRSS:")


def peak_mib(pid: int) -> float:
    return _status(pid, "VmHWM:")


def _status(pid: int, name: str) -> float:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0.0
    return int((text.partition(name)[2].split() or ["0"])[0]) / 1024


def _stats(sessions: Collection[int]) -> Iterator[tuple[int, list[str]]]:
    """Yield each process of the sessions, or below one, with its `stat` from the state on."""
    every = dict(_all())
    for pid, fields in every.items():
        above = pid
        while above in every and int(every[above][3]) not in sessions:
            above = int(every[above][1])  # a worker may have a session of its own
        if above in every and fields[0] != "Z":
            yield pid, fields


def _all() -> Iterator[tuple[int, list[str]]]:
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended
                stat = (path / "stat").read_text()
                yield int(path.name), stat.rpartition(")")[2].split()

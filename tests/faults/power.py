"""Power cuts, replayed: what the disk may hold at any moment of a run, and what we find on it.

`power.c` records what the service does to its journal, and when it has accepted a job. From the
record each state is rebuilt that a power cut could leave; our own Journal opens it, and each job
that was accepted by then is looked for. `python -m tests.faults.power [jobs] [points] [seed]
[FULL|NORMAL]` does so at many points and prints one line.
"""

import contextlib
import itertools
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jobs import errors
from jobs.journal import Journal
from tests.harness import Caller, RealProcess, poll
from tests.receiver import Receiver

SOURCE = Path(__file__).with_name("power.c")

#: As in power.c.
DIRECTORY, MAIN, WAL, ROLLBACK, ACKNOWLEDGED = range(1, 6)
OPENED, WRITTEN, TRUNCATED, SYNCED, UNLINKED = range(1, 6)

SUFFIXES = {MAIN: "", WAL: "-wal", ROLLBACK: "-journal"}

#: What becomes of writes that were not synced: all lost, each kept by chance, each sector kept by
#: chance, all kept.
MODELS = ("lost", "kept by chance", "torn", "kept")

SECTOR_BYTES = 512

#: Callers at once, so that commits are shared.
CALLERS = 8

#: In memory where that is possible: nobody cuts the power of the replay.
REPLAY_DIRECTORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


class Entry(NamedTuple):
    """One thing that was done. `offset` is the new size of what was truncated."""

    kind: int
    file: int
    offset: int
    data: bytes


@dataclass
class Inode:
    """A file: what is surely on the disk, and what may be."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[Entry] = field(default_factory=list)

    def sync(self) -> None:
        for entry in self.pending:
            apply(self.synced, entry)
        self.pending.clear()


class Disk:
    """A directory with the journal in it. Names are synced by its own fsync alone."""

    def __init__(self) -> None:
        self.live: dict[int, Inode] = {}
        self.acknowledged: set[str] = set()
        self._synced: dict[int, Inode | None] = {}
        self._pending: list[tuple[int, Inode | None]] = []

    def do(self, entry: Entry) -> None:
        """Follow the record by one entry."""
        if entry.file == ACKNOWLEDGED:
            self.acknowledged |= {entry.data.decode()} - {""}
        elif entry.file == DIRECTORY:
            self._do_to_directory(entry)
        elif entry.kind == OPENED:
            if entry.file not in self.live:
                self._name(entry.file, Inode())
        elif entry.kind == UNLINKED:
            del self.live[entry.file]
            self._pending.append((entry.file, None))
        elif entry.kind == SYNCED:
            self.live[entry.file].sync()
        else:
            self.live[entry.file].pending.append(entry)

    def after_a_cut(self, model: str, chance: random.Random) -> dict[int, bytes]:
        """Return what one power cut leaves of each file."""
        kept = {file: inode for file, inode in self._pending if keeps(model, chance)}
        names = self._synced | kept
        return {file: _content(inode, model, chance) for file, inode in names.items() if inode}

    def _do_to_directory(self, entry: Entry) -> None:
        if entry.kind == SYNCED:
            self._synced = dict(self.live)
            self._pending.clear()

    def _name(self, file: int, inode: Inode) -> None:
        self.live[file] = inode
        self._pending.append((file, inode))


def apply(content: bytearray, entry: Entry) -> None:
    """Write or truncate; what lies between the end and a write is zero."""
    missing = entry.offset - len(content)
    content.extend(bytes(max(0, missing)))
    if entry.kind == TRUNCATED:
        del content[entry.offset :]
    else:
        content[entry.offset : entry.offset + len(entry.data)] = entry.data


def keeps(model: str, chance: random.Random) -> bool:
    return model == "kept" or (model != "lost" and chance.random() < 0.5)


def _content(inode: Inode, model: str, chance: random.Random) -> bytes:
    content = bytearray(inode.synced)
    pieces = inode.pending
    if model == "torn":
        pieces = [piece for entry in inode.pending for piece in torn(entry)]
    for piece in pieces:
        if keeps(model, chance):
            apply(content, piece)
    return bytes(content)


def torn(entry: Entry) -> Iterator[Entry]:
    """Yield the sectors of a write."""
    if entry.kind == TRUNCATED:
        yield entry
    start, end = entry.offset, entry.offset + len(entry.data)
    edges = [start, *range(start - start % SECTOR_BYTES + SECTOR_BYTES, end, SECTOR_BYTES), end]
    for left, right in itertools.pairwise(edges):
        yield entry._replace(offset=left, data=entry.data[left - start : right - start])


def read(record: Path) -> list[Entry]:
    """Return what the record tells."""
    text, position, entries = record.read_bytes(), 0, []
    while position < len(text):
        kind, file, offset, length = struct.unpack_from("4q", text, position)
        position += 32
        entries.append(Entry(kind, file, offset, text[position : position + length]))
        position += length
    return entries


# The run


def build(directory: Path) -> Path | None:
    """Compile power.c; None where there is no compiler."""
    target, compiler = directory / "power.so", shutil.which("cc")
    if not compiler:
        return None
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(target), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return target


def run(shim: Path, directory: Path, *, jobs: int, level: str) -> list[Entry]:
    """Have a real service accept and deliver so many jobs, and stop; return what it did."""
    journal, record = directory.resolve() / "journal.db", directory / "record"
    with Receiver() as receiver:
        env = {
            "LD_PRELOAD": str(shim),
            "POWER_JOURNAL": str(journal),
            "POWER_RECORD": str(record),
            "ACKNOWLEDGED": f"{journal}.acknowledged",
            "ACCEPT": level,
            "JOURNAL": str(journal),
            "ANALYSIS": "tests.analyses:echo",
            "POSTBACK_URL": receiver.url,
        }
        service = RealProcess(env, command=("-m", "tests.faults.launch"))
        try:
            with ThreadPoolExecutor(CALLERS) as pool:
                shares = [range(jobs)[first::CALLERS] for first in range(CALLERS)]
                list(pool.map(lambda share: _call(service.base_url, share), shares))
            receiver.wait_for(jobs, timeout=60)
            poll(lambda: not service.is_busy(), "all delivered", timeout=60)
        finally:
            service.end()
    return read(record)


def _call(base_url: str, numbers: Iterable[int]) -> None:
    with contextlib.closing(Caller(base_url)) as caller:
        for number in numbers:
            caller.process({"data": number})


# The replay


def replay(entries: list[Entry], points: int, seed: int) -> Counter[str]:
    """Cut the power at so many points of a run, in each of four ways, and count what is lost.

    Returns:
        How many cuts there were, how many left a journal that was refused, how many lost a job,
        the most jobs that one lost, and how many jobs were acknowledged in the run.
    """
    chance = random.Random(seed)
    moments = set(chance.sample(range(len(entries)), min(points, len(entries))))
    counts, disk = Counter[str](), Disk()
    with tempfile.TemporaryDirectory(dir=REPLAY_DIRECTORY) as directory:
        for moment, entry in enumerate(entries):
            disk.do(entry)
            for model in MODELS if moment in moments else ():
                _count(counts, disk, model, disk.after_a_cut(model, chance), Path(directory))
    counts["acknowledged"] = len(disk.acknowledged)
    return counts


def _count(
    counts: Counter[str], disk: Disk, model: str, files: dict[int, bytes], directory: Path
) -> None:
    found = survivors(files, directory, used=bool(disk.acknowledged))
    lost = len(disk.acknowledged - (found or set()))
    counts["cuts"] += 1
    counts["refused"] += found is None
    counts["lossy"] += lost > 0
    counts["worst"] = max(counts["worst"], lost)


def survivors(files: dict[int, bytes], directory: Path, *, used: bool) -> set[str] | None:
    """Open what a cut left, and return the ids of the whole jobs in it; None when it is refused."""
    for old in directory.iterdir():
        old.unlink()
    for file, content in files.items():
        (directory / f"journal.db{SUFFIXES[file]}").write_bytes(content)
    if used:  # what a service that has begun leaves beside it
        (directory / "journal.db.lock").write_text("1 since 2026-01-02T03:04:05Z")
    journal = Journal(directory / "journal.db", on_lost=lambda: None)
    try:
        journal.open()
        rows = journal._read("SELECT id FROM jobs JOIN payloads USING (seq)")
        return {row["id"] for row in rows}
    except errors.ConfigError:
        return None
    finally:
        journal.close()


def main(arguments: list[str]) -> int:
    """Run, replay and print; exit 1 when a cut lost a job."""
    jobs, points, seed = (
        int(text) for text in (arguments[:3] + ["1000", "500", "1"][len(arguments[:3]) :])
    )
    level = arguments[3] if arguments[3:] else "FULL"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        shim = build(Path(directory))
        if shim is None:
            print("A C compiler named cc is needed.")
            return 2
        entries = run(shim, Path(directory), jobs=jobs, level=level)
    counts = replay(entries, points, seed)
    facts = {"jobs": jobs, "accept": level, "seed": seed, "entries": len(entries), **counts}
    facts["seconds"] = round(time.monotonic() - began)
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    return 1 if counts["lossy"] or counts["refused"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

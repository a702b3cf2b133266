"""The journal's file: opened, refused, locked, committed, failing, and lost."""

import contextlib
import functools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from jobs import storage
from jobs.errors import ConfigError, JournalLost, Refusal
from jobs.storage import Storage

NOTE = "INSERT INTO received VALUES (NULL, :text, 'now', 'none', x'')"
NOTES = "SELECT webhook_id FROM received ORDER BY seq"


class Notes(Storage):
    """A storage of notes, in a table of the schema. It counts its losses and durable commits."""

    def __init__(self, path: Path) -> None:
        self.losses: list[str] = []
        self.commits: list[float] = []  # the seconds of each that was durable
        on_lost = functools.partial(self.losses.append, "lost")
        super().__init__(path, on_lost=on_lost, on_commit=self.commits.append)

    def note(self, text: str, *, durable: bool = True) -> None:
        with self.transaction(durable=durable):
            self._write(NOTE, text=text)

    def notes(self) -> list[str]:
        return [row[0] for row in self._read(NOTES)]


class Faulty(sqlite3.Connection):
    """A connection on which an operation fails, once; they are counted from 1."""

    code, fails_at, operations = "", 0, 0

    def execute(self, *arguments):
        self.operations += 1
        if self.operations == self.fails_at:
            exc = sqlite3.OperationalError("a fault")
            exc.sqlite_errorname = self.code
            raise exc
        return super().execute(*arguments)

    def fail(self, code: str, number: int) -> None:
        """Have an operation fail, counted from now."""
        self.code, self.fails_at = code, self.operations + number


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def reopen(monkeypatch) -> Iterator[Callable[[Path], Notes]]:
    """Return a function that opens a journal, to be closed at the end."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Faulty))
    with contextlib.ExitStack() as stack:

        def reopen(path: Path) -> Notes:
            one = stack.enter_context(closing(Notes(path)))
            one.open()
            return one

        yield reopen


@pytest.fixture
def opened(path, reopen):
    return reopen(path)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A directory of one's own, and no right to write where the permissions forbid it."""
    user, directory = os.geteuid(), Path(tempfile.mkdtemp())
    if user == 0:
        os.chown(directory, 65534, -1)
        os.seteuid(65534)
    yield directory
    os.seteuid(user)
    directory.chmod(0o700)
    shutil.rmtree(directory)


def refusal(path: Path) -> str:
    """Return the one line with which the start is refused."""
    with pytest.raises(ConfigError) as caught:
        Notes(path).open()
    (problem,) = str(caught.value).splitlines()
    assert problem.startswith(f"JOURNAL={str(path)!r}: ")
    assert "\n" not in problem
    return problem


def after_a_crash(path: Path, *suffixes: str) -> Path:
    """Return a copy of a journal in use: what a kill -9 would leave."""
    target = path.with_name("crashed")
    for suffix in ("", *suffixes):
        shutil.copy(f"{path}{suffix}", f"{target}{suffix}")
    return target


def refused(operation: Callable[[], object]) -> Refusal | None:
    """Return why an operation was refused; None when it was not."""
    try:
        operation()
    except Refusal as exc:
        return exc
    return None


# Opened and closed


def test_a_closed_journal_is_one_private_file_with_all_that_was_written(path, opened, reopen):
    opened.note("a")
    opened.note("b", durable=False)
    modes = [Path(f"{path}{suffix}").stat().st_mode & 0o777 for suffix in ("", "-wal")]

    opened.close()
    opened.close()

    assert modes == [0o600, 0o600]
    assert {one.name for one in path.parent.iterdir()} == {"journal.db", "journal.db.lock"}
    assert reopen(path).notes() == ["a", "b"]


def test_a_pragma_that_does_not_take_refuses_the_start(path, monkeypatch):
    monkeypatch.setattr(storage, "PRAGMAS", {"journal_mode": "imaginary"})

    assert "cannot use journal_mode=imaginary here, only delete" in refusal(path)


def test_a_link_and_a_name_of_odd_bytes_lead_to_the_journal(tmp_path, path, reopen):
    real = tmp_path / os.fsdecode(b"100% \xff?#&.db")
    path.symlink_to(real)

    reopen(path).note("a")

    assert reopen(after_a_crash(real, "-wal")).notes() == ["a"]


# Refused


def test_a_missing_folder_is_refused(tmp_path):
    said = refusal(tmp_path / "missing" / "j.db")

    assert f"there is no folder {tmp_path}/missing: make it" in said


@pytest.mark.parametrize(("name", "mode"), [("", 0o500), ("journal.db", 0o400)])
def test_what_cannot_be_written_is_refused(unprivileged, reopen, name, mode):
    path = unprivileged / "journal.db"
    reopen(path).close()

    (unprivileged / name).chmod(mode)

    assert "cannot be opened: " in refusal(path)


@pytest.mark.parametrize("act", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_journal_that_is_gone_is_refused_and_what_is_left_of_it_stays(path, opened, act):
    opened.note("a")
    left = Path(f"{path}-wal").read_bytes()
    opened.close()
    act(path)
    Path(f"{path}-wal").write_bytes(left)

    for _ in range(2):
        assert "is gone: restore a backup" in refusal(path)
    assert Path(f"{path}-wal").read_bytes() == left


def test_an_empty_file_that_was_never_used_is_a_new_journal(path, reopen):
    path.touch()
    Path(f"{path}.lock").write_bytes(b"4711 \xff")  # its first start ended before it had tables

    assert reopen(path).notes() == []


@pytest.mark.parametrize(
    ("cut_bytes", "left"), [(0, ["a", "b"]), (10, ["a"])], ids=["whole", "log cut short"]
)
def test_after_a_crash_what_is_whole_is_there(path, opened, reopen, cut_bytes, left):
    opened.note("a")
    opened.note("b", durable=False)

    copy = after_a_crash(path, "-wal", ".lock")
    os.truncate(f"{copy}-wal", Path(f"{copy}-wal").stat().st_size - cut_bytes)

    assert reopen(copy).notes() == left


# Transactions


def test_only_what_is_durable_waits_for_the_disk(opened):
    statements: list[str] = []
    opened._connection.set_trace_callback(statements.append)

    for text, durable in (("a", False), ("b", True), ("c", True)):
        opened.note(text, durable=durable)

    assert [line.partition(" INTO ")[0] for line in statements] == [
        *("PRAGMA synchronous = 1", "BEGIN IMMEDIATE", "INSERT", "COMMIT"),
        *("PRAGMA synchronous = 2", "BEGIN IMMEDIATE", "INSERT", "COMMIT"),
        *("PRAGMA synchronous = 2", "BEGIN IMMEDIATE", "INSERT", "COMMIT"),
    ]
    assert len(opened.commits) == 2


def test_what_is_written_inside_of_a_transaction_is_committed_with_it(opened):
    with opened.transaction(durable=True):
        for text in ("a", "b"):
            opened._write(NOTE, text=text)
        seen = [row[0] for row in opened._fetch(NOTES)]
        others = opened.notes()

    assert (seen, others, opened.notes()) == (["a", "b"], [], ["a", "b"])
    assert len(opened.commits) == 1


# Faults that pass


def test_a_full_disk_refuses_all_of_a_transaction_and_recovers(opened, caplog):
    opened.note("a")
    pages = opened._read("PRAGMA page_count")[0][0]
    opened._connection.execute(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        with opened.transaction(durable=True):
            opened._write(NOTE, text="b")
            for text in ("c" * 100_000, "d"):
                assert refused(partial(opened._write, NOTE, text=text))

    failed = refused(fill)
    with opened.transaction():
        opened._fetch("SELECT 1")  # to read proves nothing about the disk
    failure = opened.failure
    opened._connection.execute("PRAGMA max_page_count = 100000")
    opened.note("e" * 100_000)

    assert (failure, opened.failure) == (failed, None)
    assert "is full (SQLITE_FULL)" in failed.detail
    assert (failed.status_code, failed.retry_after_seconds) == (503, 5)
    assert [len(text) for text in opened.notes()] == [1, 100_000]
    assert caplog.messages == ["journal failed", "journal recovered"]


def test_when_memory_runs_out_nothing_is_committed(opened):
    class Small(dict[str, str]):
        def __getitem__(self, name):
            raise MemoryError

    with contextlib.suppress(MemoryError), opened.transaction(durable=True):
        opened._write(NOTE, text="a")
        opened._execute(NOTE, Small())

    assert opened.notes() == []


# Faults that do not


@pytest.mark.parametrize("code", [*storage.LOST, "SQLITE_CORRUPT_INDEX"])
@pytest.mark.parametrize("number", [2, 4], ids=["begin", "commit"])
def test_after_a_fault_of_the_disk_the_journal_is_lost_for_good(opened, caplog, code, number):
    opened._connection.fail(code, number)

    failures = [refused(partial(opened.note, "a")) for _ in range(2)] + [refused(opened.notes)]

    assert [type(one) for one in failures] == [JournalLost] * 3
    assert code in failures[0].detail
    assert (opened.failure, opened.losses) == (failures[0], ["lost"])
    assert caplog.messages == ["journal lost"]


def test_a_read_can_find_that_the_journal_is_lost(opened):
    opened.notes()
    next(iter(opened._readers.values())).fail("SQLITE_CORRUPT", 1)

    failures = refused(opened.notes), refused(partial(opened.note, "a"))

    assert [type(one) for one in failures] == [JournalLost] * 2


ACTS: dict[str, Callable[[Path], object]] = {
    "log removed": lambda path: Path(f"{path}-wal").unlink(),
    "shared memory removed": lambda path: Path(f"{path}-shm").unlink(),
    "lock removed": lambda path: Path(f"{path}.lock").unlink(),
    "directory renamed": lambda path: path.parent.rename(f"{path.parent}.old"),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_file_that_is_no_longer_there_is_lost(tmp_path, reopen, act):
    path = tmp_path / "directory" / "journal.db"
    path.parent.mkdir()
    one = reopen(path)
    one.note("a")

    ACTS[act](path)

    assert "was removed or replaced" in refused(partial(one.note, "b")).detail
    assert (type(one.failure), one.losses) == (JournalLost, ["lost"])

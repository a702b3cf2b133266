import errno
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from jobs import errors, storage
from jobs.storage import Storage
from tests.harness import ROOT, poll

SCHEMA = "CREATE TABLE notes (text TEXT NOT NULL UNIQUE) STRICT;"

#: Opens the journal named on the command line, says so, and holds it until its input ends.
HOLD = f"""
import sys
from pathlib import Path
from jobs import errors
from jobs.storage import Storage

held = Storage(Path(sys.argv[1]), schema={SCHEMA!r}, on_lost=sys.exit)
try:
    held.open()
except errors.ConfigError as exc:
    sys.exit(str(exc))
print("open", flush=True)
sys.stdin.read()
held.close()
"""


class Opened(Storage):
    """A storage that counts how often it was lost."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, schema=SCHEMA, on_lost=self._count)
        self.path = path
        self.times_lost = 0

    def _count(self) -> None:
        self.times_lost += 1

    def note(self, text: str) -> int:
        return int(self.write(noting(text)))

    def promise(self, text: str) -> None:
        """Note a text, and wait until it survives a power cut."""
        self.write(noting(text), promised=True)
        self.settle()

    def notes(self) -> list[str]:
        return [row["text"] for row in self.read("SELECT text FROM notes ORDER BY rowid", {})]


class Faulty:
    """A connection on which chosen operations fail, counted from 1."""

    def __init__(self, connection: sqlite3.Connection, code: str, numbers: tuple[int, ...]) -> None:
        self._connection = connection
        self._code = code
        self._numbers = numbers
        self.operations = 0

    def execute(self, statement, parameters=()):
        self.operations += 1
        if self.operations in self._numbers:
            raise fault(self._code)
        return self._connection.execute(statement, parameters)

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    @property
    def total_changes(self) -> int:
        return self._connection.total_changes

    def close(self) -> None:
        self._connection.close()


def fault(code: str) -> sqlite3.OperationalError:
    exc = sqlite3.OperationalError("a fault")
    exc.sqlite_errorname = code
    return exc


def make_faulty(one: Storage, code: str, *numbers: int) -> Faulty:
    faulty = Faulty(one._connection, code, numbers)
    one._connection = faulty  # type: ignore[assignment]
    return faulty


def noting(text: str):
    def work(connection):
        return connection.execute("INSERT INTO notes VALUES (?)", [text]).lastrowid

    return work


def after_a_crash(path: Path, target: Path, *suffixes: str) -> Path:
    """Return a copy of a journal in use: what a kill -9 would leave."""
    target.mkdir()
    for suffix in ("", *suffixes):
        shutil.copy(f"{path}{suffix}", f"{target / path.name}{suffix}")
    return target / path.name


def refusal(path: Path) -> str:
    """Return the one line with which the start is refused."""
    with pytest.raises(errors.ConfigError) as caught:
        Opened(path).open()
    (problem,) = caught.value.problems
    assert problem.startswith(f"JOURNAL={str(path)!r}: ")
    assert "\n" not in problem
    return problem


def run_child(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, input="", capture_output=True, text=True, timeout=20, check=False
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def opened(path) -> Iterator[Opened]:
    one = Opened(path)
    one.open()
    yield one
    one.close()


@pytest.fixture
def reopen() -> Iterator[Callable[[Path], Opened]]:
    """Return a function that opens a journal, to be closed at the end."""
    kept = []

    def reopen(path: Path) -> Opened:
        kept.append(Opened(path))
        kept[-1].open()
        return kept[-1]

    yield reopen

    for one in kept:
        one.close()


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


# Opened and closed


def test_a_closed_journal_is_one_file_that_any_sqlite_opens(path, opened):
    opened.note("a")
    opened.promise("b")

    opened.close()

    assert {one.name for one in path.parent.iterdir()} == {"journal.db", "journal.db.lock"}
    with closing(sqlite3.connect(path)) as plain:
        assert plain.execute("SELECT text FROM notes").fetchall() == [("a",), ("b",)]


def test_what_was_written_is_there_after_a_restart(path, opened, reopen):
    opened.note("a")
    opened.close()

    assert reopen(path).notes() == ["a"]


def test_the_journal_may_be_closed_twice(opened):
    opened.close()

    opened.close()


def test_a_closed_journal_says_that_the_service_stops(opened):
    opened.close()

    with pytest.raises(errors.JournalError, match="stopping"):
        opened.note("a")
    with pytest.raises(errors.JournalError, match="stopping"):
        opened.notes()


@pytest.mark.parametrize(
    ("pragma", "value"),
    [
        ("locking_mode", "exclusive"),
        ("journal_mode", "wal"),
        ("synchronous", 1),
        ("foreign_keys", 1),
        ("journal_size_limit", 64 * 1024 * 1024),
        ("application_id", int.from_bytes(b"Post")),
        ("user_version", 2),
        ("page_size", 2048),
        ("wal_autocheckpoint", 2000),
    ],
)
def test_the_pragmas_are_really_set(opened, pragma, value):
    assert opened.read(f"PRAGMA {pragma}", {})[0][0] == value


def test_a_pragma_that_does_not_take_refuses_the_start(path, monkeypatch):
    monkeypatch.setattr(storage, "PRAGMAS", {"journal_mode": "imaginary"})

    assert "cannot use journal_mode=imaginary here, only delete" in refusal(path)


def test_nobody_else_may_read_the_payloads(path, opened):
    assert path.stat().st_mode & 0o777 == 0o600
    assert Path(f"{path}-wal").stat().st_mode & 0o777 == 0o600


# One instance


def test_a_second_instance_is_refused_and_the_first_is_unaffected(path, opened):
    second = run_child(HOLD, path)

    assert second.returncode == 1
    assert second.stderr.startswith(f"JOURNAL={str(path)!r}: is in use by another instance, pid ")
    assert f"pid {os.getpid()} since 20" in second.stderr
    opened.promise("a")
    assert opened.notes() == ["a"]


def test_the_lock_is_free_after_its_holder_was_killed(path, reopen):
    command = [sys.executable, "-c", HOLD, path]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"open\n"
        assert f"pid {holder.pid} " in refusal(path)

        holder.send_signal(signal.SIGKILL)

    reopen(path).note("a")


def test_a_refused_start_lets_the_lock_go(path, opened, reopen):
    opened.close()
    whole = path.read_bytes()
    path.write_bytes(b"no database" * 100)
    refusal(path)

    path.write_bytes(whole)

    reopen(path).note("a")


def test_a_lock_file_that_cannot_be_read_as_text_is_written_anew(path, reopen):
    lock_path = Path(f"{path}.lock")
    lock_path.write_bytes(b"\xff\x00\xfe")

    reopen(path)

    assert lock_path.read_text().startswith(f"{os.getpid()} since ")


# Refused


def test_a_missing_directory_is_refused(tmp_path):
    assert "No such file or directory" in refusal(tmp_path / "missing" / "journal.db")


def test_a_directory_is_refused(tmp_path):
    (tmp_path / "directory").mkdir()

    assert "unable to open database file" in refusal(tmp_path / "directory")


def test_a_read_only_directory_is_refused(unprivileged):
    unprivileged.chmod(0o500)

    assert "Permission denied" in refusal(unprivileged / "journal.db")


def test_a_directory_that_became_read_only_is_refused(unprivileged, reopen):
    path = unprivileged / "journal.db"
    reopen(path).close()
    unprivileged.chmod(0o500)

    assert "readonly database" in refusal(path)


def test_a_read_only_file_is_refused(unprivileged, reopen):
    path = unprivileged / "journal.db"
    reopen(path).close()
    path.chmod(0o400)

    assert "cannot be opened" in refusal(path)


def test_what_is_not_a_database_is_refused_and_left_as_it_is(path):
    path.write_bytes(b"a letter to a friend" * 100)

    assert "not a database" in refusal(path)
    assert path.read_bytes() == b"a letter to a friend" * 100


def test_a_damaged_page_is_refused(path, opened):
    for number in range(100):
        opened.note(f"{number}" * 500)
    opened.close()
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2 // 4096 * 4096
    damaged[middle : middle + 4096] = b"\xa5" * 4096
    path.write_bytes(damaged)

    assert "is damaged (" in refusal(path)


def test_a_damaged_first_table_is_refused(path, opened):
    opened.close()
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xa5" * 1000)

    assert "malformed" in refusal(path)


def test_the_database_of_another_program_is_refused_and_left_as_it_is(path):
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()

    assert "database of another program" in refusal(path)
    assert path.read_bytes() == before


def test_a_newer_schema_is_refused(path, opened):
    opened.close()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 3")

    assert "newer version (schema 3, this reads 2)" in refusal(path)


def test_an_empty_file_that_was_never_used_is_a_new_journal(path, reopen):
    path.touch()
    Path(f"{path}.lock").write_text("4711")  # its first start ended before it had tables

    assert reopen(path).notes() == []


def test_an_emptied_journal_is_refused_however_often_it_is_tried(path, opened):
    opened.note("a")
    opened.close()
    path.write_bytes(b"")

    assert "is empty, and was not" in refusal(path)
    assert "is empty, and was not" in refusal(path)


def test_a_journal_that_is_gone_is_refused_and_what_is_left_of_it_stays(path, opened):
    opened.note("a")
    log = Path(f"{path}-wal").read_bytes()
    path.unlink()
    opened.close()
    Path(f"{path}-wal").write_bytes(log)

    assert "is gone: restore a backup" in refusal(path)
    assert Path(f"{path}-wal").read_bytes() == log


def test_a_link_leads_to_the_journal(path, opened, reopen, tmp_path):
    opened.promise("a")
    opened.close()
    link = tmp_path / "link.db"
    link.symlink_to(path)

    one = reopen(link)
    one.promise("b")

    assert one.notes() == ["a", "b"]
    assert Path(f"{path}-wal").exists()


def test_what_an_analysis_forks_does_not_hold_the_journal(path, opened, reopen):
    reading, writing = os.pipe()
    told, telling = os.pipe()
    if not (child := os.fork()):
        os.close(writing)
        os.write(telling, b".")
        os.read(reading, 1)
        os._exit(0)
    os.read(told, 1)
    opened.close()

    again = reopen(path)

    again.close()
    for descriptor in (writing, reading, told, telling):
        os.close(descriptor)
    os.waitpid(child, 0)


def test_an_emptied_journal_is_new_once_it_and_its_lock_are_removed(path, opened, reopen):
    opened.close()
    path.unlink()
    Path(f"{path}.lock").unlink()

    assert reopen(path).notes() == []


def test_a_log_cut_short_keeps_the_earlier_rows(path, opened, tmp_path, reopen):
    for text in ("a", "b", "c"):
        opened.promise(text)
    copy = after_a_crash(path, tmp_path / "crashed", "-wal")
    log_path = Path(f"{copy}-wal")
    os.truncate(log_path, log_path.stat().st_size - 10)

    assert reopen(copy).notes() == ["a", "b"]


def test_a_missing_log_leaves_what_was_folded_in(path, opened, tmp_path, reopen):
    opened.note("a")
    opened.close()
    opened.open()
    opened.promise("b")

    copy = after_a_crash(path, tmp_path / "crashed")

    assert reopen(copy).notes() == ["a"]


def test_a_crash_loses_nothing_that_was_committed(path, opened, tmp_path, reopen):
    opened.note("a")
    opened.promise("b")

    copy = after_a_crash(path, tmp_path / "crashed", "-wal", ".lock")

    assert reopen(copy).notes() == ["a", "b"]


# Transactions


def test_a_write_is_one_transaction_and_waits_for_no_disk(opened, syncs):
    statements: list[str] = []
    opened._connection.set_trace_callback(statements.append)

    opened.note("a")

    assert statements == ["BEGIN IMMEDIATE", "INSERT INTO notes VALUES ('a')", "COMMIT"]
    assert not syncs


@pytest.mark.parametrize(
    ("exception", "seen"),
    [
        (errors.KeyReusedError("no"), errors.KeyReusedError),
        (sqlite3.IntegrityError("no"), errors.JournalError),
        (fault("SQLITE_FULL"), errors.JournalError),
        (ValueError("no"), ValueError),
    ],
    ids=["ours", "constraint", "full", "any"],
)
def test_work_that_raises_leaves_nothing_behind(opened, exception, seen):
    def spoil(connection):
        connection.execute("INSERT INTO notes VALUES ('spoiled')")
        raise exception

    with pytest.raises(seen):
        opened.write(spoil)

    opened.note("a")
    assert opened.notes() == ["a"]


def test_hundreds_of_concurrent_writes_are_all_there(opened):
    with ThreadPoolExecutor(32) as pool:
        ids = list(pool.map(opened.note, map(str, range(500))))

    assert sorted(ids) == list(range(1, 501))
    assert sorted(opened.notes(), key=int) == list(map(str, range(500)))


# What survives a power cut; tests/faults/test_power_cuts.py cuts it


@pytest.fixture
def syncs(monkeypatch) -> list[int]:
    """Return the descriptors that are synced, in order."""
    synced: list[int] = []
    sync = os.fdatasync

    def note(descriptor: int) -> None:
        sync(descriptor)
        synced.append(descriptor)

    monkeypatch.setattr(os, "fdatasync", note)
    return synced


def test_what_was_promised_is_settled_by_one_sync_of_the_log(path, opened, syncs):
    for text in ("a", "b", "c"):
        opened.write(noting(text), promised=True)

    opened.settle()

    (descriptor,) = syncs
    assert os.fstat(descriptor).st_ino == Path(f"{path}-wal").stat().st_ino


def test_nothing_is_synced_where_nothing_was_promised(opened, syncs):
    opened.note("a")
    opened.settle()
    opened.promise("b")
    opened.settle()

    assert len(syncs) == 1


def test_those_who_wait_for_the_disk_share_the_next_sync(opened, monkeypatch):
    entered, release = threading.Event(), threading.Event()
    syncs = []

    def sync(descriptor):
        syncs.append(descriptor)
        entered.set()
        assert release.wait(10)

    monkeypatch.setattr(os, "fdatasync", sync)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(opened.promise, "a")
        assert entered.wait(10)
        others = [pool.submit(opened.promise, f"b{number}") for number in range(8)]
        poll(lambda: len(opened.notes()) == 9, "all of them")
        release.set()
        for future in (first, *others):
            future.result()

    assert len(syncs) == 2


def test_a_write_waits_for_no_sync_of_another(opened, monkeypatch):
    entered, release = threading.Event(), threading.Event()

    def sync(_):
        entered.set()
        assert release.wait(10)

    monkeypatch.setattr(os, "fdatasync", sync)
    with ThreadPoolExecutor(1) as pool:
        promise = pool.submit(opened.promise, "a")
        assert entered.wait(10)
        opened.note("b")
        assert not promise.done()
        release.set()

    assert opened.notes() == ["a", "b"]


def test_a_failed_sync_loses_the_journal(opened, monkeypatch, caplog):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)

    with pytest.raises(errors.JournalLostError, match="Input/output error"):
        opened.promise("a")
    with pytest.raises(errors.JournalLostError):
        opened.promise("b")

    assert opened.times_lost == 1
    assert caplog.messages == ["journal lost"]


def test_a_journal_that_was_lost_during_a_transaction_stays_lost(opened, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    def lose(connection):
        monkeypatch.setattr(os, "fdatasync", fail)
        opened._promises += 1
        with pytest.raises(errors.JournalLostError):
            opened.settle()
        monkeypatch.undo()
        connection.execute("INSERT INTO notes VALUES ('after')")

    opened.write(lose)  # it had begun before

    assert isinstance(opened.failure, errors.JournalLostError)
    with pytest.raises(errors.JournalLostError):
        opened.settle()
    with pytest.raises(errors.JournalLostError):
        opened.note("later")


def test_a_closed_journal_settles_nothing(opened):
    opened.write(noting("a"), promised=True)
    opened.close()

    with pytest.raises(errors.JournalError, match="stopping"):
        opened.settle()


# Faults that pass


def test_a_full_disk_refuses_and_recovers_when_there_is_space(opened, caplog):
    opened.note("a")
    pages = opened.read("PRAGMA page_count", {})[0][0]
    opened._connection.execute(f"PRAGMA max_page_count = {pages}")

    with pytest.raises(errors.JournalError, match=r"is full \(SQLITE_FULL\)"):
        opened.note("b" * 100_000)
    failure = opened.failure
    opened._connection.execute("PRAGMA max_page_count = 100000")
    opened.note("c" * 100_000)

    assert type(failure) is errors.JournalError
    assert opened.failure is None
    assert [len(text) for text in opened.notes()] == [1, 100_000]
    assert caplog.messages == ["journal failed", "journal recovered"]


def test_a_real_limit_of_the_file_size_refuses_and_recovers(path, reopen):
    script = f"""
import resource, sys
from pathlib import Path
from tests.test_storage import Opened
from jobs import errors

one = Opened(Path(sys.argv[1]))
one.open()
one.promise("before")
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, {resource.RLIM_INFINITY}))
try:
    one.promise("x" * 100_000)
except errors.JournalError as exc:
    print(type(exc).__name__, exc, one.failure is exc)
resource.setrlimit(resource.RLIMIT_FSIZE, ({resource.RLIM_INFINITY},) * 2)
one.promise("after")
print(one.failure)
"""

    child = run_child(script, path)

    assert child.stderr == "journal failed\njournal recovered\n"
    refused, recovered = child.stdout.splitlines()
    assert refused.startswith("JournalError The journal cannot be used now: ")
    assert refused.endswith("True")
    assert recovered == "None"
    assert reopen(path).notes() == ["before", "after"]


def test_the_failure_is_told_once_however_long_it_lasts(opened, caplog):
    make_faulty(opened, "SQLITE_FULL", 2, 4, 6)

    refused = [capture(lambda: opened.note("a")) for _ in range(3)]

    assert [type(exc) for exc in refused] == [errors.JournalError] * 3
    assert caplog.messages == ["journal failed"]


def capture(operation) -> Exception | None:
    try:
        operation()
    except errors.JournalError as exc:
        return exc
    return None


def write_until_refused(one: Opened, texts: list[str]) -> list[str]:
    """Return what was acknowledged."""
    return [text for text in texts if capture(partial(one.promise, text)) is None]


@pytest.mark.parametrize("code", ["SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_BUSY"])
@pytest.mark.parametrize("number", range(1, 14))
def test_whichever_operation_fails_what_is_acknowledged_is_there(opened, reopen, code, number):
    texts = ["a", "b", "c", "d"]
    faulty = make_faulty(opened, code, number)

    acknowledged = write_until_refused(opened, texts)

    assert len(acknowledged) == len(texts) - (number <= faulty.operations)
    assert opened.failure is None or acknowledged == texts[:-1]
    assert opened.times_lost == 0
    copy = after_a_crash(opened.path, opened.path.parent / "crashed", "-wal")
    assert reopen(copy).notes() == acknowledged


def test_the_last_of_those_operations_is_beyond_the_end(opened):
    faulty = make_faulty(opened, "SQLITE_FULL")

    write_until_refused(opened, ["a", "b", "c", "d"])

    assert faulty.operations == 12


def test_a_rollback_that_fails_is_made_good_by_the_next_write(opened):
    make_faulty(opened, "SQLITE_IOERR_WRITE", 3, 4)  # the commit, then the rollback

    with pytest.raises(errors.JournalError):
        opened.note("a")
    with pytest.raises(errors.JournalError, match="within a transaction"):
        opened.note("b")
    opened.note("c")

    assert opened.notes() == ["c"]


def test_a_read_that_fails_is_told_and_the_next_write_recovers(opened):
    make_faulty(opened, "SQLITE_BUSY", 1)

    with pytest.raises(errors.JournalError, match="SQLITE_BUSY"):
        opened.notes()
    assert opened.failure

    opened.note("a")
    assert opened.failure is None


def test_a_commit_that_wrote_nothing_does_not_show_that_the_disk_takes_writes_again(opened):
    make_faulty(opened, "SQLITE_FULL", 2)
    capture(lambda: opened.note("a"))

    opened.write(lambda connection: connection.execute("DELETE FROM notes").rowcount)

    assert opened.failure


def test_a_fault_without_a_code_of_sqlite_is_told_by_its_type(opened):
    with pytest.raises(errors.JournalError, match=r"\(ProgrammingError\)"):
        opened.read("SELECT :missing", {})


# Faults that do not


@pytest.mark.parametrize("code", [*storage.LOST, "SQLITE_CORRUPT_INDEX"])
@pytest.mark.parametrize("number", [1, 3], ids=["begin", "commit"])
def test_after_a_fault_of_the_disk_the_journal_is_lost_for_good(opened, caplog, code, number):
    faulty = make_faulty(opened, code, number)

    with pytest.raises(errors.JournalLostError, match=code):
        opened.promise("a")
    operations = faulty.operations
    with pytest.raises(errors.JournalLostError):
        opened.note("b")
    with pytest.raises(errors.JournalLostError):
        opened.notes()

    assert faulty.operations == operations
    assert isinstance(opened.failure, errors.JournalLostError)
    assert opened.times_lost == 1
    assert caplog.messages == ["journal lost"]


def test_a_read_can_find_that_the_journal_is_lost(opened):
    make_faulty(opened, "SQLITE_CORRUPT", 1)

    with pytest.raises(errors.JournalLostError):
        opened.notes()

    assert opened.times_lost == 1


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    path.rename(f"{path}.old")
    shutil.copy(f"{path}.old", path)


def remove_log(path: Path) -> None:
    Path(f"{path}-wal").unlink()


def replace_directory(path: Path) -> None:
    path.parent.rename(f"{path.parent}.old")
    path.parent.write_text("a file")


@pytest.mark.parametrize("act", [remove, replace, remove_log, replace_directory])
def test_a_file_that_is_no_longer_there_is_lost(tmp_path, reopen, act):
    (tmp_path / "directory").mkdir()
    one = reopen(tmp_path / "directory" / "journal.db")
    one.note("a")

    act(tmp_path / "directory" / "journal.db")

    with pytest.raises(errors.JournalLostError, match="removed or replaced"):
        one.promise("b")
    with pytest.raises(errors.JournalLostError):
        one.promise("c")
    with pytest.raises(errors.JournalLostError):
        one.notes()
    assert one.times_lost == 1

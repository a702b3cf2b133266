"""One SQLite file, held by one process: opened with checks, written in short transactions.

Knows how the file is opened, what its errors mean, and when it is durable. A commit survives the
end of the process, and costs no wait; only `settle` makes sure that it survives a power cut, too.
So whoever promises many things at once waits for the disk once.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar

from jobs import errors

#: Marks the file as ours: "Post" in ASCII.
APPLICATION_ID = 0x506F7374

#: The schema of a new file. A newer one is refused; 1 had other indexes, and is used as it is.
SCHEMA_VERSION = 2

#: After a burst the write-ahead log shrinks to this many bytes.
WAL_LIMIT_BYTES = 64 * 1024 * 1024

#: Bytes of a page of a new file. A commit writes whole pages, of which a job changes a few bytes
#: in each of a dozen.
PAGE_BYTES = 2048

#: Set on the connection and read back: SQLite ignores what it cannot do.
PRAGMAS: Mapping[str, str | int] = {
    # No other connection: no shared memory, and nobody else checkpoints (before 3.51.3 that could
    # lose commits, https://sqlite.org/wal.html#walresetbug).
    "locking_mode": "exclusive",
    "journal_mode": "wal",
    "synchronous": 1,  # NORMAL: no fsync but at checkpoints, so that none is out of order
    "foreign_keys": 1,
    "journal_size_limit": WAL_LIMIT_BYTES,
    "wal_autocheckpoint": 2000,  # pages
}

#: After these nobody knows what is on the disk: only a restart that reads it again can tell.
#: A failed fsync in particular may not be repeated (https://danluu.com/fsyncgate/).
LOST = (
    "SQLITE_IOERR_FSYNC",
    "SQLITE_IOERR_DIR_FSYNC",
    "SQLITE_IOERR_READ",
    "SQLITE_IOERR_SHORT_READ",
    "SQLITE_CORRUPT",
    "SQLITE_NOTADB",
)

log = logging.getLogger("postback")

T = TypeVar("T")


class Storage:
    """The file, its lock and its one connection.

    Every method may be called from any thread.
    """

    def __init__(
        self,
        path: Path,
        *,
        schema: str,
        on_lost: Callable[[], None],
        on_settled: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._path = Path(os.path.realpath(path))  # SQLite's files lie beside the real one
        self._schema = schema
        self._on_lost = on_lost
        self._on_settled = on_settled
        self._lost_for_good: errors.JournalLostError | None = None  # once set it stays; no lock
        self._lock = threading.Lock()  # guards the connection, and changes of what follows
        self._lock_file: IO[str] | None = None
        self._failure: errors.JournalError | None = None
        self._promises = 0  # writes that an answer depends on
        self._disk = threading.Lock()  # guards what follows; may be held for as long as an fsync
        self._log_file: int | None = None
        self._settled = 0  # so many promises are on the disk

    def open(self) -> None:
        """Lock the file, open it, check it, and lay the tables in a new one.

        Raises:
            ConfigError: It is in use, damaged, not ours, newer, or cannot be written.
        """
        try:
            self._lock_file, holder = _lock(self._path)
            _refuse_emptied(self._path, holder)
            self._connection = _connect(self._path)
            self._prepare()
            self._log_path = Path(f"{self._path}-wal")
            self._log_file = os.open(self._log_path, os.O_RDONLY)
            self._inode, self._log_inode = _inode(self._path), _inode(self._log_path)
            os.register_at_fork(after_in_child=self._let_go_in_fork)
            _sign(self._lock_file, f"{os.getpid()}{_SINCE}{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
        except (OSError, sqlite3.Error) as exc:
            self.close()
            raise _refusal(self._path, f"cannot be opened: {exc}") from exc
        except errors.ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """Fold the write-ahead log into the file and let it go. May be called twice."""
        with self._lock, self._disk:
            if self._log_file is not None:
                os.close(self._log_file)
                self._log_file = None
            if connection := getattr(self, "_connection", None):
                connection.close()
                del self._connection
            if self._lock_file:
                self._lock_file.close()
                self._lock_file = None

    def _let_go_in_fork(self) -> None:
        """Leave the lock to the parent: a child of an analysis may outlive the service."""
        if self._lock_file:
            self._lock_file.close()

    @property
    def failure(self) -> errors.JournalError | None:
        """Why the last commit failed, or the next one would; None when there is no reason."""
        if self._log_file is not None and not self._lost_for_good:
            with contextlib.suppress(errors.JournalLostError):
                self._refuse_replaced()
        return self._lost_for_good or self._failure

    def read(self, statement: str, parameters: Mapping[str, Any]) -> list[sqlite3.Row]:
        """Return the rows of a SELECT.

        Raises:
            JournalError: The file cannot be read.
        """
        with self._lock:
            try:
                return self._open_connection().execute(statement, parameters).fetchall()
            except sqlite3.Error as exc:
                raise self._failed(exc) from exc

    def write(self, work: Callable[[sqlite3.Connection], T], *, promised: bool = False) -> T:
        """Run `work` inside a transaction and return what it returned, once that is committed.

        Args:
            work: Changes rows.
            promised: Whether an answer depends on it, which `settle` has to be called before.

        Raises:
            JournalError: Nothing was committed.
        """
        with self._lock:
            try:
                connection = self._open_connection()
                if promised:
                    self._refuse_replaced()
                result = self._transact(connection, work)
            except sqlite3.Error as exc:
                raise self._failed(exc) from exc
            finally:
                self._roll_back()  # unless it was committed
            self._promises += promised
            return result

    def settle(self) -> None:
        """Wait until all that was promised so far survives a power cut.

        Many threads may ask at once: one fsync answers all who came before it began.

        Raises:
            JournalError: It may not survive.
        """
        wanted = self._promises
        if self._settled >= wanted:  # without a wait for one whose disk hangs
            return
        with self._disk:
            if self._settled >= wanted:
                return
            settled, began = self._promises, time.perf_counter()
            self._synchronise()
            self._settled = settled
        self._on_settled(time.perf_counter() - began)

    def size_bytes(self) -> int:
        """Return the size of the file and of its write-ahead log."""
        files = (self._path, Path(f"{self._path}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def backup(self) -> Path:
        """Copy the journal to a file beside it, whole at every moment, and return its path.

        Nobody else can open the file of a running service. Writes wait for as long as it takes.

        Raises:
            JournalError: There is no new copy; an earlier one is as it was.
        """
        part, copy = Path(f"{self._path}.part"), Path(f"{self._path}.backup")
        try:
            part.unlink(missing_ok=True)
            part.touch(mode=0o600)
            with self._lock:
                self._open_connection().execute("VACUUM INTO ?", (str(part),))
            with part.open("rb") as file:
                os.fsync(file.fileno())
            return part.replace(copy)
        except (OSError, sqlite3.Error) as exc:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise errors.JournalError(f"The journal could not be copied: {exc}.") from exc

    def _transact(
        self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]
    ) -> T:
        connection.execute("BEGIN IMMEDIATE")
        changes = connection.total_changes
        result = work(connection)
        connection.execute("COMMIT")
        if self._failure and connection.total_changes > changes:  # else it wrote nothing
            self._failure = None
            log.warning("journal recovered")
        return result

    def _synchronise(self) -> None:
        if self._log_file is None:
            raise errors.JournalError("The journal is closed: the service is stopping.")
        if self._lost_for_good:
            raise self._lost_for_good
        if _inode(self._log_path) != self._log_inode:
            raise self._lost(f"The write-ahead log {self._log_path} was removed or replaced.")
        try:
            # Where there is no fdatasync, as on macOS, fsync does more than is needed.
            getattr(os, "fdatasync", os.fsync)(self._log_file)
        except OSError as exc:
            raise self._lost(f"The journal can no longer be trusted: {exc}.") from exc

    def _roll_back(self) -> None:
        connection: sqlite3.Connection | None = getattr(self, "_connection", None)
        if connection and connection.in_transaction:  # after SQLITE_FULL it no longer is
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")

    def _open_connection(self) -> sqlite3.Connection:
        if self._lost_for_good:
            raise self._lost_for_good
        if not hasattr(self, "_connection"):
            raise errors.JournalError("The journal is closed: the service is stopping.")
        return self._connection

    def _refuse_replaced(self) -> None:
        # SQLite goes on writing to a file that was removed.
        if _inode(self._path) != self._inode:
            raise self._lost(f"The journal {self._path} was removed or replaced.")

    def _failed(self, exc: sqlite3.Error) -> errors.JournalError:
        name = getattr(exc, "sqlite_errorname", "")
        if name.startswith(LOST):
            return self._lost(f"The journal can no longer be trusted: {exc} ({name}).")
        message = f"The journal cannot be used now: {exc} ({name or type(exc).__name__})."
        if self._failure is None:
            log.error("journal failed", extra={"error": str(exc), "code": name})
        self._failure = errors.JournalError(message)
        return self._failure

    def _lost(self, message: str) -> errors.JournalLostError:
        lost = self._lost_for_good = errors.JournalLostError(message)
        log.critical("journal lost", extra={"error": message})
        self._on_lost()
        return lost

    def _prepare(self) -> None:
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA locking_mode = exclusive")
        version = self._refuse_foreign()  # before anything of it is changed
        for name, wanted in PRAGMAS.items():
            self._set_pragma(name, wanted)
        damage = self._value("PRAGMA quick_check(1)")
        if damage != "ok":
            raise _refusal(self._path, f"is damaged ({damage}): restore a backup")
        if version == 0:
            self._connection.executescript(f"BEGIN; {self._schema} {_STAMP} COMMIT;")

    def _set_pragma(self, name: str, wanted: str | int) -> None:
        self._connection.execute(f"PRAGMA {name} = {wanted}")
        got = self._value(f"PRAGMA {name}")
        if got != wanted:
            raise _refusal(self._path, f"cannot use {name}={wanted} here, only {got}")

    def _refuse_foreign(self) -> int:
        """Return the schema's version, 0 in a new file."""
        owner, version = self._value("PRAGMA application_id"), self._value("PRAGMA user_version")
        tables = self._value("SELECT count(*) FROM sqlite_schema")
        if tables and owner != APPLICATION_ID:
            raise _refusal(self._path, "is a database of another program: name another file")
        if version > SCHEMA_VERSION:
            text = f"was written by a newer version (schema {version}, this reads {SCHEMA_VERSION})"
            raise _refusal(self._path, text)
        return int(version)

    def _value(self, statement: str) -> Any:
        return self._connection.execute(statement).fetchone()[0]


#: In the lock file, after the pid: this journal was opened before.
_SINCE = " since "

_STAMP = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"


def _connect(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)  # payloads are nobody else's business
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    return connection


def _lock(path: Path) -> tuple[IO[str], str]:
    """Return the locked file, to be kept open, and what its last holder wrote in it.

    It lies beside the journal and is never removed: closing any descriptor of the journal itself
    would drop SQLite's own locks.
    """
    lock_path = Path(f"{path}.lock")
    lock_file = lock_path.open("a+", encoding="ascii", errors="replace")
    lock_file.seek(0)
    holder = lock_file.read()
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        lock_file.close()
        text = f"is in use by another instance, pid {holder}: stop it, or name another file"
        raise _refusal(path, text) from exc
    # Until the tables are laid it keeps telling whether they ever were.
    _sign(lock_file, str(os.getpid()) + (_SINCE if _SINCE in holder else ""))
    return lock_file, holder


def _sign(lock_file: IO[str], holder: str) -> None:
    lock_file.truncate(0)
    lock_file.write(holder)
    lock_file.flush()


def _refuse_emptied(path: Path, holder: str) -> None:
    if _SINCE not in holder:
        return
    if not path.exists():  # and SQLite would remove what is left of it, its write-ahead log
        raise _refusal(path, f"is gone: restore a backup, or remove {path}.lock to begin anew")
    if path.stat().st_size == 0:
        text = f"is empty, and was not: restore a backup, or remove it and {path}.lock"
        raise _refusal(path, text)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - half the time of Path.stat
    except OSError:  # it was removed, or no longer is where the path leads
        return None
    return status.st_dev, status.st_ino


def _refusal(path: Path, text: str) -> errors.ConfigError:
    line = text.replace("\n", " ")  # SQLite tells of damage in several
    return errors.ConfigError([f"JOURNAL={str(path)!r}: {line}"])

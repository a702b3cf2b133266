"""The SQLite file of the journal: its lock, its connections, its transactions, and its errors.

It knows how the file is opened, when a commit survives a power cut, and which errors of SQLite mean
that the file can no longer be trusted. One connection writes. Reads have connections of their own,
so a listing neither waits for a commit nor delays one.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from jobs import model
from jobs.errors import ConfigError, JournalError, JournalLost

#: Marks the file as ours: "Post" in ASCII.
APPLICATION_ID = 0x506F7374

#: What creates the tables in a new file, and its version. 1 and 2 were those of Postback 0.1.
SCHEMA_PATH = Path(__file__).with_name("schema.sql")
SCHEMA_VERSION = 3

#: Set on the writing connection and read back, because SQLite ignores what it cannot do.
PRAGMAS: Mapping[str, str | int] = {
    "journal_mode": "wal",
    "foreign_keys": 1,
    "secure_delete": 0,  # some builds overwrite what is deleted, which takes seconds for large jobs
    "journal_size_limit": 64 * 1024 * 1024,  # after a burst the write-ahead log shrinks to this
}

#: After these nobody knows what is on the disk, until a restart reads it again.
#: A failed fsync in particular must not be repeated (https://danluu.com/fsyncgate/).
LOST = (
    *("SQLITE_IOERR_FSYNC", "SQLITE_IOERR_DIR_FSYNC", "SQLITE_IOERR_READ"),
    *("SQLITE_IOERR_SHORT_READ", "SQLITE_IOERR_CORRUPTFS", "SQLITE_CORRUPT", "SQLITE_NOTADB"),
)

#: Seconds to wait for another program that writes to the file.
BUSY_SECONDS = 1.0

#: In the lock file, after the pid: this journal was opened before.
_SINCE = " since "

log = logging.getLogger("postback")


@dataclass(slots=True)
class _Transaction:
    """The open transaction.

    Attributes:
        durable: Whether its commit must survive a power cut.
        began: By time.perf_counter().
        changes: How many rows its connection had changed before.
        failure: Why it can no longer be committed.
    """

    durable: bool
    began: float
    changes: int
    failure: JournalError | None = None


# How Python's values are written: instants in their one form, mappings as JSON.
sqlite3.register_adapter(datetime, model.text_of)
sqlite3.register_adapter(dict, json.dumps)


class Storage:
    """The file. Every method may be called from any thread.

    Args:
        path: The database.
        on_lost: Called once, when the file can no longer be trusted.
        on_commit: Given the seconds of each durable transaction, after its commit.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_lost: Callable[[], None],
        on_commit: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._path = Path(os.path.realpath(path))  # SQLite's own files lie beside the real one
        self._lock_path = Path(f"{self._path}.lock")
        self._on_lost, self._on_commit = on_lost, on_commit
        # Only the thread that holds the lock uses the writing connection.
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._transaction: _Transaction | None = None
        self._lock_file: IO[str] | None = None
        self._inodes: list[tuple[int, int]] = []  # of the open files
        self._failure: JournalError | None = None
        self._loss: JournalLost | None = None
        # By thread. One that is in use is not in it, so that nobody else closes it.
        self._readers: dict[int, sqlite3.Connection] = {}

    def open(self) -> None:
        """Lock the file, open it, check it, and create the tables in a new one.

        Raises:
            ConfigError: It is in use, damaged, not ours, of another version, or not writable.
            JournalError: The disk is full, or failed.
        """
        try:
            if not self._path.parent.is_dir():
                raise self._refusal(f"there is no folder {self._path.parent}: make it")
            self._take_lock()
            # Payloads are nobody else's business. SQLite itself would open a read-only file.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            self._connection = _connect(str(self._path))
            self._prepare(self._connection)
            self._lock_path.write_text(f"{os.getpid()}{_SINCE}{model.text_of(model.utc_now())}")
            self._inodes = self._look_at_files()
        except (OSError, sqlite3.Error, ConfigError) as exc:
            self.close()
            if isinstance(exc, ConfigError):
                raise
            name = getattr(exc, "sqlite_errorname", errno.errorcode.get(getattr(exc, "errno", 0)))
            if str(name).startswith(("ENOSPC", "SQLITE_FULL", "SQLITE_IOERR")):  # it may pass
                raise JournalError(f"The journal {self._path} cannot be opened: {exc}.") from exc
            raise self._refusal(f"cannot be opened: {exc}") from exc

    def close(self) -> None:
        """Fold the write-ahead log into the file and release it. May be called twice."""
        with self._lock:
            self._inodes = []  # SQLite removes its own files now
            connection, self._connection = self._connection, None
            for opened in (*self._readers.values(), connection, self._lock_file):
                if opened:
                    opened.close()

    @property
    def failure(self) -> JournalError | None:
        """Why the last commit failed, or the next one would; None when there is no reason."""
        with contextlib.suppress(JournalLost):
            self._refuse_replaced()
        return self._loss or self._failure

    def size_bytes(self) -> int:
        """Return the size of the file and of its write-ahead log."""
        return sum(status.st_size for status in self._stat("", "-wal"))

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        """Commit together whatever is written inside; nothing of it when anything fails.

        Args:
            durable: Whether the commit must survive a power cut (synchronous=FULL), because an
                answer depends on it. Every commit survives the end of the process.

        Raises:
            JournalError: Nothing was committed.
        """
        with self._lock:
            if self._transaction:
                raise AssertionError("There is an open transaction.")
            try:
                transaction = self._begin(durable=durable)
                yield
                self._commit(transaction)
            finally:
                self._transaction = None
                if self._connection and self._connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        self._connection.execute("ROLLBACK")

    def _write(self, statement: str, **values: Any) -> int:
        """Execute a statement inside the open transaction; return how many rows it changed."""
        return self._execute(statement, values)[1]

    def _fetch(self, statement: str, **values: Any) -> list[sqlite3.Row]:
        """Return rows as the open transaction sees them."""
        return self._execute(statement, values)[0]

    def _read(self, statement: str, **values: Any) -> list[sqlite3.Row]:
        """Return rows by a connection of this thread: it waits for no commit, and delays none."""
        self._usable()
        thread = threading.get_ident()
        reader = self._readers.pop(thread, None)
        try:
            reader = reader or _connect(f"{self._path.as_uri()}?mode=ro")
            return reader.execute(statement, values).fetchall()
        except sqlite3.Error as exc:
            raise self._failed(exc) from exc
        finally:
            if reader:
                self._readers[thread] = reader

    def _execute(self, statement: str, values: Mapping[str, Any]) -> tuple[list[sqlite3.Row], int]:
        transaction = self._transaction
        if transaction is None:
            raise AssertionError("There is no transaction: use `with self.transaction()`.")
        if transaction.failure:
            raise transaction.failure
        try:
            cursor = self._usable().execute(statement, values)
            return cursor.fetchall(), cursor.rowcount
        except sqlite3.Error as exc:
            # SQLite may have rolled back by itself, as it does when the disk is full.
            transaction.failure = self._failed(exc)
            raise transaction.failure from exc

    def _begin(self, *, durable: bool) -> _Transaction:
        connection = self._usable()
        if durable:
            self._refuse_replaced()
        try:
            # Before it begins, because inside of a transaction it is refused.
            connection.execute(f"PRAGMA synchronous = {2 if durable else 1}")
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as exc:
            raise self._failed(exc) from exc
        self._transaction = _Transaction(durable, time.perf_counter(), connection.total_changes)
        return self._transaction

    def _commit(self, transaction: _Transaction) -> None:
        if transaction.failure:
            raise transaction.failure
        connection = self._usable()
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as exc:
            raise self._failed(exc) from exc
        with contextlib.suppress(Exception):  # it is committed, whatever happens now
            if transaction.durable:
                self._on_commit(time.perf_counter() - transaction.began)
            # A commit without changes does not touch the disk.
            if self._failure and connection.total_changes != transaction.changes:
                self._failure = None
                log.warning("journal recovered")

    def _usable(self) -> sqlite3.Connection:
        if self._loss:
            raise self._loss
        if self._connection is None:
            raise JournalError("The journal is closed because the service is stopping.")
        return self._connection

    def _failed(self, exc: sqlite3.Error) -> JournalError:
        name = getattr(exc, "sqlite_errorname", type(exc).__name__)
        if name.startswith(LOST):
            return self._lost(f"The journal can no longer be trusted: {exc} ({name}).")
        if self._failure is None:
            log.error("journal failed", extra={"error": str(exc), "code": name})
        self._failure = JournalError(f"The journal cannot be used now: {exc} ({name}).")
        return self._failure

    def _lost(self, text: str) -> JournalLost:
        if self._loss is None:
            self._loss = JournalLost(text)
            log.critical("journal lost", extra={"error": text})
            self._on_lost()
        return self._loss

    def _refuse_replaced(self) -> None:
        # SQLite goes on writing to files that were removed.
        found = self._look_at_files()
        if self._inodes not in ([], found):
            text = "its -wal, its -shm or its .lock was removed or replaced"
            raise self._lost(f"The journal {self._path}, {text}.")

    def _look_at_files(self) -> list[tuple[int, int]]:
        found = self._stat("", "-wal", "-shm", ".lock")
        return [(status.st_dev, status.st_ino) for status in found]

    def _stat(self, *suffixes: str) -> list[os.stat_result]:
        """Return the status of those of the files that are there."""
        found = []
        for suffix in suffixes:
            with contextlib.suppress(OSError):
                found.append(os.stat(f"{self._path}{suffix}"))  # noqa: PTH116 - half the time
        return found

    def _take_lock(self) -> None:
        """Lock a file beside it: to open and close the journal itself would drop SQLite's locks."""
        self._lock_file = self._lock_path.open("a")
        holder = self._lock_path.read_text(encoding="ascii", errors="replace")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            text = f"is in use by another instance, pid {holder}: stop it, or name another file"
            raise self._refusal(text) from exc
        was_used = _SINCE in holder
        if was_used and not any(status.st_size for status in self._stat("")):
            # SQLite would remove what is left of it, its write-ahead log.
            text = "is gone: restore a backup, or remove its .lock file to begin with an empty one"
            raise self._refusal(text)
        # Until the tables are there, it must not say that they are.
        self._lock_path.write_text(f"{os.getpid()}{_SINCE if was_used else ''}")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        def value(statement: str) -> Any:
            return connection.execute(statement).fetchone()[0]

        is_new = not value("SELECT count(*) FROM sqlite_schema")
        if not is_new and value("PRAGMA application_id") != APPLICATION_ID:
            raise self._refusal("is a database of another program: name another file")
        if not is_new and value("PRAGMA user_version") != SCHEMA_VERSION:
            raise self._refusal("was written by another version: use that one, or another file")
        for name, wanted in PRAGMAS.items():
            connection.execute(f"PRAGMA {name} = {wanted}")
            if (got := value(f"PRAGMA {name}")) != wanted:
                raise self._refusal(f"cannot use {name}={wanted} here, only {got}")
        if (damage := value("PRAGMA quick_check(1)")) != "ok":
            raise self._refusal(f"is damaged ({damage}): restore a backup")
        if is_new:
            stamp = f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION};"
            schema = SCHEMA_PATH.read_text(encoding="utf-8")
            connection.executescript(f"BEGIN; {schema} {stamp} COMMIT;")

    def _refusal(self, text: str) -> ConfigError:
        line = text.replace("\n", " ")  # SQLite describes damage in several lines
        return ConfigError(f"JOURNAL={str(self._path)!r}: {line}")


def _connect(database: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        database,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        uri=database.startswith("file:"),
    )
    connection.row_factory = sqlite3.Row
    return connection

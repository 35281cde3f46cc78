"""Keep rows on disk while PostgreSQL is unavailable: bounded, private, replayed by the next run.

The rows wait for the database that they were meant for: each file names it. Each proxy writes its own
file and holds SQLite's exclusive lock on it. The operating system releases
the lock of a killed process. A file without a lock is left over from an earlier run and is replayed first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sqlite3
import tempfile
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ..rows.entry import AccessLogEntry
from ..settings import create_private_folder
from .copy_batch import decode_rows, encode_rows
from .gaps import Gap
from .ledger import UNKNOWN_RUN, RunEnd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

_SUFFIX = ".spool"
_DAMAGED_SUFFIX = ".damaged"
_APPLICATION_ID = 0x41525441  # "ARTA": marks our files (sqlite.org/pragma.html)
_FORMAT = 2
_GAP_RESERVE_BYTES = 1024 * 1024  # a full file must still have room for the gaps
_DISK_ERRORS = (sqlite3.Error, OSError)
_RETRY_SECONDS = 1.0
_TABLES = """
    CREATE TABLE batch (
      id INTEGER PRIMARY KEY AUTOINCREMENT, columns TEXT NOT NULL, entries BLOB NOT NULL
    );
    CREATE TABLE target (database TEXT NOT NULL);
    CREATE TABLE gap (
      gap_id TEXT PRIMARY KEY, node TEXT, from_at TEXT, to_at TEXT, reason TEXT, entries INTEGER, run_id TEXT
    );
    CREATE TABLE run (run_id TEXT, ended BLOB);
"""
_IS_EMPTY = "SELECT NOT EXISTS (SELECT 1 FROM batch) AND NOT EXISTS (SELECT 1 FROM gap)"
_HAS_NO_END = " AND NOT EXISTS (SELECT 1 FROM run WHERE ended IS NOT NULL)"
# The first version of the format had no table run.
_NAMES_RUN = "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'run')"


class DamagedError(Exception):
    """A spool file is corrupt, or not ours."""


class SpooledBatch(NamedTuple):
    """Entries in the order they arrived, and where they are stored."""

    file: SpoolFile
    batch_id: int
    entries: list[AccessLogEntry]


class SpoolFile:
    """One SQLite file, locked exclusively while it is open."""

    def __init__(self, path: Path, database: str, max_bytes: int) -> None:
        """Open the file, or create it for this database with mode 0600.

        Raises:
            BlockingIOError: another running process has locked it.
            DamagedError: it is corrupt, or not ours.
            OSError, sqlite3.Error: it cannot be opened, or another version of artifactapi wrote it.
        """
        self.path = path
        self.database = database  # that the rows wait for; of an existing file, what it says
        self.run_id: str | None = None  # of the run that saw the requests; None: not recorded
        self._names_run = True
        self._max_bytes = max_bytes
        self._done = 0  # batches up to this id are in PostgreSQL, even if deleting them failed
        is_new = not path.exists()
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._sqlite = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            self._prepare(is_new=is_new)
        except sqlite3.DatabaseError as e:
            self._sqlite.close()
            if is_new:
                self._unlink()
            if e.sqlite_errorname in ("SQLITE_BUSY", "SQLITE_LOCKED"):
                raise BlockingIOError from None
            if e.sqlite_errorname in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
                raise DamagedError(str(e)) from None
            raise
        except BaseException:
            self._sqlite.close()
            raise

    def append(self, entries: Sequence[AccessLogEntry]) -> bool:
        """Store the entries; False if the file or the disk is full."""
        if self.used_bytes() >= self._max_bytes:
            return False
        columns = ",".join(AccessLogEntry._fields)
        values = (columns, encode_rows(entries))
        try:
            self._sqlite.execute("INSERT INTO batch (columns, entries) VALUES (?, ?)", values)
        except sqlite3.OperationalError as e:
            if e.sqlite_errorname == "SQLITE_FULL":  # our limit, or a full disk
                return False
            raise
        return True

    def oldest(self) -> SpooledBatch | None:
        """The oldest batch; None if there is none. Raises DamagedError if it cannot be read."""
        return self._first_after(self._done)

    def sample(self, count: int) -> list[SpooledBatch]:
        """Batches at random, at most `count`. Raises DamagedError if one cannot be read."""
        sql = "SELECT min(id), max(id) FROM batch WHERE id > ?"
        try:
            first, last = self._sqlite.execute(sql, (self._done,)).fetchone()
        except sqlite3.DatabaseError as e:
            raise DamagedError(str(e)) from None
        if first is None:
            return []
        ids = range(first - 1, last)
        batches = map(self._first_after, random.sample(ids, min(count, len(ids))))
        return [batch for batch in batches if batch is not None]

    def _first_after(self, batch_id: int) -> SpooledBatch | None:
        sql = "SELECT id, columns, entries FROM batch WHERE id > ? ORDER BY id LIMIT 1"
        try:
            row = self._sqlite.execute(sql, (batch_id,)).fetchone()
            return None if row is None else SpooledBatch(self, row[0], _entries(row[1], row[2]))
        except (sqlite3.DatabaseError, msgspec.MsgspecError, TypeError) as e:
            raise DamagedError(str(e)) from None

    def remove(self, batch: SpooledBatch) -> None:
        """Delete a batch that is in PostgreSQL. `oldest` does not return it again in this run."""
        self._done = batch.batch_id
        with suppress(sqlite3.Error):  # the next run sends it again, which is harmless
            self._sqlite.execute("DELETE FROM batch WHERE id = ?", (batch.batch_id,))

    def is_done(self) -> bool:
        """Whether every batch is in PostgreSQL."""
        sql = "SELECT NOT EXISTS (SELECT 1 FROM batch WHERE id > ?)"
        try:
            return bool(self._sqlite.execute(sql, (self._done,)).fetchone()[0])
        except sqlite3.DatabaseError:
            return False  # `oldest` reports the damage

    def gaps(self) -> list[Gap]:
        """The stored gaps. Raises DamagedError if they cannot be read."""
        run_id = "run_id" if self._names_run else "NULL"
        sql = f"SELECT gap_id, node, from_at, to_at, reason, entries, {run_id} FROM gap"  # noqa: S608 - a constant
        try:
            return [Gap(*row) for row in self._sqlite.execute(sql)]
        except sqlite3.DatabaseError as e:
            raise DamagedError(str(e)) from None

    def end(self) -> RunEnd | None:
        """The end of the run, if it could not be reported. Raises DamagedError if it cannot be read."""
        if not self._names_run:
            return None
        try:
            row = self._sqlite.execute("SELECT ended FROM run").fetchone()
            if row is None or row[0] is None:
                return None
            return msgspec.msgpack.decode(row[0], type=RunEnd)
        except (sqlite3.DatabaseError, msgspec.MsgspecError) as e:
            raise DamagedError(str(e)) from None

    def set_run(self, run_id: str, end: RunEnd | None = None) -> None:
        """Say which run saw the requests, and how it ended."""
        encoded = None if end is None else msgspec.msgpack.encode(end)
        self._sqlite.execute("UPDATE run SET run_id = ?, ended = ?", (run_id, encoded))
        self.run_id = run_id

    def replace_gaps(self, gaps: Iterable[Gap]) -> None:
        """Store these gaps in place of the stored ones."""
        with self._sqlite:  # one transaction
            self._sqlite.execute("BEGIN")
            self._sqlite.execute("DELETE FROM gap")
            self._sqlite.executemany(
                "INSERT OR REPLACE INTO gap VALUES (?, ?, ?, ?, ?, ?, ?)", gaps
            )

    def close(self) -> None:
        """Close the file; delete it if it is empty."""
        empty = False
        with suppress(sqlite3.Error):
            has_no_end = _HAS_NO_END if self._names_run else ""
            empty = self._sqlite.execute(_IS_EMPTY + has_no_end).fetchone()[0]
        self._sqlite.close()
        if empty:
            self._unlink()

    def delete(self) -> None:
        """Close and delete the file. Its batches are in PostgreSQL, even those a full disk kept us from deleting."""
        self._sqlite.close()
        self._unlink()

    def set_database(self, database: str) -> None:
        """Let the rows wait for another database. It need not know what the run did in the old one."""
        self._sqlite.execute("UPDATE target SET database = ?", (database,))
        if self._names_run:
            self._sqlite.execute("UPDATE run SET ended = NULL")
        self.database = database

    def set_max_bytes(self, max_bytes: int) -> None:
        """Change the limit."""
        self._max_bytes = max_bytes
        pages = (max_bytes + _GAP_RESERVE_BYTES) // self._pragma("page_size")
        self._sqlite.execute(f"PRAGMA max_page_count = {pages}")

    def _unlink(self) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):  # sqlite.org/tempfiles.html
            with suppress(OSError):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _prepare(self, *, is_new: bool) -> None:
        sqlite = self._sqlite
        sqlite.execute("PRAGMA locking_mode = EXCLUSIVE")
        sqlite.execute("PRAGMA journal_mode = WAL")
        sqlite.execute("PRAGMA synchronous = NORMAL")
        sqlite.execute("BEGIN EXCLUSIVE")
        if is_new:
            for statement in _TABLES.split(";"):
                sqlite.execute(statement)
            sqlite.execute("INSERT INTO target VALUES (?)", (self.database,))
            sqlite.execute("INSERT INTO run VALUES (NULL, NULL)")
            sqlite.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            sqlite.execute(f"PRAGMA user_version = {_FORMAT}")
        sqlite.execute("COMMIT")
        application_id, found = self._pragma("application_id"), self._pragma("user_version")
        if application_id != _APPLICATION_ID:
            raise DamagedError(f"application id is {application_id}, expected {_APPLICATION_ID}")
        if found != _FORMAT:
            raise OSError(
                f"another artifactapi wrote it, in format {found}; this one reads {_FORMAT}"
            )
        (self.database,) = sqlite.execute("SELECT database FROM target").fetchone()
        self._names_run = bool(sqlite.execute(_NAMES_RUN).fetchone()[0])
        if self._names_run:
            (self.run_id,) = sqlite.execute("SELECT run_id FROM run").fetchone()
        self.set_max_bytes(self._max_bytes)

    def used_bytes(self) -> int:
        """Bytes in use, without free pages."""
        names = ("page_count", "freelist_count", "page_size")
        pages, free, size = (self._pragma(name) for name in names)
        return (pages - free) * size

    def _pragma(self, name: str) -> int:
        return int(self._sqlite.execute(f"PRAGMA {name}").fetchone()[0])


class WaitingRows(NamedTuple):
    """Files of earlier runs that wait for one database."""

    database: str
    files: int
    bytes: int


def waiting_rows(folder: Path) -> list[WaitingRows]:
    """What waits in this folder, by database, without the files that running proxies use."""
    sizes: dict[str, list[int]] = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        with suppress(BlockingIOError, DamagedError, *_DISK_ERRORS):
            file = SpoolFile(path, "", 0)
            has_rows = not file.is_done() or bool(file.gaps())
            file.close()
            if has_rows:
                sizes.setdefault(file.database, []).append(path.stat().st_size)
    return [WaitingRows(name, len(found), sum(found)) for name, found in sorted(sizes.items())]


def redirect(folder: Path, database: str) -> int:
    """Let what waits for other databases wait for this one; returns the number of files.

    Files that running proxies use stay as they are.
    """
    changed = 0
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        with suppress(BlockingIOError, DamagedError, *_DISK_ERRORS):
            file = SpoolFile(path, "", 0)
            is_other = file.database != database
            if is_other:
                file.set_database(database)
            file.close()
            if is_other and path.exists():
                path.rename(folder / _file_name(database))
                changed += 1
    return changed


def _file_name(database: str) -> str:
    return f"{time.time_ns():020d}-{_digest(database)}-{uuid.uuid4().hex}{_SUFFIX}"


def _digest(database: str) -> str:
    return hashlib.sha256(database.encode()).hexdigest()[:16]


class Spool:
    """This proxy's file and the files of earlier runs. Only the writer thread uses it."""

    def __init__(
        self, folder: Path, database: str, max_bytes: int, run_id: str = UNKNOWN_RUN
    ) -> None:
        """Creates nothing on disk until there is something to keep. `max_bytes` 0 turns the spool off."""
        self._folder = folder
        self.run_id = run_id  # of this run
        self._database = database
        self.entries = 0  # of this run, stored here
        self.lost = 0  # of this run, in a damaged file
        self.bytes = 0  # that the entries of this run take on disk, after the last change
        self._max_bytes = max_bytes
        self._own: SpoolFile | None = None
        self._inherited: list[SpoolFile] | None = None
        self._retry_at = 0.0  # monotonic seconds: next attempt to write to the disk
        self._has_warned = False

    def waiting_for_others(self) -> list[WaitingRows]:
        """What earlier runs kept for other databases. This spool does not write it."""
        return [it for it in waiting_rows(self._folder) if it.database != self._database]

    def check(self) -> None:
        """Warn now if nothing can be kept on disk, not only when there is something to keep."""
        if self._max_bytes:
            self._try(self._create_unnamed_file)

    def _create_unnamed_file(self) -> None:
        # Not os.access: it does not know about root, quotas and access control lists.
        create_private_folder(self._folder)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(b"x")

    def reconfigure(self, database: str, max_bytes: int) -> None:
        """Use another database and limit.

        The rows of this run go to the new database. Those of earlier runs keep waiting for theirs.
        """
        if database != self._database:
            for file in self._inherited or ():
                file.close()
            self._database, self._inherited = database, None
        if max_bytes != self._max_bytes:
            self._max_bytes = max_bytes
            if self._own is not None and max_bytes:
                self._try(lambda: self._file().set_max_bytes(max_bytes))

    def append(self, entries: Sequence[AccessLogEntry]) -> bool:
        """Store the entries; False if the spool is off or full, or the disk fails."""
        if not self._max_bytes or not self._try(lambda: self._file().append(entries)):
            return False
        self.entries += len(entries)
        self._measure()
        return True

    def oldest(self) -> SpooledBatch | None:
        """The next batch to write; files of earlier runs come first."""
        for file in self._files():
            try:
                batch = file.oldest()
            except DamagedError as e:
                self._set_aside(file, e)
                continue
            if batch is not None:
                return batch
        return None

    def sample(self, batches: int) -> list[AccessLogEntry]:
        """One entry of each of some batches, at random, from at most that many files."""
        files, found = list(self._files()), []
        for file in random.sample(files, min(batches, len(files))):
            with suppress(DamagedError):  # `oldest` reports the damage
                found += file.sample(batches)
        return [random.choice(batch.entries) for batch in found]  # noqa: S311 - not a secret

    def origin(self, batch: SpooledBatch) -> str | None:
        """The run that saw these requests; None: this one."""
        return None if batch.file is self._own else batch.file.run_id or UNKNOWN_RUN

    def remove(self, batch: SpooledBatch) -> bool:
        """Delete a batch that is in PostgreSQL. True if it is of this run."""
        batch.file.remove(batch)
        own = batch.file is self._own
        if own:
            self.entries -= len(batch.entries)
        return own

    def inherited_gaps(self) -> list[Gap]:
        """Gaps of earlier runs."""
        found: list[Gap] = []
        for file in list(self._inherit()):
            try:
                found += file.gaps()
            except DamagedError as e:
                self._set_aside(file, e)
        return found

    def inherited_ends(self) -> list[RunEnd]:
        """The ends of earlier runs that could not report them."""
        found = []
        for file in list(self._inherit()):
            try:
                found.append(file.end())
            except DamagedError as e:
                self._set_aside(file, e)
        return [end for end in found if end is not None]

    def keep_end(self, end: RunEnd) -> None:
        """Store how this run ended; the next run reports it."""
        if self._max_bytes:
            self._try(lambda: self._file().set_run(end.run.run_id, end))

    def keep_gaps(self, gaps: Sequence[Gap]) -> bool:
        """Store these gaps of this run until `settle`; False if that is not possible."""
        if not gaps and self._own is None:
            return True
        return bool(self._max_bytes) and self._try(lambda: self._file().replace_gaps(gaps))

    def adopt(self, batches: Iterable[Sequence[AccessLogEntry]], end: Callable[[], RunEnd]) -> bool:
        """Store the entries and the end of a killed run as if it had stored them itself; False if it fails.

        `end` is called after the last batch.
        """
        return bool(self._max_bytes) and self._try(lambda: self._adopt(batches, end))

    def _adopt(
        self, batches: Iterable[Sequence[AccessLogEntry]], end: Callable[[], RunEnd]
    ) -> bool:
        file = self._new_file()
        is_stored = False
        try:
            is_stored = all(file.append(batch) for batch in batches)
            if is_stored:
                file.set_run(end().run.run_id, end())
        finally:
            if not is_stored:
                file.delete()
        if is_stored:
            self._inherit().append(file)
        return is_stored

    def settle(self, *, may_delete: bool = True) -> bool:
        """Delete the files without batches; True if no batch is left.

        `may_delete`: all gaps are in PostgreSQL. Otherwise the files stay.
        """
        if not may_delete:
            return all(file.is_done() for file in self._files())
        left = []
        for file in self._files():
            if file.is_done():
                file.delete()
            else:
                left.append(file)
        self._inherited = [file for file in left if file is not self._own]
        if self._own not in left:
            self._own = None
        self._measure()
        return not left

    def _measure(self) -> None:
        with suppress(sqlite3.Error):  # what reads or writes the file next reports it
            self.bytes = self._own.used_bytes() if self._own is not None and self.entries else 0

    def close(self) -> None:
        """Close all files. The next run finds what is in them."""
        for file in self._files():
            file.close()
        self._own, self._inherited = None, None

    def _try(self, write: Callable[[], bool | None]) -> bool:
        """Call `write`, unless the disk failed a moment ago; True if it succeeded. Warns once."""
        if time.monotonic() < self._retry_at:
            return False
        try:
            done = write() is not False
        except (*_DISK_ERRORS, DamagedError) as e:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            if not self._has_warned:
                logger.warning(
                    "artifactapi: spool not writable; rows that PostgreSQL does not take wait in memory only, and a "
                    "stop can lose them: %s (%s); set ARTIFACTAPI_HOME to a folder that the proxy can write to",
                    getattr(e, "strerror", None) or e,
                    self._folder,
                )
            self._has_warned = True
            return False
        self._has_warned = False
        return done

    def _files(self) -> Iterator[SpoolFile]:
        yield from list(self._inherit())
        if self._own is not None:
            yield self._own

    def _file(self) -> SpoolFile:
        if self._own is None:
            self._own = self._new_file()
        if self._own.run_id != self.run_id:
            self._own.set_run(self.run_id)
        return self._own

    def _new_file(self) -> SpoolFile:
        create_private_folder(self._folder)
        path = self._folder / _file_name(self._database)
        return SpoolFile(path, self._database, self._max_bytes)

    def _inherit(self) -> list[SpoolFile]:
        if self._inherited is None:
            self._inherited = []
            for path in sorted(self._folder.glob(f"*-{_digest(self._database)}-*{_SUFFIX}")):
                if self._own is None or path != self._own.path:
                    self._open(path, self._inherited)
        return self._inherited

    def _open(self, path: Path, files: list[SpoolFile]) -> None:
        try:
            files.append(SpoolFile(path, self._database, self._max_bytes))
        except BlockingIOError:
            return  # a running proxy uses it
        except DamagedError as e:
            _set_aside(path, e)
        except _DISK_ERRORS as e:
            logger.warning("artifactapi: spool file not readable; left in place: %s (%s)", e, path)

    def _set_aside(self, file: SpoolFile, error: Exception) -> None:
        file.close()
        if file is self._own:
            self._own = None
            self.lost, self.entries = self.lost + self.entries, 0
        elif self._inherited:
            self._inherited.remove(file)
        _set_aside(file.path, error)


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(path.name + _DAMAGED_SUFFIX)
    with suppress(OSError):
        path.rename(aside)
    logger.warning("artifactapi: spool file damaged; moved to %s: %s", aside, error)


def _entries(columns: str, blob: bytes) -> list[AccessLogEntry]:
    """The entries of a batch, including one stored by a version with other columns."""
    names = columns.split(",")
    if tuple(names) == AccessLogEntry._fields:
        return decode_rows(blob)
    known = [(i, name) for i, name in enumerate(names) if name in AccessLogEntry._fields]
    return [
        AccessLogEntry(**{name: values[i] for i, name in known})
        for values in msgspec.msgpack.decode(blob)
    ]

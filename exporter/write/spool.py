"""Rows on disk while Postgres is away: bounded, private, and found again by the next run; no SQL of Postgres.

Each proxy writes a file of its own, held by SQLite's exclusive lock, which the system takes away
from the killed. A file that nobody holds is the legacy of a run before, and is replayed first.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ..rows.entry import AccessLogEntry
from .copy_batch import decode_rows, encode_rows
from .gaps import Gap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

_SUFFIX = ".spool"
_SET_ASIDE = ".damaged"
_APPLICATION_ID = 0x41525441  # "ARTA": tells our files from others (sqlite.org/pragma.html)
_FORMAT = 1
_GAP_RESERVE_BYTES = (
    1024 * 1024
)  # what is lost when the file is full must still find its place in it
_FORGIVABLE = (sqlite3.Error, OSError)
_RETRY_SECONDS = 1.0
_TABLES = """
    CREATE TABLE batch (
      id INTEGER PRIMARY KEY AUTOINCREMENT, columns TEXT NOT NULL, entries BLOB NOT NULL
    );
    CREATE TABLE gap (
      gap_id TEXT PRIMARY KEY, node TEXT, from_at TEXT, to_at TEXT, reason TEXT, entries INTEGER
    );
"""
_IS_EMPTY = "SELECT NOT EXISTS (SELECT 1 FROM batch) AND NOT EXISTS (SELECT 1 FROM gap)"


class DamagedError(Exception):
    """A file is torn, or not ours."""


class SpooledBatch(NamedTuple):
    """Entries in the order they came, and where they lie."""

    file: SpoolFile
    batch_id: int
    entries: list[AccessLogEntry]


class SpoolFile:
    """One SQLite file, held exclusively from opening to closing."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Open, or make with mode 0600.

        Raises:
            BlockingIOError: a living process holds it.
            DamagedError: it is torn, or no file of ours.
            OSError, sqlite3.Error: it can't be opened.
        """
        self.path = path
        self._max_bytes = max_bytes
        self._done = 0  # up to here all is in Postgres, whether it could be deleted or not
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
        """Keep the entries; False if there is no room for them."""
        if self._size() >= self._max_bytes:
            return False
        columns = ",".join(AccessLogEntry._fields)
        values = (columns, encode_rows(entries))
        try:
            self._sqlite.execute("INSERT INTO batch (columns, entries) VALUES (?, ?)", values)
        except sqlite3.OperationalError as e:
            if e.sqlite_errorname == "SQLITE_FULL":  # of ours, or the disk's
                return False
            raise
        return True

    def oldest(self) -> SpooledBatch | None:
        """The batch that came first. Raises DamagedError if it can't be read."""
        sql = "SELECT id, columns, entries FROM batch WHERE id > ? ORDER BY id LIMIT 1"
        try:
            row = self._sqlite.execute(sql, (self._done,)).fetchone()
            return None if row is None else SpooledBatch(self, row[0], _entries(row[1], row[2]))
        except (sqlite3.DatabaseError, msgspec.MsgspecError, TypeError) as e:
            raise DamagedError(str(e)) from None

    def remove(self, batch: SpooledBatch) -> None:
        """The batch is in Postgres, and will not come again in this run."""
        self._done = batch.batch_id
        with suppress(sqlite3.Error):  # then the next run finds it, and Postgres has it already
            self._sqlite.execute("DELETE FROM batch WHERE id = ?", (batch.batch_id,))

    def is_done(self) -> bool:
        """Whether all batches are in Postgres."""
        sql = "SELECT NOT EXISTS (SELECT 1 FROM batch WHERE id > ?)"
        try:
            return bool(self._sqlite.execute(sql, (self._done,)).fetchone()[0])
        except sqlite3.DatabaseError:
            return False  # `oldest` will say what is wrong with it

    def gaps(self) -> list[Gap]:
        """The gaps kept here. Raises DamagedError if they can't be read."""
        sql = "SELECT gap_id, node, from_at, to_at, reason, entries FROM gap"
        try:
            return [Gap(*row) for row in self._sqlite.execute(sql)]
        except sqlite3.DatabaseError as e:
            raise DamagedError(str(e)) from None

    def replace_gaps(self, gaps: Iterable[Gap]) -> None:
        """Keep these gaps and no others."""
        with self._sqlite:  # all or none
            self._sqlite.execute("BEGIN")
            self._sqlite.execute("DELETE FROM gap")
            self._sqlite.executemany("INSERT OR REPLACE INTO gap VALUES (?, ?, ?, ?, ?, ?)", gaps)

    def close(self) -> None:
        """Let go of the file, and remove it if nothing is in it."""
        empty = False
        with suppress(sqlite3.Error):
            empty = self._sqlite.execute(_IS_EMPTY).fetchone()[0]
        self._sqlite.close()
        if empty:
            self._unlink()

    def remove_whole(self) -> None:
        """All that is in it is in Postgres, also what a full disk did not let us delete."""
        self._sqlite.close()
        self._unlink()

    def bound(self, max_bytes: int) -> None:
        """Take no more than so many bytes from now on."""
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
            sqlite.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            sqlite.execute(f"PRAGMA user_version = {_FORMAT}")
        sqlite.execute("COMMIT")
        found = (self._pragma("application_id"), self._pragma("user_version"))
        if found != (_APPLICATION_ID, _FORMAT):
            raise DamagedError(f"it has the marks {found}, expected {(_APPLICATION_ID, _FORMAT)}")
        self.bound(self._max_bytes)

    def _size(self) -> int:
        """Bytes in use: pages that became free again do not count."""
        names = ("page_count", "freelist_count", "page_size")
        pages, free, size = (self._pragma(name) for name in names)
        return (pages - free) * size

    def _pragma(self, name: str) -> int:
        return int(self._sqlite.execute(f"PRAGMA {name}").fetchone()[0])


class Spool:
    """This proxy's file and those of the dead. Used by the writer's thread alone."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Nothing is made on disk before there is something to keep. `max_bytes` 0 switches it off."""
        self.entries = 0  # of this run, waiting here
        self.lost = 0  # of this run, in a file that was damaged
        self._folder = folder
        self._max_bytes = max_bytes
        self._own: SpoolFile | None = None
        self._inherited: list[SpoolFile] | None = None
        self._retry_at = 0.0  # monotonic seconds: when the disk is asked again
        self._is_troubled = False  # and that was said

    def reconfigure(self, max_bytes: int) -> None:
        """Go on with another bound; what is on disk stays there until it is written."""
        if max_bytes != self._max_bytes:
            self._max_bytes = max_bytes
            if self._own is not None and max_bytes:
                self._try(lambda: self._file().bound(max_bytes))

    def append(self, entries: Sequence[AccessLogEntry]) -> bool:
        """Keep the entries; False if there is no room, or the disk does not let us."""
        if not self._max_bytes or not self._try(lambda: self._file().append(entries)):
            return False
        self.entries += len(entries)
        return True

    def oldest(self) -> SpooledBatch | None:
        """The batch to be written next: those of the dead first."""
        for file in self._files():
            try:
                batch = file.oldest()
            except DamagedError as e:
                self._set_aside(file, e)
                continue
            if batch is not None:
                return batch
        return None

    def remove(self, batch: SpooledBatch) -> bool:
        """The batch is in Postgres. True if it was of this run."""
        batch.file.remove(batch)
        own = batch.file is self._own
        if own:
            self.entries -= len(batch.entries)
        return own

    def inherited_gaps(self) -> list[Gap]:
        """Gaps of the dead."""
        found: list[Gap] = []
        for file in list(self._inherit()):
            try:
                found += file.gaps()
            except DamagedError as e:
                self._set_aside(file, e)
        return found

    def keep_gaps(self, gaps: Sequence[Gap]) -> None:
        """Keep these gaps of ours until `settle`."""
        if self._max_bytes and (gaps or self._own is not None):
            self._try(lambda: self._file().replace_gaps(gaps))

    def settle(self) -> bool:
        """The gaps are in Postgres: let go of the files that hold no batch. True if none does."""
        left = []
        for file in self._files():
            if file.is_done():
                file.remove_whole()
            else:
                left.append(file)
        self._inherited = [file for file in left if file is not self._own]
        if self._own not in left:
            self._own = None
        return not left

    def close(self) -> None:
        """Let go of all files; the next run finds what is in them."""
        for file in self._files():
            file.close()
        self._own, self._inherited = None, None

    def _try(self, write: Callable[[], bool | None]) -> bool:
        """Write, unless the disk has failed a moment ago; whether it did. What is wrong is said once."""
        if time.monotonic() < self._retry_at:
            return False
        try:
            done = write() is not False
        except (*_FORGIVABLE, DamagedError) as e:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            if not self._is_troubled:
                logger.warning("The spool in %s can't be written: %s.", self._folder, e)
            self._is_troubled = True
            return False
        self._is_troubled = False
        return done

    def _files(self) -> Iterator[SpoolFile]:
        yield from list(self._inherit())
        if self._own is not None:
            yield self._own

    def _file(self) -> SpoolFile:
        if self._own is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = f"{time.time_ns():020d}-{uuid.uuid4().hex}{_SUFFIX}"
            self._own = SpoolFile(self._folder / name, self._max_bytes)
        return self._own

    def _inherit(self) -> list[SpoolFile]:
        if self._inherited is None:
            self._inherited = []
            for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
                if self._own is None or path != self._own.path:
                    self._open(path, self._inherited)
        return self._inherited

    def _open(self, path: Path, files: list[SpoolFile]) -> None:
        try:
            files.append(SpoolFile(path, self._max_bytes))
        except BlockingIOError:
            return  # another proxy lives and uses it
        except DamagedError as e:
            _set_aside(path, e)
        except _FORGIVABLE as e:
            logger.warning("The spool file %s can't be opened and is left alone: %s.", path, e)

    def _set_aside(self, file: SpoolFile, error: Exception) -> None:
        file.close()
        if file is self._own:
            self._own = None
            self.lost, self.entries = self.lost + self.entries, 0
        elif self._inherited:
            self._inherited.remove(file)
        _set_aside(file.path, error)


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(path.name + _SET_ASIDE)
    with suppress(OSError):
        path.rename(aside)
    logger.warning("The spool file %s is damaged or not ours and was set aside: %s.", aside, error)


def _entries(columns: str, blob: bytes) -> list[AccessLogEntry]:
    """The entries of a batch, also of a version that had other columns."""
    names = columns.split(",")
    if tuple(names) == AccessLogEntry._fields:
        return decode_rows(blob)
    known = [(i, name) for i, name in enumerate(names) if name in AccessLogEntry._fields]
    return [
        AccessLogEntry(**{name: values[i] for i, name in known})
        for values in msgspec.msgpack.decode(blob)
    ]

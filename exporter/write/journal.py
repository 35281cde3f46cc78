"""The journal: what has happened in this run, in memory that outlives the process. recovery.py reads it.

A bounded store of exchanges and some counters, in a shared mapping of a file in memory. The event loop
writes both without a system call, and without a lock: each word has one writing thread.

The file does not say where it is in use. An exchange counts if it is whole and its number is not below
the counter RELEASED, so one store releases any number of them, and a torn one does not exist.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple
from zlib import adler32

from ..postgres.dsn import database_name
from ..settings import data_folder
from .journal_file import (
    ALIVE_AT,
    BEGUN,
    CHECK,
    COUNTERS,
    COUNTERS_AT,
    DROPPED,
    ELSEWHERE_LOST,
    LAST_BEGUN_AT,
    OLDEST_OPEN_AT,
    RECORD,
    RELEASED,
    RING_AT,
    SKIPPED,
    Identity,
    JournalError,
    JournalFile,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ..run import Run
    from ..settings import Settings

logger = logging.getLogger(__name__)

# Space is used and freed by segments, which costs nothing per exchange. One holds the largest exchange, which
# has 142,567 bytes, unless `journal.max_bytes` is too small for that.
_SEGMENT_BYTES = 160 * 1024
_MIN_SEGMENTS, _MAX_SEGMENTS = 4, 64
_pack = RECORD.pack
_RECORD_BYTES = RECORD.size


def journal_database(settings: Settings) -> str:
    """The name of the database that the rows are for. It holds no password."""
    dsn = settings.database.dsn
    return database_name(dsn) if dsn else f"embedded PostgreSQL in {data_folder()}"


def checksum(payload: bytes, number: int) -> int:
    """Of an exchange in the ring. CRC-32 would take three times as long."""
    return adler32(payload, number % CHECK)


class Safe(NamedTuple):
    """What a kill can no longer lose, in the order of the counters. All are totals of this process."""

    accepted: int  # the first so many exchanges are in PostgreSQL or on disk, or are a gap there
    drops: int = 0  # the first so many drops of the buffer are a gap there
    rejected: int = 0  # of this run
    spooled: int = 0  # now on disk
    lost: int = 0  # by the writer
    elsewhere: int = 0  # that were settled in an earlier run of this process
    elsewhere_lost: int = 0  # of these, lost


class Journal:
    """What recovery needs to know about this run, if it is killed.

    The event loop's thread calls `begin`, `skip`, `put`, `count_drop` and `set_in_flight`; the writer's
    thread calls the others. None of them raises or waits; the event loop's make no system call.
    """

    def __init__(self, run: Run, settings: Settings) -> None:
        """Create the file. Without one, the counters still count, in the memory of this process."""
        self.unrecorded = 0  # exchanges for which there was no room
        self.off_reason: str | None = None  # why there is no ring; None: there is one
        self._file = self._create(run, settings)
        self._identified = run, settings
        memory = self._file.memory if self._file else bytearray(RING_AT)
        self._memory = memory
        words = memoryview(memory)[COUNTERS_AT : COUNTERS_AT + 8 * COUNTERS]
        self._counters, self._times = words.cast("Q"), words.cast("d")
        for word in (BEGUN, SKIPPED, DROPPED, *range(RELEASED, ELSEWHERE_LOST + 1)):
            self._counters[word] = CHECK
        for word in (LAST_BEGUN_AT, OLDEST_OPEN_AT, ALIVE_AT):
            self._times[word] = run.started_at
        self._begun = self._skipped = self._dropped = CHECK  # as they are stored
        self._accepted = 0
        self._key = self._file.identity.key if self._file else b""
        self._capacity = self._file.identity.capacity if self._file else 0
        self._segment_bytes = _segment_bytes(self._capacity)
        # Segments by their offset in the file. The last one freed is used first: it is in the CPU's cache.
        self._free = deque(_segments(self._capacity, self._segment_bytes))
        self._filled: deque[tuple[int, int]] = deque()  # (n, segment): it holds some of the first n
        self._segment: int | None = None  # being filled
        self._offset = self._room = 0  # where the next exchange goes, and the bytes left there

    def _create(self, run: Run, settings: Settings) -> JournalFile | None:
        capacity = settings.journal.max_bytes
        if not capacity:
            self.off_reason = "journal.max_bytes is 0"
            return None
        identity = Identity(run, journal_database(settings), os.getpid(), capacity)
        try:
            return JournalFile(identity)
        except JournalError as e:
            self.off_reason = str(e)
            logger.info(
                "artifactapi: no journal: %s; if the proxy is killed, the rows of its last %g seconds or "
                "more are lost without a gap.",
                e,
                settings.batch.max_seconds,
            )
            return None

    @property
    def path(self) -> Path | None:
        """The file; None without a ring."""
        return self._file.path if self._file else None

    @property
    def capacity(self) -> int:
        """Bytes for exchanges; 0 without a ring. Any thread may ask."""
        return self._capacity

    @property
    def used_bytes(self) -> int:
        """Bytes of the segments that hold exchanges, or did and are not free yet. Any thread may ask."""
        return (len(self._filled) + (self._segment is not None)) * self._segment_bytes

    @property
    def in_flight(self) -> int:
        """Requests that have begun and not ended."""
        return (self._begun - self._skipped - self._dropped) // CHECK + 1 - self._accepted

    def begin(self, at: float) -> None:
        """A request begins. `at`: epoch seconds."""
        self._begun += CHECK
        self._counters[BEGUN] = self._begun
        self._times[LAST_BEGUN_AT] = at

    def skip(self) -> None:
        """A request ends that is not to be logged."""
        self._skipped += CHECK
        self._counters[SKIPPED] = self._skipped

    def count_drop(self) -> None:
        """A request ends, and the buffer has counted it as lost."""
        self._dropped += CHECK
        self._counters[DROPPED] = self._dropped

    def put(self, payload: bytes) -> None:
        """A request ends, and the buffer has accepted its exchange; see `encode`."""
        number = self._accepted
        self._accepted = number + 1
        if not self._capacity:
            return
        size = _RECORD_BYTES + (length := len(payload))
        if size > self._room and not self._make_room(size):
            self.unrecorded += 1
            return
        self._room -= size
        start = self._offset
        self._offset = end = start + size
        head = _pack(self._key, adler32(payload, number % CHECK), length, number)
        self._memory[start:end] = head + payload

    def _make_room(self, size: int) -> bool:
        """Begin another segment; False if none is free."""
        if size > self._segment_bytes:
            return False
        if self._segment is not None:
            self._filled.append((self._accepted - 1, self._segment))
            self._segment, self._room = None, 0
        if not self._free:
            return False
        self._segment = self._offset = self._free.pop()
        self._room = self._segment_bytes
        return True

    def set_in_flight(self, count: int) -> None:
        """So many requests have begun and not ended."""
        self._begun += (count - self.in_flight) * CHECK
        self._counters[BEGUN] = self._begun

    def release(self, safe: Safe) -> None:
        """Forget what is safe."""
        for word, count in enumerate(safe, RELEASED):
            self._counters[word] = (count + 1) * CHECK
        while self._filled and self._filled[0][0] <= safe.accepted:
            self._free.append(self._filled.popleft()[1])

    def tick(self, oldest_open_at: float | None) -> None:
        """No request that is now in flight began before this time; None: none is in flight."""
        self._times[ALIVE_AT] = now = time.time()
        self._times[OLDEST_OPEN_AT] = now if oldest_open_at is None else oldest_open_at

    def set_identity(self, run: Run, settings: Settings) -> None:
        """What is not safe belongs to this run and this database now. The size stays."""
        if self._file and (run is not self._identified[0] or settings is not self._identified[1]):
            self._identified = run, settings
            try:
                self._file.set_identity(run, journal_database(settings))
            except JournalError as e:
                logger.warning("artifactapi: the journal still names the old database: %s", e)

    def check(self) -> None:
        """Notice that somebody has deleted the file, as systemd does when a user logs out."""
        if self._file and self.off_reason is None and not self._file.path.exists():
            self.off_reason = f"{self._file.path} was deleted"
            logger.warning(
                "artifactapi: the journal is gone: %s; if the proxy is killed, its last rows are lost without a "
                "gap. Restart the proxy.",
                self.off_reason,
            )

    def close(self) -> None:
        """Delete the file: the run ends in order."""
        if self._file:
            self._file.remove()


def _segment_bytes(capacity: int) -> int:
    return max(capacity // _MAX_SEGMENTS, min(_SEGMENT_BYTES, capacity // _MIN_SEGMENTS))


def _segments(capacity: int, size: int) -> range:
    """The offsets of the segments, without a rest at the end."""
    return range(RING_AT, RING_AT + capacity - size + 1, size) if size else range(0)

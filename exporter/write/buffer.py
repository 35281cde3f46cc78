"""What waits between the proxy's thread and the writer's, bounded in entries and bytes; no locks, no I/O."""

from __future__ import annotations

from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from .compact_queue import CompactQueue

if TYPE_CHECKING:
    from ..exchange import Exchange
    from ..settings import BufferSettings
    from .gaps import Reason

# Of what the buffer may hold, in entries and in bytes: then one writes, however few they are.
_WAKE_ENTRIES_SHARE, _WAKE_BYTES_SHARE = 2, 4
_TAKEN_BYTES_SHARE = 16  # what was taken is in memory, too
# A pack is made in some 0.2 ms, once so much waits as these
_PACKED_AT_ONCE = 128  # entries
_PACKED_BYTES = 256 * 1024
_MAX_DROPS = 16_384  # times kept until the writer asks for them


class Buffer:
    """One thread puts, one takes; neither waits for the other.

    Each counter is written by one thread only and never goes down, so that no lock is needed:
    `seen`, `dropped` and `bytes_in` belong to the thread that puts, `taken` and `bytes_out` to the
    one that takes.
    """

    def __init__(self, bounds: BufferSettings, wake_entries: int) -> None:
        """As of `reconfigure`."""
        self.reconfigure(bounds, wake_entries)
        self.seen = 0
        self.dropped = 0
        self.bytes_in = 0
        self.taken = 0
        self.bytes_out = 0
        self.unplaced_drops = 0  # of `dropped`, those whose times are not kept
        self._drops: deque[tuple[Reason, float]] = deque()
        # In order: the oldest, of a pack that was opened; those packed; the newest.
        self._opened: deque[Exchange] = deque()
        self._packs = CompactQueue()
        self._entries: deque[Exchange] = deque()
        # SimpleQueue.put neither blocks nor takes a lock that a taker holds (Python docs, queue).
        self._wake: SimpleQueue[None] = SimpleQueue()

    def __len__(self) -> int:
        return self.seen - self.dropped - self.taken

    def reconfigure(self, bounds: BufferSettings, wake_entries: int) -> None:
        """From now on so many waiting entries, or as many as fill half the buffer, wake a taker."""
        self.bounds = bounds
        self._wake_entries = max(1, min(wake_entries, bounds.max_entries // _WAKE_ENTRIES_SHARE))
        self._wake_bytes = bounds.max_bytes // _WAKE_BYTES_SHARE
        self._taken_bytes = bounds.max_bytes // _TAKEN_BYTES_SHARE

    def put(self, exchange: Exchange) -> bool:
        """Append, or drop and count when full; False if dropped. Never blocks, never raises."""
        entries, size = self._entries, exchange.size
        if not self.has_room(size):
            # The newest goes, not the oldest: what is already in line keeps its place.
            self.seen += 1
            self._drop("buffer_full", exchange.started_at)
            return False
        self.seen += 1
        self.bytes_in += size
        entries.append(exchange)
        if (
            len(entries) >= self._wake_entries or self.bytes_in - self.bytes_out >= self._wake_bytes
        ) and self._wake.empty():
            self._wake.put(None)
        return True

    def count_unreadable(self, started_at: float) -> None:
        """A flow that could not be read is seen, and lost."""
        self.seen += 1
        self._drop("unreadable", started_at)

    def take_drops(self) -> list[tuple[Reason, float]]:
        """Why and when entries were dropped since the last call."""
        return [self._drops.popleft() for _ in range(len(self._drops))]

    def _drop(self, reason: Reason, started_at: float) -> None:
        self.dropped += 1
        if len(self._drops) < _MAX_DROPS:
            self._drops.append((reason, started_at))
        else:
            self.unplaced_drops += 1

    def has_room(self, size: int) -> bool:
        """Whether one more entry of this size would be taken in."""
        return (
            len(self) < self.bounds.max_entries
            and self.bytes_in - self.bytes_out + size <= self.bounds.max_bytes
        )

    def take(self, limit: int) -> list[Exchange]:
        """The oldest entries, in order, at most `limit`, fewer if they are large; empty if none wait."""
        batch: list[Exchange] = []
        size = 0
        while len(batch) < limit and size < self._taken_bytes and (oldest := self._oldest()):
            exchange = oldest.popleft()
            batch.append(exchange)
            size += exchange.size
        self.taken += len(batch)
        self.bytes_out += size
        return batch

    def _oldest(self) -> deque[Exchange]:
        if not self._opened and self._packs:
            self._opened.extend(self._packs.popleft())
        return self._opened or self._entries

    def compact(self) -> bool:
        """Make some of what waits smaller, and its memory such as can be given back; False if all is.

        For the thread that takes, when it can't, and for as long as others may stand still.
        """
        entries = self._entries
        portion: list[Exchange] = []
        size = 0
        while len(portion) < _PACKED_AT_ONCE and size < _PACKED_BYTES:
            if len(portion) == len(entries):
                return False
            portion.append(entries[len(portion)])
            size += portion[-1].bare_size
        try:
            self._packs.append(portion)
        except Exception:  # noqa: BLE001 - of whatever it may be made: it stays as it is
            return False
        for _ in portion:
            entries.popleft()
        return True

    def wait(self, seconds: float) -> None:
        """Return when enough waits, see `reconfigure`, when somebody calls `wake`, or after `seconds`."""
        if len(self) >= self._wake_entries:
            return
        try:
            self._wake.get(timeout=max(seconds, 0.0))
        except Empty:
            return

    def wake(self) -> None:
        """End a `wait` now. Any thread may call it."""
        if self._wake.empty():
            self._wake.put(None)

"""What waits between the proxy's thread and the writer's, bounded in entries and bytes; no locks, no I/O."""

from __future__ import annotations

from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .exchange import Exchange
    from .gaps import Reason
    from .settings import BufferSettings

_MAX_DROPS = 16_384  # times kept until the writer asks for them


class Buffer:
    """One thread puts, one takes; neither waits for the other.

    Each counter is written by one thread only and never goes down, so that no lock is needed:
    `seen`, `dropped` and `bytes_in` belong to the thread that puts, `taken` and `bytes_out` to the
    one that takes.
    """

    def __init__(self, bounds: BufferSettings, wake_entries: int) -> None:
        """`wake_entries` waiting entries wake a taker at once."""
        self.bounds = bounds
        self.wake_entries = wake_entries
        self.seen = 0
        self.dropped = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.unplaced_drops = 0  # of `dropped`, those whose times are not kept
        self._drops: deque[tuple[Reason, float]] = deque()
        self._entries: deque[Exchange] = deque()
        # SimpleQueue.put neither blocks nor takes a lock that a taker holds (Python docs, queue).
        self._wake: SimpleQueue[None] = SimpleQueue()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, exchange: Exchange) -> bool:
        """Append, or drop and count when full; False if dropped. Never blocks, never raises."""
        self.seen += 1
        entries, size = self._entries, exchange.size
        if not self.has_room(size):
            # The newest goes, not the oldest: what is already in line keeps its place.
            self._drop("buffer_full", exchange.started_at)
            return False
        self.bytes_in += size
        entries.append(exchange)
        if len(entries) >= self.wake_entries and self._wake.empty():
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
            len(self._entries) < self.bounds.max_entries
            and self.bytes_in - self.bytes_out + size <= self.bounds.max_bytes
        )

    def take(self, limit: int) -> list[Exchange]:
        """The oldest entries, in order, at most `limit`; empty if none wait."""
        entries = self._entries
        batch = [entries.popleft() for _ in range(min(limit, len(entries)))]
        self.bytes_out += sum(exchange.size for exchange in batch)
        return batch

    def wait(self, seconds: float) -> None:
        """Return when `wake_entries` wait, when somebody calls `wake`, or after `seconds`."""
        if len(self._entries) >= self.wake_entries:
            return
        try:
            self._wake.get(timeout=max(seconds, 0.0))
        except Empty:
            return

    def wake(self) -> None:
        """End a `wait` now. Any thread may call it."""
        if self._wake.empty():
            self._wake.put(None)

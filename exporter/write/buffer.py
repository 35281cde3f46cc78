"""The bounded queue between the event loop and the writer thread. No locks, no I/O."""

from __future__ import annotations

from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from .compact_queue import CompactQueue
from .encoding import memory_bytes

if TYPE_CHECKING:
    from ..settings import BufferSettings
    from .encoding import Encoded
    from .gaps import Reason

# The writer wakes when 1/2 of max_entries or 1/4 of max_bytes wait, even if that is less than a batch.
_WAKE_ENTRIES_SHARE, _WAKE_BYTES_SHARE = 2, 4
_TAKEN_BYTES_SHARE = 16  # one `take` returns at most 1/16 of max_bytes: it still uses memory
# One step of `compact`, about 0.2 ms.
_COMPACT_ENTRIES = 128
_COMPACT_BYTES = 256 * 1024
_MAX_DROPS = 16_384  # drop times kept until the writer takes them


class Buffer:
    """A queue for one producer thread and one consumer thread; neither waits for the other.

    It needs no lock, because each counter is written by one thread only and never goes down: `seen`,
    `dropped` and `bytes_in` by the producer, `taken` and `bytes_out` by the consumer.
    """

    def __init__(self, bounds: BufferSettings, wake_entries: int) -> None:
        """See `reconfigure`."""
        self.reconfigure(bounds, wake_entries)
        self.seen = 0
        self.dropped = 0
        self.bytes_in = 0
        self.taken = 0
        self.bytes_out = 0
        self.unplaced_drops = 0  # drops whose times are not kept, or are none
        self._drops: deque[tuple[Reason, float]] = deque()
        # Oldest first: one decompacted batch, the compacted ones, the newest entries.
        self._expanded: deque[Encoded] = deque()
        self._compacted = CompactQueue()
        self._entries: deque[Encoded] = deque()
        # SimpleQueue.put neither blocks nor takes a lock that a taker holds (Python docs, queue).
        self._wake: SimpleQueue[None] = SimpleQueue()

    def __len__(self) -> int:
        return self.seen - self.dropped - self.taken

    @property
    def bytes(self) -> int:
        """Bytes in use. Any thread may ask."""
        bytes_out = self.bytes_out  # read first: both only grow, so the result is never negative
        return self.bytes_in - bytes_out

    def reconfigure(self, bounds: BufferSettings, wake_entries: int) -> None:
        """Use these bounds. The consumer wakes when `wake_entries` wait, or earlier in a small buffer."""
        self.bounds = bounds
        self._wake_entries = max(1, min(wake_entries, bounds.max_entries // _WAKE_ENTRIES_SHARE))
        self._wake_bytes = bounds.max_bytes // _WAKE_BYTES_SHARE
        self._taken_bytes = bounds.max_bytes // _TAKEN_BYTES_SHARE

    def put(self, encoded: Encoded, started_at: float, *, needs_body: bool = True) -> bool:
        """Append, or drop and count when full; False if dropped. Never blocks, never raises.

        `started_at`: epoch seconds. A body that is not needed may take half of what is free, so that the
        entries after it find room; a larger one is left out.
        """
        payload, body = encoded
        if body is not None and not needs_body and not self.has_room(2 * len(body)):
            encoded = payload, None
        entries, size = self._entries, memory_bytes(encoded)
        if not self.has_room(size):
            # Drop the newest entry, not the oldest: waiting entries keep their place.
            self.seen += 1
            self._drop("buffer_full", started_at)
            return False
        self.seen += 1
        self.bytes_in += size
        entries.append(encoded)
        if (
            len(entries) >= self._wake_entries or self.bytes_in - self.bytes_out >= self._wake_bytes
        ) and self._wake.empty():
            self._wake.put(None)
        return True

    def count_unreadable(self, started_at: float) -> None:
        """Count a flow that could not be read: seen, and lost."""
        self.seen += 1
        self._drop("unreadable", started_at)

    def take_drops(self) -> list[tuple[Reason, float]]:
        """Reason and time (epoch seconds) of each drop since the last call."""
        return [self._drops.popleft() for _ in range(len(self._drops))]

    def _drop(self, reason: Reason, started_at: float) -> None:
        self.dropped += 1
        if len(self._drops) < _MAX_DROPS and isinstance(started_at, int | float):
            self._drops.append((reason, started_at))
        else:
            self.unplaced_drops += 1

    def has_room(self, size: int) -> bool:
        """Whether an entry of `size` bytes would be accepted."""
        return (
            self.seen - self.dropped - self.taken < self.bounds.max_entries
            and self.bytes_in - self.bytes_out + size <= self.bounds.max_bytes
        )

    def take(self, limit: int) -> list[Encoded]:
        """Remove and return the oldest entries: at most `limit`, fewer if they are large."""
        batch: list[Encoded] = []
        size = 0
        while len(batch) < limit and size < self._taken_bytes and (oldest := self._oldest()):
            encoded = oldest.popleft()
            batch.append(encoded)
            size += memory_bytes(encoded)
        self.taken += len(batch)
        self.bytes_out += size
        return batch

    def sample(self, count: int) -> list[Encoded]:
        """Some entries, among them the newest, without their bodies. At most three times `count`.

        They stay here. For the consumer.
        """
        newest = [self._entries[-1 - i] for i in range(min(count, len(self._entries)))]
        return [(payload, None) for payload, _ in newest] + self._compacted.sample(count)

    def _oldest(self) -> deque[Encoded]:
        if not self._expanded and self._compacted:
            self._expanded.extend(self._compacted.popleft())
        return self._expanded or self._entries

    def compact(self) -> bool:
        """Compact some waiting entries; False if there is nothing more to compact.

        For the consumer, while it cannot deliver. See CompactQueue for the reason.
        """
        entries = self._entries
        portion: list[Encoded] = []
        size = 0
        while len(portion) < _COMPACT_ENTRIES and size < _COMPACT_BYTES:
            if len(portion) == len(entries):
                return False
            portion.append(entries[len(portion)])
            size += len(portion[-1][0])
        try:
            self._compacted.append(portion)
        except OSError:  # no memory map; the entries stay as they are
            return False
        for _ in portion:
            entries.popleft()
        return True

    def wait(self, seconds: float) -> bool:
        """Wait until enough entries wait (see `reconfigure`) or `wake`; False: not within `seconds`."""
        if len(self) >= self._wake_entries:
            return True
        try:
            self._wake.get(timeout=max(seconds, 0.0))
        except Empty:
            return False
        return True

    def wake(self) -> None:
        """End a `wait` now. Thread-safe."""
        if self._wake.empty():
            self._wake.put(None)

"""Take exchanges from the buffer and build them into batches, one batch ahead of the writer.

While PostgreSQL is slow, what arrives goes to disk, so that memory and journal do not fill up.
"""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING

from ..gil import yielding_gil
from ..rows.text import timestamp
from .encoding import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..rows.entry import AccessLogEntry
    from ..settings import BatchSettings
    from .buffer import Buffer
    from .build import PendingRows, RowBuilder
    from .encoding import Encoded
    from .progress import Progress
    from .spool import Spool

_SPOOL_AFTER_SECONDS = 0.5  # a call to PostgreSQL that takes longer is slow
_SAMPLE_ENTRIES = 8


class State(enum.Enum):
    """What is between the buffer and the writer. docs/architecture.md draws the transitions."""

    EMPTY = enum.auto()
    BUILDING = enum.auto()  # a batch is being built
    READY = enum.auto()  # a batch is built, and the disk did not take it


class Intake:
    """Holds at most one batch that the writer has not taken. Only the writer thread uses it."""

    def __init__(
        self,
        buffer: Buffer,
        builder: RowBuilder,
        spool: Spool,
        progress: Progress,
        batch: BatchSettings,
    ) -> None:
        self.batch = batch  # settings; may be replaced at any time
        self._buffer = buffer
        self._builder = builder
        self._spool = spool
        self._progress = progress
        self._pending: PendingRows | None = None
        self._ready: Sequence[AccessLogEntry] = ()
        self._held = 0  # exchanges that the pending or ready batch was built of
        self._call_started_at = 0.0  # monotonic seconds

    @property
    def state(self) -> State:
        """See `State`."""
        if self._ready:
            return State.READY
        return State.BUILDING if self._pending is not None else State.EMPTY

    @property
    def held(self) -> int:
        """Exchanges that were taken from the buffer and are neither on disk nor with the writer."""
        return self._held if self.state is not State.EMPTY else 0

    def wait(self, seconds: float) -> bool:
        """Wait until a batch is complete or somebody wakes the buffer; False: not within `seconds`."""
        return self.state is not State.EMPTY or self._buffer.wait(seconds)

    def next_batch(self) -> Sequence[AccessLogEntry]:
        """The next batch, oldest entries first; empty if nothing waits."""
        if self.state is State.READY:
            batch, self._ready = self._ready, ()
            return batch
        if self.state is State.EMPTY:
            self._start_building()
        return self._finish_building()

    def call_started(self) -> None:
        """The writer is about to call PostgreSQL; build the next batch during the call."""
        self._call_started_at = time.monotonic()
        if self.state is State.EMPTY and len(self._buffer) >= self.batch.max_entries:
            self._start_building()

    def during_call(self) -> None:
        """Called several times a second during a call: if it is slow, move what arrives to disk."""
        elapsed = time.monotonic() - self._call_started_at
        if elapsed < _SPOOL_AFTER_SECONDS:
            return
        is_overdue = elapsed >= self.batch.max_seconds
        enough = 1 if is_overdue else self.batch.max_entries
        while self.state is not State.EMPTY or len(self._buffer) >= enough:
            batch = self.next_batch()
            if batch and not self._spool.append(batch):
                self._ready = batch
                break
        if is_overdue:
            self._call_started_at = time.monotonic()
        self.compact()

    def compact(self) -> None:
        """Compact what stays in memory, in steps that let the event loop run."""
        for _ in yielding_gil(iter(self._buffer.compact, False)):
            pass

    def sample(self) -> Sequence[AccessLogEntry]:
        """Some of the entries that wait in the buffer, as they will be. They stay there."""
        return self._builder.preview(self._buffer.sample(_SAMPLE_ENTRIES))

    def discard(self) -> list[str]:
        """Drop everything, for a stop that is out of time; started_at of each entry dropped."""
        starts = [entry.started_at for entry in self._ready]
        exchanges: list[Encoded] = []
        if self._pending is not None:
            exchanges += self._pending.exchanges
        while taken := self._buffer.take(len(self._buffer)):
            exchanges += taken
        self._ready, self._pending = (), None
        self._builder.close()
        return [*starts, *map(_started_at, exchanges)]

    def _start_building(self) -> None:
        exchanges = self._buffer.take(self.batch.max_entries)
        self._held = len(exchanges)
        if exchanges:
            self._pending = self._builder.build(exchanges)

    def _finish_building(self) -> Sequence[AccessLogEntry]:
        if self._pending is None:
            return ()
        entries, unreadable = self._pending.result()
        self._pending = None
        self._progress.count_unreadable(unreadable)
        return entries


def _started_at(encoded: Encoded) -> str:
    """When this exchange started; now if it cannot be read, because it is lost and counts all the same."""
    try:
        return timestamp(decode(encoded).started_at)
    except Exception:  # noqa: BLE001 - as in build_rows
        return timestamp(time.time())

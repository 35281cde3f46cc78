"""What became of the entries: counters, gaps to be written, and one log message per kind of trouble."""

from __future__ import annotations

import contextlib
import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..rows.text import timestamp
from .gaps import UnwrittenGaps
from .histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..rows.entry import AccessLogEntry
    from .buffer import Buffer
    from .database import Rejection
    from .gaps import Reason
    from .ledger import RunLedger
    from .worker import BuildFailure

logger = logging.getLogger(__name__)

# Upper bounds of the ranges of the histograms; batch.max_entries is at most 10,000.
_BATCH_ROWS = (1, 4, 16, 64, 128, 256, 1024, 4096, 10_000)
_BATCH_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Progress:
    """Counters never go down. Only the writer thread calls methods; any thread may read counters."""

    def __init__(self, ledger: RunLedger) -> None:
        """`ledger` knows the node and the run, which are written into gaps."""
        self._ledger = ledger
        self.written = 0
        self.rejected = 0
        self.dropped = 0  # neither PostgreSQL nor the disk took them in time
        self.recovered = 0  # written for earlier runs
        self.retries = 0
        self.failures = 0  # unexpected exceptions
        self.batch_rows = Histogram(_BATCH_ROWS)
        self.batch_seconds = Histogram(_BATCH_SECONDS)
        self.last_written_at: str | None = None  # ISO 8601, UTC
        self.last_error: str | None = None  # of an outage only until it is over
        self.last_error_at: str | None = None  # ISO 8601, UTC
        self.gaps = UnwrittenGaps()
        self.drops = 0  # of the buffer, that are in `gaps` or were
        self._unplaced_drops_seen = 0
        self._spool_losses_seen = 0
        self._reported: set[str] = set()  # kinds of trouble that have been logged

    @property
    def all_written(self) -> int:
        """Entries written by this process, for this run and for earlier ones."""
        return self.written + self.recovered

    def count_written(
        self,
        entries: Sequence[AccessLogEntry],
        rejections: Sequence[Rejection],
        origin: str | None = None,
    ) -> None:
        """PostgreSQL has these entries, except the rejected ones. `origin`: the earlier run that saw them."""
        if origin is not None:
            self.recovered += len(entries) - len(rejections)
        else:
            self.written += len(entries) - len(rejections)
            self.rejected += len(rejections)
        self.last_written_at = _now()
        for rejection in rejections:
            self._add_gap(
                "rejected", rejection.entry.started_at, node=rejection.entry.node, run=origin
            )
            self._report_rejection(rejection)

    def count_batch(self, rows: int, seconds: float) -> None:
        """PostgreSQL took a batch of as many rows, within this time."""
        self.batch_rows.add(rows)
        self.batch_seconds.add(seconds)

    def count_recovered(self, entries: int, rejections: Sequence[Rejection]) -> None:
        """PostgreSQL has these entries of a killed run, except the rejected ones, or had them already."""
        self.recovered += entries - len(rejections)
        self.last_written_at = _now()
        for rejection in rejections:
            self._report_rejection(rejection)

    def count_unreadable(self, failures: Iterable[BuildFailure]) -> None:
        """No row could be built of as many exchanges."""
        for failure in failures:
            self.count_failure(failure)
            self.rejected += 1
            self._add_gap("unreadable", timestamp(time.time()))

    def count_drops(self, buffer: Buffer) -> None:
        """Turn the drops that the buffer counted since the last call into gaps."""
        for reason, started_at in buffer.take_drops():
            self._add_gap(reason, timestamp(started_at))
            self.drops += 1
        unplaced = buffer.unplaced_drops - self._unplaced_drops_seen
        if unplaced:
            self._unplaced_drops_seen += unplaced
            self._add_gap("buffer_full", timestamp(time.time()), unplaced)
            self.drops += unplaced

    def count_spool_losses(self, lost: int) -> None:
        """`lost`: entries of this run in damaged spool files, in total."""
        new = lost - self._spool_losses_seen
        if new:
            self._spool_losses_seen += new
            self.dropped += new
            self._add_gap("spool_damaged", timestamp(time.time()), new)

    def count_lost_at_stop(self, starts: Sequence[str]) -> None:
        """`starts`: started_at of the entries that the stop had no time and no space for."""
        if starts:  # at once, because there is no time left
            self._add_gap("shutdown", min(starts), len(starts))
            self._add_gap("shutdown", max(starts), 0)
            self.dropped += len(starts)

    def _add_gap(
        self,
        reason: Reason,
        started_at: str,
        entries: int = 1,
        *,
        node: str | None = None,
        run: str | None = None,
    ) -> None:
        this_run = self._ledger.run
        self.gaps.add(node or this_run.node, reason, started_at, entries, run or this_run.run_id)

    def count_refused_gaps(self, reason: str) -> None:
        """PostgreSQL rejects the gaps. They wait."""
        self.retries += 1
        self.set_error(reason)
        if self._is_new(f"gaps {reason}"):
            logger.warning(
                "artifactapi: PostgreSQL rejects the gaps, which wait; the log goes on: %s", reason
            )

    def set_error(self, error: str | None) -> None:
        """Set or clear the error that the status shows."""
        self.last_error, self.last_error_at = error, error and _now()

    def count_failure(self, failure: BuildFailure) -> None:
        """An unexpected exception. Logged once per kind."""
        self.failures += 1
        self.set_error(f"{failure.kind} in the writer")
        if self._is_new(f"failure {failure.kind}"):
            with contextlib.suppress(BaseException):  # a logging handler that fails must not matter
                logger.warning("artifactapi: internal error; the log goes on.\n%s", failure.trace)

    def _report_rejection(self, rejection: Rejection) -> None:
        self.set_error(rejection.reason)
        if self._is_new(f"rejection {rejection.sqlstate}"):
            logger.warning(
                "artifactapi: PostgreSQL rejected a row; it is recorded as a gap, and more of this kind are "
                "only counted: %s; flow %s of %s",
                rejection.reason,
                rejection.entry.flow_id,
                rejection.entry.started_at,
            )

    def _is_new(self, kind: str) -> bool:
        is_new = kind not in self._reported
        self._reported.add(kind)
        return is_new


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

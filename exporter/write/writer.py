"""The background writer: take what waits, have rows made of it, deliver them; the only thread we start.

Decides when to write and when to try again. What an error means is the database's to say.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..postgres.connection import Deadline
from ..rows.entry import timestamp
from ..settings import data_folder
from .builder import BatchBuilder
from .database import Database, DatabaseUnavailable
from .gaps import Gaps
from .gil import yielding_gil
from .spool import Spool
from .worker import BuildFailure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..rows.entry import AccessLogEntry
    from ..settings import DatabaseSettings, Settings
    from .buffer import Buffer
    from .database import Rejection

logger = logging.getLogger(__name__)

THREAD_NAME = "artifactapi-writer"
_SUMMARY_SECONDS = 60.0  # how often an outage is mentioned again
_CONFIGURATION_RETRY_SECONDS = 15.0  # what only the user can mend is not asked for more often
_PAUSE_AT_STOP_SECONDS = 0.1  # the last attempts come closer together
_SPOOL_SHARE = 0.25  # of the time to stop: for bringing to disk what Postgres did not take
_MEANWHILE_SECONDS = 0.5  # what comes while Postgres is slow is left in memory for so long
_PACK_SECONDS = 0.2  # what comes in a pause lies loose for so long
_REPLAY_BATCHES = 100  # brought home between two batches of today
_JOIN_SECONDS = 1.0  # what the thread gets to notice that its time is up


@dataclass
class Progress:
    """What the writer has done; written by its thread only, the counters never go down."""

    written: int = 0
    rejected: int = 0
    dropped: int = 0  # neither Postgres nor the disk would take them in time
    recovered: int = 0  # written for runs before this one
    retries: int = 0
    failures: int = 0  # exceptions nobody thought of
    last_written_at: str | None = None
    last_error: str | None = None


class Writer:
    """Owns one thread, running from the start, and within it one connection; nothing else touches either."""

    def __init__(self, settings: Settings, buffer: Buffer) -> None:
        self.progress = Progress()
        self.spool = Spool(data_folder() / "spool", settings.spool.max_bytes)
        self._buffer = buffer
        self._settings = settings
        self._in_force = settings  # what the thread works by; it looks for others between attempts
        deadline = Deadline(self._meanwhile)
        self.builder = BatchBuilder(settings, deadline)
        self._database = Database(settings.database, deadline)
        self._gaps = Gaps()
        self._in_hand: Sequence[AccessLogEntry] = ()  # ready, and not yet anywhere else
        self._next_in_hand: Sequence[AccessLogEntry] = ()  # the same, of the batch after that
        self._asked_at = 0.0  # when Postgres was last asked for something
        self._unplaced_drops = 0
        self._spool_lost = 0
        self._replaying = False  # more waits in the spool than was brought home
        self._outage = Outage()
        self._retry_at = 0.0
        self._pauses = retry_delays(settings.database)
        self._kinds_rejected: set[str] = set()
        self._kinds_failed: set[str] = set()
        self._stopping = False
        self._stop_by = float("inf")  # monotonic seconds: then what is left in memory is given up
        self._gave_up = False  # the last attempt before the end has failed
        self._interrupt = threading.Event()  # ends a pause: a stop, or other settings
        self._thread = self._start()

    def reconfigure(self, settings: Settings) -> None:
        """Go on with other settings from the next attempt; what waits goes to the new database."""
        self._settings = settings
        self._interrupt.set()
        self._buffer.wake()

    def revive(self) -> None:
        """Start the thread again should it be gone. Called from the thread that puts."""
        if not self._thread.is_alive() and not self._stopping:
            self.progress.failures += 1
            self._thread = self._start()

    @property
    def is_unavailable(self) -> bool:
        """Whether the last attempt to reach Postgres failed."""
        return bool(self._outage)

    def stop(self, drain_seconds: float) -> bool:
        """Write what is left, for at most `drain_seconds` and one more. True if nothing was lost.

        Idempotent. What Postgres does not take in time goes to the spool, and what the spool does
        not take is counted as dropped.
        """
        stop_by = time.monotonic() + drain_seconds
        deadline = self._database.deadline
        share = drain_seconds * _SPOOL_SHARE
        deadline.give_up_at = min(deadline.give_up_at, stop_by - share)
        self._stop_by = min(self._stop_by, stop_by)
        self._stopping = True
        self._interrupt.set()
        self._buffer.wake()
        self._thread.join(stop_by + _JOIN_SECONDS - time.monotonic())
        return not self._thread.is_alive() and self.progress.dropped == 0

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        pause = retry_delays(self._in_force.database)
        while True:
            try:
                self._work()
                break
            except BaseException as e:  # noqa: BLE001 - whatever it was, the log must go on
                self._count_failure(BuildFailure.of(e))
                self._database.disconnect()  # whatever was under way on it
                self._pause(next(pause))
        self.builder.close()
        self._database.close()
        self.spool.close()

    def _work(self) -> None:
        self._open()
        while True:
            last = self._stopping and not len(self._buffer)
            self._adopt_settings()
            self._take()
            self._collect_drops()
            if self._is_due():
                self._deliver()
            if self._in_hand or self._outage:
                self._put_aside()
            if last and not (self._in_hand or self._next_in_hand or self.builder.is_busy):
                return

    def _open(self) -> None:
        """Look for Postgres before there is anything to write, so that trouble shows at the start."""
        self._asked_at = time.monotonic()
        self.builder.start()
        self._gaps.adopt(self.spool.inherited_gaps())
        try:
            self._database.open()
        except DatabaseUnavailable as away:
            self._count_unavailable(away)

    def _adopt_settings(self) -> None:
        if self._settings is not self._in_force:
            self._in_force = self._settings
            self._database.reconfigure(self._in_force.database)
            self.spool.reconfigure(self._in_force.spool.max_bytes)
            self._pauses, self._retry_at = retry_delays(self._in_force.database), 0.0
            self.builder.reconfigure(self._in_force)  # last: its files may be wrong by now

    def _take(self) -> None:
        """Have a batch in hand; wait for one no longer than one may, or than the next attempt is due."""
        if self._in_hand:
            return
        is_waited_for = self._stopping or self._replaying
        if not (is_waited_for or self._next_in_hand or self.builder.is_busy):
            longest = self._in_force.batch.max_seconds
            until_retry = self._retry_at - time.monotonic() if self._outage else longest
            self._buffer.wait(min(longest, until_retry))
        self._in_hand, self._next_in_hand = self._next_in_hand or self._build(), ()

    def _begin(self) -> None:
        taken = self._buffer.take(self._in_force.batch.max_entries)
        if taken:
            self.builder.begin(taken)

    def _build(self) -> Sequence[AccessLogEntry]:
        """The next batch; empty if nothing waits."""
        if not self.builder.is_busy:
            self._begin()
        entries, unreadable = self.builder.finish()
        for failure in unreadable:
            self._count_failure(failure)
            self.progress.rejected += 1
            self._gaps.add(self._in_force.node_name, "unreadable", timestamp(time.time()))
        return entries

    def _meanwhile(self) -> None:
        """Called while Postgres is waited for."""
        is_idle = not (self.builder.is_busy or self._next_in_hand)
        if is_idle and len(self._buffer) >= self._in_force.batch.max_entries:
            self._begin()  # the next batch is built while Postgres is busy with this one
        self._spool_late()

    def _spool_late(self) -> None:
        """What comes while Postgres is slow must not wait in memory.

        So a proxy that is killed loses no more than it would if Postgres answered at once.
        """
        waited = time.monotonic() - self._asked_at
        if waited < _MEANWHILE_SECONDS:
            return
        batch = self._in_force.batch
        enough = 1 if waited >= batch.max_seconds else batch.max_entries
        while self._next_in_hand or self.builder.is_busy or len(self._buffer) >= enough:
            entries = self._next_in_hand or self._build()
            if entries and not self.spool.append(entries):
                self._next_in_hand = entries
                break
            self._next_in_hand = ()
        if enough == 1:
            self._asked_at = time.monotonic()
        self._pack()  # what the disk does not take

    def _collect_drops(self) -> None:
        """What the proxy's thread had to drop becomes gaps."""
        node = self._in_force.node_name
        for reason, started_at in self._buffer.take_drops():
            self._gaps.add(node, reason, timestamp(started_at))
        unplaced = self._buffer.unplaced_drops - self._unplaced_drops
        if unplaced:
            self._unplaced_drops += unplaced
            self._gaps.add(node, "buffer_full", timestamp(time.time()), unplaced)
        damaged = self.spool.lost - self._spool_lost
        if damaged:
            self._spool_lost += damaged
            self.progress.dropped += damaged
            self._gaps.add(node, "spool_damaged", timestamp(time.time()), damaged)

    def _is_due(self) -> bool:
        """Whether to ask Postgres now; at a stop once more, whatever pause there was."""
        now = time.monotonic()
        if self._stopping:
            return not self._gave_up and now < self._database.deadline.give_up_at
        return now >= self._retry_at

    def _deliver(self) -> None:
        """Write what the spool holds, what is in hand, and the gaps; or note that Postgres is away."""
        self._asked_at = time.monotonic()
        try:
            if self._outage:
                self._database.open()  # only who answers is back
            if self._stopping:  # what is on disk is safe there
                self._write_in_hand()
                self._write_gaps()
                self._replay(batches=None)
            else:
                self._replay(batches=_REPLAY_BATCHES)
                self._write_in_hand()
                self._write_gaps()
        except DatabaseUnavailable as away:
            self._count_unavailable(away)
        else:
            self._outage.end(self.progress.written + self.progress.recovered)
            self._pauses, self._retry_at = retry_delays(self._in_force.database), 0.0
            self._replaying = not self.spool.settle()

    def _write_in_hand(self) -> None:
        if self._in_hand:
            rejected = self._database.write(self._in_hand)
            entries, self._in_hand = self._in_hand, ()
            self._count_written(entries, rejected)

    def _write_gaps(self) -> None:
        if self._gaps:
            gaps = self._gaps.offer()
            self._database.write_gaps(gaps)
            self._gaps.settle(gaps)

    def _replay(self, batches: int | None) -> None:
        """Bring home so many batches of the spool, or all of them while there is time."""
        for _ in itertools.count() if batches is None else range(batches):
            batch = self.spool.oldest()
            if batch is None or time.monotonic() >= self._database.deadline.give_up_at:
                break
            self._asked_at = time.monotonic()
            rejected = self._database.write(batch.entries)
            own = self.spool.remove(batch)
            self._count_written(batch.entries, rejected, own=own)

    def _put_aside(self) -> None:
        """Keep on disk what Postgres does not take; without room there it stays in memory, to the end."""
        if self._gaps.changed:
            self.spool.keep_gaps(self._gaps.pending())
            self._gaps.changed = False
        if not self._in_hand:
            return
        if self.spool.append(self._in_hand):
            self._in_hand = ()
            if time.monotonic() >= self._stop_by:
                self._give_up()
        elif not self._stopping:
            self._pause(self._retry_at - time.monotonic())
        elif time.monotonic() < self._database.deadline.give_up_at:
            self._gave_up = False
            self._pause(_PAUSE_AT_STOP_SECONDS)
        else:
            self._give_up()

    def _give_up(self) -> None:
        """The time to stop is over: all that is left is lost, and counted."""
        entries = [*self._in_hand, *self._next_in_hand]
        self._in_hand, self._next_in_hand = (), ()
        exchanges = self.builder.abandon()
        while taken := self._buffer.take(len(self._buffer)):
            exchanges += taken
        starts = [entry.started_at for entry in entries]
        starts += [timestamp(exchange.started_at) for exchange in exchanges]
        for started_at in starts:
            self._gaps.add(self._in_force.node_name, "shutdown", started_at)
        self.progress.dropped += len(starts)
        self.spool.keep_gaps(self._gaps.pending())

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._interrupt.wait(min(left, _PACK_SECONDS)):
                break
            self._pack()
        self._interrupt.clear()

    def _pack(self) -> None:
        for _ in yielding_gil(iter(self._buffer.compact, False)):
            pass

    def _count_written(
        self, entries: Sequence[AccessLogEntry], rejected: Sequence[Rejection], *, own: bool = True
    ) -> None:
        if own:
            self.progress.written += len(entries) - len(rejected)
            self.progress.rejected += len(rejected)
        else:
            self.progress.recovered += len(entries) - len(rejected)
        self.progress.last_written_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        for rejection in rejected:
            self._gaps.add(rejection.entry.node, "rejected", rejection.entry.started_at)
            self._report_rejection(rejection)

    def _count_unavailable(self, away: DatabaseUnavailable) -> None:
        self.progress.retries += 1
        self.progress.last_error = str(away)
        self._gave_up = self._stopping
        pause = _CONFIGURATION_RETRY_SECONDS if away.configuration else next(self._pauses)
        self._retry_at = time.monotonic() + pause
        waiting = len(self._in_hand) + len(self._buffer) + self.spool.entries
        self._outage.go_on(str(away), waiting, refuses=away.configuration)

    def _count_failure(self, failure: BuildFailure) -> None:
        """Said once for each kind; a logging handler that fails too must not matter."""
        self.progress.failures += 1
        self.progress.last_error = f"{failure.kind} in the writer"
        if failure.kind not in self._kinds_failed:
            self._kinds_failed.add(failure.kind)
            with contextlib.suppress(BaseException):
                logger.warning("The access log writer failed and goes on.\n%s", failure.trace)

    def _report_rejection(self, rejection: Rejection) -> None:
        self.progress.last_error = rejection.reason
        if rejection.sqlstate not in self._kinds_rejected:
            self._kinds_rejected.add(rejection.sqlstate)
            logger.warning(
                "Postgres refuses an access log entry and will not be asked again: %s; "
                "flow %s of %s. More of this kind are counted, not reported.",
                rejection.reason,
                rejection.entry.flow_id,
                rejection.entry.started_at,
            )


class Outage:
    """Says that Postgres is away: once when it goes, once a minute, once when it is back."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._next_summary = 0.0
        self._written_before = 0

    def __bool__(self) -> bool:
        return self._since is not None

    def go_on(self, reason: str, waiting: int, *, refuses: bool = False) -> None:
        """An attempt failed. Never an ERROR: mitmproxy would exit for one at its start."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            what = "refuses the access log" if refuses else "is away"
            logger.warning("Postgres %s, access log entries wait: %s", what, reason)
        elif now >= self._next_summary:
            logger.warning(
                "Postgres has been away for %.0f s, %d access log entries wait: %s",
                now - self._since,
                waiting,
                reason,
            )
        else:
            return
        self._next_summary = now + _SUMMARY_SECONDS

    def end(self, written: int) -> None:
        """An attempt succeeded; `written` is all that ever was."""
        if self._since is not None:
            seconds, self._since = time.monotonic() - self._since, None
            saved = written - self._written_before
            logger.info(
                "Postgres is back after %.1f s, %d access log entries were saved.", seconds, saved
            )
        self._written_before = written


def retry_delays(settings: DatabaseSettings) -> Iterator[float]:
    """Seconds between attempts: doubling from the least to the most, each half fixed, half chance.

    The chance keeps many proxies from coming back in the same instant.
    """
    pause = settings.retry_min_seconds
    while True:
        yield pause / 2 + random.uniform(0, pause / 2)  # noqa: S311 - no secret
        pause = min(pause * 2, settings.retry_max_seconds)

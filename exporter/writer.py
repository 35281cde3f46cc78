"""The background writer: take what waits, make rows of it, deliver them; the only thread we start.

Decides when to write and when to try again. What an error means is the database's to say.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .database import Database, DatabaseAway
from .entry import EntryBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .buffer import Buffer
    from .database import Rejection
    from .entry import AccessLogEntry
    from .settings import DatabaseSettings, Settings

logger = logging.getLogger(__name__)

THREAD_NAME = "artifactapi-writer"
_SUMMARY_SECONDS = 60.0  # how often an outage is mentioned again
_CONFIGURATION_RETRY_SECONDS = 15.0  # what only the user can mend is not asked for more often
_PAUSE_AT_STOP_SECONDS = 0.5  # the last attempts come closer together
_JOIN_SECONDS = 1.0  # what the thread gets to notice that its time is up


@dataclass
class Progress:
    """What the writer has done; written by its thread only, the counters never go down."""

    written: int = 0
    rejected: int = 0
    lost: int = 0  # given up at a stop
    retries: int = 0
    failures: int = 0  # exceptions nobody thought of
    last_written_at: str | None = None
    last_error: str | None = None


class Writer:
    """Owns one thread, running from the start, and within it one connection; nothing else touches either."""

    def __init__(self, settings: Settings, buffer: Buffer) -> None:
        self.progress = Progress()
        self._buffer = buffer
        self._settings = settings
        self._in_force = settings  # what the thread works by; it looks for others between attempts
        self._builder = EntryBuilder(settings)
        self._database = Database(settings.database)
        self._in_hand: list[AccessLogEntry] = []  # taken from the buffer, not yet delivered
        self._outage = Outage()
        self._kinds_rejected: set[str] = set()
        self._stopping = False
        self._stop_at = float("inf")
        self._interrupt = threading.Event()  # ends a pause: a stop, or other settings
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def use(self, settings: Settings) -> None:
        """Go on with other settings from the next attempt; what waits goes to the new database."""
        self._settings = settings
        self._interrupt.set()
        self._buffer.wake()

    def stop(self, drain_seconds: float) -> bool:
        """Write what is left, for at most `drain_seconds` and one more. True if that was everything.

        Idempotent. What could not be written is counted as lost.
        """
        self._stop_at = min(self._stop_at, time.monotonic() + drain_seconds)
        self._database.give_up_at = self._stop_at
        self._stopping = True
        self._interrupt.set()
        self._buffer.wake()
        self._thread.join(drain_seconds + _JOIN_SECONDS)
        return not self._thread.is_alive() and self.progress.lost == 0

    def _run(self) -> None:
        while True:
            try:
                self._work()
                break
            except BaseException as e:  # noqa: BLE001 - whatever it was, the log must go on
                self.progress.failures += 1
                _log_failure(e)
                self._pause(self._in_force.database.retry_min_seconds)
        self._database.close()

    def _work(self) -> None:
        if not self._in_hand:
            self._open()
        while True:
            self._adopt_settings()
            if not self._in_hand:
                if not self._stopping:
                    self._buffer.wait(self._in_force.batch.max_seconds)
                exchanges = self._buffer.take(self._in_force.batch.max_entries)
                self._in_hand = [self._builder.build(exchange) for exchange in exchanges]
            if self._in_hand:
                self._deliver()
            elif self._stopping:
                return

    def _open(self) -> None:
        """Look for Postgres before there is anything to write, so that trouble shows at the start."""
        try:
            self._database.open()
        except DatabaseAway as away:
            self._count_away(away)

    def _deliver(self) -> None:
        """Write what is in hand, however often it takes, until the time to stop has come."""
        for pause in pauses(self._in_force.database):
            if time.monotonic() >= self._stop_at:
                self.progress.lost += len(self._in_hand)
                self._in_hand = []
                return
            try:
                rejected = self._database.write(self._in_hand)
            except DatabaseAway as away:
                self._count_away(away)
                self._pause(_CONFIGURATION_RETRY_SECONDS if away.configuration else pause)
                self._adopt_settings()
            else:
                self._count_written(rejected)
                return

    def _adopt_settings(self) -> None:
        if self._settings is not self._in_force:
            self._in_force = self._settings
            self._builder = EntryBuilder(self._in_force)
            self._database.use(self._in_force.database)

    def _pause(self, seconds: float) -> None:
        if self._stopping:
            seconds = min(seconds, _PAUSE_AT_STOP_SECONDS, self._stop_at - time.monotonic())
        self._interrupt.wait(max(seconds, 0.0))
        self._interrupt.clear()

    def _count_written(self, rejected: Sequence[Rejection]) -> None:
        entries, self._in_hand = self._in_hand, []
        self.progress.written += len(entries) - len(rejected)
        self.progress.rejected += len(rejected)
        self.progress.last_written_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._outage.end(len(entries))
        for rejection in rejected:
            self._report_rejection(rejection)

    def _count_away(self, away: DatabaseAway) -> None:
        self.progress.retries += 1
        self.progress.last_error = str(away)
        self._outage.go_on(str(away), len(self._in_hand) + len(self._buffer))

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

    def go_on(self, reason: str, waiting: int) -> None:
        """An attempt failed. Never an ERROR: mitmproxy would exit for one at its start."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            logger.warning("Postgres is away, access log entries wait: %s", reason)
        elif now >= self._next_summary:
            seconds = now - self._since
            logger.warning(
                "Postgres has been away for %.0f s, %d access log entries wait: %s",
                seconds,
                waiting,
                reason,
            )
        else:
            return
        self._next_summary = now + _SUMMARY_SECONDS

    def end(self, written: int) -> None:
        """An attempt succeeded."""
        if self._since is not None:
            seconds, self._since = time.monotonic() - self._since, None
            logger.warning(
                "Postgres is back after %.1f s; the first %d entries that waited are written.",
                seconds,
                written,
            )


def pauses(settings: DatabaseSettings) -> Iterator[float]:
    """Seconds between attempts: doubling from the least to the most, each half fixed, half chance.

    The chance keeps many proxies from coming back in the same instant.
    """
    pause = settings.retry_min_seconds
    while True:
        yield pause / 2 + random.uniform(0, pause / 2)  # noqa: S311 - no secret
        pause = min(pause * 2, settings.retry_max_seconds)


def _log_failure(error: BaseException) -> None:
    """Report a bug of ours; a logging handler that fails too must not end the thread."""
    with contextlib.suppress(BaseException):
        logger.warning("The access log writer failed and goes on.", exc_info=error)

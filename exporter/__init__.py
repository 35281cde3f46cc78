"""The access log, from an exchange to its row in Postgres; knows nothing of mitmproxy."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from .exchange import RESPONSE_FIELDS, Exchange
from .postgres.dsn import check_dsn, has_password, public_name
from .rows.entry import AccessLogEntry
from .rows.entry_builder import load_remotes
from .settings import Settings, SettingsError, data_folder, load_settings, resolve_dsn
from .write.buffer import Buffer
from .write.database import insert_access_log_batch
from .write.writer import Writer

__all__ = [
    "RESPONSE_FIELDS",
    "AccessLogEntry",
    "Exchange",
    "Exporter",
    "Settings",
    "SettingsError",
    "check_dsn",
    "data_folder",
    "has_password",
    "insert_access_log_batch",
    "load_remotes",
    "load_settings",
    "resolve_dsn",
]

_WATCH_ENTRIES = 128  # how often the writer's thread is looked after
_ROOM_TICK_SECONDS = 0.01
_STANDSTILL_SECONDS = (
    60.0  # then the database is taken for gone, and entries are dropped and counted
)

# psycopg reports what we handle; mitmproxy would show every record of it.
logging.getLogger("psycopg").setLevel(logging.ERROR)


class Exporter:
    """The log of one proxy: existing means running, `stop` ends it.

    One thread calls `log_access`; everything else may be called from any.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._buffer = Buffer(settings.buffer, settings.batch.max_entries)
        self._writer = Writer(settings, self._buffer)

    def log_access(self, exchange: Exchange) -> bool:
        """Take in one exchange; False if it was dropped because the buffer is full. Never blocks."""
        if not self._buffer.seen % _WATCH_ENTRIES:
            self._writer.ensure_running()
        return self._buffer.put(exchange)

    def count_unreadable(self, started_at: float) -> None:
        """Say that an exchange took place of which nothing can be told; `started_at` in epoch seconds."""
        self._buffer.count_unreadable(started_at)

    def wait_for_room(self, size: int) -> bool:
        """Wait until an exchange of this size would be taken in; False if nothing moves any more.

        For whoever can afford it: reading old flows from a file. A proxied request never can.
        """
        pause = threading.Event()
        taken, since = self._buffer.bytes_out, time.monotonic()
        while not self._buffer.has_room(size):
            if self._buffer.bytes_out != taken:
                taken, since = self._buffer.bytes_out, time.monotonic()
            elif time.monotonic() - since > _STANDSTILL_SECONDS:
                return False
            self._buffer.wake()  # there may be room for less than a batch
            pause.wait(_ROOM_TICK_SECONDS)
        return True

    def reconfigure(self, settings: Settings) -> None:
        """Go on with other settings; what waits stays in line and goes where they say."""
        self._settings = settings
        self._buffer.reconfigure(settings.buffer, settings.batch.max_entries)
        self._writer.reconfigure(settings)

    def stop(self) -> bool:
        """Write what is left within `shutdown.drain_seconds` and one more; True if nothing was lost.

        Idempotent.
        """
        return self._writer.stop(self._settings.shutdown.drain_seconds)

    def status(self) -> dict[str, Any]:
        """Counters that never go down, and gauges.

        At every moment seen = written + dropped + rejected + waiting + spooled.
        """
        progress = self._writer.progress
        # What only grows is read before what it is a part of, so that `waiting` is never negative.
        written, rejected = progress.written, progress.rejected
        dropped = self._buffer.dropped + progress.dropped
        spooled = self._writer.spool.entries
        seen = self._buffer.seen
        return {
            "seen": seen,
            "written": written,
            "dropped": dropped,
            "rejected": rejected,
            "waiting": seen - written - dropped - rejected - spooled,
            "spooled": spooled,
            "recovered": progress.recovered,
            "retries": progress.retries,
            "failures": progress.failures + self._writer.builder.failures,
            "away": self._writer.is_unavailable,
            "last_error": progress.last_error,
            "last_written_at": progress.last_written_at,
            "database": self.database_name,
        }

    @property
    def database_name(self) -> str:
        """Where the rows go, fit to be shown: no password."""
        dsn = self._settings.database.dsn
        return public_name(dsn) if dsn else f"embedded PostgreSQL in {data_folder()}"

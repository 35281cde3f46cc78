"""The access log: from an exchange to its row in PostgreSQL. Knows nothing about mitmproxy."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from .exchange import RESPONSE_FIELDS, Exchange
from .postgres.dsn import check_dsn, has_password, public_name
from .retention.housekeeping import Housekeeping
from .rows.entry import AccessLogEntry
from .rows.entry_builder import load_remotes
from .run import Run
from .settings import Settings, SettingsError, data_folder, load_settings, resolve_dsn
from .write import spool
from .write.buffer import Buffer
from .write.database import insert_access_log_batch
from .write.spool import WaitingRows
from .write.writer import Writer, spool_database

__all__ = [
    "RESPONSE_FIELDS",
    "AccessLogEntry",
    "Exchange",
    "Exporter",
    "Settings",
    "SettingsError",
    "WaitingRows",
    "check_dsn",
    "data_folder",
    "has_password",
    "insert_access_log_batch",
    "load_remotes",
    "load_settings",
    "redirect_spool",
    "resolve_dsn",
    "waiting_rows",
]

_CHECK_ENTRIES = 128  # entries between two checks that the writer thread is alive
_ROOM_POLL_SECONDS = 0.01
_MAX_STALL_SECONDS = 60.0  # without progress; then an import stops waiting, and drops are counted

# psycopg logs errors that we handle, and mitmproxy would show each of them.
logging.getLogger("psycopg").setLevel(logging.ERROR)


class Exporter:
    """The log of one proxy. It runs from its construction until `stop`.

    Only one thread may call `log_access`. All other methods are thread-safe.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._buffer = Buffer(settings.buffer, settings.batch.max_entries)
        self._writer = Writer(settings, self._buffer, Run.start(settings.node_name))
        self._housekeeping = Housekeeping(settings)

    def log_access(self, exchange: Exchange) -> bool:
        """Queue one exchange; False if it was dropped because the buffer is full. Never blocks."""
        if not self._buffer.seen % _CHECK_ENTRIES:
            self._writer.ensure_running()
        return self._buffer.put(exchange)

    def count_unreadable(self, started_at: float) -> None:
        """Count an exchange that could not be read, as a gap. `started_at`: epoch seconds."""
        self._buffer.count_unreadable(started_at)

    def wait_for_room(self, size: int) -> bool:
        """Wait until the buffer has room for `size` bytes; False if the writer makes no progress.

        Only for flows read from a file. A proxied request must never wait.
        """
        pause = threading.Event()
        bytes_out, changed_at = self._buffer.bytes_out, time.monotonic()
        while not self._buffer.has_room(size):
            if self._buffer.bytes_out != bytes_out:
                bytes_out, changed_at = self._buffer.bytes_out, time.monotonic()
            elif time.monotonic() - changed_at > _MAX_STALL_SECONDS:
                return False
            self._buffer.wake()  # do not wait for a whole batch
            pause.wait(_ROOM_POLL_SECONDS)
        return True

    def reconfigure(self, settings: Settings) -> None:
        """Use other settings. Waiting entries keep their place and go to the new database."""
        self._settings = settings
        self._buffer.reconfigure(settings.buffer, settings.batch.max_entries)
        self._writer.reconfigure(settings)
        self._housekeeping.reconfigure(settings)

    def stop(self) -> bool:
        """Write what is left, for at most `shutdown.drain_seconds` and one more; True if nothing was lost.

        Idempotent.
        """
        self._housekeeping.stop()
        return self._writer.stop(self._settings.shutdown.drain_seconds)

    def status(self) -> dict[str, Any]:
        """Counters, which never go down, and gauges.

        At any time, seen = written + dropped + rejected + waiting + spooled.
        """
        progress = self._writer.progress
        counts = self._writer.counts()
        return {
            "seen": counts.seen,
            "written": counts.written,
            "dropped": counts.dropped,
            "rejected": counts.rejected,
            "waiting": counts.waiting,
            "spooled": counts.spooled,
            "recovered": progress.recovered,
            "retries": progress.retries + self._writer.reconnects,
            "failures": progress.failures + self._writer.builder.failures,
            "away": self._writer.is_unavailable,
            "last_error": progress.last_error,
            "last_error_at": progress.last_error_at,
            "last_written_at": progress.last_written_at,
            "database": self.database_name,
        }

    @property
    def database_name(self) -> str:
        """Where the rows go, without a password."""
        dsn = self._settings.database.dsn
        return public_name(dsn) if dsn else f"embedded PostgreSQL in {data_folder()}"


def waiting_rows(settings: Settings) -> list[tuple[WaitingRows, bool]]:
    """What waits on disk, by database, and whether that is the database of these settings."""
    current = spool_database(settings)
    return [(it, it.database == current) for it in spool.waiting_rows(data_folder() / "spool")]


def redirect_spool(settings: Settings) -> int:
    """Let what waits on disk for other databases wait for this one; returns the number of files."""
    return spool.redirect(data_folder() / "spool", spool_database(settings))

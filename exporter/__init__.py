"""The access log: from an exchange to its row in PostgreSQL. Knows nothing about mitmproxy."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from .exchange import RESPONSE_FIELDS, Exchange, RequestedUrl
from .metrics.server import MetricsServer
from .postgres.dsn import check_dsn, has_password, public_name
from .retention.housekeeping import Housekeeping
from .rows.entry import AccessLogEntry
from .rows.entry_builder import load_remotes
from .rows.epochs import MAX_INDEX_BYTES, is_package_index
from .run import Run
from .settings import Settings, SettingsError, data_folder, load_settings, resolve_dsn
from .status_file import ProxyStatus, StatusFile, delete_dead, read_statuses
from .write import spool
from .write.buffer import Buffer
from .write.database import DatabaseUnavailable, insert_access_log_batch
from .write.encoding import encode, memory_bytes
from .write.journal import Journal
from .write.recovery import RecoveredRun, recover_journals
from .write.spool import WaitingRows
from .write.writer import Writer, spool_database

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = [
    "MAX_INDEX_BYTES",
    "RESPONSE_FIELDS",
    "AccessLogEntry",
    "DatabaseUnavailable",
    "Exchange",
    "Exporter",
    "ProxyStatus",
    "RecoveredRun",
    "RequestedUrl",
    "Settings",
    "SettingsError",
    "WaitingRows",
    "check_dsn",
    "data_folder",
    "forget_killed",
    "has_password",
    "insert_access_log_batch",
    "is_package_index",
    "load_remotes",
    "load_settings",
    "proxy_statuses",
    "recover_journals",
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

    Only one thread may call `begin`, `skip`, `log_access`, `count_unreadable` and `watch`. All other
    methods are thread-safe.

    `begin(at)` says that a request has begun (epoch seconds), and `skip()` that one has ended that is not
    to be logged. Every other one ends with `log_access` or `count_unreadable`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        run = Run.start(settings.node_name)
        self._buffer = Buffer(settings.buffer, settings.batch.max_entries)
        self._journal = Journal(run, settings)
        self._writer = Writer(settings, self._buffer, self._journal, run)
        self.begin = self._journal.begin
        self.skip = self._journal.skip
        self._housekeeping = Housekeeping(settings)
        self._metrics = MetricsServer(settings.metrics.listen, self.status)
        self._status_file = StatusFile(_status_folder(), run.run_id, self.status)

    def log_access(self, exchange: Exchange) -> bool:
        """Queue one exchange; False if it was dropped because the buffer is full. Never blocks.

        Raises TypeError or ValueError for a value that no exchange should have.
        """
        if not self._buffer.seen % _CHECK_ENTRIES:
            self._writer.ensure_running()
        encoded = encode(exchange)
        # Without sha256, a body is an index of packages, and the row can do without it.
        needs_body = self._settings.artifact.sha256
        if self._buffer.put(encoded, exchange.started_at, needs_body=needs_body):
            self._journal.put(encoded[0])
            return True
        self._journal.count_drop()
        return False

    def count_unreadable(self, started_at: float) -> None:
        """Count an exchange that could not be read, as a gap. `started_at`: epoch seconds."""
        self._buffer.count_unreadable(started_at)
        self._journal.count_drop()

    def watch(self, open_requests: int, oldest_open_at: Callable[[], float | None]) -> None:
        """Tell how many requests have begun and not ended, and how to find the start of the oldest.

        `oldest_open_at` is called in another thread. It returns epoch seconds, or None if none is open.
        """
        self._journal.set_in_flight(open_requests)
        self._writer.oldest_open_at = oldest_open_at

    def wait_for_room(self, exchange: Exchange) -> bool:
        """Wait until the buffer has room for an exchange.

        False if it is larger than the buffer, or if the writer makes no progress. Only for flows read from
        a file: a proxied request must never wait.
        """
        pause, (payload, body) = threading.Event(), encode(exchange)
        size, max_bytes = memory_bytes((payload, body)), self._buffer.bounds.max_bytes
        if size > max_bytes and not self._settings.artifact.sha256:
            size = memory_bytes((payload, None))  # the buffer leaves out a body that is not needed
        if size > max_bytes:
            return False
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
        self._metrics.reconfigure(settings.metrics.listen)

    def log_command_to_read(self, command: str) -> None:
        """Log this command, which shows the rows, once the database is reached and lets our role read."""
        self._writer.command_to_read = command

    def stop(self) -> bool:
        """Write what is left, for at most `shutdown.drain_seconds` and one more; True if nothing was lost.

        Idempotent.
        """
        self._housekeeping.stop()
        is_complete = self._writer.stop(self._settings.shutdown.drain_seconds)
        self._metrics.stop()  # last, so that the stop can be watched
        self._status_file.stop()
        return is_complete

    def status(self) -> dict[str, Any]:
        """Counters, which never go down, gauges and histograms. Values for JSON; no I/O.

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
            "in_flight": self._journal.in_flight,
            "unjournaled": self._journal.unrecorded,
            "recovered": progress.recovered,
            "retries": progress.retries + self._writer.reconnects,
            "failures": progress.failures + self._writer.builder.failures,
            "away": self._writer.is_unavailable,
            "last_error": progress.last_error,
            "last_error_at": progress.last_error_at,
            "last_written_at": progress.last_written_at,
            "database": self.database_name,
            "node": self._writer.run.node,
            "version": self._writer.run.version,
            "run_id": self._writer.run.run_id,
            "buffer_bytes": self._buffer.bytes,
            "buffer_max_bytes": self._buffer.bounds.max_bytes,
            "buffer_max_entries": self._buffer.bounds.max_entries,
            "spool_bytes": self._writer.spool.bytes,
            "spool_max_bytes": self._settings.spool.max_bytes,
            "journal": self._journal.off_reason or "on",
            "journal_bytes": self._journal.capacity,
            "journal_used_bytes": self._journal.used_bytes,
            "batch_rows": progress.batch_rows.as_dict(),
            "batch_seconds": progress.batch_seconds.as_dict(),
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


def proxy_statuses() -> list[ProxyStatus]:
    """The figures of the proxies that use this data folder, also of those that were killed. Raises OSError."""
    return read_statuses(_status_folder())


def forget_killed(run_id: str) -> None:
    """Delete the figures of a killed proxy, once it is known what it had seen. Raises OSError."""
    delete_dead(_status_folder(), run_id)


def _status_folder() -> Path:
    return data_folder() / "status"

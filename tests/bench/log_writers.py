"""artifactapi's exporter and alternatives that write exchanges to the table; measures nothing.

All use the same hooks, rows and table, so that they differ only in how they write.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from logging.handlers import QueueHandler, QueueListener
from typing import TYPE_CHECKING, Any, ClassVar, Self

import psycopg
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from psycopg import sql

from exporter import AccessLogEntry, Exchange, Exporter, Settings, insert_access_log_batch
from exporter.rows.entry_builder import EntryBuilder
from exporter.write.artifacts import fetches, record
from exporter.write.writer import THREAD_NAME
from tests.bench.machine import cpu_seconds
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BATCH_ENTRIES = 128
_QUEUE_ENTRIES = 1_000_000  # OpenTelemetry drops records when its queue is full
_FLUSH_SECONDS = 120.0
_INSERT = sql.SQL("INSERT INTO access_log ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
    sql.SQL(", ").join(map(sql.Identifier, AccessLogEntry._fields)),
    sql.SQL(", ").join(sql.Placeholder() for _ in AccessLogEntry._fields),
)


class LogWriter(ABC):
    """Writes exchanges to the table; a context manager."""

    name: ClassVar[str]
    log_access: Callable[[Exchange], bool]  # like that of `Exporter`

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def flush(self) -> None:
        """Wait until all exchanges are in the table."""


class ArtifactapiWriter(LogWriter):
    """The exporter with its thread and its worker process."""

    name = "artifactapi"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __enter__(self) -> Self:
        self.exporter = Exporter(self._settings)
        self.log_access = self.exporter.log_access
        thread = next(t for t in threading.enumerate() if t.name == THREAD_NAME)
        assert thread.ident is not None
        self._clock = time.pthread_getcpuclockid(thread.ident)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.exporter.stop()

    def flush(self) -> None:
        """Wait until the buffer is empty."""
        self.exporter.reconfigure(self._settings)  # wakes the thread
        eventually(lambda: not self.exporter.status()["waiting"], _FLUSH_SECONDS)
        status = self.exporter.status()
        assert status["written"] == status["seen"], status

    def cpu_seconds(self) -> float:
        """Return the CPU time of the thread and of the worker process so far."""
        worker = self.exporter._writer.builder._worker
        assert worker is not None
        return time.clock_gettime(self._clock) + cpu_seconds(worker.pid)


class _ConnectionWriter(LogWriter):
    """The common base of the alternatives: a connection, and artifactapi's rows."""

    def __init__(self, settings: Settings) -> None:
        self._dsn = settings.database.dsn
        self._builder = EntryBuilder(settings)

    def __enter__(self) -> Self:
        self._connection = psycopg.connect(self._dsn, autocommit=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def flush(self) -> None:
        """Do nothing: no exchange waits."""

    def _insert(self, exchange: Exchange) -> None:
        self._connection.execute(_INSERT, self._builder.build(exchange))

    def _copy(self, exchanges: Sequence[Exchange]) -> None:
        insert_access_log_batch(self._connection, [self._builder.build(x) for x in exchanges])


class InsertInHookWriter(_ConnectionWriter):
    """Runs an INSERT in the hook, so that the request waits for it."""

    name = "INSERT in the hook"

    def log_access(self, exchange: Exchange) -> bool:
        """Insert the row and wait for the server."""
        self._insert(exchange)
        return True


class ThreadPerRequestWriter(_ConnectionWriter):
    """Starts a thread with an INSERT for each request, like artifactapi's predecessor."""

    name = "a thread and an INSERT for each request"

    def __enter__(self) -> Self:
        self._threads: list[threading.Thread] = []
        return super().__enter__()

    def log_access(self, exchange: Exchange) -> bool:
        """Start a thread; psycopg lets only one of them use the connection at a time."""
        thread = threading.Thread(target=self._insert, args=(exchange,))
        self._threads = [t for t in self._threads[-BATCH_ENTRIES:] if t.is_alive()]
        self._threads.append(thread)
        thread.start()
        return True

    def flush(self) -> None:
        """Wait for the threads."""
        for thread in self._threads:
            thread.join()


class ExecuteManyWriter(_ConnectionWriter):
    """Uses psycopg's executemany: pipelined INSERTs in one transaction."""

    name = "psycopg executemany"

    def __enter__(self) -> Self:
        self._waiting: list[Exchange] = []
        return super().__enter__()

    def log_access(self, exchange: Exchange) -> bool:
        """Write a batch when it is full."""
        self._waiting.append(exchange)
        if len(self._waiting) >= BATCH_ENTRIES:
            self.flush()
        return True

    def flush(self) -> None:
        """Write the last batch."""
        exchanges, self._waiting = self._waiting, []
        entries = [self._builder.build(x) for x in exchanges]
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(_INSERT, entries)
            if fetched := fetches(entries):
                cursor.execute(record(fetched))


class OpenTelemetryWriter(_ConnectionWriter):
    """Puts the queue and the thread of opentelemetry-sdk in front of artifactapi's COPY."""

    name = "opentelemetry-sdk's BatchProcessor"

    def __enter__(self) -> Self:
        super().__enter__()
        processor = BatchLogRecordProcessor(
            self, max_queue_size=_QUEUE_ENTRIES, max_export_batch_size=BATCH_ENTRIES
        )
        # Use the inner processor, which queues records without further work on them.
        self._processor = processor._batch_processor
        self._written = self._seen = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._processor.shutdown()
        super().__exit__()

    def log_access(self, exchange: Exchange) -> bool:
        """Queue the exchange."""
        self._seen += 1
        self._processor.emit(exchange)
        return True

    def flush(self) -> None:
        """Wait for the thread."""
        self._processor.force_flush()
        eventually(lambda: self._written == self._seen, _FLUSH_SECONDS)

    def export(self, batch: Sequence[Any]) -> None:
        """Write a batch; part of OpenTelemetry's exporter interface."""
        self._copy(batch)
        self._written += len(batch)

    def shutdown(self) -> None:
        """Do nothing; part of OpenTelemetry's exporter interface."""


class _ForwardingHandler(logging.Handler):
    """Passes each record to a function."""

    def __init__(self, handle: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._handle_record = handle

    def emit(self, record: logging.LogRecord) -> None:
        self._handle_record(record)


class LoggingWriter(_ConnectionWriter):
    """Puts the standard library's QueueHandler and QueueListener in front of artifactapi's COPY."""

    name = "logging's QueueHandler"

    def __enter__(self) -> Self:
        super().__enter__()
        self._waiting: list[Exchange] = []
        self._logger = logging.getLogger("artifactapi-bench")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        records: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._handler = QueueHandler(records)
        self._logger.addHandler(self._handler)
        self._listener = QueueListener(records, _ForwardingHandler(self._collect))
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.stop()
        self._logger.removeHandler(self._handler)
        super().__exit__()

    def log_access(self, exchange: Exchange) -> bool:
        """Log the exchange."""
        self._logger.info("exchange", extra={"exchange": exchange})
        return True

    def flush(self) -> None:
        """Wait for the listener, and write the last batch."""
        self._listener.stop()
        self._write()
        self._listener.start()

    def _collect(self, record: logging.LogRecord) -> None:
        self._waiting.append(record.__dict__["exchange"])
        if len(self._waiting) >= BATCH_ENTRIES:
            self._write()

    def _write(self) -> None:
        exchanges, self._waiting = self._waiting, []
        if exchanges:
            self._copy(exchanges)

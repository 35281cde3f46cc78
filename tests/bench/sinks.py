"""Ways to bring what the hook noted into the table: ours, and what others do; measures nothing.

All share our hook, our rows and our table, so that they differ in the handing over alone.
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
_QUEUE_ENTRIES = 1_000_000  # OpenTelemetry drops what comes when its queue is full
_PATIENCE_SECONDS = 120.0
_INSERT = sql.SQL("INSERT INTO access_log ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
    sql.SQL(", ").join(map(sql.Identifier, AccessLogEntry._fields)),
    sql.SQL(", ").join(sql.Placeholder() for _ in AccessLogEntry._fields),
)


class Sink(ABC):
    """Takes in what the hook noted; a context manager."""

    name: ClassVar[str]
    log_access: Callable[[Exchange], bool]  # as the exporter's

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def settle(self) -> None:
        """Wait until all that was taken in is in the table."""


class Ours(Sink):
    """The exporter with its thread and its process."""

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

    def settle(self) -> None:
        """Wait until nothing waits."""
        self.exporter.reconfigure(self._settings)  # wakes the thread, as more entries would
        eventually(lambda: not self.exporter.status()["waiting"], _PATIENCE_SECONDS)
        status = self.exporter.status()
        assert status["written"] == status["seen"], status

    def cpu_seconds(self) -> float:
        """CPU time of the thread and of the process so far."""
        worker = self.exporter._writer.builder._worker
        assert worker is not None
        return time.clock_gettime(self._clock) + cpu_seconds(worker.pid)


class _Connected(Sink):
    """What the others have in common: a connection, and rows made as ours are."""

    def __init__(self, settings: Settings) -> None:
        self._dsn = settings.database.dsn
        self._builder = EntryBuilder(settings)

    def __enter__(self) -> Self:
        self._connection = psycopg.connect(self._dsn, autocommit=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def settle(self) -> None:
        """Nothing waits."""

    def _insert(self, exchange: Exchange) -> None:
        self._connection.execute(_INSERT, self._builder.build(exchange))

    def _copy(self, exchanges: Sequence[Exchange]) -> None:
        insert_access_log_batch(self._connection, [self._builder.build(x) for x in exchanges])


class InsertInHook(_Connected):
    """INSERT where the request waits for it."""

    name = "INSERT in the hook"

    def log_access(self, exchange: Exchange) -> bool:
        """Wait for Postgres."""
        self._insert(exchange)
        return True


class ThreadPerRequest(_Connected):
    """A thread and an INSERT for each request, as artifactapi's predecessor did."""

    name = "a thread and an INSERT for each request"

    def __enter__(self) -> Self:
        self._threads: list[threading.Thread] = []
        return super().__enter__()

    def log_access(self, exchange: Exchange) -> bool:
        """Start a thread; psycopg lets one at a time use the connection."""
        thread = threading.Thread(target=self._insert, args=(exchange,))
        self._threads = [t for t in self._threads[-BATCH_ENTRIES:] if t.is_alive()]
        self._threads.append(thread)
        thread.start()
        return True

    def settle(self) -> None:
        """Wait for the threads."""
        for thread in self._threads:
            thread.join()


class ExecuteMany(_Connected):
    """psycopg's executemany: INSERTs in one transaction, in a pipeline."""

    name = "psycopg executemany"

    def __enter__(self) -> Self:
        self._waiting: list[Exchange] = []
        return super().__enter__()

    def log_access(self, exchange: Exchange) -> bool:
        """Write a batch once it is full."""
        self._waiting.append(exchange)
        if len(self._waiting) >= BATCH_ENTRIES:
            self.settle()
        return True

    def settle(self) -> None:
        """Write what is left."""
        exchanges, self._waiting = self._waiting, []
        entries = [self._builder.build(x) for x in exchanges]
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(_INSERT, entries)
            if fetched := fetches(entries):
                cursor.execute(record(fetched))


class OpenTelemetry(_Connected):
    """The queue and the thread of opentelemetry-sdk in front of our COPY."""

    name = "opentelemetry-sdk's BatchProcessor"

    def __enter__(self) -> Self:
        super().__enter__()
        processor = BatchLogRecordProcessor(
            self, max_queue_size=_QUEUE_ENTRIES, max_export_batch_size=BATCH_ENTRIES
        )
        # What it does to records before it queues them would come on top.
        self._processor = processor._batch_processor
        self._written = self._seen = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._processor.shutdown()
        super().__exit__()

    def log_access(self, exchange: Exchange) -> bool:
        """Queue it."""
        self._seen += 1
        self._processor.emit(exchange)
        return True

    def settle(self) -> None:
        """Wait for its thread."""
        self._processor.force_flush()
        eventually(lambda: self._written == self._seen, _PATIENCE_SECONDS)

    def export(self, batch: Sequence[Any]) -> None:
        """As OpenTelemetry wants an exporter."""
        self._copy(batch)
        self._written += len(batch)

    def shutdown(self) -> None:
        """As OpenTelemetry wants an exporter."""


class _Forwarder(logging.Handler):
    def __init__(self, take: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record)


class Logging(_Connected):
    """QueueHandler and QueueListener of the standard library in front of our COPY."""

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
        self._listener = QueueListener(records, _Forwarder(self._take))
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.stop()
        self._logger.removeHandler(self._handler)
        super().__exit__()

    def log_access(self, exchange: Exchange) -> bool:
        """Log it."""
        self._logger.info("exchange", extra={"exchange": exchange})
        return True

    def settle(self) -> None:
        """Wait for the listener, and write what is left."""
        self._listener.stop()
        self._write()
        self._listener.start()

    def _take(self, record: logging.LogRecord) -> None:
        self._waiting.append(record.__dict__["exchange"])
        if len(self._waiting) >= BATCH_ENTRIES:
            self._write()

    def _write(self) -> None:
        exchanges, self._waiting = self._waiting, []
        if exchanges:
            self._copy(exchanges)

"""Run the page's database queries in threads, so that the event loop never waits. Contains no SQL."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from exporter.postgres.connection import Deadline
from exporter.postgres.embedded import EmbeddedServer
from exporter.read.page import page_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from exporter import Settings

_MAX_THREADS = 2
_MAX_PENDING = 8  # queries that run or wait; further ones are refused


class TooManyQueriesError(Exception):
    """The pool has reached its limit of pending queries."""


class QueryPool:
    """Up to two threads, named artifactapi-page. Each query gets a connection of its own.

    Not thread-safe: call all methods from the event loop's thread.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._deadline = Deadline()
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="artifactapi-page")
        self._pending = 0

    async def run[Result](self, query: Callable[[Connection[Any]], Result]) -> Result:
        """Call `query` in a thread, with a read-only connection, for at most `page.query_seconds`.

        Raises:
            TooManyQueriesError: too many queries are pending.
            psycopg.Error, DeadlineExceededError, OSError: see `exporter.read.page.explain`.
        """
        if self._pending >= _MAX_PENDING:
            raise TooManyQueriesError
        self._pending += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._run, query, self.settings)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Abort running queries and drop those that wait. The pool cannot be used afterwards."""
        self._deadline.give_up_at = time.monotonic()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run[Result](
        self, query: Callable[[Connection[Any]], Result], settings: Settings
    ) -> Result:
        # The exporter keeps the embedded server running; here we only need its address.
        dsn = settings.for_reading().database.dsn or EmbeddedServer().dsn
        seconds = settings.page.query_seconds
        with page_session(dsn, settings.database, seconds, self._deadline) as connection:
            return query(connection)

"""Ask the database off the event loop: few questions at a time, each for a bounded time; knows no SQL."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from exporter.postgres.connection import Deadline
from exporter.postgres.embedded import EmbeddedServer
from exporter.read.page import reading

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from exporter import Settings

_AT_ONCE = 2
_IN_LINE = 8  # who comes when so many are being asked or wait is sent away


class TooManyQueriesError(Exception):
    """Too many questions wait already."""


class QueryPool:
    """Owns up to two threads, named artifactapi-page, and in each a connection while it asks.

    Used by the event loop's thread alone.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._deadline = Deadline()
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="artifactapi-page")
        self._asked = 0

    async def run[Answer](self, question: Callable[[Connection[Any]], Answer]) -> Answer:
        """Have the question put in a thread; it may read, for `page.query_seconds` at most.

        Raises:
            TooManyQueriesError: too many wait.
            psycopg.Error, DeadlineExceededError, OSError: see exporter.reading.explain.
        """
        if self._asked >= _IN_LINE:
            raise TooManyQueriesError
        self._asked += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._answer, question, self.settings)
        finally:
            self._asked -= 1

    def close(self) -> None:
        """End what is being asked; nothing can be asked any more."""
        self._deadline.give_up_at = time.monotonic()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _answer[Answer](
        self, question: Callable[[Connection[Any]], Answer], settings: Settings
    ) -> Answer:
        # The writer keeps the embedded server running; here it is only looked for.
        dsn = settings.page.dsn or settings.database.dsn or EmbeddedServer().dsn
        seconds = settings.page.query_seconds
        with reading(dsn, settings.database, seconds, self._deadline) as connection:
            return question(connection)

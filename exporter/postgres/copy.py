"""Send a query that ends in COPY FROM STDIN, with libpq's own calls (psycopg.pq).

psycopg's Copy allows no other statement in the same query. That would cost three more round trips.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Any

from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus

from .connection import DeadlineConnection

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg
    from psycopg.pq.abc import PGconn, PGresult

_TICK_MS = 50  # how often a wait checks its deadline
_CHUNK_BYTES = 128 * 1024  # more may not fit into the socket buffer (psycopg #255)


def copy_from_stdin(connection: psycopg.Connection[Any], query: bytes, text: bytes) -> int | None:
    """Run the query and send `text` as the data of its COPY; returns the number of rows.

    `text` is complete before the call, because a client that dies in the middle of a COPY keeps its locks.
    After an exception the connection must be closed, except after a psycopg.Error from the server.

    Raises:
        psycopg.Error: the server reported an error, or the connection broke.
        DeadlineExceededError: the call took longer than the connection allows.
    """
    call = _Call(connection)
    call.pgconn.send_query(query)
    result = call.result()
    while result.status in {ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK}:
        result = call.result()
    if result.status != ExecStatus.COPY_IN:
        call.finish()
        raise error_from_result(result, encoding="utf-8")
    for start in range(0, len(text), _CHUNK_BYTES):
        call.send(text[start : start + _CHUNK_BYTES])
    while call.pgconn.put_copy_end(None) == 0:
        call.wait_writable()
    result = call.result()
    call.finish()
    if result.status != ExecStatus.COMMAND_OK:
        raise error_from_result(result, encoding="utf-8")
    return result.command_tuples


class _Call:
    """One query on a connection in nonblocking mode, until its last result."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.pgconn: PGconn = connection.pgconn
        self._check_deadline: Callable[[], None] = lambda: None
        if isinstance(connection, DeadlineConnection):
            self._check_deadline = connection.deadline_check()
        self._poll = select.poll()
        self._poll.register(self.pgconn.socket)

    def send(self, chunk: bytes) -> None:
        """Send a part of the COPY data."""
        while self.pgconn.put_copy_data(chunk) == 0:
            self.wait_writable()
        self._flush()

    def result(self) -> PGresult:
        """The next result."""
        self._flush()
        result = self._next_result()
        if result is None:
            raise AssertionError("libpq has no more results")
        return result

    def finish(self) -> None:
        """Read the remaining results, so that the connection can be used again."""
        while self._next_result() is not None:
            pass

    def wait_writable(self) -> None:
        """Wait until more can be sent. Read at the same time, or both sides could block."""
        self._wait(select.POLLIN | select.POLLOUT)
        self.pgconn.consume_input()

    def _next_result(self) -> PGresult | None:
        while self.pgconn.is_busy():
            self._wait(select.POLLIN)
            self.pgconn.consume_input()
        return self.pgconn.get_result()

    def _flush(self) -> None:
        while self.pgconn.flush() == 1:
            self.wait_writable()

    def _wait(self, events: int) -> None:
        self._poll.modify(self.pgconn.socket, events)
        self._check_deadline()
        while not self._poll.poll(_TICK_MS):
            self._check_deadline()

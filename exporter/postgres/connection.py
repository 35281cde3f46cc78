"""Open PostgreSQL connections whose calls have a deadline. Knows no tables."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, cast

import psycopg

from .dsn import connection_string
from .embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg.abc import RV, PQGen

    from ..settings import DatabaseSettings

_MAX_DESCRIPTION = 300  # characters
_TICK_SECONDS = 0.05  # how often a wait checks its deadline
# With these the server notices soon that a client has vanished, and releases its locks: the
# keepalives while it waits for data, the check interval while it waits for a lock. We use SET
# because poolers reject `options` at connection time. Behind a pooler the settings can leak into
# other sessions, where they are harmless.
_DEAD_PEER_SETTINGS = """
    SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 2;
    SET client_connection_check_interval = '5s'
"""


class DeadlineExceededError(Exception):
    """A call to the server exceeded its deadline."""


class Deadline:
    """A deadline shared by all calls that a thread makes to the server.

    Every call ends at `give_up_at` (monotonic seconds). Any thread may set it.
    The waiting thread calls `on_wait` several times a second.
    """

    def __init__(self, on_wait: Callable[[], None] = lambda: None) -> None:
        self.give_up_at = float("inf")
        self.on_wait = on_wait


class DeadlineConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose calls end at a deadline, whatever the server does.

    Each wait for the server ends at `call_deadline` (monotonic seconds) if that is set, otherwise
    after `call_seconds`, and in any case at `deadline.give_up_at`.

    No libpq or server parameter ends a COPY to a server that acknowledges packets but never
    answers. So we check the clock while psycopg waits.
    """

    call_deadline: float | None = None
    call_seconds: float = float("inf")
    deadline = Deadline()

    def wait(self, gen: PQGen[RV], *args: Any, **options: Any) -> RV:
        """Wait like psycopg, but raise DeadlineExceededError at the deadline."""
        return super().wait(self._with_deadline(gen), *args, **options)

    def _with_deadline(self, gen: PQGen[RV]) -> PQGen[RV]:
        call_deadline = self.call_deadline or time.monotonic() + self.call_seconds
        try:
            waiting_for = next(gen)
            while True:
                if time.monotonic() > min(call_deadline, self.deadline.give_up_at):
                    raise DeadlineExceededError
                self.deadline.on_wait()
                waiting_for = gen.send((yield waiting_for))
        except StopIteration as stop:
            return cast("RV", stop.value)


@contextlib.contextmanager
def reachable(settings: DatabaseSettings) -> Iterator[str]:
    """Yield a connection string. If `settings.dsn` is empty, run the embedded server during the block.

    Raises:
        OSError: the embedded server did not start.
    """
    if settings.dsn:
        yield settings.dsn
        return
    server = EmbeddedServer()
    try:
        yield server.start()
    finally:
        server.release()


def connect(
    dsn: str, settings: DatabaseSettings, deadline: Deadline | None = None
) -> DeadlineConnection:
    """Open a connection with our timeouts, in autocommit mode.

    Raises:
        psycopg.Error: the connection string is not valid, or the connection failed.
        DeadlineExceededError: it took longer than `connect_seconds`.
    """
    deadline = deadline or Deadline()
    attempt = _ConnectAttempt(connection_string(dsn, settings))
    connection = attempt.wait(time.monotonic() + settings.connect_seconds, deadline)
    connection.call_seconds = settings.call_seconds
    connection.deadline = deadline
    # Behind a pooler the next statement may run in another session, without the prepared statement.
    connection.prepare_threshold = None
    try:
        connection.execute(_DEAD_PEER_SETTINGS)
    except (psycopg.Error, DeadlineExceededError) as e:
        # Some servers do not know these settings. The connection is usable unless it broke.
        if connection.broken or isinstance(e, DeadlineExceededError):
            connection.close()
            raise
    return connection


class _ConnectAttempt:
    """Connects in a separate thread, because a DNS lookup can take minutes and can't be canceled."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._done = threading.Event()
        self._lock = threading.Lock()  # decides whether the caller still wants the connection
        self._abandoned = False
        self._connection: DeadlineConnection | None = None
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="artifactapi-connect", daemon=True).start()

    def wait(self, until: float, deadline: Deadline) -> DeadlineConnection:
        """Return the connection, or raise its error or DeadlineExceededError."""
        while not self._done.wait(_TICK_SECONDS):
            if time.monotonic() > min(until, deadline.give_up_at):
                break
            deadline.on_wait()
        with self._lock:
            self._abandoned = True
        if self._error is not None:
            raise self._error
        if self._connection is None:
            raise DeadlineExceededError
        return self._connection

    def _run(self) -> None:
        try:
            connection = DeadlineConnection.connect(self._conninfo, autocommit=True)
        except Exception as e:  # noqa: BLE001 - raised by `wait`
            # Free what the traceback holds, such as a socket, now and not at a later collection.
            traceback.clear_frames(e.__traceback__)
            if isinstance(e, psycopg.Error) and e.pgconn is not None:
                e.pgconn.finish()
            self._error = e.with_traceback(None)
        else:
            with self._lock:
                if self._abandoned:
                    connection.close()
                else:
                    self._connection = connection
        self._done.set()


def describe(error: Exception) -> str:
    """Return an error as one short line without passwords or row values."""
    if isinstance(error, DeadlineExceededError):
        return "The server did not answer in time."
    diagnosis = getattr(error, "diag", None)
    message = (diagnosis.message_primary if diagnosis is not None else None) or str(error)
    text = re.sub(r"(?i)(password\s*=\s*)\S+", r"\1***", " ".join(message.split()))
    text = re.sub(r"://[^/@\s]*@", "://***@", text)
    state = getattr(error, "sqlstate", None)
    return f"{text[:_MAX_DESCRIPTION]}{f' ({state})' if state else ''}"

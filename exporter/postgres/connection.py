"""Open a connection that no peer can hold up, and speak of it without its secrets; no SQL of the log."""

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

_MAX_REASON = 300
_TICK_SECONDS = 0.05  # how soon a new moment to give up is noticed
# A backend whose client has vanished gives up its locks soon, whether it waits for the client's data
# or for a lock. Set and not passed at start-up: poolers refuse `options` there. Behind one these
# reach other sessions too, where they do no harm.
_DEAD_PEER_SETTINGS = """
    SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 2;
    SET client_connection_check_interval = '5s'
"""


class DeadlineExceededError(Exception):
    """A call to the server took longer than it may."""


class Deadline:
    """What a wait for the server depends on, shared by all calls of one writer.

    `give_up_at` is the moment (monotonic seconds) at which every call ends; any thread may bring it
    forward. `on_wait` is called several times a second by whoever waits.
    """

    def __init__(self, on_wait: Callable[[], None] = lambda: None) -> None:
        self.give_up_at = float("inf")
        self.on_wait = on_wait


class DeadlineConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose every wait ends at `deadline` (monotonic seconds), whatever the peer does.

    Where none is set a wait takes at most `call_seconds`; and all end when `deadline` says so.

    No parameter of libpq or the server ends a COPY to a peer that acknowledges and never answers;
    looking at the clock while psycopg waits does.
    """

    call_deadline: float | None = None
    call_seconds: float = float("inf")
    deadline = Deadline()

    def wait(self, gen: PQGen[RV], *args: Any, **options: Any) -> RV:
        """As psycopg's, and raises DeadlineExceededError at the deadline."""
        return super().wait(self._guard(gen), *args, **options)

    def _guard(self, gen: PQGen[RV]) -> PQGen[RV]:
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
    """A connection string that works while the block runs: the embedded server is kept running.

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
    """Open a connection with our bounds, in autocommit.

    Raises:
        psycopg.Error: the string is no connection string, or nobody answered to it.
        DeadlineExceededError: it took longer than `connect_seconds`.
    """
    deadline = deadline or Deadline()
    attempt = _Attempt(connection_string(dsn, settings))
    connection = attempt.wait(time.monotonic() + settings.connect_seconds, deadline)
    connection.call_seconds = settings.call_seconds
    connection.deadline = deadline
    connection.prepare_threshold = (
        None  # behind a pooler the next statement may meet another session
    )
    try:
        connection.execute(_DEAD_PEER_SETTINGS)
    except (psycopg.Error, DeadlineExceededError) as e:
        # Not every server knows them; one that says so is still good.
        if connection.broken or isinstance(e, DeadlineExceededError):
            connection.close()
            raise
    return connection


class _Attempt:
    """Connecting in a thread of its own: looking up a name can take minutes, and nothing ends it."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._done = threading.Event()
        self._lock = threading.Lock()  # decides who closes what comes too late
        self._abandoned = False
        self._connection: DeadlineConnection | None = None
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="artifactapi-connect", daemon=True).start()

    def wait(self, until: float, deadline: Deadline) -> DeadlineConnection:
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
        except Exception as e:  # noqa: BLE001 - raised where it is waited for
            # What the error and its traceback hold, a socket among it, must not wait for the collector.
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
    """An error in one bounded line, without the connection string or a row's values."""
    if isinstance(error, DeadlineExceededError):
        return "The server did not answer in time."
    diagnosis = getattr(error, "diag", None)
    primary = diagnosis.message_primary if diagnosis is not None else None
    text = primary or str(error)
    text = re.sub(r"(?i)(password\s*=\s*)\S+", r"\1***", " ".join(text.split()))
    text = re.sub(r"://[^/@\s]*@", "://***@", text)
    state = getattr(error, "sqlstate", None)
    return f"{text[:_MAX_REASON]}{f' ({state})' if state else ''}"

"""Open PostgreSQL connections whose calls have a deadline. Knows no tables."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, cast

import psycopg

from .dsn import connection_string, server_addresses
from .embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg.abc import RV, PQGen

    from ..settings import DatabaseSettings

_MAX_DESCRIPTION = 300  # characters
# psycopg says twice that a connection failed, and libpq adds a question.
_REPETITION = re.compile(r"^connection (?:failed|is bad): (?=connection )")
_HINT = re.compile(r"\s*Is the server running .*\?")
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

    def deadline_check(self) -> Callable[[], None]:
        """A function for a call that begins now, to be called during each of its waits.

        It raises DeadlineExceededError at the deadline.
        """
        call_deadline = self.call_deadline or time.monotonic() + self.call_seconds

        def check() -> None:
            if time.monotonic() > min(call_deadline, self.deadline.give_up_at):
                raise DeadlineExceededError
            self.deadline.on_wait()

        return check

    def _with_deadline(self, gen: PQGen[RV]) -> PQGen[RV]:
        check = self.deadline_check()
        try:
            waiting_for = next(gen)
            while True:
                check()
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
    connection = _connect_to_any(connection_string(dsn, settings), settings, deadline)
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


def _connect_to_any(
    conninfo: str, settings: DatabaseSettings, deadline: Deadline
) -> DeadlineConnection:
    """Try one server address after the other, each for an equal share of the time that is left.

    So a server that accepts connections and never answers cannot use up the time of the others.
    """
    until = time.monotonic() + settings.connect_seconds
    addresses = _BackgroundCall(lambda: server_addresses(conninfo)).wait(until, deadline)
    error: Exception = DeadlineExceededError()
    for number, address in enumerate(addresses):
        now = time.monotonic()
        share = (until - now) / (len(addresses) - number)
        attempt = _BackgroundCall(
            functools.partial(_open, address), discard=DeadlineConnection.close
        )
        try:
            return attempt.wait(now + share, deadline)
        except DeadlineExceededError:
            if now + share >= deadline.give_up_at:
                raise
        except psycopg.Error as e:
            error = e
    raise error


def _open(conninfo: str) -> DeadlineConnection:
    try:
        return DeadlineConnection.connect(conninfo, autocommit=True)
    except psycopg.Error as e:
        # Free what the traceback holds, such as a socket, now and not at a later collection.
        traceback.clear_frames(e.__traceback__)
        if e.pgconn is not None:
            e.pgconn.finish()
        raise e.with_traceback(None) from None


class _BackgroundCall[T]:
    """A call in a thread of its own: a DNS lookup or a connection can hang, and cannot be canceled."""

    def __init__(
        self, call: Callable[[], T], discard: Callable[[T], None] = lambda _: None
    ) -> None:
        """`discard` gets a result that comes after `wait` gave up."""
        self._call = call
        self._discard = discard
        self._done = threading.Event()
        self._lock = threading.Lock()  # decides whether the caller still wants the result
        self._abandoned = False
        self._results: list[T] = []
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="artifactapi-connect", daemon=True).start()

    def wait(self, until: float, deadline: Deadline) -> T:
        """Return the result, or raise its error, or DeadlineExceededError at `until`."""
        while not self._done.wait(_TICK_SECONDS):
            if time.monotonic() > min(until, deadline.give_up_at):
                break
            deadline.on_wait()
        with self._lock:
            self._abandoned = True
        if self._error is not None:
            raise self._error
        if not self._results:
            raise DeadlineExceededError
        return self._results[0]

    def _run(self) -> None:
        try:
            result = self._call()
        except Exception as e:  # noqa: BLE001 - raised by `wait`
            self._error = e.with_traceback(None)
        else:
            with self._lock:
                if self._abandoned:
                    self._discard(result)
                else:
                    self._results.append(result)
        self._done.set()


def describe(error: Exception) -> str:
    """Return an error as one short line without passwords or row values."""
    if isinstance(error, DeadlineExceededError):
        return "The server did not answer in time."
    diagnosis = getattr(error, "diag", None)
    message = (diagnosis.message_primary if diagnosis is not None else None) or str(error)
    message = _HINT.sub("", _REPETITION.sub("", message))
    text = re.sub(r"(?i)(password\s*=\s*)\S+", r"\1***", " ".join(message.split()))
    text = re.sub(r"://[^/@\s]*@", "://***@", text)
    state = getattr(error, "sqlstate", None)
    return f"{text[:_MAX_DESCRIPTION]}{f' ({state})' if state else ''}"

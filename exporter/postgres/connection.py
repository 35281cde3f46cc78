"""Open PostgreSQL connections whose calls have a deadline. Knows no tables."""

from __future__ import annotations

import contextlib
import re
import select
import threading
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg.conninfo import timeout_from_conninfo
from psycopg.pq import ConnStatus, PGconn, PollingStatus

from .dsn import Server, connection_string, effective_parameters, servers
from .embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg.abc import RV, PQGen
    from psycopg.pq.abc import PGconn as LibpqConnection

    from ..settings import DatabaseSettings

_MAX_DESCRIPTION = 500  # characters
# psycopg says twice that a connection failed, and libpq adds a question.
_REPETITION = re.compile(r"^connection (?:failed|is bad): (?=connection )")
_HINT = re.compile(r"\s*Is the server running .*\?")
# The lines of an error's context that say where it comes from, in any language of lc_messages.
_FUNCTION = re.compile(r"^PL/.*", re.MULTILINE)
_COPY_COLUMN = re.compile(r"^COPY \w+, \D*\d+, \w+ (\w+)", re.MULTILINE)
_COPY_LINES = re.compile(r"\bCOPY \w+, \D*\d+")  # before the values of a row
_TICK_SECONDS = 0.05  # how often a wait checks its deadline
# With these the server notices soon that a client has vanished, and releases its locks: the
# keepalives while it waits for data, the check interval while it waits for a lock. Values that the
# user chose for the connection, the role or the database stay. We change them after connecting,
# because poolers reject `options` at connection time. Behind a pooler the settings can leak into
# other sessions, where they are harmless.
_DEAD_PEER_SETTINGS = """
    SELECT set_config(name, ours.value, false)
    FROM (VALUES ('tcp_keepalives_idle', '15'), ('tcp_keepalives_interval', '5'),
                 ('tcp_keepalives_count', '2'), ('client_connection_check_interval', '5s')
         ) AS ours (name, value) JOIN pg_settings USING (name)
    WHERE source NOT IN ('client', 'user', 'database', 'database user')
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

    def check(self) -> None:
        """Raise DeadlineExceededError if it is over; else call `on_wait`."""
        if time.monotonic() > self.give_up_at:
            raise DeadlineExceededError
        self.on_wait()


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
            if time.monotonic() > call_deadline:
                raise DeadlineExceededError
            self.deadline.check()

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

    If `dsn` names several hosts, or a host has several addresses, the first one that answers is used.

    Raises:
        psycopg.Error: the connection string is not valid, or the connection failed.
        DeadlineExceededError: it took longer than `connect_seconds`.
    """
    deadline = deadline or Deadline()
    connection = _ConnectRace(connection_string(dsn, settings), settings).winner(deadline)
    connection.deadline = deadline
    return connection


class _ConnectRace:
    """Connects to several servers, of which the first one that answers a query wins.

    They start one after another, in the user's order: the next one when the last one failed, or after
    a while, so that all have started by half-time. A server that accepts connections and never
    answers therefore leaves at least half of the time to each of the others, and a slow one is not
    given up for another.

    Each server has its own thread, because a DNS lookup can take minutes and cannot be canceled.
    """

    def __init__(self, conninfo: str, settings: DatabaseSettings) -> None:
        """Raises psycopg.ProgrammingError if a parameter is not valid."""
        self._settings = settings
        self._seconds_per_server = timeout_from_conninfo({**effective_parameters(conninfo)})
        self._waiting = deque(servers(conninfo))
        self._running: list[Server] = []
        self._failures: list[tuple[Server, Exception]] = []
        self._results: SimpleQueue[_Result] = SimpleQueue()
        self._next_at = self._half_time = 0.0  # monotonic seconds
        self._is_over = False
        self._lock = threading.Lock()  # decides whether a connection is still wanted

    def winner(self, deadline: Deadline) -> DeadlineConnection:
        """Return the connection, or raise the errors of all servers or DeadlineExceededError."""
        start_at = time.monotonic()
        try:
            while self._waiting or self._running:
                now = time.monotonic()
                give_up_at = min(start_at + self._settings.connect_seconds, deadline.give_up_at)
                if now > give_up_at:
                    raise DeadlineExceededError(self._failure())
                self._half_time = (start_at + give_up_at) / 2
                if self._waiting and (now >= self._next_at or not self._running):
                    self._start(self._waiting.popleft())
                    self._plan_next()
                if connection := self._next_result():
                    return connection
                deadline.on_wait()
        finally:
            self._end()
        if len(self._failures) == 1:
            raise self._failures[0][1]
        raise psycopg.OperationalError(self._failure())

    def _start(self, server: Server) -> None:
        self._running.append(server)
        threading.Thread(
            target=self._run, args=(server,), name="artifactapi-connect", daemon=True
        ).start()

    def _plan_next(self) -> None:
        """Spread the starts of the waiting servers evenly until half-time."""
        now = time.monotonic()
        self._next_at = now + max(0.0, self._half_time - now) / max(1, len(self._waiting))

    def _next_result(self) -> DeadlineConnection | None:
        """Wait a moment for a result; return it if it is a connection."""
        try:
            server, outcome = self._results.get(timeout=_TICK_SECONDS)
        except Empty:
            return None
        if isinstance(outcome, list):  # the other addresses of a host
            self._waiting.extendleft(reversed(outcome))
            self._plan_next()
            return None
        self._running.remove(server)
        if isinstance(outcome, Exception):
            self._failures.append((server, outcome))
            self._next_at = 0.0
            return None
        return outcome

    def _run(self, server: Server) -> None:
        outcome: Exception | DeadlineConnection
        try:
            outcome = self._connect(server)
        except Exception as e:  # noqa: BLE001 - raised by `winner`
            outcome = e.with_traceback(None)
        with self._lock:
            if not self._is_over:
                self._results.put((server, outcome))
            elif isinstance(outcome, DeadlineConnection):
                outcome.close()

    def _connect(self, server: Server) -> DeadlineConnection:
        address = server
        if server.host:
            address, *others = server.addresses()
            self._results.put((server, others))
        deadline = Deadline(on_wait=self._check_wanted)
        deadline.give_up_at = time.monotonic() + self._seconds_per_server
        connection = DeadlineConnection(_log_in(address.conninfo, deadline))
        connection.autocommit = True
        # Behind a pooler the next statement may run in another session, without the prepared statement.
        connection.prepare_threshold = None
        connection.call_seconds = self._settings.call_seconds
        connection.deadline = deadline
        _notice_dead_peers(connection)
        return connection

    def _check_wanted(self) -> None:
        if self._is_over:
            raise DeadlineExceededError

    def _end(self) -> None:
        """End the attempts that are still running."""
        with self._lock:
            self._is_over = True
        while not self._results.empty():
            _, outcome = self._results.get()
            if isinstance(outcome, DeadlineConnection):
                outcome.close()

    def _failure(self) -> str:
        """What each server did; empty if there is one that did nothing."""
        if not self._failures and len(self._running) == 1:
            return ""
        said = [
            f"{server.name} did not answer in time"
            if isinstance(error, DeadlineExceededError)
            else describe(error)
            for server, error in self._failures
        ]
        said += [f"{server.name} did not answer in time" for server in self._running]
        return "; ".join(dict.fromkeys(said))


type _Result = tuple[Server, DeadlineConnection | Exception | list[Server]]


def _log_in(conninfo: str, deadline: Deadline) -> LibpqConnection:
    """Connect to the only server of `conninfo`.

    psycopg's `connect` cannot be given up from another thread, and takes at least two seconds to time out.
    """
    pgconn = PGconn.connect_start(conninfo.encode())
    try:
        status = int(PollingStatus.WRITING)  # PostgreSQL docs, PQconnectStart
        if pgconn.status == ConnStatus.BAD:
            status = PollingStatus.FAILED
        while status != PollingStatus.OK:
            if status == PollingStatus.FAILED:
                raise psycopg.OperationalError(pgconn.get_error_message())  # noqa: TRY301
            _wait_for_socket(pgconn.socket, status, deadline)
            status = pgconn.connect_poll()
        pgconn.nonblocking = 1
    except BaseException:
        pgconn.finish()
        raise
    return pgconn


def _wait_for_socket(socket: int, status: int, deadline: Deadline) -> None:
    poll = select.poll()
    poll.register(socket, select.POLLIN if status == PollingStatus.READING else select.POLLOUT)
    deadline.check()
    while not poll.poll(_TICK_SECONDS * 1000):
        deadline.check()


def _notice_dead_peers(connection: DeadlineConnection) -> None:
    try:
        connection.execute(_DEAD_PEER_SETTINGS)
    except (psycopg.Error, DeadlineExceededError) as e:
        # Some servers do not know these settings. The connection is usable unless it broke.
        if connection.broken or isinstance(e, DeadlineExceededError):
            connection.close()
            raise


def describe(error: Exception) -> str:
    """Return an error as one short line without passwords or row values."""
    if isinstance(error, DeadlineExceededError):
        return str(error)[:_MAX_DESCRIPTION] or "The server did not answer in time."
    diagnosis = getattr(error, "diag", None)
    message = (diagnosis.message_primary if diagnosis is not None else None) or str(error)
    message = _HINT.sub("", _REPETITION.sub("", message))
    if _COPY_LINES.search(message):  # the text of a broken connection: all that the server said
        message = message.splitlines()[0]
    text = re.sub(r"(?i)(password\s*=\s*)\S+", r"\1***", " ".join(message.split()))
    text = re.sub(r"://[^/@\s]*@", "://***@", text)
    context = getattr(diagnosis, "context", None) or ""
    places = [getattr(error, "sqlstate", None), _place(context)]
    found = ", ".join(filter(None, places))
    return f"{text[:_MAX_DESCRIPTION]}{f' ({found})' if found else ''}"


def _place(context: str) -> str:
    """The function or the column that an error comes from, without values of the row."""
    if function := _FUNCTION.search(context):
        return function[0]
    column = _COPY_COLUMN.search(context)
    return f"column {column[1]}" if column else ""

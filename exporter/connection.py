"""Open a connection that no peer can hold up, and speak of it without its secrets; no SQL of the log."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .embedded import EmbeddedServer
from .settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg.abc import RV, PQGen

    from .settings import DatabaseSettings

_MAX_REASON = 300
_TICK_SECONDS = 0.05  # how soon a new moment to give up is noticed
_LEAST_CONNECT_SECONDS = 2  # libpq takes no less
# A backend whose client has vanished gives up its locks soon, whether it waits for the client's data
# or for a lock. Set and not passed at start-up: poolers refuse `options` there. Behind one these
# reach other sessions too, where they do no harm.
_FREE_LOCKS_OF_THE_DEAD = """
    SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 2;
    SET client_connection_check_interval = '5s'
"""


class DeadlineExceededError(Exception):
    """A call to the server took longer than it may."""


class Patience:
    """What a wait for the server depends on, shared by all calls of one writer.

    `give_up_at` is the moment (monotonic seconds) at which every call ends; any thread may bring it
    forward. `meanwhile` is called several times a second by whoever waits.
    """

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.give_up_at = float("inf")
        self.meanwhile = meanwhile


class DeadlineConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose every wait ends at `deadline` (monotonic seconds), whatever the peer does.

    Where none is set a wait takes at most `call_seconds`; and all end when `patience` says so.

    No parameter of libpq or the server ends a COPY to a peer that acknowledges and never answers;
    looking at the clock while psycopg waits does.
    """

    deadline: float | None = None
    call_seconds: float = float("inf")
    patience = Patience()

    def wait(self, gen: PQGen[RV], *args: Any, **options: Any) -> RV:
        """As psycopg's, and raises DeadlineExceededError at the deadline."""
        return super().wait(self._guard(gen), *args, **options)

    def _guard(self, gen: PQGen[RV]) -> PQGen[RV]:
        deadline = self.deadline or time.monotonic() + self.call_seconds
        try:
            waiting_for = next(gen)
            while True:
                if time.monotonic() > min(deadline, self.patience.give_up_at):
                    raise DeadlineExceededError
                self.patience.meanwhile()
                waiting_for = gen.send((yield waiting_for))
        except StopIteration as stop:
            return cast("RV", stop.value)


def connection_string(dsn: str, settings: DatabaseSettings) -> str:
    """The user's connection string with our bounds where it says nothing.

    Raises:
        psycopg.ProgrammingError: it is no connection string.
    """
    given = conninfo_to_dict(dsn)
    defaults: dict[str, Any] = {
        "application_name": "artifactapi",
        "connect_timeout": max(_LEAST_CONNECT_SECONDS, round(settings.connect_seconds)),
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": round(settings.call_seconds * 1000),
    }
    ours = {k: v for k, v in defaults.items() if k not in given}
    return make_conninfo(dsn, **ours, client_encoding="UTF8")  # COPY gets its text as that


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
    dsn: str, settings: DatabaseSettings, patience: Patience | None = None
) -> DeadlineConnection:
    """Open a connection with our bounds, in autocommit.

    Raises:
        psycopg.Error: the string is no connection string, or nobody answered to it.
        DeadlineExceededError: it took longer than `connect_seconds`.
    """
    patience = patience or Patience()
    attempt = _Attempt(connection_string(dsn, settings))
    connection = attempt.wait(time.monotonic() + settings.connect_seconds, patience)
    connection.call_seconds = settings.call_seconds
    connection.patience = patience
    connection.prepare_threshold = (
        None  # behind a pooler the next statement may meet another session
    )
    try:
        connection.execute(_FREE_LOCKS_OF_THE_DEAD)
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

    def wait(self, deadline: float, patience: Patience) -> DeadlineConnection:
        while not self._done.wait(_TICK_SECONDS):
            if time.monotonic() > min(deadline, patience.give_up_at):
                break
            patience.meanwhile()
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


def check_dsn(dsn: str, name: str = "artifactapi_dsn, ARTIFACTAPI_DSN or database.dsn") -> None:
    """Raise SettingsError unless this is a connection string; its text may hold a password, so it is not told."""
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.Error:
        parts = None
    if parts is None or _is_split_wrongly(parts):
        raise SettingsError(
            f"The connection string of the database ({name}) can't be read, expected key=value pairs"
            " or a postgresql:// URI with the password percent-encoded."
        )


def _is_split_wrongly(parts: dict[str, Any]) -> bool:
    """An unencoded @ or / in the password of a URI puts its rest into host, port or database."""
    host, port, dbname = (str(parts.get(name) or "") for name in ("host", "port", "dbname"))
    return (
        "@" in host + dbname
        or ("/" in host and not host.startswith("/"))
        or (port != "" and not port.replace(",", "").isdecimal())
    )


def has_password(dsn: str) -> bool:
    """Whether a connection string holds a password."""
    return bool(conninfo_to_dict(dsn).get("password"))


def without_password(dsn: str) -> str:
    """The same connection string without its password."""
    parts = conninfo_to_dict(dsn)
    for secret in ("password", "sslpassword"):
        parts.pop(secret, None)
    return make_conninfo("", **parts)


def public_name(dsn: str) -> str:
    """A connection string fit to be shown: user, host, port and database, nothing else."""
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.Error:
        return "an unreadable connection string"
    user = f"{given['user']}@" if given.get("user") else ""
    host = given.get("host") or given.get("hostaddr") or given.get("service") or "local socket"
    port = f":{given['port']}" if given.get("port") else ""
    return f"{user}{host}{port}/{given.get('dbname', '')}"


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

"""Check connection strings, add timeouts to them, and show them without secrets. Does no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ..settings import SettingsError

if TYPE_CHECKING:
    from ..settings import DatabaseSettings

_MIN_CONNECT_SECONDS = 2  # libpq's minimum


def connection_string(dsn: str, settings: DatabaseSettings) -> str:
    """Return the user's connection string plus our defaults for parameters it does not set.

    Raises:
        psycopg.ProgrammingError: `dsn` is not a valid connection string.
    """
    given = conninfo_to_dict(dsn)
    defaults: dict[str, Any] = {
        "application_name": "artifactapi",
        "connect_timeout": max(_MIN_CONNECT_SECONDS, round(settings.connect_seconds)),
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": round(settings.call_seconds * 1000),
    }
    missing = {name: value for name, value in defaults.items() if name not in given}
    # The encoding overrides the user's: COPY data is always sent as UTF-8.
    return make_conninfo(dsn, **missing, client_encoding="UTF8")


def check_dsn(dsn: str, name: str = "artifactapi_dsn, ARTIFACTAPI_DSN or database.dsn") -> None:
    """Check that `dsn` is a valid connection string.

    Args:
        dsn: the connection string. It may contain a password, so the message never quotes it.
        name: the settings that it may come from, for the message.

    Raises:
        SettingsError: it is not valid.
    """
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.Error:
        parts = None
    if parts is None or _is_misparsed(parts):
        raise SettingsError(
            f"The database connection string ({name}) is not valid; expected key=value pairs"
            " or a postgresql:// URI with the password percent-encoded."
        )


def _is_misparsed(parts: dict[str, Any]) -> bool:
    """Detect an unencoded @ or / in the password of a URI.

    libpq then takes part of the password for the host, port or database name.
    """
    host, port, dbname = (str(parts.get(name) or "") for name in ("host", "port", "dbname"))
    return (
        "@" in host + dbname
        or ("/" in host and not host.startswith("/"))
        or (port != "" and not port.replace(",", "").isdecimal())
    )


def has_password(dsn: str) -> bool:
    """Return whether the connection string contains a password."""
    return bool(conninfo_to_dict(dsn).get("password"))


def without_password(dsn: str) -> str:
    """Return the connection string without its passwords."""
    parts = conninfo_to_dict(dsn)
    for secret in ("password", "sslpassword"):
        parts.pop(secret, None)
    return make_conninfo("", **parts)


def public_name(dsn: str) -> str:
    """Return user, host, port and database of a connection string, to show to users."""
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.Error:
        return "an unreadable connection string"
    user = f"{given['user']}@" if given.get("user") else ""
    host = given.get("host") or given.get("hostaddr") or given.get("service") or "local socket"
    port = f":{given['port']}" if given.get("port") else ""
    return f"{user}{host}{port}/{given.get('dbname', '')}"

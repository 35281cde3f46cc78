"""Connection strings: check them, add our bounds, and show them without their secrets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ..settings import SettingsError

if TYPE_CHECKING:
    from ..settings import DatabaseSettings

_LEAST_CONNECT_SECONDS = 2  # libpq takes no less


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

"""Check connection strings, complete them, and show them without secrets."""

from __future__ import annotations

import math
import random
import re
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import PGconn

from ..settings import SettingsError

if TYPE_CHECKING:
    from ..settings import DatabaseSettings

_MIN_CONNECT_SECONDS = 2  # libpq's minimum


class Server(NamedTuple):
    """One of the servers that a connection string names."""

    name: str  # for messages
    conninfo: str  # names only this server
    host: str  # to be looked up; empty: `conninfo` has an address or a socket

    def addresses(self) -> list[Server]:
        """The server at each address of its host. Looks up the name, which may block for minutes.

        Raises:
            psycopg.OperationalError: the name cannot be resolved.
        """
        try:
            answers = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except OSError as e:
            reason = e.strerror or e
            raise psycopg.OperationalError(
                f"host {self.host!r} cannot be resolved: {reason}"
            ) from None
        addresses = dict.fromkeys(str(answer[4][0]) for answer in answers)
        return [
            Server(self.name, make_conninfo(self.conninfo, hostaddr=address), "")
            for address in addresses
        ]


def connection_string(dsn: str, settings: DatabaseSettings) -> str:
    """Return the user's connection string plus our defaults for parameters the user does not set.

    The user can set them in `dsn`, in a service file or in libpq's environment variables.

    Raises:
        psycopg.ProgrammingError: `dsn` is not a valid connection string.
    """
    given = effective_parameters(dsn)
    defaults: dict[str, Any] = {
        "application_name": "artifactapi",
        "connect_timeout": max(_MIN_CONNECT_SECONDS, math.ceil(settings.connect_seconds)),
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": round(settings.call_seconds * 1000),
    }
    missing = {name: value for name, value in defaults.items() if name not in given}
    # The encoding overrides the user's: COPY data is always sent as UTF-8.
    return make_conninfo(dsn, **missing, client_encoding="UTF8")


def effective_parameters(dsn: str) -> dict[str, str]:
    """Return the parameters that libpq uses, without the password.

    They come from `dsn`, its service, the environment and libpq's defaults.

    Raises:
        psycopg.ProgrammingError: `dsn` is not a valid connection string.
    """
    # Only libpq knows where all of them come from. It collects them, then stops at the value that is
    # not valid, before it connects. With a password it does not read the password file.
    invalid = make_conninfo(dsn, password="-", channel_binding="-")  # noqa: S106 - not a secret
    pgconn = PGconn.connect_start(invalid.encode())
    found = {option.keyword.decode(): option.val.decode() for option in pgconn.info if option.val}
    pgconn.finish()
    return {name: found[name] for name in found.keys() - {"password", "channel_binding"}}


def servers(conninfo: str) -> list[Server]:
    """Return the servers that `conninfo` names, in the order in which to try them.

    A server that may only be used if no standby is available is there twice.
    """
    parameters = effective_parameters(conninfo)
    hosts, addresses, ports = (
        parameters.get(name, "").split(",") for name in ("host", "hostaddr", "port")
    )
    count = max(len(hosts), len(addresses))
    if not parameters.get("host"):
        hosts = [""] * count
    if not parameters.get("hostaddr"):
        addresses = [""] * count
    if len(ports) == 1:
        ports *= count
    if not len(hosts) == len(addresses) == len(ports):
        return [Server("", conninfo, "")]  # libpq explains what is wrong
    found = [
        Server(
            f"{host or address or 'local socket'}:{port}",
            make_conninfo(conninfo, host=host, hostaddr=address, port=port),
            "" if address or not host or host.startswith(("/", "@")) else host,
        )
        for host, address, port in zip(hosts, addresses, ports, strict=True)
    ]
    if parameters.get("load_balance_hosts") == "random":
        random.shuffle(found)
    if parameters.get("target_session_attrs") == "prefer-standby":
        found = [
            Server(name, make_conninfo(one, target_session_attrs=wanted), host)
            for wanted in ("standby", "any")
            for name, one, host in found
        ]
    return found


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
    if parts is None or _is_misparsed(dsn, parts):
        raise SettingsError(
            f"The database connection string ({name}) is not valid; expected key=value pairs"
            " or a postgresql:// URI with the password percent-encoded."
        )


def _is_misparsed(dsn: str, parts: dict[str, Any]) -> bool:
    """Detect an unencoded @ or / in the password of a URI.

    libpq then takes part of the password for the host, port or database name.
    """
    port = str(parts.get("port") or "").replace(",", "")
    if port and not port.isdecimal():
        return True
    scheme, separator, rest = dsn.strip().partition("://")
    if not separator or scheme not in {"postgresql", "postgres"}:
        return False
    authority, _, path = rest.partition("/")
    login, at, hosts = authority.partition("@")  # as libpq does: the first @ before the first /
    if not at:
        hosts = login
    hosts, has_query, _ = hosts.partition("?")
    dbname = "" if has_query else path.partition("?")[0]
    if "@" in hosts:
        return True
    # me:secret@host/name@corp is fine, but not me:sec/ret@host, nor me:s@ec/ret@host/name.
    after_at = dbname.partition("@")[2]
    return "@" in dbname and (not at or "/" in after_at or ":" in after_at or "@" in after_at)


def has_password(dsn: str) -> bool:
    """Return whether the connection string contains a password."""
    return bool(conninfo_to_dict(dsn).get("password"))


def without_password(dsn: str) -> str:
    """Return the connection string without its passwords."""
    parts = conninfo_to_dict(dsn)
    for secret in ("password", "sslpassword"):
        parts.pop(secret, None)
    return make_conninfo("", **parts)


def database_name(dsn: str) -> str:
    """Return a name for the database and schema that a connection string leads to.

    Two strings with the same name lead to the same place; users and secrets are not part of it.
    """
    parameters = effective_parameters(dsn)
    host = parameters.get("host") or parameters.get("hostaddr") or "local socket"
    port = parameters.get("port") or "5432"
    dbname = parameters.get("dbname") or parameters.get("user") or ""
    found = re.search(r"search_path=(\S+)", parameters.get("options", ""))
    return f"{host}:{port}/{dbname}" + (f" schema {found[1]}" if found else "")


def public_name(dsn: str) -> str:
    """Return user, host, port and database of a connection string, to show to users."""
    try:
        given = conninfo_to_dict(dsn)
        if not any(given.get(name) for name in ("host", "hostaddr", "service")):
            found = effective_parameters(dsn)  # from environment variables or a service file
            if found.get("host") or found.get("hostaddr"):
                given = {**found, **given}
    except psycopg.Error:
        return "an unreadable connection string"
    user = f"{given['user']}@" if given.get("user") else ""
    host = given.get("host") or given.get("hostaddr") or given.get("service") or "local socket"
    port = f":{given['port']}" if given.get("port") else ""
    return f"{user}{host}{port}/{given.get('dbname', '')}"

"""Check connection strings, complete them, and show them without secrets."""

from __future__ import annotations

import configparser
import os
import random
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo

from ..settings import SettingsError

if TYPE_CHECKING:
    from ..settings import DatabaseSettings

_MIN_CONNECT_SECONDS = 2  # libpq's minimum


def connection_string(dsn: str, settings: DatabaseSettings) -> str:
    """Return the user's connection string plus our defaults for parameters the user does not set.

    The user can set them in `dsn`, in a service file or in libpq's environment variables.

    Raises:
        psycopg.ProgrammingError: `dsn` is not a valid connection string.
    """
    given = effective_parameters(dsn)
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


def effective_parameters(dsn: str) -> dict[str, str]:
    """Return the parameters that libpq uses: those of `dsn`, of its service, of the environment.

    Raises:
        psycopg.ProgrammingError: `dsn` is not a valid connection string.
    """
    given = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None}
    environment = {
        option.envvar.decode(): option.keyword.decode()
        for option in Conninfo.get_defaults()
        if option.envvar
    }
    found = {
        name: os.environ[variable]
        for variable, name in environment.items()
        if os.environ.get(variable)
    }
    service = given.get("service") or found.get("service")
    return found | (_service_parameters(service) if service else {}) | given


def _service_parameters(service: str) -> dict[str, str]:
    """Read a service file as libpq does (PostgreSQL docs, "The Connection Service File").

    What libpq cannot read it reports itself when it connects; here that counts as no parameters.
    """
    user_file = os.environ.get("PGSERVICEFILE") or Path("~/.pg_service.conf").expanduser()
    folder = os.environ.get("PGSYSCONFDIR")
    for file in (user_file, Path(folder, "pg_service.conf") if folder else None):
        parser = configparser.RawConfigParser(delimiters=("=",), strict=False, default_section="")
        try:
            if file is not None and parser.read(file) and parser.has_section(service):
                return dict(parser.items(service))
        except (configparser.Error, UnicodeDecodeError):
            continue
    return {}


def server_addresses(conninfo: str) -> list[str]:
    """Return a connection string for each server address that `conninfo` names, in order.

    Looks up host names, which may block for long.

    Raises:
        psycopg.OperationalError: no host name could be resolved.
    """
    parameters = effective_parameters(conninfo)
    hosts, addresses, ports = (
        parameters.get(name, "").split(",") for name in ("host", "hostaddr", "port")
    )
    count = max(len(hosts), len(addresses))
    if count == 1 and not parameters.get("host") and not parameters.get("hostaddr"):
        return [conninfo]  # libpq's default socket
    if len(ports) not in {1, count} or any(len(it) not in {1, count} for it in (hosts, addresses)):
        return [conninfo]  # libpq explains what is wrong
    found: list[dict[str, str]] = []
    problems: list[str] = []
    for number in range(count):
        host, address, port = (
            values[number] if len(values) == count else values[0]
            for values in (hosts, addresses, ports)
        )
        server = {"host": host, "hostaddr": address, "port": port}
        try:
            found += [server | {"hostaddr": it} for it in _resolve(host, address, port)]
        except OSError as e:
            problems.append(f"host {host!r} cannot be resolved: {e.strerror or e}")
    if not found:
        raise psycopg.OperationalError("; ".join(problems))
    if parameters.get("load_balance_hosts") == "random":
        random.shuffle(found)
    if parameters.get("target_session_attrs") == "prefer-standby":
        found = [it | {"target_session_attrs": "standby"} for it in found] + [
            it | {"target_session_attrs": "any"} for it in found
        ]
    return [make_conninfo(conninfo, **{k: v for k, v in it.items() if v}) for it in found]


def _resolve(host: str, address: str, port: str) -> list[str]:
    """Return the addresses of a host; an empty one for a Unix socket."""
    if address or not host or host.startswith(("/", "@")):
        return [address]
    answers = socket.getaddrinfo(host, port or "5432", type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


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
    scheme, separator, rest = dsn.strip().partition("://")
    if separator and scheme in {"postgresql", "postgres"}:
        authority, _, path = rest.partition("?")[0].partition("/")
        if authority.count("@") > 1 or "@" in path:
            return True
    port = str(parts.get("port") or "")
    return port != "" and not port.replace(",", "").isdecimal()


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
    except psycopg.Error:
        return "an unreadable connection string"
    user = f"{given['user']}@" if given.get("user") else ""
    host = given.get("host") or given.get("hostaddr") or given.get("service") or "local socket"
    port = f":{given['port']}" if given.get("port") else ""
    return f"{user}{host}{port}/{given.get('dbname', '')}"

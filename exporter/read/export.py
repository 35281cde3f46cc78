"""Stream rows out of Postgres by COPY, in constant memory, as CSV, JSON lines or GoAccess reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from .human import printable, printable_json
from .session import ALL_COLUMNS, COLUMN_NAMES, JSON_ROW, read_only

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..postgres.connection import DeadlineConnection
    from .selection import Selection

STATEMENT_SECONDS = 4 * 3600.0  # a whole month goes through a slow pipe
_COUNT_SECONDS = 30.0

# Text may be a client's. In a spreadsheet a cell that begins so is a formula; OWASP, "CSV
# Injection", has these characters and the remedy; full-width ones count, too.
_NOT_TEXT = frozenset(
    {"started_at", "flow_id", "logged_at", "client_ip", "client_port", "port", "status_code"}
    | {"request_bytes", "response_bytes", "duration_ms", "ttfb_ms", "connect_ms", "server_ip"}
    | {"cache_age_s", "sha256"}
)
_OF_CLIENTS = frozenset(COLUMN_NAMES) - _NOT_TEXT
_GUARDED = sql.SQL(
    "CASE WHEN {column} ~ E'^[=+@\\t\\r\\n\\uff1d\\uff0b\\uff20\\uff0d-]' THEN '''' || {column}"
    " ELSE {column} END AS {column}"
)

_CSV = sql.SQL("COPY ({query}) TO STDOUT (FORMAT csv, HEADER)")
# Each line is one field that holds neither of these two characters, so that COPY leaves it as it is:
# JSON escapes them (RFC 8259 7), and GoAccess' fields are rid of them.
_LINES = sql.SQL("COPY ({query}) TO STDOUT (FORMAT csv, QUOTE E'\\x01', DELIMITER E'\\x02')")

_ROWS = sql.SQL("SELECT {columns} FROM access_log WHERE {where} ORDER BY started_at, flow_id")
_COUNT = sql.SQL("SELECT count(*) FROM access_log WHERE {where}")

# What was never asked, answered or known is "-", and an address that is not known the unspecified one:
# GoAccess refuses a line without.
GOACCESS_OPTIONS = (
    "--log-format='%h|%e|%d|%t|%r|%s|%b|%D|%v|%C|%M|%u' --date-format=%d/%b/%Y --time-format=%H:%M:%S"
    " --no-strict-status"
)
_GOACCESS = sql.SQL("""concat_ws('|',
    coalesce(host(client_ip), '0.0.0.0'),
    {user},
    to_char(started_at, 'DD/Mon/YYYY|HH24:MI:SS'),
    CASE WHEN method IS NULL THEN '-'
         ELSE concat_ws(' ', {method}, {path}, {version}) END,
    coalesce(status_code::text, '-'),
    coalesce(response_bytes, 0),
    coalesce((duration_ms * 1000)::bigint, 0),
    {host},
    {cache},
    {content_type},
    {agent}
)""")
_FIELD = sql.SQL(
    r"regexp_replace(coalesce(nullif({}, ''), '-'), '[\u0001-\u001f\u007f-\u009f|]', '?', 'g')"
)


def streamed(
    connection: DeadlineConnection, selection: Selection, form: str, *, raw: bool = False
) -> Generator[bytes]:
    r"""The rows in order of their start, each with its newline; within one read-only transaction.

    Args:
        connection: In autocommit; used by nobody else until the iterator is done or closed.
        selection: Which rows.
        form: csv (first a line of the columns' names), jsonl, or goaccess, which GOACCESS_OPTIONS
            read. Times are in UTC.
        raw: Leave text in CSV as it is, also where a spreadsheet would take it for a formula.

    Raises:
        psycopg.Error, DeadlineExceededError: the server refused or went away.
    """
    where, values = selection.where()
    rows = _ROWS.format(columns=_COLUMNS_OF[form](raw), where=where)
    statement = (_CSV if form == "csv" else _LINES).format(query=rows)
    with (
        read_only(connection, STATEMENT_SECONDS),
        connection.cursor() as cursor,
        cursor.copy(statement, values) as copy,
    ):
        for data in copy:
            yield bytes(data)


def count(connection: DeadlineConnection, selection: Selection) -> int | None:
    """How many rows there are to stream; None where counting takes longer than is worth it.

    Raises:
        psycopg.Error, DeadlineExceededError: the server refused or went away.
    """
    where, values = selection.where()
    try:
        with read_only(connection, _COUNT_SECONDS):
            row = connection.execute(_COUNT.format(where=where), values).fetchone()
    except psycopg.errors.QueryCanceled:
        return None
    return int(row[0]) if row else None


def for_terminal(line: bytes, form: str) -> bytes:
    """The same line without what would command a terminal."""
    text = line.decode().removesuffix("\n")
    return ((printable_json if form == "jsonl" else printable)(text) + "\n").encode()


def _csv_columns(raw: bool) -> sql.Composed:
    if raw:
        return ALL_COLUMNS
    return sql.SQL(", ").join(map(_guarded, COLUMN_NAMES))


def _guarded(name: str) -> sql.Composable:
    if name == "sha256":
        return sql.SQL("encode(sha256, 'hex') AS sha256")
    if name in _OF_CLIENTS:
        return _GUARDED.format(column=sql.Identifier(name))
    return sql.Identifier(name)


def _json_columns(_: bool) -> sql.Composed:
    return JSON_ROW


def _goaccess_columns(_: bool) -> sql.Composed:
    names = {"user": "proxy_user", "method": "method", "path": "path", "host": "host"}
    names |= {"content_type": "content_type", "agent": "user_agent"}
    names |= {"version": "http_version", "cache": "cache_status"}
    return _GOACCESS.format(**{k: _FIELD.format(sql.Identifier(v)) for k, v in names.items()})


_COLUMNS_OF = {"csv": _csv_columns, "jsonl": _json_columns, "goaccess": _goaccess_columns}

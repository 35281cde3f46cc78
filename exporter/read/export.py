"""Stream rows with COPY, in constant memory, as CSV, JSON lines, input for GoAccess or Parquet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from ..archive.columns import csv_columns, table_columns
from ..archive.parquet import new_parquet_file
from .archived import archived_spans, parts_by_day, with_archive
from .human import printable, printable_json
from .session import ALL_COLUMNS, COLUMN_NAMES, JSON_ROW, read_only

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from ..postgres.connection import DeadlineConnection
    from .selection import Selection

_STATEMENT_SECONDS = 4 * 3600.0  # enough for a month of rows through a slow pipe
_COUNT_SECONDS = 30.0

_NOT_TEXT = frozenset(
    {"started_at", "flow_id", "logged_at", "client_ip", "client_port", "port", "status_code"}
    | {"request_bytes", "response_bytes", "duration_ms", "ttfb_ms", "connect_ms", "server_ip"}
    | {"cache_age_s", "artifact_complete", "sha256"}
)
_TEXT_COLUMNS = frozenset(COLUMN_NAMES) - _NOT_TEXT
# Clients choose these texts. A spreadsheet reads a cell that starts with one of these characters as a
# formula; the fullwidth ones count too. OWASP, "CSV Injection", has the list and the remedy.
_WITHOUT_FORMULA = sql.SQL(
    "CASE WHEN {column} ~ E'^[=+@\\t\\r\\n\\uff1d\\uff0b\\uff20\\uff0d-]' THEN '''' || {column}"
    " ELSE {column} END AS {column}"
)

_CSV = sql.SQL("COPY ({query}) TO STDOUT (FORMAT csv, HEADER {header})")
# Each line is one field without these two characters, so COPY changes nothing: JSON escapes them
# (RFC 8259 7), and _FIELD removes them for GoAccess.
_LINES = sql.SQL("COPY ({query}) TO STDOUT (FORMAT csv, QUOTE E'\\x01', DELIMITER E'\\x02')")

_ROWS = sql.SQL("SELECT {columns} FROM access_log WHERE {where} ORDER BY started_at, flow_id")
_COUNT = sql.SQL("SELECT count(*) FROM access_log WHERE {where}")

# GoAccess rejects empty fields, so unknown is "-", and an unknown address is 0.0.0.0.
GOACCESS_OPTIONS = (
    "--log-format='%h|%e|%d|%t|%r|%s|%b|%D|%v|%C|%M|%u' --date-format=%d/%b/%Y --time-format=%H:%M:%S"
    " --no-strict-status"
)
_GOACCESS = sql.SQL("""concat_ws('|',
    coalesce(host(client_ip), '0.0.0.0'),
    {user},
    to_char(started_at AT TIME ZONE 'UTC', 'DD/Mon/YYYY|HH24:MI:SS'),
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


def stream_rows(
    connection: DeadlineConnection,
    selection: Selection,
    format_name: str,
    *,
    raw: bool = False,
    archive: Path | None = None,
) -> Generator[bytes]:
    r"""Yield the rows in order of started_at, one line each, with \n at the end. Times are in UTC.

    Args:
        connection: In autocommit mode. Not usable otherwise until the generator is exhausted or closed.
        selection: Which rows.
        format_name: csv (starts with a header line), jsonl, or goaccess (for GOACCESS_OPTIONS).
        raw: In csv, do not neutralize formulas.
        archive: The folder of archived days to include.

    Raises:
        ArchiveError: the archive cannot be read.
        psycopg.Error, DeadlineExceededError: the query failed, took too long, or lost its connection.
    """
    columns = _columns(format_name, raw=raw)
    for number, part in enumerate(_parts(connection, selection, archive)):
        where, values = part.where()
        query = _ROWS.format(columns=columns, where=where)
        header = sql.SQL("false" if number else "true")
        template = _CSV if format_name == "csv" else _LINES
        yield from _copied(connection, template.format(query=query, header=header), values)


def write_parquet(
    connection: DeadlineConnection,
    selection: Selection,
    path: Path,
    *,
    archive: Path | None = None,
) -> int:
    """Write the rows to a Parquet file, sorted by started_at; return their number.

    The file appears when it is complete, and replaces one of that name.

    Args:
        connection: In autocommit mode.
        selection: Which rows.
        path: The file.
        archive: The folder of archived days to include.

    Raises:
        ArchiveError: the file cannot be written, the archive cannot be read, or DuckDB is not installed.
        psycopg.Error, DeadlineExceededError: the query failed, took too long, or lost its connection.
    """
    columns = table_columns(connection, sql.Identifier("access_log"))
    names = csv_columns(columns)
    rows = 0
    expected = count_rows(connection, selection, _STATEMENT_SECONDS) or 0
    if archive is not None:
        expected += sum(span.rows for span in archived_spans(archive, selection))
    with new_parquet_file(path, columns, expected) as writer:
        for part in _parts(connection, selection, archive):
            where, values = part.where()
            query = _ROWS.format(columns=names, where=where)
            statement = _CSV.format(query=query, header=sql.SQL("false"))
            for line in _copied(connection, statement, values):
                writer.write(line)
                rows += 1
    return rows


def _parts(
    connection: DeadlineConnection, selection: Selection, archive: Path | None
) -> Iterator[Selection]:
    """Yield the selection, or parts of it that include the rows of the archive while they are used."""
    if archive is None:
        yield selection
        return
    with with_archive(connection, archive) as loader:
        yield from parts_by_day(loader, selection)


def _copied(
    connection: DeadlineConnection, statement: sql.Composed, values: dict[str, Any]
) -> Iterator[bytes]:
    with (
        read_only(connection, _STATEMENT_SECONDS),
        connection.cursor() as cursor,
        cursor.copy(statement, values) as copy,
    ):
        for data in copy:
            yield bytes(data)


def count_rows(
    connection: DeadlineConnection, selection: Selection, seconds: float = _COUNT_SECONDS
) -> int | None:
    """Return the number of selected rows, or None if counting takes too long.

    Raises:
        psycopg.Error, DeadlineExceededError: the query failed or lost its connection.
    """
    where, values = selection.where()
    try:
        with read_only(connection, seconds):
            row = connection.execute(_COUNT.format(where=where), values).fetchone()
    except psycopg.errors.QueryCanceled:
        return None
    return int(row[0]) if row else None


def printable_line(line: bytes, format_name: str) -> bytes:
    """Make a line safe for a terminal: escape control characters."""
    text = line.decode().removesuffix("\n")
    return ((printable_json if format_name == "jsonl" else printable)(text) + "\n").encode()


def _columns(format_name: str, *, raw: bool) -> sql.Composed:
    if format_name == "jsonl":
        return JSON_ROW
    if format_name == "goaccess":
        return _goaccess_columns()
    return ALL_COLUMNS if raw else sql.SQL(", ").join(map(_csv_column, COLUMN_NAMES))


def _csv_column(name: str) -> sql.Composable:
    if name == "sha256":
        return sql.SQL("encode(sha256, 'hex') AS sha256")
    if name in _TEXT_COLUMNS:
        return _WITHOUT_FORMULA.format(column=sql.Identifier(name))
    return sql.Identifier(name)


def _goaccess_columns() -> sql.Composed:
    columns = {"user": "proxy_user", "method": "method", "path": "path", "host": "host"}
    columns |= {"content_type": "content_type", "agent": "user_agent"}
    columns |= {"version": "http_version", "cache": "cache_status"}
    fields = {field: _FIELD.format(sql.Identifier(name)) for field, name in columns.items()}
    return _GOACCESS.format(**fields)

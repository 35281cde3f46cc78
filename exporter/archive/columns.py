"""The columns of an archived table: how PostgreSQL sends them, how DuckDB stores them, and a digest of their values.

Both sides compute the same digest with their own functions, so it also shows a value that changed on the way.
Runs queries in PostgreSQL only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple

from msgspec import Struct
from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from psycopg import Connection

KEY = ("started_at", "flow_id")

_COLUMNS = """
    SELECT attname, format_type(atttypid, NULL), coalesce(col_description(attrelid, attnum), '')
    FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
# Sums of parts of SHA-256 do not depend on the order of rows, and those of two files can be added.
# OFFSET 0 is an optimization fence. Without it PostgreSQL computes the hash once for each part.
_POSTGRES_DIGEST = sql.SQL("""
    SELECT count(*), coalesce(sum(('x' || substr(hash, 1, 15))::bit(60)::bigint), 0),
           coalesce(sum(('x' || substr(hash, 16, 15))::bit(60)::bigint), 0)
    FROM (SELECT encode(sha256(convert_to({text}, 'UTF8')), 'hex') AS hash FROM {rows} AS entry OFFSET 0) AS hashes
""")
_DUCKDB_DIGEST = """
    SELECT count(*), coalesce(sum(('0x' || substr(hash, 1, 15))::BIGINT), 0),
           coalesce(sum(('0x' || substr(hash, 16, 15))::BIGINT), 0)
    FROM (SELECT sha256({text}) AS hash FROM {rows})
"""


class _Type(NamedTuple):
    """One type: its name in DuckDB, and the text that stands for a value in a digest, on each side."""

    duckdb: str
    postgres_text: LiteralString
    duckdb_text: str
    is_self_delimiting: bool = True  # its text holds no comma


_INTEGER = "{}::text", "{}::VARCHAR"
# Floating point numbers compare by their bits: the two programs print them differently.
_TYPES = {
    "timestamp with time zone": _Type(
        "TIMESTAMPTZ", "(extract(epoch FROM {}) * 1000000)::bigint::text", "epoch_us({})::VARCHAR"
    ),
    "uuid": _Type("UUID", *_INTEGER),
    "smallint": _Type("SMALLINT", *_INTEGER),
    "integer": _Type("INTEGER", *_INTEGER),
    "bigint": _Type("BIGINT", *_INTEGER),
    "boolean": _Type("BOOLEAN", *_INTEGER),
    "real": _Type(
        "FLOAT",
        "('x' || encode(float4send({}), 'hex'))::bit(32)::text",
        "{}::BIT::VARCHAR",
    ),
    "double precision": _Type(
        "DOUBLE",
        "('x' || encode(float8send({}), 'hex'))::bit(64)::text",
        "{}::BIT::VARCHAR",
    ),
    "bytea": _Type("BLOB", "encode({}, 'hex')", "lower(hex({}))"),
    "text": _Type("VARCHAR", "{}", "{}", is_self_delimiting=False),
}
# inet and the types of columns that a user added: as PostgreSQL prints them.
_OTHER = _Type(
    "VARCHAR",
    "CASE WHEN {0} IS NOT NULL THEN concat({0}) END",
    "{}",
    is_self_delimiting=False,
)


class ArchiveColumn(Struct, frozen=True):
    """A column of an archived table: its name, PostgreSQL's name of its type, and its comment."""

    name: str
    type: str
    comment: str = ""

    @property
    def kind(self) -> _Type:
        """How to store and compare the column."""
        return _TYPES.get(self.type, _OTHER)

    @property
    def duckdb_name(self) -> str:
        """The name as an SQL identifier of DuckDB."""
        return quoted_name(self.name)


class Digest(Struct, frozen=True):
    """The number of rows, and two sums that change if any value in them does. Digests of separate rows add up."""

    rows: int
    sums: tuple[str, str]  # decimal: they exceed 64 bits

    def __add__(self, other: Digest) -> Digest:
        sums = [str(int(a) + int(b)) for a, b in zip(self.sums, other.sums, strict=True)]
        return Digest(self.rows + other.rows, (sums[0], sums[1]))


NO_ROWS = Digest(0, ("0", "0"))


def quoted_name(name: str) -> str:
    """Quote a name for DuckDB."""
    return '"' + name.replace('"', '""') + '"'


def quoted_text(text: str) -> str:
    """Quote a text for DuckDB."""
    return "'" + text.replace("'", "''") + "'"


def table_columns(connection: Connection[Any], table: sql.Identifier) -> list[ArchiveColumn]:
    """Return the columns of a table; a name without a schema is one in the search path. Raises psycopg.Error."""
    name = table.as_string(connection)
    return [ArchiveColumn(*row) for row in connection.execute(_COLUMNS, (name,))]


def csv_columns(columns: Iterable[ArchiveColumn]) -> sql.Composed:
    """Return what to SELECT in PostgreSQL for `duckdb_csv`."""
    return sql.SQL(", ").join(
        sql.SQL("encode({}, 'hex')").format(sql.Identifier(column.name))
        if column.type == "bytea"
        else sql.Identifier(column.name)
        for column in columns
    )


def duckdb_csv(columns: Sequence[ArchiveColumn], paths: Iterable[str]) -> str:
    """Return a SELECT for DuckDB that reads the CSV output of COPY from pipes, with the right types."""
    types = ", ".join(
        f"{quoted_text(column.name)}: '{'VARCHAR' if column.type == 'bytea' else column.kind.duckdb}'"
        for column in columns
    )
    values = ", ".join(
        f"unhex({column.duckdb_name}) AS {column.duckdb_name}"
        if column.type == "bytea"
        else column.duckdb_name
        for column in columns
    )
    files = ", ".join(map(quoted_text, paths))
    # COPY quotes an empty text, and leaves NULL unquoted.
    return (
        f"SELECT {values} FROM read_csv([{files}], columns = {{{types}}}, auto_detect = false,"  # noqa: S608
        " header = false, delim = ',', quote = '\"', escape = '\"', nullstr = '',"
        " allow_quoted_nulls = false, new_line = '\\n', parallel = false, max_line_size = 4194304,"
        " buffer_size = 8388608)"
    )


def postgres_digest(
    connection: Connection[Any], columns: Sequence[ArchiveColumn], rows: sql.Composable
) -> Digest:
    """Compute the digest of `rows`, a table or a query in parentheses. Raises psycopg.Error."""
    query = _POSTGRES_DIGEST.format(text=_postgres_text(columns), rows=rows)
    return as_digest(connection.execute(query).fetchone())


def duckdb_digest(columns: Sequence[ArchiveColumn], rows: str) -> str:
    """Return the query of DuckDB for the same digest."""
    return _DUCKDB_DIGEST.format(text=_duckdb_text(columns), rows=rows)


def as_digest(row: tuple[Any, ...] | None) -> Digest:
    """Return the result of either query."""
    if row is None:
        raise AssertionError
    rows, one, other = row
    return Digest(int(rows), (str(int(one)), str(int(other))))


def _postgres_text(columns: Sequence[ArchiveColumn]) -> sql.Composed:
    parts = []
    for column in columns:
        name = sql.Identifier(column.name)
        text = sql.SQL(column.kind.postgres_text).format(name)
        if not column.kind.is_self_delimiting:
            text = sql.SQL("octet_length({text}) || ':' || {text}").format(text=text)
        parts.append(sql.SQL("coalesce({}, '-')").format(text))
    return sql.SQL(" || ',' || ").join(parts)


def _duckdb_text(columns: Sequence[ArchiveColumn]) -> str:
    parts = []
    for column in columns:
        text = column.kind.duckdb_text.format(column.duckdb_name)
        if not column.kind.is_self_delimiting:
            text = f"strlen({text}) || ':' || {text}"
        parts.append(f"coalesce({text}, '-')")
    return " || ',' || ".join(parts)

"""The filter `text` finds the same rows with and without its index, which days get once they are over."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest

from exporter import Settings
from exporter.postgres.connection import connect
from exporter.postgres.schema import ensure_schema, grants, schema_name
from exporter.read.newest import BY_ARRIVAL, BY_START, newest
from exporter.read.selection import Selection
from exporter.read.session import read_only
from exporter.retention.housekeeping import Housekeeping
from exporter.retention.text_indexes import build_text_indexes
from exporter.settings import DatabaseSettings
from tests.support.citus import CLUSTER_DSN
from tests.support.command import call
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporter.postgres.connection import DeadlineConnection

pytestmark = pytest.mark.slow

COLUMNS = ("host", "path", "package", "purl", "proxy_user")
# What can go wrong in a search: letter case, wildcards, quotes, other scripts, and the character
# that separates the columns.
VALUES = (
    None,
    "",
    "Requests",
    "requests-2.31.0",
    "100%",
    "a_b",
    "axb",
    "back\\slash",
    "it's",
    "Straße",
    "ΟΔΟΣ",
    "οδος",
    "İstanbul",
    "日本語",
    "two\nlines",
    "re",
    "quests",
    "\n",
    "aa",
)
PAIRED = ("Requests", "two\nlines", "re", "quests", "\n")
TEXTS = (
    *(value for value in VALUES if value),
    "requests",
    *(
        "REQUESTS",
        "req",
        "e",
        "%",
        "_",
        "\\",
        "%_%",
        "0%",
        "straSSE",
        "STRASSE",
        "ß",
        "σ",  # noqa: RUF001
        "本",
        "ı",  # noqa: RUF001
    ),
    *("requests\nre", "quests\nre", "nothing like it", "a%b", "k", "''", ".*", "two", "s\n"),
)
DAY = datetime(2023, 11, 14, tzinfo=UTC)
DAYS = 3
_PLAIN = " OR ".join(f"{column} ILIKE %(pattern)s" for column in COLUMNS)


@pytest.fixture
def log(any_dsn: str) -> Iterator[DeadlineConnection]:
    """A connection of the owner to a log of three old days and today, with all pairs of values."""
    with connect(any_dsn, Settings().database) as connection:
        ensure_schema(connection)
        if not connection.execute(
            "SELECT 1 FROM pg_available_extensions WHERE name = 'pg_trgm'"
        ).fetchone():
            pytest.skip("this PostgreSQL has no pg_trgm")
        days = [DAY + timedelta(days=n) for n in range(DAYS)] + [datetime.now(UTC)]
        for day in days:
            connection.execute("SELECT access_log_ensure_partition(%s)", (day.date(),))
        with (
            connection.cursor() as cursor,
            cursor.copy(
                f"COPY access_log (started_at, flow_id, node, {', '.join(COLUMNS)}) FROM STDIN"
            ) as copy,
        ):
            for day, (number, values) in itertools.product(days, enumerate(_combinations())):
                copy.write_row((day, f"{number:032x}", "test", *values))
        try:
            yield connection
        finally:
            connection.execute("DROP EXTENSION IF EXISTS pg_trgm CASCADE")  # of all schemas


def _combinations() -> Iterator[list[str | None]]:
    """Each value in each column, and pairs of values in each two columns."""
    for column, value in itertools.product(range(5), VALUES):
        yield [value if n == column else None for n in range(5)]
    pairs = itertools.product(PAIRED, PAIRED)
    for values, columns in itertools.product(pairs, itertools.combinations(range(5), 2)):
        by_column = dict(zip(columns, values, strict=True))
        yield [by_column.get(n) for n in range(5)]


def index(connection: DeadlineConnection) -> list[str]:
    """Create the extension and build the indexes, as the housekeeping does for the embedded server."""
    return list(build_text_indexes(connection, DatabaseSettings()))


def plain_search(connection: DeadlineConnection, text: str) -> list[tuple[object, ...]]:
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    found = connection.execute(
        f"SELECT started_at, flow_id FROM access_log WHERE {_PLAIN} ORDER BY 1, 2".encode(),
        {"pattern": f"%{escaped}%"},
    )
    return found.fetchall()


def search(connection: psycopg.Connection, selection: Selection) -> list[tuple[object, ...]]:
    where, values = selection.where()
    query = "SELECT started_at, flow_id FROM access_log WHERE {} ORDER BY 1, 2"
    return connection.execute(psycopg.sql.SQL(query).format(where), values).fetchall()


def plan(connection: DeadlineConnection, selection: Selection) -> str:
    where, values = selection.where()
    query = psycopg.sql.SQL("EXPLAIN SELECT count(*) FROM access_log WHERE {}").format(where)
    return "\n".join(line for (line,) in connection.execute(query, values))


def indexed(connection: DeadlineConnection) -> set[str]:
    found = connection.execute("""
        SELECT indrelid::regclass::text FROM pg_index
        WHERE pg_get_indexdef(indexrelid) LIKE '%access_log_search_text(%' AND indisvalid
    """)
    return {name for (name,) in found}


@pytest.mark.not_on_citus("the plan on the coordinator does not show the index")
def test_index_does_not_change_what_is_found(log: DeadlineConnection) -> None:
    expected = {text: plain_search(log, text) for text in TEXTS}
    assert expected["requests"]
    assert expected["two\nlines"]
    assert expected["requests\nre"] == [], "no text spans two columns"
    assert expected["nothing like it"] == []
    assert {text: search(log, Selection(text=text)) for text in TEXTS} == expected
    assert len(index(log)) == DAYS
    log.execute("SET enable_seqscan = off")
    assert "search_text_idx" in plan(log, Selection(text="requests"))
    assert {text: search(log, Selection(text=text)) for text in TEXTS} == expected


@pytest.mark.parametrize("order", [BY_START, BY_ARRIVAL])
@pytest.mark.parametrize("seconds", [None, 60.0])
def test_index_works_with_all_other_filters(
    log: DeadlineConnection, order: object, seconds: float | None
) -> None:
    others = {
        "since": DAY + timedelta(days=1),
        "until": DAY + timedelta(days=2),
        "user": "requests*",
        "who": "Requests",
        "package": "*",
        "host": "*",
        "status": "none",
        "error": False,
    }
    selections = [
        Selection(**{"text": text, name: value})  # type: ignore[arg-type]
        for text in ("requests", "100%", "nothing like it", "s\n")
        for name, value in others.items()
    ]
    expected = [search(log, selection) for selection in selections]
    index(log)
    log.execute("SET enable_seqscan = off")
    assert [search(log, selection) for selection in selections] == expected
    with read_only(log, 60):
        for selection, rows in zip(selections, expected, strict=True):
            found = newest(log, selection, 10_000, order, search_seconds=seconds)  # type: ignore[arg-type]
            assert sorted(row.key for row in found.rows) == rows
            assert found.searched_back_to is None


def test_only_days_that_are_over_are_indexed_and_only_once(log: DeadlineConnection) -> None:
    assert index(log) == [f"access_log_{DAY + timedelta(days=n):%Y%m%d}" for n in (2, 1, 0)]
    assert indexed(log) == {f"access_log_{DAY + timedelta(days=n):%Y%m%d}" for n in range(DAYS)}
    assert index(log) == []
    late = DAY + timedelta(days=30)
    log.execute("SELECT access_log_ensure_partition(%s)", (late.date(),))
    assert index(log) == [f"access_log_{late:%Y%m%d}"]


def test_rows_that_arrive_late_are_found(log: DeadlineConnection) -> None:
    index(log)
    log.execute(
        "INSERT INTO access_log (started_at, flow_id, node, path) VALUES (%s, gen_random_uuid(), 'test', %s)",
        (DAY, "/late/left-pad"),
    )
    log.execute("UPDATE access_log SET host = 'changed.example' WHERE path = '/late/left-pad'")
    log.execute("SET enable_seqscan = off")
    for text in ("LEFT-PAD", "changed.ex"):
        assert len(search(log, Selection(text=text))) == 1


def test_interrupted_build_is_repeated(log: DeadlineConnection) -> None:
    index(log)
    (left,) = (
        log.execute(
            "SELECT min(indexrelid) FROM pg_index WHERE indrelid = %s::regclass AND"
            " indexprs IS NOT NULL",
            (f"access_log_{DAY:%Y%m%d}",),
        ).fetchone()
        or ()
    )
    log.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s", (left,))
    assert index(log) == [f"access_log_{DAY:%Y%m%d}"]
    assert len(indexed(log)) == DAYS
    assert log.execute("SELECT FROM pg_class WHERE oid = %s", (left,)).fetchone() is None


def test_two_sessions_do_not_build_the_same(log: DeadlineConnection, any_dsn: str) -> None:
    build = build_text_indexes(log, DatabaseSettings())
    next(build)
    with connect(any_dsn, Settings().database) as other:
        assert index(other) == []
        assert len(list(build)) == DAYS - 1
        assert indexed(other) == indexed(log)
        assert len(indexed(log)) == DAYS


def test_days_with_long_names_have_indexes_of_their_own(log: DeadlineConnection) -> None:
    """As pg_partman or a DBA may name them: what tells them apart is at the end."""
    for n in range(DAYS):
        day = f"{DAY + timedelta(days=n):%Y%m%d}"
        log.execute(f"ALTER TABLE access_log_{day} RENAME TO {'long' * 13}_{day}".encode())
    assert len(index(log)) == DAYS
    assert index(log) == []
    assert len(indexed(log)) == DAYS


@pytest.mark.not_on_citus("its role cannot log in to the workers")
def test_without_extension_or_if_it_is_off_nothing_is_built(
    log: DeadlineConnection, any_dsn: str
) -> None:
    own_database = Settings().with_dsn(any_dsn).database
    assert list(build_text_indexes(log, own_database)) == []
    assert list(build_text_indexes(log, DatabaseSettings(index_text=False))) == []
    assert indexed(log) == set()
    log.execute("CREATE EXTENSION pg_trgm SCHEMA pg_catalog")  # not where our tables are
    with psycopg.connect(any_dsn, autocommit=True) as reader:
        schema = schema_name(reader)
        reader.execute(
            grants(
                schema, "pg_monitor", "pg_read_all_data", is_distributed=bool(CLUSTER_DSN)
            ).encode()
        )
        reader.execute("SET ROLE pg_read_all_data")
        assert list(build_text_indexes(reader, own_database)) == [], "it does not own the tables"
        assert search(reader, Selection(text="quests")) == search(log, Selection(text="quests"))
    assert len(list(build_text_indexes(log, own_database))) == DAYS


@pytest.mark.slow
def test_housekeeping_and_init_build_the_indexes(log: DeadlineConnection, any_dsn: str) -> None:
    log.execute("CREATE EXTENSION pg_trgm")
    housekeeping = Housekeeping(Settings().with_dsn(any_dsn), first_seconds=0.0)
    eventually(lambda: len(indexed(log)) == DAYS, timeout=30)
    housekeeping.stop()
    log.execute("DROP EXTENSION pg_trgm CASCADE")
    assert "CREATE EXTENSION pg_trgm;" in call("--dsn", any_dsn, "init").stdout
    assert indexed(log) == set()
    log.execute("CREATE EXTENSION pg_trgm")
    assert "pg_trgm" not in call("--dsn", any_dsn, "init").stdout
    assert len(indexed(log)) == DAYS

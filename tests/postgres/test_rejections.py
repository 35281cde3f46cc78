"""No mistake of a DBA drops rows, and one bad row does not block the rows behind it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from exporter import Exporter, Settings
from exporter.postgres.connection import connect, describe
from exporter.postgres.faults import _FAULTS_BY_CLASS, _FAULTS_BY_STATE, rejected_line
from exporter.postgres.schema import ensure_schema
from exporter.settings import BatchSettings, DatabaseSettings, SpoolSettings
from exporter.write.database import COLUMNS, Database, DatabaseUnavailable, Rejection
from tests.support.citus import NEEDS_TRIGGERS
from tests.support.command import call
from tests.support.samples import make_entry, make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporter import AccessLogEntry
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

Query = Callable[..., list[tuple[object, ...]]]

_TRIGGER = (
    "CREATE FUNCTION check_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$;"
    " CREATE TRIGGER check_row BEFORE INSERT ON access_log FOR EACH ROW EXECUTE FUNCTION check_row()"
)
_POISON = _TRIGGER.format(body="IF NEW.path = '/poison' THEN RAISE EXCEPTION 'not this'; END IF;")


def start(dsn: str, spool_bytes: int = 2**28) -> Exporter:
    database = DatabaseSettings(dsn=dsn, retry_max_seconds=0.5)
    return Exporter(
        Settings(
            node="test",
            database=database,
            batch=BatchSettings(max_seconds=0.05),
            spool=SpoolSettings(max_bytes=spool_bytes),
        )
    )


@pytest.fixture
def exporter(dsn: str) -> Iterator[Exporter]:
    create_schema(dsn)  # before the test changes it
    running = start(dsn)
    yield running
    running.stop()


def send(exporter: Exporter, *paths: str) -> None:
    for path in paths:
        number = exporter.status()["seen"]
        assert exporter.log_access(make_exchange(number, target=path.encode()))


@pytest.mark.parametrize("spool_bytes", [2**28, 0])
@NEEDS_TRIGGERS
def test_a_row_that_a_trigger_refuses_does_not_block_the_rows_behind_it(
    dsn: str, query: Query, spool_bytes: int
) -> None:
    exporter = start(dsn, spool_bytes)
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    query(_POISON)
    send(exporter, "/poison")
    eventually(lambda: exporter.status()["retries"] > 1)
    assert exporter.status()["rejected"] == 0
    send(exporter, "/good")
    eventually(lambda: query("SELECT path FROM access_log") == [("/good",)])
    eventually(lambda: query("SELECT reason, entries FROM access_log_gap") == [("rejected", 1)])
    status = exporter.status()
    assert (status["rejected"], status["written"]) == (1, 1)
    send(exporter, "/poison", "/better")
    eventually(lambda: exporter.status()["rejected"] == 2)
    assert exporter.stop()
    assert query("SELECT path FROM access_log ORDER BY started_at") == [("/good",), ("/better",)]


@NEEDS_TRIGGERS
def test_rows_of_one_batch_are_told_apart(exporter: Exporter, query: Query) -> None:
    query(_POISON)
    send(exporter, *(f"/{number}" if number % 10 else "/poison" for number in range(200)))
    eventually(lambda: exporter.status()["written"] == 180)
    eventually(lambda: exporter.status()["rejected"] == 20)
    assert query("SELECT sum(entries) FROM access_log_gap") == [(20,)]


@pytest.mark.parametrize(
    ("change", "repair", "reason"),
    [
        (
            "ALTER TABLE access_log ADD CONSTRAINT no_rows CHECK (status_code = 1) NOT VALID",
            "ALTER TABLE access_log DROP CONSTRAINT no_rows",
            "no_rows",
        ),
        (
            "ALTER TABLE access_log ADD COLUMN extra text NOT NULL",
            "ALTER TABLE access_log DROP COLUMN extra",
            "extra",
        ),
        pytest.param(
            _TRIGGER.format(body="RAISE EXCEPTION 'closed for today';"),
            "DROP FUNCTION check_row CASCADE",
            "closed for today",
            marks=NEEDS_TRIGGERS,
        ),
        pytest.param(
            _TRIGGER.format(body="NEW.port := 1 / 0;"),
            "DROP FUNCTION check_row CASCADE",
            "division by zero",
            marks=NEEDS_TRIGGERS,
        ),
        pytest.param(
            _TRIGGER.format(body="NEW.port := 'x'::int;"),
            "DROP FUNCTION check_row CASCADE",
            "invalid input syntax",
            marks=NEEDS_TRIGGERS,
        ),
    ],
    ids=["check", "not null", "trigger", "division", "cast"],
)
def test_a_mistake_in_the_schema_drops_no_row(
    exporter: Exporter, query: Query, change: str, repair: str, reason: str
) -> None:
    query(change)
    send(exporter, "/1")
    eventually(lambda: exporter.status()["away"])
    send(exporter, *(f"/{number}" for number in range(2, 300)))
    eventually(lambda: reason in (exporter.status()["last_error"] or ""))
    eventually(lambda: exporter.status()["retries"] > 3)
    status = exporter.status()
    assert (status["rejected"], status["dropped"], status["written"]) == (0, 0, 0)
    query(repair)
    eventually(lambda: exporter.status()["written"] == 299)
    assert query("SELECT count(*) FROM access_log") == [(299,)]
    assert query("SELECT count(*) FROM access_log_gap") == [(0,)]


# States that a trigger can raise, at least one per class of appendix A, and some that are not in it.
_STATES = [
    "08006",
    "09000",
    "0A000",
    "0B000",
    "0F000",
    "0L000",
    "0P000",
    "0Z000",
    "10608",
    "20000",
    "21000",
    "22021",
    "22023",
    "23000",
    "23502",
    "23503",
    "23505",
    "23514",
    "24000",
    "25006",
    "25P04",
    "26000",
    "27000",
    "28000",
    "2B000",
    "2D000",
    "2F003",
    "34000",
    "38000",
    "39000",
    "3B000",
    "3D000",
    "3F000",
    "40001",
    "42501",
    "42601",
    "42883",
    "42P01",
    "44000",
    "45000",
    "53100",
    "54000",
    "54001",
    "55000",
    "55006",
    "55P03",
    "57014",
    "57P01",
    "58030",
    "72000",
    "F0000",
    "HV000",
    "P0001",
    "P0002",
    "P0004",
    "UZ001",
    "XX001",
    "XX000",
]
_NOT_ERRORS = {"00", "01", "02", "03"}
_AFTER_TRIGGER = _TRIGGER.replace("BEFORE INSERT", "AFTER INSERT")
_DEFERRED_TRIGGER = _TRIGGER.replace(
    "CREATE TRIGGER check_row BEFORE INSERT ON access_log",
    "CREATE CONSTRAINT TRIGGER check_row AFTER INSERT ON access_log_20231114 INITIALLY DEFERRED",
)


@pytest.fixture
def database(dsn: str) -> Iterator[Database]:
    database = Database(DatabaseSettings(dsn=dsn))
    database.open()
    yield database
    database.close()


def create_schema(dsn: str) -> None:
    with connect(dsn, DatabaseSettings()) as connection:
        ensure_schema(connection)


def paths(query: Query) -> list[object]:
    return [path for (path,) in query("SELECT path FROM access_log ORDER BY started_at")]


def good_and_bad(*numbers: int) -> list[AccessLogEntry]:
    """Rows with these numbers. Every third has the path /poison."""
    return [make_entry(n, path="/poison" if n % 3 == 0 else f"/{n}") for n in numbers]


@pytest.mark.parametrize("trigger", [_TRIGGER, _AFTER_TRIGGER], ids=["before", "after"])
@pytest.mark.parametrize("state", _STATES)
@NEEDS_TRIGGERS
def test_row_that_a_trigger_refuses_with_any_state_is_left_out(
    database: Database, query: Query, state: str, trigger: str
) -> None:
    raising = f"RAISE EXCEPTION 'not this' USING ERRCODE = '{state}';"
    query(trigger.format(body=f"IF NEW.path = '/poison' THEN {raising} END IF;"))
    rejections = database.write(good_and_bad(1, 2, 3, 4, 5, 6))
    assert [(it.entry.path, it.sqlstate) for it in rejections] == [("/poison", state)] * 2
    assert paths(query) == ["/1", "/2", "/4", "/5"]
    (alone,) = database.write(good_and_bad(9))  # others were accepted before
    assert alone.sqlstate == state
    query("DROP TRIGGER check_row ON access_log")
    query(
        f"CREATE OR REPLACE FUNCTION check_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {raising} END $$"
    )
    query(
        f"CREATE TRIGGER check_row {'AFTER' if trigger is _AFTER_TRIGGER else 'BEFORE'}"
        " INSERT ON access_log FOR EACH ROW EXECUTE FUNCTION check_row()"
    )
    for numbers in ((10, 11), (10,)):
        with pytest.raises(DatabaseUnavailable, match=f"not this.*{state}"):
            database.write(good_and_bad(*numbers))
    query("DROP FUNCTION check_row CASCADE")
    assert database.write(good_and_bad(10, 11)) == []


@NEEDS_TRIGGERS
def test_row_that_a_deferred_trigger_refuses_is_left_out(database: Database, query: Query) -> None:
    assert database.write(good_and_bad(1)) == []
    refuse = "IF NEW.path = '/poison' THEN RAISE EXCEPTION 'not this'; END IF;"
    query(_DEFERRED_TRIGGER.format(body=refuse))
    assert len(database.write(good_and_bad(2, 3, 4))) == 1
    assert len(database.write(good_and_bad(6))) == 1
    assert paths(query) == ["/1", "/2", "/4"]


@NEEDS_TRIGGERS
def test_row_whose_trigger_violates_the_key_of_another_table_is_left_out(
    database: Database, query: Query
) -> None:
    """Its name ends like that of our key, but the row is not in the table."""
    query("CREATE TABLE audit (path text PRIMARY KEY)")
    query(_TRIGGER.format(body="INSERT INTO audit VALUES (NEW.path);"))
    assert database.write([make_entry(1, path="/1")]) == []
    (rejection,) = database.write([make_entry(2, path="/1"), make_entry(3, path="/3")])
    assert (rejection.entry.path, rejection.sqlstate) == ("/1", "23505")
    assert paths(query) == ["/1", "/3"]


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE access_log ADD CHECK (path <> '/poison') NOT VALID",
        pytest.param(_POISON, marks=NEEDS_TRIGGERS),
        pytest.param(_POISON.replace("BEFORE INSERT", "AFTER INSERT"), marks=NEEDS_TRIGGERS),
    ],
    ids=["check", "before", "after"],
)
@pytest.mark.parametrize("numbers", [(3,), (1, 2, 3, 4)], ids=["alone", "batch"])
def test_stored_row_that_is_sent_again_after_a_change_is_no_gap(
    database: Database, query: Query, change: str, numbers: tuple[int, ...]
) -> None:
    """A connection that was lost during a commit leaves rows in doubt."""
    assert database.write(good_and_bad(3, 4)) == []
    query(change)
    assert database.write(good_and_bad(*numbers)) == []
    (rejection,) = database.write(good_and_bad(5, 6))  # a new one is rejected
    assert rejection.entry == good_and_bad(6)[0]
    assert paths(query) == [f"/{n}" if n % 3 else "/poison" for n in sorted({*numbers, 3, 4, 5})]


def test_error_of_a_broken_connection_shows_no_row() -> None:
    error = psycopg.OperationalError(
        "consuming input failed: FATAL: terminating connection due to transaction timeout\n"
        'CONTEXT:  SQL statement "SELECT pg_sleep(2)"\n'
        'COPY access_log, line 2: "2026-11-27 00:00:00+00\tname@example"'
    )
    assert describe(error) == (
        "consuming input failed: FATAL: terminating connection due to transaction timeout"
    )


def test_every_class_of_the_table_exists() -> None:
    """A wrong digit would make it a bad row."""
    states = {getattr(error, "sqlstate", None) for error in vars(psycopg.errors).values()}
    known = {state for state in states if isinstance(state, str)}
    classes = {state[:2] for state in known}
    assert classes >= _FAULTS_BY_CLASS.keys()
    assert known >= _FAULTS_BY_STATE.keys()
    assert {state[:2] for state in _STATES} >= classes - _NOT_ERRORS


@pytest.mark.parametrize(
    "context",
    [
        'COPY access_log, line 3, column path: "/x"',
        "COPY access_log, Zeile 3, Spalte path: »/x«",
        "COPY access_log, ligne 3, colonne path : « /x »",
        "COPY access_log, línea 3, columna path: «/x»",
    ],
)
def test_row_and_column_are_found_in_any_language(context: str) -> None:
    diagnosis = SimpleNamespace(context=context, message_primary="no")
    error = type("LocalizedError", (psycopg.DataError,), {"sqlstate": "22003", "diag": diagnosis})()
    assert rejected_line(error, 5) == 2
    assert rejected_line(error, 2) is None
    assert describe(error) == "no (22003, column path)"


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100, 400])
@pytest.mark.parametrize("trigger", [_TRIGGER, _AFTER_TRIGGER], ids=["before", "after"])
@NEEDS_TRIGGERS
def test_every_bad_row_of_a_batch_is_found(
    database: Database, query: Query, count: int, trigger: str
) -> None:
    query(trigger.format(body="IF NEW.path = '/poison' THEN RAISE EXCEPTION 'no'; END IF;"))
    database.write(good_and_bad(100_001))
    bad = [make_entry(n, path="/poison") for n in range(count)]
    good = good_and_bad(*(3 * n + 1 for n in range(1000, 1000 + count)))
    for batch in (bad, [*bad, *good], [*good, *bad]):
        assert [it.entry for it in database.write(batch)] == bad
    assert query("SELECT count(*) FROM access_log") == [(count + 1,)]


@NEEDS_TRIGGERS
def test_many_rows_refused_alone_at_startup_do_not_block(dsn: str, query: Query) -> None:
    """No row was accepted before, and each one is a batch of its own."""
    create_schema(dsn)
    query(_POISON)
    exporter = start(dsn)
    for number in range(1, 21):
        send(exporter, "/poison")
        eventually(lambda number=number: exporter.status()["spooled"] == number)  # type: ignore[misc]
    send(exporter, "/good")
    eventually(lambda: exporter.status()["spooled"] == 0, timeout=20)
    eventually(lambda: (exporter.status()["written"], exporter.status()["rejected"]) == (1, 20))
    assert exporter.stop()
    assert query("SELECT sum(entries), min(reason) FROM access_log_gap") == [(20, "rejected")]


@NEEDS_TRIGGERS
def test_more_refused_rows_than_memory_holds_do_not_block_without_a_spool(
    dsn: str, query: Query
) -> None:
    """A good row behind them is still in the buffer."""
    create_schema(dsn)
    query(_POISON)
    exporter = start(dsn, spool_bytes=0)
    send(exporter, *["/poison"] * 1500)
    eventually(lambda: exporter.status()["retries"] > 1, timeout=30)
    assert exporter.status()["rejected"] == 0
    send(exporter, "/good")
    eventually(lambda: exporter.status()["rejected"] == 1500, timeout=60)
    eventually(lambda: paths(query) == ["/good"])
    assert exporter.stop()


@NEEDS_TRIGGERS
def test_refused_row_waits_through_a_restart(dsn: str, query: Query) -> None:
    create_schema(dsn)
    query(_POISON)
    first = start(dsn)
    send(first, "/poison")
    eventually(lambda: first.status()["spooled"] == 1)
    assert first.stop()
    second = start(dsn)
    eventually(lambda: second.status()["away"])
    assert second.log_access(make_exchange(100, target=b"/good"))
    eventually(lambda: paths(query) == ["/good"])
    eventually(lambda: query("SELECT reason, entries FROM access_log_gap") == [("rejected", 1)])
    assert second.stop()


@NEEDS_TRIGGERS
def test_refused_row_is_no_outage_once_others_were_accepted(
    exporter: Exporter, query: Query
) -> None:
    send(exporter, "/good")
    eventually(lambda: exporter.status()["written"] == 1)
    query(_POISON)
    send(exporter, "/poison")
    eventually(lambda: exporter.status()["rejected"] == 1)
    assert (exporter.status()["retries"], exporter.status()["away"]) == (0, False)


@NEEDS_TRIGGERS
def test_rows_that_a_trigger_discards_are_gaps(exporter: Exporter, query: Query) -> None:
    query(_TRIGGER.format(body="IF NEW.path = '/poison' THEN RETURN NULL; END IF;"))
    send(exporter, "/1", "/poison", "/2")
    eventually(lambda: exporter.status()["rejected"] == 1)
    send(exporter, "/poison")
    eventually(lambda: exporter.status()["rejected"] == 2)
    send(exporter, *["/3", "/poison", "/poison"] * 40)
    eventually(lambda: exporter.status()["rejected"] == 82)
    assert (exporter.status()["written"], exporter.status()["retries"]) == (42, 0)
    assert exporter.stop()
    assert query("SELECT count(*) FROM access_log") == [(42,)]
    assert query("SELECT sum(entries), min(reason) FROM access_log_gap") == [(82, "rejected")]


@NEEDS_TRIGGERS
def test_trigger_that_discards_every_row_drops_none(exporter: Exporter, query: Query) -> None:
    query(_TRIGGER.format(body="RETURN NULL;"))
    send(exporter, "/1")
    eventually(lambda: "discards" in (exporter.status()["last_error"] or ""))
    send(exporter, "/2", "/3")
    eventually(lambda: exporter.status()["spooled"] == 3)
    query("DROP FUNCTION check_row CASCADE")
    eventually(lambda: exporter.status()["written"] == 3)
    assert exporter.status()["rejected"] == 0
    assert paths(query) == ["/1", "/2", "/3"]


@NEEDS_TRIGGERS
def test_rows_already_there_are_told_from_discarded_ones(database: Database, query: Query) -> None:
    assert database.write(good_and_bad(1, 2)) == []
    query(_TRIGGER.format(body="IF NEW.path = '/poison' THEN RETURN NULL; END IF;"))
    assert len(database.write(good_and_bad(1, 2, 3, 4, 6))) == 2
    assert paths(query) == ["/1", "/2", "/4"]
    query(
        "CREATE OR REPLACE FUNCTION check_row() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    )
    with pytest.raises(DatabaseUnavailable, match="discards"):
        database.write(good_and_bad(1, 2, 7))


@pytest.mark.not_on_citus("Citus refuses unique indexes without the distribution column")
def test_unique_index_of_a_dba_drops_no_row_silently(database: Database, query: Query) -> None:
    assert database.write([make_entry(1)]) == []
    query("CREATE UNIQUE INDEX one_host ON access_log_20231114 (host)")
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match="one_host"):
            database.write([make_entry(2), make_entry(3)])
    query("DROP INDEX one_host")
    assert database.write([make_entry(2), make_entry(3)]) == []
    query(
        "CREATE UNIQUE INDEX one_path ON access_log_20231114 (path) WHERE path <> '/simple/demo/'"
    )
    assert database.write([make_entry(4, path="/once"), make_entry(5)]) == []
    (rejection,) = database.write([make_entry(6, path="/once"), make_entry(7)])
    assert "one_path" in rejection.reason
    assert database.write([make_entry(4, path="/once"), make_entry(8)]) == []  # sent again
    assert query("SELECT count(*) FROM access_log") == [(7,)]


def test_mistake_in_one_partition_rejects_no_row_of_it(database: Database, query: Query) -> None:
    """Rows of another day show nothing about it."""
    other_day = make_entry(1, started_at="2023-11-15 00:00:00+00")
    assert database.write([other_day, make_entry(1)]) == []
    query("ALTER TABLE access_log_20231114 ADD CONSTRAINT wrong CHECK (port = 1) NOT VALID")
    for batch in (
        [make_entry(2)],
        [make_entry(2), other_day._replace(flow_id=make_entry(9).flow_id)],
    ):
        with pytest.raises(DatabaseUnavailable, match="wrong"):
            database.write(batch)
    query("ALTER TABLE access_log_20231114 DROP CONSTRAINT wrong")
    assert database.write([make_entry(2)]) == []


def test_mistake_in_the_table_of_artifacts_rejects_no_row(database: Database, query: Query) -> None:
    def download(number: int) -> AccessLogEntry:
        purl = f"pkg:pypi/demo{number}@1.0"
        return make_entry(number, artifact_kind="artifact", purl=purl, status_code=200)

    assert database.write([make_entry(1), download(2)]) == []
    query("ALTER TABLE artifact_by_node ADD CONSTRAINT wrong CHECK (purl = '') NOT VALID")
    for batch in ([download(3)], [download(3), make_entry(4), download(5)]):
        with pytest.raises(DatabaseUnavailable, match="wrong"):
            database.write(batch)
    query("ALTER TABLE artifact_by_node DROP CONSTRAINT wrong")
    query("ALTER TABLE artifact_by_node ADD CONSTRAINT no_6 CHECK (purl <> 'pkg:pypi/demo6@1.0')")
    (rejection,) = database.write([download(n) for n in (3, 5, 6, 7)])
    assert rejection.entry == download(6)
    assert query("SELECT purl, fetches FROM artifact ORDER BY purl") == [
        (f"pkg:pypi/demo{number}@1.0", 1) for number in (2, 3, 5, 7)
    ]


def test_forbidden_partition_rejects_no_row(database: Database, query: Query) -> None:
    assert database.write([make_entry(1)]) == []
    query(
        "CREATE FUNCTION no_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'no DDL today'; END $$"
    )
    query("CREATE EVENT TRIGGER no_ddl ON ddl_command_start EXECUTE FUNCTION no_ddl()")
    try:
        tomorrow = make_entry(2, started_at="2023-11-15 00:00:00+00")
        with pytest.raises(DatabaseUnavailable, match="no DDL today") as caught:
            database.write([make_entry(3), tomorrow])
        assert caught.value.configuration
    finally:
        query("DROP EVENT TRIGGER no_ddl")
    assert database.write([make_entry(3), tomorrow]) == []


@NEEDS_TRIGGERS
def test_reason_says_where_the_cause_is(dsn: str, query: Query) -> None:
    def reason() -> str:
        database = Database(DatabaseSettings(dsn=dsn))
        try:
            with pytest.raises(DatabaseUnavailable) as caught:
                database.write([make_entry(1), make_entry(2)])
        finally:
            database.close()
        return str(caught.value)

    create_schema(dsn)
    query(_TRIGGER.format(body="RAISE EXCEPTION 'closed';"))
    assert reason() == (
        "it accepts no row: closed (P0001, PL/pgSQL function check_row() line 1 at RAISE)"
    )
    query("DROP FUNCTION check_row CASCADE")
    query("DROP VIEW access_log_partial_reads CASCADE; DROP VIEW access_log_fetches CASCADE")
    query("ALTER TABLE access_log ALTER http_version TYPE varchar(3)")
    assert "value too long for type character varying(3) (22001, column http_version)" in reason()
    query("ALTER TABLE access_log ALTER http_version TYPE text")
    query("ALTER TABLE access_log ADD team text NOT NULL")
    assert 'null value in column "team" of relation "access_log' in reason()


@NEEDS_TRIGGERS
def test_hopeless_batch_costs_few_statements(database: Database, query: Query) -> None:
    """A server whose table accepts nothing must not get every row again at each attempt."""
    query("CREATE SEQUENCE attempts")
    query(_TRIGGER.format(body="PERFORM nextval('attempts'); RAISE EXCEPTION 'never';"))
    with pytest.raises(DatabaseUnavailable, match="never"):
        database.write([make_entry(n) for n in range(5000)])
    ((attempts,),) = query("SELECT last_value FROM attempts")
    assert isinstance(attempts, int)
    assert attempts < 20


@pytest.mark.not_on_citus("Citus refuses privileges on columns")
def test_a_missing_column_privilege_is_for_the_user_to_fix(dsn: str, query: Query) -> None:
    database = Database(DatabaseSettings(dsn=dsn))
    assert database.write([make_entry(1)]) == []
    database.close()
    (schema,) = query("SELECT current_schema()")[0]
    role = f"{schema}_narrow"
    query(f"CREATE ROLE {role} LOGIN")
    try:
        query(
            f"GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT SELECT ON access_log_schema TO {role}"
        )
        allowed = [column for column in COLUMNS if column not in {"path", "query"}]
        query(f"GRANT INSERT ({', '.join(allowed)}) ON access_log TO {role}")
        query(f"GRANT EXECUTE ON FUNCTION access_log_ensure_partition(date) TO {role}")
        narrow = Database(DatabaseSettings(dsn=dsn.replace("user=postgres", f"user={role}")))
        with pytest.raises(
            DatabaseUnavailable, match=r"permission denied.*lacks INSERT on path, query$"
        ) as caught:
            narrow.write([make_entry(2)])
        assert caught.value.configuration
        narrow.close()
    finally:
        query(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_is_not_utf_8_is_refused_and_nothing_is_lost(
    postgres: Postgres, dsn: str, query: Query, encoding: str
) -> None:
    name = f"not_utf8_{encoding.lower()}"
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'".encode()
        )
        try:
            with pytest.raises(DatabaseUnavailable, match=f"encoding {encoding}.*UTF8") as caught:
                Database(DatabaseSettings(dsn=postgres.dsn(name))).open()
            assert caught.value.configuration
            for command in (("tail",), ("report",), ("gaps",), ("export", "csv")):
                result = call("--dsn", postgres.dsn(name), *command)
                assert result.returncode != 0
                assert f"The database {name} has the encoding {encoding}" in result.stderr
                assert len(result.stderr.splitlines()) == 1
            exporter = start(postgres.dsn(name))
            exporter.log_access(make_exchange(1, user_agent="\u2603".encode()))
            eventually(lambda: exporter.status()["spooled"] == 1)
            assert (exporter.status()["rejected"], exporter.status()["dropped"]) == (0, 0)
            exporter.reconfigure(Settings(node="test", database=DatabaseSettings(dsn=dsn)))
            eventually(lambda: exporter.status()["written"] == 1)
            assert exporter.stop()
            assert query("SELECT user_agent FROM access_log") == [("\u2603",)]
        finally:
            admin.execute(f"DROP DATABASE {name} (FORCE)".encode())


@pytest.mark.parametrize("spool_bytes", [2**28, 0])
@NEEDS_TRIGGERS
def test_rows_do_not_wait_for_gaps(dsn: str, query: Query, spool_bytes: int) -> None:
    create_schema(dsn)
    query(_POISON)
    query("ALTER TABLE access_log_gap ADD COLUMN extra text NOT NULL")
    exporter = start(dsn, spool_bytes)
    send(exporter, "/1", "/poison", "/2")
    eventually(lambda: exporter.status()["rejected"] == 1)
    for number in range(3, 30):
        send(exporter, f"/{number}")
        eventually(lambda number=number: exporter.status()["written"] == number)  # type: ignore[misc]
    status = exporter.status()
    assert (status["away"], status["spooled"], status["waiting"]) == (False, 0, 0)
    assert "extra" in status["last_error"]
    assert query("SELECT count(*) FROM access_log_gap") == [(0,)]
    exporter.stop()
    query("ALTER TABLE access_log_gap DROP COLUMN extra")
    if spool_bytes:
        second = start(dsn)
        eventually(lambda: query("SELECT sum(entries) FROM access_log_gap") == [(1,)])
        assert second.stop()


@NEEDS_TRIGGERS
def test_refused_gaps_are_sent_again(
    dsn: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.write.writer._GAPS_RETRY_SECONDS", 0.2)
    create_schema(dsn)
    query(_POISON)
    query("ALTER TABLE access_log_gap ADD COLUMN extra text NOT NULL")
    exporter = start(dsn)
    send(exporter, "/1", "/poison")
    eventually(lambda: exporter.status()["retries"] > 2)
    query("ALTER TABLE access_log_gap DROP COLUMN extra")
    eventually(lambda: query("SELECT sum(entries) FROM access_log_gap") == [(1,)])
    assert exporter.status()["away"] is False
    assert exporter.stop()


_SLOW_ROW = _TRIGGER.format(body="IF NEW.path = '/poison' THEN PERFORM pg_sleep(30); END IF;")


@pytest.mark.parametrize(
    ("limit", "position"),
    [
        ("", 0),
        ("", 20),
        ("-cstatement_timeout=300ms", 20),
        ("-ctransaction_timeout=300ms", 20),
    ],
    ids=["first", "our deadline", "statement_timeout", "transaction_timeout"],
)
@NEEDS_TRIGGERS
def test_one_row_that_is_too_slow_does_not_block_the_others(
    dsn: str, query: Query, limit: str, position: int
) -> None:
    create_schema(dsn)
    query(_SLOW_ROW)
    limited = make_conninfo(dsn, options=f"{conninfo_to_dict(dsn)['options']} {limit}")
    database = Database(DatabaseSettings(dsn=limited, call_seconds=0.5))
    batch = [make_entry(n, path="/poison" if n == position else f"/{n}") for n in range(40)]
    rejections = write_until_done(database, batch)
    assert [it.entry.path for it in rejections] == ["/poison"]
    assert query("SELECT count(*) FROM access_log") == [(39,)]
    assert database.write(good_and_bad(1000, 1001)) == []
    database.close()


@NEEDS_TRIGGERS
def test_trigger_that_is_too_slow_for_a_batch_only_delays_it(dsn: str, query: Query) -> None:
    create_schema(dsn)
    query(_TRIGGER.format(body="PERFORM pg_sleep(0.05);"))
    database = Database(DatabaseSettings(dsn=dsn, call_seconds=1.0))
    assert write_until_done(database, [make_entry(n) for n in range(40)]) == []
    assert query("SELECT count(*) FROM access_log") == [(40,)]
    database.close()


@NEEDS_TRIGGERS
def test_trigger_that_is_too_slow_for_every_row_drops_none(dsn: str, query: Query) -> None:
    create_schema(dsn)
    query(_TRIGGER.format(body="PERFORM pg_sleep(30);"))
    database = Database(DatabaseSettings(dsn=dsn, call_seconds=0.2))
    batch = [make_entry(n) for n in range(3)]
    for _ in range(12):
        with pytest.raises(DatabaseUnavailable):
            database.write(batch)
    query("DROP FUNCTION check_row CASCADE")
    assert write_until_done(database, batch) == []
    assert query("SELECT count(*) FROM access_log") == [(3,)]
    database.close()


def write_until_done(database: Database, batch: list[AccessLogEntry]) -> list[Rejection]:
    for _ in range(20):
        try:
            return database.write(batch)
        except DatabaseUnavailable:
            continue
    raise AssertionError("the batch still waits")


@pytest.mark.parametrize(
    "condition",
    ["", "AND nextval('attempts') <= 4"],  # a row is stored at the second attempt
    ids=["always", "at first"],
)
@NEEDS_TRIGGERS
def test_trigger_that_begins_to_discard_rows_counts_no_artifact_twice(
    database: Database, query: Query, condition: str
) -> None:
    """The connection knows of no trigger, so the first batch is committed with all its counts."""
    artifact: dict[str, Any] = {
        "purl": "pkg:pypi/demo@1.0",
        "artifact_complete": True,
        "response_bytes": 10,
    }
    assert database.write([make_entry(0, **artifact)]) == []
    query("CREATE SEQUENCE attempts")
    query(_TRIGGER.format(body=f"IF NEW.path = '/poison' {condition} THEN RETURN NULL; END IF;"))
    batch = [entry._replace(**artifact) for entry in good_and_bad(*range(1, 13))]
    rejections = database.write(batch)
    assert len(rejections) == (0 if condition else 4)
    ((stored,),) = query("SELECT count(*) FROM access_log")
    assert stored == 13 - len(rejections)
    assert query("SELECT fetches, bytes FROM artifact") == [(stored, 10 * int(str(stored)))]


@NEEDS_TRIGGERS
def test_trigger_that_begins_to_discard_all_rows_counts_no_artifact_twice(
    database: Database, query: Query
) -> None:
    artifact: dict[str, Any] = {"purl": "pkg:pypi/demo@1.0", "artifact_complete": True}
    assert database.write([make_entry(0, **artifact)]) == []
    query(_TRIGGER.format(body="RETURN NULL;"))
    batch = [entry._replace(**artifact) for entry in good_and_bad(*range(1, 13))]
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match="discards rows"):
            database.write(batch)
        assert query("SELECT fetches FROM artifact") == [(1,)]
    query("DROP FUNCTION check_row CASCADE")
    assert database.write(batch) == []
    assert query("SELECT fetches FROM artifact") == [(13,)]

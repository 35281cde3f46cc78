"""No mistake of a DBA drops rows, and one bad row does not block the rows behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import psycopg
import pytest

from exporter import Exporter, Settings
from exporter.settings import BatchSettings, DatabaseSettings, SpoolSettings
from exporter.write.database import Database, DatabaseUnavailable
from tests.support.samples import make_entry, make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import Postgres

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
def exporter(dsn: str, query: Query) -> Iterator[Exporter]:
    running = start(dsn)
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    yield running
    running.stop()


def send(exporter: Exporter, *paths: str) -> None:
    for path in paths:
        number = exporter.status()["seen"]
        assert exporter.log_access(make_exchange(number, target=path.encode()))


@pytest.mark.parametrize("spool_bytes", [2**28, 0])
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
        (
            _TRIGGER.format(body="RAISE EXCEPTION 'closed for today';"),
            "DROP FUNCTION check_row CASCADE",
            "closed for today",
        ),
        (
            _TRIGGER.format(body="NEW.port := 1 / 0;"),
            "DROP FUNCTION check_row CASCADE",
            "division by zero",
        ),
        (
            _TRIGGER.format(body="NEW.port := 'x'::int;"),
            "DROP FUNCTION check_row CASCADE",
            "invalid input syntax",
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
        query(f"GRANT INSERT (started_at, flow_id) ON access_log TO {role}")
        query(f"GRANT EXECUTE ON FUNCTION access_log_ensure_partition(date) TO {role}")
        narrow = Database(DatabaseSettings(dsn=dsn.replace("user=postgres", f"user={role}")))
        with pytest.raises(DatabaseUnavailable, match="permission denied") as caught:
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

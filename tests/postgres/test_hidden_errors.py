"""Errors of COPY that have lost their state, as on Citus, lose no row and block none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from exporter import Settings
from exporter.run import Run
from exporter.write.database import Database, DatabaseUnavailable
from exporter.write.ledger import RunCounts, RunLedger
from tests.support.relay import Relay
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from exporter import AccessLogEntry
    from tests.support.postgres import Postgres

    Query = Callable[..., list[tuple[object, ...]]]

# A cluster hides errors by itself, and refuses the changes of these tests.
pytestmark = pytest.mark.not_on_citus("needs a server of its own")

_ARTIFACT = {"artifact_complete": True, "purl": "pkg:pypi/demo@1.0"}


@pytest.fixture
def relay(postgres: Postgres) -> Iterator[Relay]:
    target = ("127.0.0.1", postgres.port)
    with Relay(target, postgres=True, hides_copy_errors=True) as relay:
        yield relay


@pytest.fixture
def database(dsn: str, postgres: Postgres, relay: Relay) -> Iterator[Database]:
    through_relay = dsn.replace(f"port={postgres.port}", f"port={relay.address[1]}")
    counts = RunCounts(0, 0, 0, 0, 0)
    database = Database(
        Settings().with_dsn(through_relay).database,
        ledger=RunLedger(Run.start("test"), lambda: counts),
    )
    database.open()
    yield database
    assert relay.hidden > 0
    database.close()


def fetches(*numbers: int) -> list[AccessLogEntry]:
    return [make_entry(n, **_ARTIFACT) for n in numbers]


def test_batch_sent_again_is_stored_and_counted_once(database: Database, query: Query) -> None:
    batch = fetches(*range(128))
    assert database.write(batch) == []
    assert database.write(batch) == []
    assert database.write(fetches(*range(64, 192))) == []
    assert database.write(fetches(191)) == []
    assert query("SELECT count(*), count(DISTINCT flow_id) FROM access_log") == [(192, 192)]
    assert query("SELECT fetches FROM artifact") == [(192,)]
    assert query("SELECT sum(rows) FROM access_log_run_day") == [(192,)]


def test_key_of_a_shard_is_ours(dsn: str, query: Query) -> None:
    """A worker reports the name of the shard's key, if the proxy is connected to it."""
    database = Database(Settings().with_dsn(dsn).database)
    assert database.write(fetches(1, 2)) == []
    query(
        "ALTER TABLE access_log_20231114 RENAME CONSTRAINT access_log_20231114_pkey"
        " TO access_log_20231114_pkey_102008"
    )
    assert database.write(fetches(1, 2, 3)) == []
    database.close()
    assert query("SELECT count(*) FROM access_log") == [(3,)]


def test_bad_rows_of_a_partly_written_batch_are_rejected_with_their_state(
    database: Database, query: Query
) -> None:
    assert database.write(fetches(*range(5))) == []
    batch = fetches(*range(20))
    for bad in (3, 7, 19):
        batch[bad] = batch[bad]._replace(port=2**40)
    rejections = database.write(batch)
    # Row 3 is stored: a valid version of it was written before.
    assert [(it.entry, it.sqlstate) for it in rejections] == [
        (batch[7], "22003"),
        (batch[19], "22003"),
    ]
    assert query("SELECT count(*) FROM access_log") == [(18,)]
    assert query("SELECT fetches FROM artifact") == [(18,)]
    assert query("SELECT sum(rows) FROM access_log_run_day") == [(18,)]


def test_partition_that_someone_dropped_is_created_again(database: Database, query: Query) -> None:
    assert database.write(fetches(1)) == []
    query("DROP TABLE access_log_20231114")
    assert database.write(fetches(1, 2)) == []
    assert query("SELECT count(*) FROM access_log") == [(2,)]


def test_constraint_that_accepts_no_row_rejects_none(database: Database, query: Query) -> None:
    assert database.write(fetches(1)) == []
    query("ALTER TABLE access_log ADD CONSTRAINT no_rows CHECK (status_code = 1) NOT VALID")
    with pytest.raises(DatabaseUnavailable, match="no_rows") as info:
        database.write(fetches(1, 2, 3))  # the first is stored
    assert info.value.refused
    query("ALTER TABLE access_log DROP CONSTRAINT no_rows")
    assert database.write(fetches(1, 2, 3)) == []
    assert query("SELECT count(*) FROM access_log") == [(3,)]
    assert query("SELECT fetches FROM artifact") == [(3,)]


def test_row_that_violates_another_key_is_rejected(database: Database, query: Query) -> None:
    query("ALTER TABLE access_log ADD UNIQUE (started_at, port)")
    rows = [make_entry(n, started_at=make_entry(0).started_at, port=n // 2) for n in range(4)]
    rejections = database.write(rows)
    assert [(it.entry.port, it.sqlstate) for it in rejections] == [(0, "23505"), (1, "23505")]
    assert query("SELECT count(*) FROM access_log") == [(2,)]

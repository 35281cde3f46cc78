"""Measure the CPU time per row in an empty table and in a full one, for client and server process."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg

from exporter import Settings, insert_access_log_batch
from exporter.postgres.schema import ensure_schema
from exporter.rows.entry_builder import EntryBuilder
from tests.bench.figures import Figure, Target, Workspace
from tests.bench.log_writers import BATCH_ENTRIES
from tests.bench.machine import cpu_seconds
from tests.bench.synthetic_flows import capture_exchanges

if TYPE_CHECKING:
    from exporter import AccessLogEntry

SECTION = "Growth"
EXPLANATION = """\
COPY of 128 rows at a time into today's partition, with its indexes and the artifact counts. Meanwhile the
table grows from empty to ten million rows in 30 equally full daily partitions, and the table of artifacts to
one million rows. The value is the CPU time of the client's thread plus that of its server process, which
does not depend on the load of the disk."""
_UNIT = "us of CPU per row"
_DAYS = 30
_FILL_SECONDS = 150.0  # a slow machine does not reach ten million rows; the figures name the number
_FAST = "SET maintenance_work_mem = '256MB'; SET synchronous_commit = off"
_COLUMNS_WITHOUT_KEY = "node, client_ip, client_port, proxy_user, user_agent, method, scheme, host, port, path, query, http_version, status_code, content_type, request_bytes, response_bytes, duration_ms, ttfb_ms, connect_ms, server_ip, tls_version, response_source, cache_status, cache_source, cache_age_s, remote, artifact_kind, ecosystem, package, version, filename, purl"  # noqa: E501


def measure(workspace: Workspace) -> list[Figure]:
    """Return the CPU time per row at several table sizes, and the ratio of the last to the first."""
    rows_a_day = workspace.choose(10_000_000 // _DAYS, 10_000)
    artifacts = workspace.choose(1_000_000, 20_000)
    burst = workspace.choose(12_800, 2_560)
    rounds = workspace.choose(8, 2)
    partition_counts = workspace.choose((1, 10, _DAYS), (1, 3))
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    costs: dict[str, tuple[float, ...]] = {}
    with psycopg.connect(workspace.dsn, autocommit=True) as connection:
        ensure_schema(connection)
        connection.execute("SELECT access_log_ensure_partition(%s)", (today.date(),))
        _costs(connection, burst, 1)  # warms up caches and plans
        connection.execute("TRUNCATE access_log, artifact_by_node")
        costs["in an empty table"] = _costs(connection, burst, rounds)
        deadline = time.monotonic() + _FILL_SECONDS
        _fill_today(connection, today, rows_a_day)
        days = 1
        for partition_count in partition_counts:
            days += _fill_days(workspace.dsn, today, range(days, partition_count), deadline)
            _fill_artifacts(connection, artifacts * days // partition_counts[-1])
            connection.execute("CHECKPOINT")
            _costs(connection, burst, 1)  # the first change of a page after a checkpoint costs more
            total = days * rows_a_day / 1_000_000
            name = f"after {total:.2g} million rows in {days} partition{'s' * (days > 1)}"
            costs[name] = _costs(connection, burst, rounds)
            if days < partition_count:
                break
        connection.execute("TRUNCATE access_log, artifact_by_node")
    first, *_, last = costs.values()
    ratio = tuple(
        later / earlier for earlier, later in zip(sorted(first), sorted(last), strict=True)
    )
    return [
        Figure(SECTION, "last relative to first", "x", ratio, Target("<=", 1.1)),
        *(Figure(SECTION, name, _UNIT, values) for name, values in costs.items()),
    ]


def _costs(connection: psycopg.Connection, burst: int, rounds: int) -> tuple[float, ...]:
    """Return the microseconds per row of each round."""
    return tuple(_cost(connection, _entries(burst)) for _ in range(rounds))


def _cost(connection: psycopg.Connection, entries: list[AccessLogEntry]) -> float:
    server = connection.info.backend_pid
    start = time.thread_time() + cpu_seconds(server)
    for first in range(0, len(entries), BATCH_ENTRIES):
        insert_access_log_batch(connection, entries[first : first + BATCH_ENTRIES])
    seconds = time.thread_time() + cpu_seconds(server) - start
    return seconds / len(entries) * 1e6


def _entries(count: int) -> list[AccessLogEntry]:
    """Return entries of today, half of them for new URLs."""
    builder = EntryBuilder(Settings(node="bench"))
    exchanges = [
        *capture_exchanges(count // 2, new_urls=True),
        *capture_exchanges(count - count // 2, new_urls=False),
    ]
    return [builder.build(exchange) for exchange in sorted(exchanges, key=lambda x: x.flow_id)]


def _fill_today(connection: psycopg.Connection, today: datetime, rows: int) -> None:
    """Add this number of rows, copied from existing ones, over the hours of today."""
    connection.execute(
        f"INSERT INTO access_log (started_at, flow_id, {_COLUMNS_WITHOUT_KEY})"
        f" SELECT %(today)s + (now() - %(today)s) * random(), gen_random_uuid(), {_COLUMNS_WITHOUT_KEY}"
        " FROM (SELECT * FROM access_log LIMIT 5000) AS model,"
        " generate_series(1, %(rows)s / 5000)",
        {"today": today, "rows": rows},
    )


def _fill_days(dsn: str, today: datetime, days: range, deadline: float) -> int:
    """Copy today's rows to earlier days, two days in parallel; return how many were done in time."""
    queue = iter(days)
    filled: list[int] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with psycopg.connect(dsn) as connection:
                connection.execute(_FAST)
                while not failures and time.monotonic() < deadline and (days_ago := next(queue, 0)):
                    _fill_day(connection, today, days_ago)
                    filled.append(days_ago)
        except BaseException as e:  # noqa: BLE001 - raised in the calling thread
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return len(filled)


def _fill_day(connection: psycopg.Connection, today: datetime, days_ago: int) -> None:
    """Create a partition like access_log_ensure_partition, but build its indexes last, which is faster."""
    day = today - timedelta(days=days_ago)
    name, source = f"access_log_{day:%Y%m%d}", f"access_log_{today:%Y%m%d}"
    connection.execute(
        f"CREATE TABLE {name} (LIKE access_log INCLUDING DEFAULTS)"
        " WITH (autovacuum_enabled = off)".encode()
    )
    columns = f"started_at, flow_id, {_COLUMNS_WITHOUT_KEY}"
    connection.execute(
        f"INSERT INTO {name} ({columns}) SELECT started_at - %s, gen_random_uuid(), {_COLUMNS_WITHOUT_KEY}"
        f" FROM {source}".encode(),
        (today - day,),
    )
    connection.execute(
        f"ALTER TABLE access_log ATTACH PARTITION {name}"
        f" FOR VALUES FROM ('{day}') TO ('{day + timedelta(days=1)}')".encode()
    )
    connection.commit()


def _fill_artifacts(connection: psycopg.Connection, count: int) -> None:
    """Add this number of artifacts, with unsorted names."""
    connection.execute(
        "INSERT INTO artifact_by_node SELECT 'pkg:pypi/' || md5(n::text) || '@1.0', 'pypi', now(), now(),"
        " 'build-1', 1, 1000, 'test' FROM generate_series(1, %s) AS n ON CONFLICT DO NOTHING",
        (count,),
    )

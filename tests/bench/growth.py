"""Whether a row costs more in a full table than in an empty one: CPU of the client and of its server process."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg

from exporter import Settings, insert_access_log_batch
from exporter.postgres.schema import ensure_schema
from exporter.rows.entry_builder import EntryBuilder
from tests.bench.figures import Figure, Place, Target
from tests.bench.machine import cpu_seconds
from tests.bench.sample import capture_exchanges
from tests.bench.sinks import BATCH_ENTRIES

if TYPE_CHECKING:
    from exporter import AccessLogEntry

SECTION = "Growth"
ABOUT = """\
COPY of 128 rows at a time into the partition of today, with its indexes and the count of artifacts, while
the table grows from nothing to ten million rows in 30 daily partitions, the last of them as full as the
others, and the table of artifacts to a million. CPU of the client's thread and of its server process
together, which a busy disk does not change."""
_UNIT = "us of CPU a row"
_DAYS = 30
_FILL_SECONDS = 150.0  # a slow machine stays below ten million, and the figures say so
_FAST = "SET maintenance_work_mem = '256MB'; SET synchronous_commit = off"
_COLUMNS_BUT_KEY = "node, client_ip, client_port, proxy_user, user_agent, method, scheme, host, port, path, query, http_version, status_code, content_type, request_bytes, response_bytes, duration_ms, ttfb_ms, connect_ms, server_ip, tls_version, response_source, cache_status, cache_source, cache_age_s, remote, artifact_kind, ecosystem, package, version, filename, purl"  # noqa: E501


def measure(place: Place) -> list[Figure]:
    """The cost of a row at each of some sizes, and how much the last is above the first."""
    rows_a_day = place.choose(10_000_000 // _DAYS, 10_000)
    artifacts = place.choose(1_000_000, 20_000)
    burst = place.choose(12_800, 2_560)
    rounds = place.choose(8, 2)
    stages = place.choose((1, 10, _DAYS), (1, 3))
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    found: dict[str, tuple[float, ...]] = {}
    with psycopg.connect(place.dsn, autocommit=True) as connection:
        ensure_schema(connection)
        connection.execute("SELECT access_log_ensure_partition(%s)", (today.date(),))
        _costs(connection, burst, 1)  # caches, plans
        connection.execute("TRUNCATE access_log, artifact")
        found["in an empty table"] = _costs(connection, burst, rounds)
        until = time.monotonic() + _FILL_SECONDS
        _fill_today(connection, today, rows_a_day)
        days = 1
        for environment in stages:
            days += _fill_days(place.dsn, today, range(days, environment), until)
            _fill_artifacts(connection, artifacts * days // stages[-1])
            connection.execute("CHECKPOINT")
            _costs(connection, burst, 1)  # the first change of a page after it costs more
            total = days * rows_a_day / 1_000_000
            name = f"after {total:.2g} million rows in {days} partition{'s' * (days > 1)}"
            found[name] = _costs(connection, burst, rounds)
            if days < environment:
                break
        connection.execute("TRUNCATE access_log, artifact")
    first, *_, last = found.values()
    ratio = tuple(
        later / earlier for earlier, later in zip(sorted(first), sorted(last), strict=True)
    )
    return [
        Figure(SECTION, "the last in times of the first", "x", ratio, Target("<=", 1.1)),
        *(Figure(SECTION, name, _UNIT, values) for name, values in found.items()),
    ]


def _costs(connection: psycopg.Connection, burst: int, rounds: int) -> tuple[float, ...]:
    """Microseconds a row of each round."""
    return tuple(_cost(connection, _entries(burst)) for _ in range(rounds))


def _cost(connection: psycopg.Connection, entries: list[AccessLogEntry]) -> float:
    server = connection.info.backend_pid
    start = time.thread_time() + cpu_seconds(server)
    for place in range(0, len(entries), BATCH_ENTRIES):
        insert_access_log_batch(connection, entries[place : place + BATCH_ENTRIES])
    seconds = time.thread_time() + cpu_seconds(server) - start
    return seconds / len(entries) * 1e6


def _entries(count: int) -> list[AccessLogEntry]:
    """Rows of today, half of them for URLs that never came before."""
    builder = EntryBuilder(Settings(node="bench"))
    exchanges = [
        *capture_exchanges(count // 2, new_urls=True),
        *capture_exchanges(count - count // 2, new_urls=False),
    ]
    return [builder.build(exchange) for exchange in sorted(exchanges, key=lambda x: x.flow_id)]


def _fill_today(connection: psycopg.Connection, today: datetime, rows: int) -> None:
    """So many rows like those there are, over the hours before now."""
    connection.execute(
        f"INSERT INTO access_log (started_at, flow_id, {_COLUMNS_BUT_KEY})"
        f" SELECT %(today)s + (now() - %(today)s) * random(), gen_random_uuid(), {_COLUMNS_BUT_KEY}"
        " FROM (SELECT * FROM access_log LIMIT 5000) AS model,"
        " generate_series(1, %(rows)s / 5000)",
        {"today": today, "rows": rows},
    )


def _fill_days(dsn: str, today: datetime, days: range, until: float) -> int:
    """Copy today to each of these days before it, two at a time; how many there was time for."""
    queue = iter(days)
    filled: list[int] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with psycopg.connect(dsn) as connection:
                connection.execute(_FAST)
                while not failures and time.monotonic() < until and (back := next(queue, 0)):
                    _fill_day(connection, today, back)
                    filled.append(back)
        except BaseException as e:  # noqa: BLE001 - raised by the thread that asked
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return len(filled)


def _fill_day(connection: psycopg.Connection, today: datetime, back: int) -> None:
    """As access_log_ensure_partition makes one, but with the indexes last, which is faster."""
    day = today - timedelta(days=back)
    name, source = f"access_log_{day:%Y%m%d}", f"access_log_{today:%Y%m%d}"
    connection.execute(
        f"CREATE TABLE {name} (LIKE access_log INCLUDING DEFAULTS)"
        " WITH (autovacuum_enabled = off)".encode()
    )
    columns = f"started_at, flow_id, {_COLUMNS_BUT_KEY}"
    connection.execute(
        f"INSERT INTO {name} ({columns}) SELECT started_at - %s, gen_random_uuid(), {_COLUMNS_BUT_KEY}"
        f" FROM {source}".encode(),
        (today - day,),
    )
    connection.execute(
        f"ALTER TABLE access_log ATTACH PARTITION {name}"
        f" FOR VALUES FROM ('{day}') TO ('{day + timedelta(days=1)}')".encode()
    )
    connection.commit()


def _fill_artifacts(connection: psycopg.Connection, count: int) -> None:
    """So many artifacts in all, with names in no order."""
    connection.execute(
        "INSERT INTO artifact SELECT 'pkg:pypi/' || md5(n::text) || '@1.0', 'pypi', now(), now(),"
        " 'build-1', 1, 1000 FROM generate_series(1, %s) AS n ON CONFLICT DO NOTHING",
        (count,),
    )

"""Fill the access_log table with rows like those of a month of builds: `just seed-rows N`.

The same seed, number of rows, number of days and end produce the same rows. Their nodes are `NODES`. The
command refuses to add them to a log with rows of a real proxy without `--force`. `just seed-rows 0`
removes them.
"""

from __future__ import annotations

import math
import random
import sys
import time
import uuid
from bisect import bisect
from datetime import UTC, datetime, timedelta
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import psycopg
from psycopg import sql
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from exporter import SettingsError, check_dsn, load_settings, resolve_dsn
from exporter.postgres.connection import describe, reachable
from exporter.postgres.schema import SchemaError, ensure_schema
from exporter.write.database import COLUMNS
from tests.bench.url_catalog import NULL, Target, UrlCatalog

if TYPE_CHECKING:
    from collections.abc import Iterator

NODES = ("seed", "seed-2", "seed-3")  # reserved: no real proxy may use these names
_NODE_WITH_DIGESTS = NODES[1]

_COPY = sql.SQL("COPY access_log ({}) FROM STDIN").format(
    sql.SQL(", ").join(map(sql.Identifier, (*COLUMNS, "logged_at")))
)
_RECORD = (
    f"SELECT artifact_add('{NODES[0]}', %s::text[], %s::text[], %s::text[], %s::timestamptz[],"
    " %s::timestamptz[], %s::bigint[], %s::bigint[])"
)
_GAP = (
    "INSERT INTO access_log_gap (gap_id, node, from_at, to_at, reason, entries, logged_at)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s)"
)
_LINES_AT_ONCE = 1000
_ARTIFACTS_AT_ONCE = 5000
# Precomputed, because drawing a value for every row takes longer.
_SPREAD = [random.Random(seed).lognormvariate(0, 0.6) for seed in range(4096)]
_NO_IDENTITY = "\t".join([NULL] * 7)
_SECONDS_PER_HOUR = 3600
_TEAMS = ("web", "api", "data", "infra", "mobile", "search", "billing", "qa")
_CACHED = ("HIT", "HIT", "HIT", "HIT", "HIT", "HIT", "REVALIDATED", "STALE", "UPDATING")
_UNCACHED = ("MISS", "MISS", "MISS", "EXPIRED", "BYPASS")

# error_type, status that the client received (or None), text, share of the failures
_FAILURES = (
    ("connect", 502, "[Errno 111] Connect call failed", 16),
    ("dns", 502, "[Errno -2] Name or service not known", 12),
    ("connect_timeout", 504, "connection timed out", 8),
    ("tls_upstream", 502, "Certificate verify failed: certificate has expired", 6),
    ("upstream_closed", 200, "peer closed connection without sending complete message body", 18),
    ("upstream_timeout", 504, "no answer in time", 7),
    ("client_disconnected", None, "Client disconnected.", 25),
    ("tls_client", None, "The client does not trust the proxy's certificate", 5),
    ("proxy_auth", 407, "Proxy authentication required", 2),
    ("killed", None, "Connection killed.", 1),
)
_FAILED_SHARE = 0.011
# status, bytes (None: the size of the target), share per thousand responses, kinds of targets
_ANY = frozenset({"artifact", "index", "sidecar", "blob", "api", "unknown"})
_STATUSES = (
    (200, None, 877, _ANY),
    (304, 0, 95, {"artifact", "index"}),
    (404, 160, 14, _ANY),
    (206, 65_536, 5, {"artifact"}),
    (503, 180, 3, _ANY),
    (500, 180, 2, _ANY),
    (403, 90, 2, _ANY),
    (429, 90, 2, _ANY),
)
_STATUS_SHARES = list(accumulate(status[2] for status in _STATUSES))
_FAILURE_SHARES = list(accumulate(failure[3] for failure in _FAILURES))
_GAP_REASONS = ("buffer_full", "shutdown", "rejected", "unreadable")


class Plan(NamedTuple):
    """What to generate: a number of rows over the days that end at `until`."""

    rows: int
    until: datetime
    days: int = 30
    seed: int = 1


class Row(NamedTuple):
    """One generated row."""

    started_at: float  # Unix time
    line: str  # COPY text
    target: Target
    user: str | None
    fetched: int | None  # bytes, if this counts as a fetch of an artifact


class Fetches:
    """The artifacts that belong to the generated rows."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Any]] = {}

    def count(self, row: Row) -> None:
        """Count a row. Rows must be in order of time."""
        if row.fetched is None or row.target.purl is None:
            return
        at = datetime.fromtimestamp(row.started_at, UTC)
        known = self._rows.setdefault(
            row.target.purl, [row.target.purl, row.target.remote, row.user, at, at, 0, 0]
        )
        known[4] = at
        known[5] += 1
        known[6] += row.fetched

    def write(self, connection: psycopg.Connection[Any]) -> int:
        """Add the counts to the table; return the number of artifacts."""
        rows = iter(self._rows.values())
        while batch := list(islice(rows, _ARTIFACTS_AT_ONCE)):
            connection.execute(_RECORD, [list(column) for column in zip(*batch, strict=True)])
        return len(self._rows)


def generate(plan: Plan) -> Iterator[Row]:
    """Yield the rows in order of time. The same plan always produces the same rows."""
    rng = random.Random(plan.seed)
    catalog = UrlCatalog(rng)
    for hour, count in _counts_by_hour(plan):
        offsets = sorted(rng.random() for _ in range(count))
        for offset in offsets:
            yield _row(rng, catalog, hour + offset * _SECONDS_PER_HOUR)


def _counts_by_hour(plan: Plan) -> Iterator[tuple[float, int]]:
    """Yield the number of rows in each hour: many in working hours, few on weekends."""
    until = plan.until.timestamp()
    hours = [until - _SECONDS_PER_HOUR * hours_ago for hours_ago in range(plan.days * 24, 0, -1)]
    weights = list(accumulate(_load_factor(datetime.fromtimestamp(hour, UTC)) for hour in hours))
    done = 0
    for hour, weight in zip(hours, weights, strict=True):
        total = round(plan.rows * weight / weights[-1])
        yield hour, total - done
        done = total


def _load_factor(at: datetime) -> float:
    weekend = 0.35 if at.weekday() >= 5 else 1.0
    return weekend * (0.4 + 2.0 * math.exp(-((at.hour - 13) ** 2) / 20))


def _row(rng: random.Random, catalog: UrlCatalog, started_at: float) -> Row:
    draw = rng.random
    target = catalog.pick(started_at)
    node = NODES[int(draw() ** 2 * 3)]
    worker = int(draw() * 200)
    user = _user(worker, started_at)
    outcome = _outcome(rng, target)
    ended_at = started_at + outcome.duration_ms / 1000
    digest = target.sha256 if outcome.full_body and node == _NODE_WITH_DIGESTS else NULL
    request, identity = (
        (target.failed_tls_columns, _NO_IDENTITY)
        if outcome.tls_failed
        else (target.request_columns, target.identity_columns)
    )
    line = (
        f"{_iso(started_at)}\t{rng.getrandbits(128):032x}\t{node}"
        f"\t10.20.{worker // 50}.{worker % 50 + 1}\t{int(32768 + draw() * 28000)}"
        f"\t{NULL if user is None else user}\t{request}\t{outcome.columns}\t{identity}\t{outcome.complete}\t{digest}"
        f"\t{NULL}\t{_iso(ended_at + 0.05 + 2 * draw())}\n"
    )
    return Row(started_at, line, target, user, outcome.fetched)


def _user(worker: int, at: float) -> str | None:
    """Return the build that a worker runs at this time; a build takes 15 minutes. Some have no login."""
    if worker < 20:
        return None
    return f"{_TEAMS[worker % len(_TEAMS)]}-{int(at) // 900 % 100_000}"


class Outcome(NamedTuple):
    """How a request ended: the columns status_code to cache_age_s as COPY text, and their key facts."""

    columns: str
    duration_ms: float
    fetched: int | None
    full_body: bool
    complete: str = NULL  # artifact_complete
    tls_failed: bool = False  # the client rejected the proxy's certificate and sent no request


def _outcome(rng: random.Random, target: Target) -> Outcome:
    if rng.random() < _FAILED_SHARE:
        return _failure(rng, target)
    if target.kind == "absent":
        return _with_response(rng, target, 404, target.size)
    if target.kind == "redirect":
        return _with_response(rng, target, 302, 0)
    index = bisect(_STATUS_SHARES, rng.random() * _STATUS_SHARES[-1])
    status, size, _, kinds = _STATUSES[index]
    if target.kind not in kinds:
        status, size = 200, None
    return _with_response(rng, target, status, target.size if size is None else size)


def _with_response(rng: random.Random, target: Target, status: int, size: int) -> Outcome:
    connect = target.head_ms * 1.5 if rng.random() < 0.15 else 0.0
    cache, source, age = _cache(rng, target, status)
    speedup = 0.3 if cache in _CACHED else 1.0
    ttfb = connect + speedup * target.head_ms * _SPREAD[int(rng.random() * len(_SPREAD))]
    duration = ttfb + size / 20_000 * (0.3 + rng.random())  # 20 to 60 MB/s
    columns = (
        f"{status}\t{NULL}\t{NULL}\t{target.content_type}\t{target.sent}\t{size}\t{duration:.3f}\t{ttfb:.3f}"
        f"\t{f'{connect:.3f}' if connect else NULL}\t{target.server_ip}\t{target.tls}\tupstream"
        f"\t{cache}\t{source}\t{age}"
    )
    counts = target.fetchable and status in {200, 304}
    complete = "t" if counts else "f" if target.fetchable and status == 206 else NULL
    return Outcome(columns, duration, size if counts else None, counts and status == 200, complete)


def _cache(rng: random.Random, target: Target, status: int) -> tuple[str, str, str]:
    """Return cache_status, cache_source and cache_age_s: all of them, or three NULLs."""
    if not target.cache_source or status >= 400:
        return NULL, NULL, NULL
    if status == 304 and target.cache_source == "age":
        return "REVALIDATED", "304", NULL
    if rng.random() < target.hit_share:
        cache_status = (
            "HIT" if target.cache_source == "age" else _CACHED[int(rng.random() * len(_CACHED))]
        )
        return cache_status, target.cache_source, str(int(rng.expovariate(1 / 9000)) + 1)
    if target.cache_source == "age":  # a missing Age header says nothing about the cache
        return NULL, NULL, NULL
    return _UNCACHED[int(rng.random() * len(_UNCACHED))], target.cache_source, NULL


def _failure(rng: random.Random, target: Target) -> Outcome:
    index = bisect(_FAILURE_SHARES, rng.random() * _FAILURE_SHARES[-1])
    kind, status, text, _ = _FAILURES[index]
    duration = target.head_ms * rng.lognormvariate(0, 1)
    if kind in {"connect_timeout", "upstream_timeout"}:
        duration += 10_000
    received = int(target.size * rng.random()) if kind == "upstream_closed" else 0
    response_source = {200: "upstream", 407: "addon"}.get(status or 0, NULL)
    connected = kind in {"upstream_closed", "upstream_timeout", "client_disconnected"}
    columns = (
        f"{NULL if status is None else status}\t{kind}\t{text}\t{NULL}\t{target.sent}\t{received}\t{duration:.3f}"
        f"\t{f'{target.head_ms:.3f}' if status == 200 else NULL}\t{NULL}"
        f"\t{target.server_ip if connected else NULL}\t{target.tls if connected else NULL}\t{response_source}"
        f"\t{NULL}\t{NULL}\t{NULL}"
    )
    complete = "f" if target.fetchable and received else NULL
    tls_failed = kind == "tls_client"
    return Outcome(
        columns, duration, None, full_body=False, complete=complete, tls_failed=tls_failed
    )


def _gaps(plan: Plan) -> Iterator[tuple[object, ...]]:
    """Yield one gap for every five days, but at least two."""
    rng = random.Random(plan.seed + 1)
    for _ in range(max(2, plan.days // 5)):
        start = plan.until - timedelta(seconds=rng.random() * plan.days * 86_400 * 0.98)
        end = start + timedelta(seconds=rng.expovariate(1 / 40))
        name = uuid.UUID(int=rng.getrandbits(128))
        reason = rng.choice(_GAP_REASONS)
        yield name, rng.choice(NODES), start, end, reason, 1 + int(rng.random() * 900), end


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def load(connection: psycopg.Connection[Any], plan: Plan) -> Iterator[int]:
    """Write the rows to the tables; yield the number written so far.

    Each day is one transaction. The connection must be in autocommit mode, and the schema must exist.

    Raises:
        psycopg.Error: The server rejected a statement or the connection was lost.
    """
    fetches, done = Fetches(), 0
    for day, rows in groupby(
        generate(plan), lambda row: datetime.fromtimestamp(row.started_at, UTC).date()
    ):
        connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
        with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
            while batch := list(islice(rows, _LINES_AT_ONCE)):
                copy.write("".join(row.line for row in batch))
                for row in batch:
                    fetches.count(row)
                done += len(batch)
                yield done
    with connection.transaction():
        fetches.write(connection)
        if plan.rows:
            connection.cursor().executemany(_GAP, list(_gaps(plan)))


def has_real_rows(connection: psycopg.Connection[Any]) -> bool:
    """Return whether the log has rows of real proxies."""
    query = (
        "SELECT EXISTS (SELECT 1 FROM access_log WHERE node IS NULL OR node <> ALL(%(seed)s))"
        " OR EXISTS (SELECT 1 FROM access_log_gap WHERE node <> ALL(%(seed)s))"
    )
    row = connection.execute(query, {"seed": list(NODES)}).fetchone()
    return row is not None and bool(row[0])


def clear(connection: psycopg.Connection[Any]) -> None:
    """Remove earlier seed rows. If the log has real rows, the table of artifacts keeps all counts.

    Raises:
        psycopg.Error: The server rejected a statement or the connection was lost.
    """
    with connection.transaction():
        if has_real_rows(connection):
            for table in ("access_log", "access_log_gap"):
                connection.execute(f"DELETE FROM {table} WHERE node = ANY(%s)", (list(NODES),))
        else:
            connection.execute("TRUNCATE access_log, access_log_gap, artifact_by_node")


@click.command()
@click.argument("rows", type=click.IntRange(min=0))
@click.option("--days", type=click.IntRange(1, 3650), default=30, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--until", type=click.DateTime(), help="End of the last day, in UTC.  [default: now]")
@click.option(
    "--dsn", default="", help="Database; without it ARTIFACTAPI_DSN, then the embedded server."
)
@click.option("--force", is_flag=True, help="Write even if the log has rows of real proxies.")
def main(rows: int, days: int, seed: int, until: datetime | None, dsn: str, *, force: bool) -> None:
    """Write ROWS rows of generated traffic over the days before now, and remove earlier ones."""
    end = until.replace(tzinfo=UTC) if until else datetime.now(UTC)
    try:
        settings = load_settings(None)
        settings = settings.with_dsn(resolve_dsn(dsn, settings))
        check_dsn(settings.database.dsn)
        with (
            reachable(settings.database) as target,
            psycopg.connect(target, autocommit=True) as connection,
        ):
            ensure_schema(connection)
            _fill(connection, Plan(rows, end, days, seed), force=force)
    except (SettingsError, SchemaError, OSError, psycopg.Error) as e:
        raise click.ClickException(describe(e)) from None


def _fill(connection: psycopg.Connection[Any], plan: Plan, *, force: bool) -> None:
    if plan.rows and not force and has_real_rows(connection):
        raise click.ClickException(
            "The table access_log holds rows of real proxies; "
            "name another database with --dsn, or add --force to write next to them."
        )
    clear(connection)
    started = time.monotonic()
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("rows", total=plan.rows)
        for done in load(connection, plan):
            progress.update(task, completed=done)
    # Like autovacuum in a table that grew for a month.
    connection.execute("VACUUM ANALYZE access_log, access_log_gap, artifact_by_node")
    seconds = time.monotonic() - started
    click.echo(f"{plan.rows} rows over {plan.days} days written in {seconds:.1f} s.")


if __name__ == "__main__":
    main()

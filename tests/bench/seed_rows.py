"""Fill a table access_log with rows like those of a month of builds: `just seed-rows N`.

The same seed, number, days and end give the same rows. They bear the nodes named below, and are
never put beside rows of a real proxy unless one asks for it. `just seed-rows 0` takes them out.
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
from tests.bench.catalogue import NULL, Catalogue, Target

if TYPE_CHECKING:
    from collections.abc import Iterator

NODES = ("seed", "seed-2", "seed-3")  # no real proxy may be called so
_WITH_DIGESTS = NODES[1]

_COPY = sql.SQL("COPY access_log ({}) FROM STDIN").format(
    sql.SQL(", ").join(map(sql.Identifier, (*COLUMNS, "logged_at")))
)
_RECORD = (
    "SELECT artifact_record(%s::text[], %s::text[], %s::text[], %s::timestamptz[],"
    " %s::timestamptz[], %s::bigint[], %s::bigint[])"
)
_GAP = (
    "INSERT INTO access_log_gap (gap_id, node, from_at, to_at, reason, entries, logged_at)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s)"
)
_LINES_AT_ONCE = 1000
_ARTIFACTS_AT_ONCE = 5000
_SPREAD = [random.Random(place).lognormvariate(0, 0.6) for place in range(4096)]  # costs less there
_UNNAMED = "\t".join([NULL] * 7)
_SECONDS_PER_HOUR = 3600
_TEAMS = ("web", "api", "data", "infra", "mobile", "search", "billing", "qa")
_CACHED = ("HIT", "HIT", "HIT", "HIT", "HIT", "HIT", "REVALIDATED", "STALE", "UPDATING")
_UNCACHED = ("MISS", "MISS", "MISS", "EXPIRED", "BYPASS")

# error_type, status the client got (None: none), text, share of the failures
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
# status, bytes (None: as many as the target has), share of the answers in a thousand, of which kinds
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
    """What to generate: so many rows over the days that end at `until`."""

    rows: int
    until: datetime
    days: int = 30
    seed: int = 1


class Row(NamedTuple):
    """One generated row."""

    started_at: float  # seconds since 1970
    line: str  # of COPY
    target: Target
    user: str | None
    fetched: int | None  # bytes, if this counts as a fetch of an artifact


class Fetches:
    """What the table artifact must say about the rows that went by."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Any]] = {}

    def count(self, row: Row) -> None:
        """Take a row into account; they come in the order of time."""
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
        """Add it to the table; how many artifacts there are."""
        every = iter(self._rows.values())
        while some := list(islice(every, _ARTIFACTS_AT_ONCE)):
            connection.execute(_RECORD, [list(column) for column in zip(*some, strict=True)])
        return len(self._rows)


def generate(plan: Plan) -> Iterator[Row]:
    """The rows in the order of time; always the same for the same plan."""
    chance = random.Random(plan.seed)
    catalogue = Catalogue(chance)
    for hour, count in _counts_by_hour(plan):
        offsets = sorted(chance.random() for _ in range(count))
        for offset in offsets:
            yield _row(chance, catalogue, hour + offset * _SECONDS_PER_HOUR)


def _counts_by_hour(plan: Plan) -> Iterator[tuple[float, int]]:
    """How many rows begin in each hour: working hours are busy, week-ends are not."""
    until = plan.until.timestamp()
    hours = [until - _SECONDS_PER_HOUR * back for back in range(plan.days * 24, 0, -1)]
    weights = list(accumulate(_busy(datetime.fromtimestamp(hour, UTC)) for hour in hours))
    done = 0
    for hour, weight in zip(hours, weights, strict=True):
        upto = round(plan.rows * weight / weights[-1])
        yield hour, upto - done
        done = upto


def _busy(at: datetime) -> float:
    weekend = 0.35 if at.weekday() >= 5 else 1.0
    return weekend * (0.4 + 2.0 * math.exp(-((at.hour - 13) ** 2) / 20))


def _row(chance: random.Random, catalogue: Catalogue, started_at: float) -> Row:
    draw = chance.random
    target = catalogue.pick(started_at)
    node = NODES[int(draw() ** 2 * 3)]
    worker = int(draw() * 200)
    user = _user(worker, started_at)
    answer = _answer(chance, target)
    ended_at = started_at + answer.duration_ms / 1000
    digest = target.sha256 if answer.whole and node == _WITH_DIGESTS else NULL
    asked, named = (target.refused, _UNNAMED) if answer.refused else (target.asked, target.named)
    line = (
        f"{_iso(started_at)}\t{chance.getrandbits(128):032x}\t{node}"
        f"\t10.20.{worker // 50}.{worker % 50 + 1}\t{int(32768 + draw() * 28000)}"
        f"\t{NULL if user is None else user}\t{asked}\t{answer.columns}\t{named}\t{answer.complete}\t{digest}"
        f"\t{_iso(ended_at + 0.05 + 2 * draw())}\n"
    )
    return Row(started_at, line, target, user, answer.fetched)


def _user(worker: int, at: float) -> str | None:
    """The build that this worker runs then; a quarter of an hour each. Some log in as nobody."""
    if worker < 20:
        return None
    return f"{_TEAMS[worker % len(_TEAMS)]}-{int(at) // 900 % 100_000}"


class Answer(NamedTuple):
    """How a request ended: the columns status_code to cache_age_s as COPY text, and their sum."""

    columns: str
    duration_ms: float
    fetched: int | None
    whole: bool
    complete: str = NULL
    refused: bool = False  # our certificate: no request was made


def _answer(chance: random.Random, target: Target) -> Answer:
    if chance.random() < _FAILED_SHARE:
        return _failure(chance, target)
    if target.kind == "absent":
        return _answered(chance, target, 404, target.size)
    if target.kind == "redirect":
        return _answered(chance, target, 302, 0)
    place = bisect(_STATUS_SHARES, chance.random() * _STATUS_SHARES[-1])
    status, size, _, kinds = _STATUSES[place]
    if target.kind not in kinds:
        status, size = 200, None
    return _answered(chance, target, status, target.size if size is None else size)


def _answered(chance: random.Random, target: Target, status: int, size: int) -> Answer:
    connect = target.head_ms * 1.5 if chance.random() < 0.15 else 0.0
    cache, source, age = _cache(chance, target, status)
    faster = 0.3 if cache in _CACHED else 1.0
    ttfb = connect + faster * target.head_ms * _SPREAD[int(chance.random() * len(_SPREAD))]
    duration = ttfb + size / 20_000 * (0.3 + chance.random())  # 20 to 60 MB/s
    columns = (
        f"{status}\t{NULL}\t{NULL}\t{target.content_type}\t{target.sent}\t{size}\t{duration:.3f}\t{ttfb:.3f}"
        f"\t{f'{connect:.3f}' if connect else NULL}\t{target.server_ip}\t{target.tls}\tupstream"
        f"\t{cache}\t{source}\t{age}"
    )
    counts = target.fetchable and status in {200, 304}
    complete = "t" if counts else "f" if target.fetchable and status == 206 else NULL
    return Answer(columns, duration, size if counts else None, counts and status == 200, complete)


def _cache(chance: random.Random, target: Target, status: int) -> tuple[str, str, str]:
    """cache_status, cache_source and cache_age_s, all of them or none."""
    if not target.cache_source or status >= 400:
        return NULL, NULL, NULL
    if status == 304 and target.cache_source == "age":
        return "REVALIDATED", "304", NULL
    if chance.random() < target.hit_share:
        word = (
            "HIT" if target.cache_source == "age" else _CACHED[int(chance.random() * len(_CACHED))]
        )
        return word, target.cache_source, str(int(chance.expovariate(1 / 9000)) + 1)
    if target.cache_source == "age":  # its absence says nothing
        return NULL, NULL, NULL
    return _UNCACHED[int(chance.random() * len(_UNCACHED))], target.cache_source, NULL


def _failure(chance: random.Random, target: Target) -> Answer:
    place = bisect(_FAILURE_SHARES, chance.random() * _FAILURE_SHARES[-1])
    kind, status, text, _ = _FAILURES[place]
    duration = target.head_ms * chance.lognormvariate(0, 1)
    if kind in {"connect_timeout", "upstream_timeout"}:
        duration += 10_000
    arrived = int(target.size * chance.random()) if kind == "upstream_closed" else 0
    answered_by = {200: "upstream", 407: "addon"}.get(status or 0, NULL)
    connected = kind in {"upstream_closed", "upstream_timeout", "client_disconnected"}
    columns = (
        f"{NULL if status is None else status}\t{kind}\t{text}\t{NULL}\t{target.sent}\t{arrived}\t{duration:.3f}"
        f"\t{f'{target.head_ms:.3f}' if status == 200 else NULL}\t{NULL}"
        f"\t{target.server_ip if connected else NULL}\t{target.tls if connected else NULL}\t{answered_by}"
        f"\t{NULL}\t{NULL}\t{NULL}"
    )
    complete = "f" if target.fetchable and arrived else NULL
    refused = kind == "tls_client"
    return Answer(columns, duration, None, whole=False, complete=complete, refused=refused)


def _gaps(plan: Plan) -> Iterator[tuple[object, ...]]:
    """A hole every ten days or so, two at least."""
    chance = random.Random(plan.seed + 1)
    for _ in range(max(2, plan.days // 5)):
        start = plan.until - timedelta(seconds=chance.random() * plan.days * 86_400 * 0.98)
        end = start + timedelta(seconds=chance.expovariate(1 / 40))
        name = uuid.UUID(int=chance.getrandbits(128))
        reason = chance.choice(_GAP_REASONS)
        yield name, chance.choice(NODES), start, end, reason, 1 + int(chance.random() * 900), end


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def load(connection: psycopg.Connection[Any], plan: Plan) -> Iterator[int]:
    """Write the rows into the tables; yields how many of them are there so far.

    Each day is a transaction. The connection must be in autocommit; the schema must be there.

    Raises:
        psycopg.Error: the server refused or went away.
    """
    fetches, done = Fetches(), 0
    for day, rows in groupby(
        generate(plan), lambda row: datetime.fromtimestamp(row.started_at, UTC).date()
    ):
        connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
        with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
            while some := list(islice(rows, _LINES_AT_ONCE)):
                copy.write("".join(row.line for row in some))
                for row in some:
                    fetches.count(row)
                done += len(some)
                yield done
    with connection.transaction():
        fetches.write(connection)
        if plan.rows:
            connection.cursor().executemany(_GAP, list(_gaps(plan)))


def has_real_rows(connection: psycopg.Connection[Any]) -> bool:
    """Whether there are rows of real proxies."""
    foreign = (
        "SELECT EXISTS (SELECT FROM access_log WHERE node IS NULL OR node <> ALL(%(seed)s))"
        " OR EXISTS (SELECT FROM access_log_gap WHERE node <> ALL(%(seed)s))"
    )
    row = connection.execute(foreign, {"seed": list(NODES)}).fetchone()
    return row is not None and bool(row[0])


def clear(connection: psycopg.Connection[Any]) -> None:
    """Take earlier seed rows out; beside real rows the table of artifacts keeps what it counted.

    Raises:
        psycopg.Error: the server refused or went away.
    """
    with connection.transaction():
        if has_real_rows(connection):
            for table in ("access_log", "access_log_gap"):
                connection.execute(f"DELETE FROM {table} WHERE node = ANY(%s)", (list(NODES),))
        else:
            connection.execute("TRUNCATE access_log, access_log_gap, artifact")


@click.command()
@click.argument("rows", type=click.IntRange(min=0))
@click.option("--days", type=click.IntRange(1, 3650), default=30, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--until", type=click.DateTime(), help="End of the last day, UTC.  [default: this moment]"
)
@click.option("--dsn", default="", help="Where to; else ARTIFACTAPI_DSN, else the embedded server.")
@click.option("--force", is_flag=True, help="Beside the rows of real proxies, too.")
def main(rows: int, days: int, seed: int, until: datetime | None, dsn: str, *, force: bool) -> None:
    """Write ROWS rows of made-up traffic over the days before now; earlier ones are removed first."""
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
            "name another database with --dsn, or say --force to write beside them."
        )
    clear(connection)
    started = time.monotonic()
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("rows", total=plan.rows)
        for done in load(connection, plan):
            progress.update(task, completed=done)
    # As a table that has grown for a month would be: autovacuum has been there.
    connection.execute("VACUUM ANALYZE access_log, access_log_gap, artifact")
    seconds = time.monotonic() - started
    click.echo(f"{plan.rows} rows over {plan.days} days written in {seconds:.1f} s.")


if __name__ == "__main__":
    main()

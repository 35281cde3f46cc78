"""Check whether builds fetched what their lock files say, from one snapshot of the log. Formats nothing."""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from msgspec import Struct
from psycopg import sql

from ..lockfiles import Unchecked  # noqa: TC001 - msgspec reads the annotations
from .archived import rows_loaded
from .gaps import RecordedGap, find_gaps
from .lock_comparison import Comparison, Fetch, Sighting, compare
from .nodes import find_nodes
from .selection import Selection
from .session import read_only

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from ..lockfiles import LockFile
    from ..postgres.connection import DeadlineConnection
    from ..rows.packages.identity import Remotes
    from .lock_comparison import Allowed
    from .nodes import Node

_STATEMENT_SECONDS = 120.0
MAX_GROUPS = 500_000  # of equal requests; a large build has 5,000
_POLL_SECONDS = 0.25
_MAX_WAIT_SECONDS = 60.0
# Around the requests of a build whose time is not given: a gap here may have hidden more of them.
_MARGIN = timedelta(minutes=10)

_SPAN = sql.SQL("SELECT count(*), min(started_at), max(started_at) FROM access_log WHERE {where}")
_AGE = sql.SQL("""
    SELECT extract(epoch FROM clock_timestamp() - max(logged_at))::float8 FROM access_log
    WHERE {where}
""")
# Without a purl it is a file that a rule recognizes without telling the package.
_FETCHES = sql.SQL("""
    SELECT purl, filename, host, encode(sha256, 'hex'), count(*), min(started_at), max(started_at)
    FROM access_log_fetches WHERE {where}
    GROUP BY 1, 2, 3, 4 ORDER BY min(started_at), purl, filename, host, 4 LIMIT %(limit)s
""")
_SIGHTINGS = sql.SQL("""
    SELECT purl, host, coalesce(bool_or(NOT artifact_complete), false),
           bool_or(artifact_kind = 'artifact' AND method = 'GET'
                   AND (status_code IS NULL OR status_code >= 400)),
           count(*) FILTER (WHERE artifact_kind = 'artifact' AND method = 'GET'
                            AND status_code IN (301, 302, 303, 307, 308))
    FROM access_log WHERE {where} AND purl IS NOT NULL AND artifact_complete IS NOT TRUE
    GROUP BY 1, 2 LIMIT %(limit)s
""")
_ELSEWHERE = sql.SQL("""
    SELECT host, path, count(*), min(started_at), max(started_at)
    FROM access_log
    WHERE {where} AND remote IS NULL AND method = 'GET'
      AND status_code IN (200, 206, 301, 302, 303, 304, 307, 308)
    GROUP BY 1, 2 ORDER BY min(started_at), host, path LIMIT %(limit)s
""")


class TooManyError(Exception):
    """The selection is too large to compare. The message says what to do."""


class LockFileSummary(Struct, frozen=True):
    """What one lock file has."""

    path: str
    format: str
    packages: int
    unchecked: list[Unchecked]  # dependencies that come from no registry


class Verification(Struct, frozen=True):
    """Whether a build fetched what its lock files say."""

    status: str  # "as locked", "findings" or "uncertain"
    reasons: list[str]  # why it is uncertain
    since: datetime | None
    until: datetime | None
    filters: dict[str, str]
    requests: int
    lock_files: list[LockFileSummary]
    comparison: Comparison
    unidentified: dict[str, int]  # downloads of artifacts without a package, by host
    unknown_hosts: dict[str, int]  # downloads from hosts that no remote describes, by host
    gaps: list[RecordedGap]


def wait_for_rows(
    connection: DeadlineConnection, selection: Selection, quiet_seconds: float
) -> None:
    """Wait so long, and then until no selected row has arrived for so long; at most a minute.

    A proxy writes a row up to two seconds after its request. Returns at once if the selected time
    has been over for longer.

    Raises:
        psycopg.Error, DeadlineExceededError: a query failed or lost its connection.
    """
    quiet = timedelta(seconds=quiet_seconds)
    if selection.until is not None and selection.until + quiet < datetime.now(UTC):
        return
    started_at, pause = time.monotonic(), threading.Event()
    where, values = selection.where()
    remaining = quiet_seconds
    while remaining > 0 and time.monotonic() - started_at < _MAX_WAIT_SECONDS:
        pause.wait(max(_POLL_SECONDS, remaining))
        with read_only(connection, _STATEMENT_SECONDS):
            row = connection.execute(_AGE.format(where=where), values).fetchone()
        remaining = quiet_seconds - row[0] if row and row[0] is not None else 0


def verify(
    connection: DeadlineConnection,
    selection: Selection,
    lock_files: Sequence[LockFile],
    allowed: Allowed,
    remotes: Remotes,
    *,
    archive: Path | None = None,
) -> Verification:
    """Compare the selected requests with lock files.

    Args:
        connection: In autocommit mode.
        selection: The requests of the build.
        lock_files: All lock files of the build.
        allowed: What is expected besides.
        remotes: Identify files from hosts that no remote describes.
        archive: The folder of archived days to read as well.

    Raises:
        ArchiveError: the archive cannot be read, or too many of its rows are selected.
        TooManyError: the selection has too many different requests.
        psycopg.Error, DeadlineExceededError: a query failed, took too long, or lost its connection.
    """
    where, values = selection.where()
    values = {**values, "limit": MAX_GROUPS + 1}
    with rows_loaded(connection, archive, selection), read_only(connection, _STATEMENT_SECONDS):
        span = connection.execute(_SPAN.format(where=where), values).fetchone()
        rows = _rows(connection, _FETCHES, where, values)
        sightings = _rows(connection, _SIGHTINGS, where, values)
        elsewhere = _rows(connection, _ELSEWHERE, where, values)
    requests, first_at, last_at = span or (0, None, None)
    fetches = [Fetch(*row) for row in rows if row[0] is not None]
    unidentified = _counts((row[2], row[4]) for row in rows if row[0] is None)
    locked_types = {name for lock_file in lock_files for name in lock_file.ecosystems}
    locked_paths = {
        unquote(file.path): package.purl
        for lock_file in lock_files
        for package in lock_file.packages
        for file in package.files
        if file.path is not None
    }
    found, unknown_hosts = _elsewhere(elsewhere, remotes, locked_types, locked_paths)
    fetches += found
    comparison = compare(fetches, [Sighting(*row) for row in sightings], lock_files, allowed)
    around = _time_around(selection, first_at, last_at)
    gaps = find_gaps(connection, around)
    reasons = _reasons(requests, gaps)
    reasons += _unheard_proxies(find_nodes(connection), around) if requests else []
    return Verification(
        "findings" if comparison.findings else "uncertain" if reasons else "as locked",
        reasons,
        selection.since or first_at,
        selection.until or last_at,
        selection.filters(),
        requests,
        [_summary(lock_file) for lock_file in lock_files],
        comparison,
        unidentified,
        unknown_hosts,
        gaps,
    )


def _rows(
    connection: DeadlineConnection,
    query: sql.SQL,
    where: sql.Composed,
    values: dict[str, Any],
) -> list[tuple[Any, ...]]:
    rows = connection.execute(query.format(where=where), values).fetchall()
    if len(rows) > MAX_GROUPS:
        raise TooManyError(
            f"There are more than {MAX_GROUPS:,} different requests; select one build with --user,"
            " or less time with --since and --until."
        )
    return rows


def _elsewhere(
    rows: Sequence[tuple[Any, ...]],
    remotes: Remotes,
    locked_types: Collection[str],
    locked_paths: Mapping[str, str],
) -> tuple[list[Fetch], dict[str, int]]:
    """Return the packages that came from hosts that no remote describes, and count the rest by host.

    A package has the path of a registry, or the path of a URL in a lock file.
    """
    fetches, others = [], []
    for host, path, count, first_at, last_at in rows:
        identity = remotes.identify_elsewhere(host or "", path or "")
        purl, file_name = identity.purl, identity.filename
        is_artifact = identity.artifact_kind == "artifact" and identity.ecosystem in locked_types
        if purl is None or not is_artifact:
            purl, file_name = locked_paths.get(unquote(path or "")), None
        if purl is not None:
            fetches.append(Fetch(purl, file_name, host, None, count, first_at, last_at))
        else:
            others.append((host, count))
    return fetches, _counts(others)


def _counts(pairs: Iterable[tuple[str | None, int]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, count in pairs:
        counts[name or "-"] += count
    return dict(counts)


def _time_around(
    selection: Selection, first_at: datetime | None, last_at: datetime | None
) -> Selection:
    """Select the time in which a gap or a proxy may have hidden requests of this build."""
    since, until = selection.since, selection.until
    if since is None and first_at is not None:
        since = first_at - _MARGIN
    if until is None and last_at is not None:
        until = last_at + _MARGIN
    return Selection(since=since, until=until, node=selection.node)


def _unheard_proxies(nodes: Sequence[Node], around: Selection) -> list[str]:
    """Return a sentence for each proxy that may have requests of this time that are not in the log."""
    reasons = []
    for node in nodes:
        is_selected = around.node is None or fnmatchcase(node.node, around.node)
        if not is_selected or (around.until is not None and node.started_at > around.until):
            continue
        last_at = node.last_seen_at
        was_seen = around.since is None or last_at >= around.since
        is_over = around.until is not None and last_at > around.until
        if node.state in {"silent", "unknown"} and was_seen and not is_over:
            at = f"{last_at.astimezone():%Y-%m-%d %H:%M:%S}"
            reasons.append(f"The proxy {node.node} has not reported since {at}.")
        elif node.state == "running" and node.spooled:
            rows = "1 row waits" if node.spooled == 1 else f"{node.spooled:,} rows wait"
            reasons.append(f"{rows} on the disk of the proxy {node.node}.")
    return reasons


def _reasons(requests: int, gaps: Sequence[RecordedGap]) -> list[str]:
    reasons = []
    if not requests:
        reasons.append("The log has no request of this build.")
    if gaps:
        lost = sum(gap.entries for gap in gaps)
        reasons.append(
            f"The log lost {lost:,} {'request' if lost == 1 else 'requests'} around this time."
        )
    return reasons


def _summary(lock_file: LockFile) -> LockFileSummary:
    return LockFileSummary(
        lock_file.path, lock_file.format_name, len(lock_file.packages), lock_file.unchecked
    )

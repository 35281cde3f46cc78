"""Store advisories in the database, with the fetched packages that they are about; load them again.

The only module of this package that writes. The tables: migrations/006_advisories.sql.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import psycopg
from msgspec import Struct

from ..advisories.matching import Advisories
from ..advisories.model import Advisory, AffectedPackage, Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ..advisories.matching import Match
    from ..postgres.connection import DeadlineConnection

MAX_KEPT = 500_000  # packages in advisories; they take about 400 MB
_MAX_AFFECTED_BYTES = 1_000_000  # of one package in one advisory
_KEEP_SECONDS = 600.0
_CURSOR_NAME = "artifactapi_kept"
_FETCH_ROWS = 5000

_LOCK = "LOCK TABLE advisory, advisory_match, advisory_state IN SHARE ROW EXCLUSIVE MODE"
_COPY_ADVISORIES = """
    COPY advisory (advisory_id, package, summary, severity, aliases, source, withdrawn, modified, affected)
    FROM STDIN
"""
_COPY_MATCHES = "COPY advisory_match (purl, advisory_id, verdict, severity, summary) FROM STDIN"
_SET_STATE = """
    INSERT INTO advisory_state (kept_at, compared_at, advisories, packages, compared)
    VALUES (now(), now(), %(advisories)s, %(packages)s, %(compared)s)
    ON CONFLICT (only_row) DO UPDATE SET
      kept_at = CASE WHEN %(is_new)s THEN excluded.kept_at ELSE advisory_state.kept_at END,
      compared_at = excluded.compared_at, advisories = excluded.advisories, packages = excluded.packages,
      compared = excluded.compared
"""
_ALL = """
    SELECT advisory_id, package, summary, severity, aliases, source, withdrawn, modified, affected FROM advisory
"""


class TooManyAdvisoriesError(Exception):
    """The advisories are too many or too large to be kept. The message is one sentence."""


class _Affected(Struct, omit_defaults=True):
    """The column affected."""

    ranges: tuple[Range, ...] = ()
    versions: tuple[str, ...] = ()
    release: str | None = None
    column: str = ""


_DECODER = msgspec.json.Decoder(_Affected)


def keep(
    connection: DeadlineConnection,
    advisories: Iterable[AffectedPackage] | None,
    matches: Mapping[str, list[Match]],
    compared: int,
    counts: tuple[int, int],
) -> None:
    """Replace the kept advisories and matches, in one transaction.

    Args:
        connection: In autocommit mode, of a role that may change the tables.
        advisories: What to keep; None: keep those that are kept, and replace only the matches.
        matches: By Package URL, of all packages ever fetched.
        compared: Number of packages ever fetched when they were compared.
        counts: Number of advisories, and of packages that they name.

    Raises:
        TooManyAdvisoriesError: there are more than MAX_KEPT, or one of them is too large.
        psycopg.Error, DeadlineExceededError: a statement failed, took too long, or lost its connection.
    """
    connection.read_only = False
    connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    connection.call_seconds = _KEEP_SECONDS
    with connection.transaction():
        connection.execute(_LOCK)
        if advisories is not None:
            connection.execute("DELETE FROM advisory")
            _copy(connection, _COPY_ADVISORIES, _advisory_rows(advisories))
        connection.execute("DELETE FROM advisory_match")
        _copy(connection, _COPY_MATCHES, _match_rows(matches))
        values = {"advisories": counts[0], "packages": counts[1], "compared": compared}
        connection.execute(_SET_STATE, {**values, "is_new": advisories is not None})
    connection.execute("ANALYZE advisory, advisory_match")


def load_kept(connection: DeadlineConnection) -> Advisories:
    """Return the kept advisories. Call it within `session.read_only`. Raises as `keep`."""
    found = Advisories()
    known: dict[tuple[str, ...], Advisory] = {}
    with connection.cursor(_CURSOR_NAME) as cursor:
        cursor.itersize = _FETCH_ROWS
        for advisory_id, package, *about, affected in cursor.execute(_ALL):
            summary, severity, aliases, source, withdrawn, modified = about
            advisory = known.setdefault(
                (advisory_id, source),
                Advisory(advisory_id, source, summary, severity, aliases, withdrawn, modified),
            )
            each = _DECODER.decode(affected)
            found.add(
                AffectedPackage(
                    advisory, package, each.ranges, each.versions, each.release, each.column
                )
            )
    return found


def _copy(connection: DeadlineConnection, statement: str, rows: Iterable[tuple[str, ...]]) -> None:
    with connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
        for row in rows:
            copy.write_row([_storable(text) for text in row])


def _advisory_rows(advisories: Iterable[AffectedPackage]) -> Iterator[tuple[str, ...]]:
    for number, each in enumerate(advisories, 1):
        advisory = each.advisory
        affected = msgspec.json.encode(
            _Affected(each.ranges, each.versions, each.release, each.column)
        )
        if number > MAX_KEPT or len(affected) > _MAX_AFFECTED_BYTES:
            raise TooManyAdvisoriesError(
                f"{advisory.id} cannot be kept: there can be {MAX_KEPT:,} packages in all advisories, and"
                f" {_MAX_AFFECTED_BYTES:,} bytes of versions for each; name fewer sources."
            )
        yield (
            advisory.id,
            each.key,
            advisory.summary,
            advisory.severity,
            advisory.aliases,
            advisory.source,
            advisory.withdrawn,
            advisory.modified,
            affected.decode(),
        )


def _match_rows(matches: Mapping[str, list[Match]]) -> Iterator[tuple[str, ...]]:
    for purl, found in matches.items():
        for match in found:
            advisory = match.advisory
            yield purl, advisory.id, match.verdict.value, advisory.severity, advisory.summary


def _storable(text: str) -> str:
    """Replace what PostgreSQL cannot store: NUL, and lone surrogates."""
    return text.replace("\x00", "\ufffd").encode(errors="replace").decode()

"""Read which fetched packages kept advisories are about, for the page and reports. Compares no versions.

advisory_store.py keeps them.
"""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from psycopg import Connection

# A role whose grants are from before these tables can still read the log.
_IS_READABLE = """
    SELECT coalesce(has_table_privilege(to_regclass('advisory_state'), 'SELECT')
                    AND has_table_privilege(to_regclass('advisory_match'), 'SELECT')
                    AND has_table_privilege(to_regclass('artifact_by_node'), 'SELECT'), false)
"""
_STATE = """
    SELECT kept_at, compared_at, advisories, packages, compared,
           (SELECT count(DISTINCT purl) FROM artifact_by_node)
    FROM advisory_state
"""
_COMPARED_AT = "SELECT compared_at FROM advisory_state"
_MARKS = """
    SELECT purl, min(verdict), array_agg(advisory_id ORDER BY verdict, advisory_id)
    FROM advisory_match WHERE purl = ANY(%s) GROUP BY purl
"""


# Each fetch counts once, however many advisories are about it. Rollups stand for the rows of whole days.
_FETCHED = sql.SQL("""
    WITH marked AS MATERIALIZED (
      SELECT purl, min(verdict) AS verdict, array_agg(advisory_id ORDER BY verdict, advisory_id) AS advisories
      FROM advisory_match GROUP BY purl
    ), fetched AS (
      SELECT purl, proxy_user, count(*) AS fetches, max(started_at) AS last_at
      FROM access_log_fetches WHERE {where} AND purl IN (SELECT purl FROM marked) GROUP BY 1, 2
      UNION ALL
      SELECT purl, NULL, fetches, from_at
      FROM access_log_rollup_artifact JOIN access_log_rollup USING (rollup_id)
      WHERE rollup_id = ANY(%(rollups)s) AND purl IN (SELECT purl FROM marked)
      UNION ALL
      SELECT purl, users[number], 0, NULL
      FROM access_log_rollup_artifact JOIN access_log_rollup USING (rollup_id)
      CROSS JOIN unnest(user_numbers) AS number
      WHERE rollup_id = ANY(%(rollups)s) AND purl IN (SELECT purl FROM marked)
    )
    SELECT purl, verdict, advisories, sum(fetches)::bigint AS fetches, count(DISTINCT proxy_user), max(last_at),
           count(*) OVER ()
    FROM fetched JOIN marked USING (purl)
    GROUP BY purl, verdict, advisories ORDER BY verdict, fetches DESC, purl LIMIT %(limit)s
""")


class KeptState(Struct, frozen=True):
    """How many advisories are kept, and how old they are."""

    kept_at: datetime
    compared_at: datetime
    advisories: int
    packages: int
    compared: int  # fetched packages, when they were compared
    fetched: int  # fetched packages now; those beyond `compared` were not compared

    @property
    def unchecked(self) -> int:
        """Number of packages that were fetched for the first time since the comparison."""
        return max(0, self.fetched - self.compared)


class Mark(Struct, frozen=True):
    """What kept advisories say about a fetched package."""

    verdict: str  # affected or possible
    advisories: list[str]  # ids


class MarkedArtifact(Struct, frozen=True):
    """A package that kept advisories are about, and how often it was fetched."""

    purl: str
    verdict: str  # affected or possible
    advisories: list[str]  # ids
    fetches: int
    users: int
    last_at: datetime  # of a day that its rollup stands for, the start


class KeptSummary(Struct, frozen=True):
    """What kept advisories say about the selected fetches."""

    kept_at: datetime
    compared_at: datetime
    advisories: int
    unchecked: int  # packages that were fetched for the first time since the comparison
    packages: int  # fetched ones that advisories are about
    top: list[MarkedArtifact]  # affected ones first, then by fetches


def kept_state(connection: Connection[Any]) -> KeptState | None:
    """Return how old the kept advisories are; None: none are kept, or this role cannot read them."""
    if connection.execute(_IS_READABLE).fetchone() != (True,):
        return None
    row = connection.execute(_STATE).fetchone()
    return KeptState(*row) if row else None


def compared_at(connection: Connection[Any]) -> datetime | None:
    """Return when kept advisories were last compared; None: none are kept, or they cannot be read."""
    if connection.execute(_IS_READABLE).fetchone() != (True,):
        return None
    row = connection.execute(_COMPARED_AT).fetchone()
    return row[0] if row else None


def marks(connection: Connection[Any], purls: Iterable[str]) -> dict[str, Mark]:
    """Return what kept advisories say about Package URLs; nothing if this role cannot read them."""
    wanted = list(set(purls))
    if not wanted or connection.execute(_IS_READABLE).fetchone() != (True,):
        return {}
    return {purl: Mark(*mark) for purl, *mark in connection.execute(_MARKS, (wanted,))}


def kept_summary(
    connection: Connection[Any], where: sql.Composable, values: Mapping[str, Any], limit: int
) -> KeptSummary | None:
    """Sum up the selected fetches of packages that kept advisories are about; None: none are kept.

    Args:
        connection: To the database, within `session.read_only`.
        where: A condition on the columns of access_log, which binds `values`.
        values: By name; `rollups` are the ids of the rollups that stand for rows that `where` leaves out.
        limit: Number of packages that are listed.

    Raises:
        psycopg.Error, DeadlineExceededError: the query failed, took too long, or lost its connection.
    """
    state = kept_state(connection)
    if state is None:
        return None
    statement = _FETCHED.format(where=where)
    rows = connection.execute(statement, {**values, "limit": limit}).fetchall()
    return KeptSummary(
        state.kept_at,
        state.compared_at,
        state.advisories,
        state.unchecked,
        packages=rows[0][-1] if rows else 0,
        top=[MarkedArtifact(*row[:-1]) for row in rows],
    )

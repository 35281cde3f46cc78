"""Find the days of a report whose rollup can replace their rows."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

_LONG_SPAN = timedelta(days=7)  # longer reports begin with a whole day, because that is faster
_QUARTER_SECONDS = 900
_ROLLUPS = """
    SELECT rollup_id, from_at, until_at, pruned_at IS NOT NULL
    FROM access_log_rollup_state
    WHERE until_at > %s AND from_at < %s AND is_complete
    ORDER BY from_at
"""
# Earlier versions merged months without the callers.
_MONTHS = """
    SELECT month_id, rollup_ids FROM access_log_rollup_month
    WHERE rollup_ids <@ %s::bigint[] AND users IS NOT NULL
"""


class _Rollup(NamedTuple):
    id: int
    from_at: datetime
    until_at: datetime
    is_pruned: bool


class RolledUp(NamedTuple):
    """How to count a span: the rollups of days and hours, and the rows of the other times in it.

    The span may have grown to whole days, whose rows are no longer there, or would take too long.
    """

    since: datetime
    until: datetime
    rollups: list[int]
    other_times: list[tuple[datetime, datetime]]  # in order, each with its exclusive end
    months: list[int]  # with merged rollups
    single_rollups: list[int]  # the rollups that are not merged in these months

    @classmethod
    def rows_only(cls, since: datetime, until: datetime) -> Self:
        """Use no rollups."""
        return cls(since, until, [], [(since, until)], [], [])

    @property
    def condition(self) -> sql.Composed:
        """A condition on `started_at` for the rows to count."""
        if not self.other_times:
            return sql.Composed([sql.SQL("false")])
        ranges = [
            sql.SQL("(started_at >= {} AND started_at < {})").format(*times)
            for times in self.other_times
        ]
        return sql.SQL("({})").format(sql.SQL(" OR ").join(ranges))


def rolled_up(connection: Connection[Any], since: datetime, until: datetime) -> RolledUp:
    """Return how to count all requests of a span.

    Raises:
        psycopg.Error, DeadlineExceededError: the query failed or lost its connection.
    """
    found = [_Rollup(*row) for row in connection.execute(_ROLLUPS, (since, until)).fetchall()]
    is_long = until - since > _LONG_SPAN
    since = min(
        [since, *(r.from_at for r in found if r.from_at < since and (is_long or r.is_pruned))]
    )
    until = max([until, *(r.until_at for r in found if r.until_at > until and r.is_pruned)])
    used = [r for r in found if r.from_at >= since and r.until_at <= until]
    counted = [(r.from_at, r.until_at) for r in used if not r.is_pruned]
    ends = [since, *(at for times in counted for at in times), until]
    others = [(a, b) for a, b in list(pairwise(ends))[::2] if a < b]
    ids = [r.id for r in used]
    months = connection.execute(_MONTHS, (ids,)).fetchall() if ids else []
    merged = {rollup for _, rollups in months for rollup in rollups}
    single = [rollup for rollup in ids if rollup not in merged]
    return RolledUp(since, until, ids, others, [month for month, _ in months], single)


def fits_bars(counted: RolledUp, edges: Sequence[datetime]) -> bool:
    """Whether each quarter of an hour of a rollup lies within one bar."""
    return not counted.rollups or all(edge.timestamp() % _QUARTER_SECONDS == 0 for edge in edges)

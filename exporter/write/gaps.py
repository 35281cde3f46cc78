"""Losses that are not in PostgreSQL yet. No I/O here."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

Reason = Literal[
    "buffer_full",
    "journal_damaged",
    "killed",
    "rejected",
    "shutdown",
    "spool_damaged",
    "unreadable",
]


class Gap(NamedTuple):
    """One row of access_log_gap in column order, without `logged_at`. Times are ISO 8601."""

    gap_id: str
    node: str
    from_at: str
    to_at: str
    reason: str
    entries: int
    run_id: str | None = None  # that saw the requests; None: a version that recorded no runs


class UnwrittenGaps:
    """Collects losses until they are in the database. Only the writer thread uses it."""

    def __init__(self) -> None:
        self._growing: dict[tuple[str, str, str | None], Gap] = {}
        # Already sent once: these may be in the database, so they must not change any more.
        self._sent: dict[str, Gap] = {}
        self.changed = False  # since the caller last cleared the flag

    def add(
        self,
        node: str,
        reason: Reason,
        started_at: str,
        entries: int = 1,
        run_id: str | None = None,
    ) -> None:
        """Record a loss. It extends the gap of the same node, reason and run that is not yet sent."""
        key = (node, reason, run_id)
        gap = self._growing.get(key)
        if gap is None:
            gap = Gap(str(uuid.uuid4()), node, started_at, started_at, reason, 0, run_id)
        self._growing[key] = gap._replace(
            from_at=min(gap.from_at, started_at),
            to_at=max(gap.to_at, started_at),
            entries=gap.entries + entries,
        )
        self.changed = True

    def inherit(self, gaps: Iterable[Gap]) -> None:
        """Take over gaps that an earlier run could not write."""
        self._sent |= {gap.gap_id: gap for gap in gaps}

    def to_send(self) -> list[Gap]:
        """Every gap. They stay here until `written`, and no longer grow."""
        self._sent |= {gap.gap_id: gap for gap in self._growing.values()}
        self._growing.clear()
        return list(self._sent.values())

    def snapshot(self) -> list[Gap]:
        """Every gap as it is now; they may still grow."""
        return [*self._sent.values(), *self._growing.values()]

    def written(self, gaps: Iterable[Gap]) -> None:
        """Forget these gaps: they are in the database."""
        for gap in gaps:
            self._sent.pop(gap.gap_id, None)

    def __bool__(self) -> bool:
        return bool(self._growing or self._sent)

"""The holes of the log: what was lost, when and why, until it is written down; no I/O here."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

Reason = Literal["buffer_full", "rejected", "shutdown", "spool_damaged", "unreadable"]


class Gap(NamedTuple):
    """One row of access_log_gap, in the order of its columns, but for `logged_at`."""

    gap_id: str
    node: str
    from_at: str
    to_at: str
    reason: str
    entries: int


class Gaps:
    """Losses that are not in the database yet. Used by the writer's thread alone."""

    def __init__(self) -> None:
        self._growing: dict[tuple[str, str], Gap] = {}
        self._offered: dict[
            str, Gap
        ] = {}  # may be in the database already: must not change any more
        self.changed = False  # since the flag was last cleared

    def add(self, node: str, reason: Reason, started_at: str, entries: int = 1) -> None:
        """One more loss; it widens the gap of the same kind that is still growing."""
        gap = self._growing.get((node, reason))
        if gap is None:
            gap = Gap(str(uuid.uuid4()), node, started_at, started_at, reason, 0)
        self._growing[node, reason] = gap._replace(
            from_at=min(gap.from_at, started_at),
            to_at=max(gap.to_at, started_at),
            entries=gap.entries + entries,
        )
        self.changed = True

    def adopt(self, gaps: Iterable[Gap]) -> None:
        """Gaps that a run before could not write."""
        self._offered |= {gap.gap_id: gap for gap in gaps}

    def offer(self) -> list[Gap]:
        """All that are to be written; they stay until `settle`, and no longer grow."""
        self._offered |= {gap.gap_id: gap for gap in self._growing.values()}
        self._growing.clear()
        return list(self._offered.values())

    def pending(self) -> list[Gap]:
        """All that are not written, as they are now."""
        return [*self._offered.values(), *self._growing.values()]

    def settle(self, gaps: Iterable[Gap]) -> None:
        """These are in the database."""
        for gap in gaps:
            self._offered.pop(gap.gap_id, None)

    def __bool__(self) -> bool:
        return bool(self._growing or self._offered)

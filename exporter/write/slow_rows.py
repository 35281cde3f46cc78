"""Decide how many rows to send at a time, and which rows to send last, while the server is too slow for some.

A trigger can be too slow for a whole batch, or for one row. Then the batch is sent in smaller parts. A row
that fails alone is sent after the others, and given up when it has failed alone several times. Runs nothing.
"""

from __future__ import annotations

from itertools import batched
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..rows.entry import AccessLogEntry

_DIVISOR = 16  # of the part that was too slow
_ENOUGH_ROWS = 1 << 20  # more than any batch has
_MAX_FAILURES = 3  # of a row alone
_MAX_SUSPECTS = 1024


class SlowRows:
    """What has been too slow so far. One thread uses it."""

    def __init__(self) -> None:
        self._limit = _ENOUGH_ROWS  # rows that are sent at a time
        self._failures: dict[str, int] = {}  # of rows that were sent alone, by flow id

    def is_in_one_part(self, entries: Sequence[AccessLogEntry]) -> bool:
        """Whether to send these entries at once."""
        return len(entries) <= self._limit and not self._failures

    def parts(self, entries: Sequence[AccessLogEntry]) -> Iterator[Sequence[AccessLogEntry]]:
        """What to send at a time: rows that have failed alone come last, one by one."""
        suspects = [entry for entry in entries if entry.flow_id in self._failures]
        others = [entry for entry in entries if entry.flow_id not in self._failures]
        yield from batched(others, self._limit)
        yield from batched(suspects, 1)

    def failed(self, part: Sequence[AccessLogEntry]) -> None:
        """The server was too slow for this part."""
        self._limit = max(1, min(self._limit, len(part)) // _DIVISOR)
        if len(part) == 1:
            flow_id = part[0].flow_id
            self._failures[flow_id] = self._failures.get(flow_id, 0) + 1
            if len(self._failures) > _MAX_SUSPECTS:
                del self._failures[next(iter(self._failures))]

    def is_given_up(self, entry: AccessLogEntry) -> bool:
        """Whether this row has failed too often."""
        return self._failures.get(entry.flow_id, 0) >= _MAX_FAILURES

    def succeeded(self, entries: Sequence[AccessLogEntry]) -> None:
        """All of these entries are in the table, or given up."""
        self._limit = min(_ENOUGH_ROWS, 2 * self._limit)
        for entry in entries if self._failures else ():
            self._failures.pop(entry.flow_id, None)

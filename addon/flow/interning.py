"""Keep values that repeat only once in memory, however many waiting exchanges hold them.

A full buffer takes half the memory this way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

MAX_VALUES = 4096
MAX_VALUE_BYTES = 256  # a larger value seldom repeats


class Interner[T: Hashable]:
    """Replaces a value by an equal one that was seen before. Bounded. One thread uses it."""

    def __init__(self) -> None:
        self._values: dict[T, T] = {}
        self.new_bytes = 0  # memory of values that were not there yet; the caller resets it

    def intern(self, value: T, size: int) -> T:
        """The kept value that equals `value`. `size`: its memory in bytes."""
        kept = self._values.get(value)
        if kept is not None:
            return kept
        self.new_bytes += size
        if size <= MAX_VALUE_BYTES:
            if len(self._values) >= MAX_VALUES:
                self._values.clear()
            self._values[value] = value
        return value

    def __len__(self) -> int:
        return len(self._values)

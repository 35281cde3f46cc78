"""Keep values that repeat only once in memory, however many waiting exchanges hold them.

A full buffer takes half the memory this way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

MAX_VALUES = 4096
MAX_VALUE_BYTES = 256  # a larger value seldom repeats


class Interner[T: Hashable](dict[T, T]):
    """`interner[value]` is an equal value that was seen before, or this one. Bounded. One thread uses it."""

    def __init__(self, size_of: Callable[[T], int]) -> None:
        """`size_of` returns the memory of a value in bytes."""
        super().__init__()
        self.new_bytes = 0  # memory of values that were not there yet; the caller resets it
        self._size_of = size_of

    def __missing__(self, value: T) -> T:
        size = self._size_of(value)
        self.new_bytes += size
        if size <= MAX_VALUE_BYTES:
            if len(self) >= MAX_VALUES:
                self.clear()
            self[value] = value
        return value

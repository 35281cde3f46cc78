"""Count how often values fell into ranges. One thread adds, any thread reads."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


class Histogram:
    """Cumulative counts, as Prometheus has them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: the upper bounds of all ranges but the last one, ascending."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def as_dict(self) -> dict[str, Any]:
        """Return `buckets`, how many values were at most as large as each bound, and the `sum` of all."""
        names = [*map("{:g}".format, self._bounds), "+Inf"]
        return {
            "buckets": dict(zip(names, accumulate(list(self._counts)), strict=True)),
            "sum": round(self._sum, 6),
        }

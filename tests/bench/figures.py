"""What was measured, how much it varied, and whether it is what was promised; measures nothing."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Place(NamedTuple):
    """Where a section of the bench may work: a schema and a folder of its own."""

    dsn: str
    folder: Path
    quick: bool

    def choose[Value](self, full: Value, quick: Value) -> Value:
        """How much of something: in the long bench, in the quick one."""
        return quick if self.quick else full


class Target(NamedTuple):
    """What was promised."""

    relation: Literal["<=", ">="]
    limit: float

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


class Figure(NamedTuple):
    """One line of the table: what a thing took, in each of several rounds."""

    section: str
    name: str
    unit: str
    values: tuple[float, ...]
    target: Target | None = None
    state: str = ""

    @property
    def median(self) -> float:
        """Half of the rounds were below."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the rounds."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def verdict(self) -> str:
        """Whether the median is what was promised: met, MISSED, or nothing if nothing was."""
        if self.target is None:
            return ""
        is_met = (
            self.median <= self.target.limit
            if self.target.relation == "<="
            else self.median >= self.target.limit
        )
        return "met" if is_met else "MISSED"


def shown(value: float) -> str:
    """Three digits of it."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 3 if abs(value) < 2 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def quantile(values: list[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

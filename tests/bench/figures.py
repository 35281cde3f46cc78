"""The results of a measurement: values, spread and target; measures nothing."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Workspace(NamedTuple):
    """The schema and the folder of one section.

    Attributes:
        quick: Whether to measure as little as possible.
    """

    dsn: str
    folder: Path
    quick: bool

    def choose[Value](self, full: Value, quick: Value) -> Value:
        """Return one of two amounts: for a full run or for a quick run."""
        return quick if self.quick else full


class Target(NamedTuple):
    """A limit for the median of a figure."""

    relation: Literal["<=", ">="]
    limit: float

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


class Figure(NamedTuple):
    """One row of the results table: the values of all rounds."""

    section: str
    name: str
    unit: str
    values: tuple[float, ...]
    target: Target | None = None

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and the third quartile of the rounds."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def verdict(self) -> str:
        """Whether the median meets the target: "met" or "MISSED"; empty without a target."""
        if self.target is None:
            return ""
        is_met = (
            self.median <= self.target.limit
            if self.target.relation == "<="
            else self.median >= self.target.limit
        )
        return "met" if is_met else "MISSED"


def format_value(value: float) -> str:
    """Format a value with about three significant digits."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 3 if abs(value) < 2 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def quantile(values: list[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

"""Compute the geometry of bar charts over time, for SVG and for terminals. Draws nothing."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

SVG_WIDTH = 960  # units of the viewBox; the page scales them
_GAP_SHARE = 0.2  # of the space for a bar


class ChartSegment(NamedTuple):
    """One part of a stacked bar. `y` is its upper edge, counted from the top of the chart."""

    y: float
    height: float


class ChartBar(NamedTuple):
    """One stacked bar."""

    x: float
    width: float
    segments: list[ChartSegment]  # from the bottom up


def svg_bars(stacks: Sequence[Sequence[int]], height: float) -> list[ChartBar]:
    """Return one bar for each stack, in a chart of SVG_WIDTH times `height` units.

    Args:
        stacks: The counts that each bar shows on top of each other, from the bottom up.
        height: Height of the chart, and of its highest bar.
    """
    step = SVG_WIDTH / (len(stacks) or 1)
    return [
        ChartBar(
            x=round(number * step + step * _GAP_SHARE / 2, 2),
            width=round(step * (1 - _GAP_SHARE), 2),
            segments=[
                ChartSegment(round(height - top, 2), round(top - bottom, 2))
                for bottom, top in pairwise([0, *tops])
            ],
        )
        for number, tops in enumerate(segment_tops(stacks, height))
    ]


def segment_tops(stacks: Sequence[Sequence[int]], height: float) -> list[list[float]]:
    """Return how high each segment reaches. The highest bar reaches `height`."""
    largest = max(map(sum, stacks), default=0) or 1
    return [[height * count / largest for count in accumulate(stack)] for stack in stacks]

"""Choose the bars and axes of charts over time, for SVG and for terminals. Draws nothing and runs no queries."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from datetime import UTC, datetime, timedelta
from itertools import accumulate, count, pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import date, tzinfo

SVG_WIDTH = 960  # units of the viewBox; the page scales them
MAX_BARS = 60  # plus one, because the first bar usually starts before the span
SEGMENTS = ("failed", "refused", "ok")  # parts of a bar of requests, from the bottom up
_GAP_SHARE = 0.2  # of the space for a bar

_HOUR, _DAY = timedelta(hours=1), timedelta(days=1)
_BAR_WIDTHS = (
    *(timedelta(minutes=minutes) for minutes in (1, 5, 15)),
    *(timedelta(hours=hours) for hours in (1, 3, 6, 24)),
    *(timedelta(weeks=weeks) for weeks in (1, 4, 13, 52)),
)
_UNITS = (
    ("week", timedelta(weeks=1)),
    ("day", _DAY),
    ("hour", _HOUR),
    ("minute", timedelta(minutes=1)),
)

_MINUTES_PER_DAY = 1440
# Minutes between two time labels.
_LABEL_STEPS = (
    *(1, 5, 15, 30, 60, 180, 360, 720),
    *(days * _MINUTES_PER_DAY for days in (1, 2, 7, 14, 28, 91, 364)),
)
_MIN_LABELS = 3  # with a round step; if there is no such step, every n-th bar has a label
_LABELS_WITH_YEAR = timedelta(days=300)  # for longer charts
_LAST_LONG_LABEL = 0.94  # of the width; a longer label after it would not fit


class ChartSegment(NamedTuple):
    """One part of a stacked bar. `y` is its upper edge, counted from the top of the chart."""

    y: float
    height: float


class ChartBar(NamedTuple):
    """One stacked bar."""

    x: float
    width: float
    segments: list[ChartSegment]  # from the bottom up


class TimeTick(NamedTuple):
    """A label of the time axis. `position` is a share of its length, where a bar starts."""

    position: float
    label: str


class ValueTick(NamedTuple):
    """A label of the value axis. `position` is a share of its height, from the bottom."""

    position: float
    value: int


class SvgChart(NamedTuple):
    """A chart in SVG_WIDTH times `height` units, and the labels to put around it."""

    height: int
    bars: list[ChartBar]
    values: list[ValueTick]
    times: list[TimeTick]


def bar_width(span: timedelta) -> timedelta:
    """Return the shortest round width that divides the span into at most MAX_BARS bars.

    It is 1, 5 or 15 minutes, 1, 3, 6 or 24 hours, or 1, 4, 13 or a multiple of 52 weeks.
    """
    for width in _BAR_WIDTHS:
        if span <= MAX_BARS * width:
            return width
    longest = _BAR_WIDTHS[-1]
    return -(-span // (MAX_BARS * longest)) * longest


def width_name(width: timedelta) -> str:
    """Return the width of a bar in words, to follow "per": "hour" or "15 minutes"."""
    for unit, length in _UNITS:
        number, rest = divmod(width, length)
        if not rest:
            return unit if number == 1 else f"{number} {unit}s"
    raise AssertionError


def bar_edges(since: datetime, until: datetime, zone: tzinfo | None = None) -> list[datetime]:
    """Return where each bar starts, and where the last one ends, in UTC. Empty if the span is empty.

    Bars start at round times of the clock in `zone`: hours on the hour, days at midnight, weeks on
    Monday. When the clock changes, a bar up to an hour keeps its length; a longer one is longer or
    shorter.

    Args:
        since: Start of the span, in the first bar.
        until: End of the span, in the last bar or at its end.
        zone: None: the local time zone.
    """
    if until <= since:
        return []
    width = bar_width(until - since)
    first, last = since.astimezone(zone).date(), until.astimezone(zone).date()
    # The days go on for a while after `until`, for the end of the last bar.
    edges = sorted(set(_edges(first, last + 2 * max(width, _DAY), width, zone)))
    return edges[bisect_right(edges, since) - 1 : bisect_left(edges, until) + 1]


def time_ticks(
    edges: Sequence[datetime], zone: tzinfo | None = None, max_ticks: int = 9
) -> list[TimeTick]:
    """Return labels at round times for a chart with these bars: "06:00", or a date at midnight.

    Args:
        edges: See `bar_edges`.
        zone: As for `bar_edges`.
        max_ticks: Room for this many labels such as "06:00", or half as many with a year.
    """
    if not edges:
        return []
    starts = [edge.astimezone(zone) for edge in edges[:-1]]
    has_year = edges[-1] - edges[0] > _LABELS_WITH_YEAR
    has_date = edges[1] - edges[0] > _DAY / 2
    if has_year:
        max_ticks = max(1, max_ticks // 2)
    ticks = [
        TimeTick(index / len(starts), _label(starts[index], has_date=has_date, has_year=has_year))
        for index in _label_indexes(starts, max_ticks)
    ]
    fitting = [tick for tick in ticks if not has_year or tick.position <= _LAST_LONG_LABEL]
    return fitting or ticks[:1]


def value_ticks(maximum: int, max_steps: int = 4) -> list[int]:
    """Return the labels of the value axis: round numbers from 0 to the first that is not below `maximum`."""
    round_numbers = (digit * 10**zeros for zeros in count() for digit in (1, 2, 5))
    step = next(number for number in round_numbers if maximum <= max_steps * number)
    steps = max(1, -(-maximum // step))
    return [number * step for number in range(steps + 1)]


def svg_chart(
    stacks: Sequence[Sequence[int]],
    edges: Sequence[datetime],
    height: int,
    zone: tzinfo | None = None,
) -> SvgChart:
    """Compute a chart with one bar for each stack.

    Args:
        stacks: The counts that each bar shows on top of each other, from the bottom up.
        edges: See `bar_edges`.
        height: Height of the chart.
        zone: Of the time labels; None: the local time zone.
    """
    values = value_ticks(max(map(sum, stacks), default=0))
    top = values[-1]
    step = SVG_WIDTH / (len(stacks) or 1)
    bars = [
        ChartBar(
            x=round(number * step + step * _GAP_SHARE / 2, 2),
            width=round(step * (1 - _GAP_SHARE), 2),
            segments=[
                ChartSegment(round(height - upper, 2), round(upper - lower, 2))
                for lower, upper in pairwise([0, *tops])
            ],
        )
        for number, tops in enumerate(segment_tops(stacks, top, height))
    ]
    ticks = [ValueTick(value / top, value) for value in values]
    return SvgChart(height, bars, ticks, time_ticks(edges, zone))


def segment_tops(stacks: Sequence[Sequence[int]], top: float, height: float) -> list[list[float]]:
    """Return how high each segment reaches. A bar of `top` reaches `height`."""
    return [[height * reached / top for reached in accumulate(stack)] for stack in stacks]


def _edges(first: date, last: date, width: timedelta, zone: tzinfo | None) -> Iterator[datetime]:
    """Yield the edges of these days, not in order and some twice."""
    days = max(1, width // _DAY)
    ordinal = first.toordinal()
    ordinal -= (ordinal - 1) % days  # day 1 of the calendar is a Monday
    for number in range(ordinal, last.toordinal() + 1, days):
        midnight = datetime.fromordinal(number)
        start = _instant(midnight, zone)
        if width <= _HOUR:
            end = _instant(midnight + _DAY, zone)
            while start < end:
                yield start
                start += width
        else:
            for part in range(max(1, _DAY // width)):
                yield _instant(midnight + part * width, zone)


def _instant(clock_time: datetime, zone: tzinfo | None) -> datetime:
    """Return when a clock in `zone` first shows this time, or would have if it skips the time."""
    local = clock_time.replace(tzinfo=zone) if zone else clock_time
    return local.astimezone(UTC)


def _label(at: datetime, *, has_date: bool, has_year: bool) -> str:
    if not has_date and (at.hour or at.minute):
        return f"{at:%H:%M}"
    return f"{at:%Y-%m-%d}" if has_year else f"{at:%m-%d}"


def _label_indexes(starts: list[datetime], max_ticks: int) -> Sequence[int]:
    """Return the bars to label: those at multiples of the shortest round step that gives few labels."""
    minutes = [(at.toordinal() - 1) * _MINUTES_PER_DAY + at.hour * 60 + at.minute for at in starts]
    min_ticks = min(_MIN_LABELS, max_ticks, len(starts))
    for step in _LABEL_STEPS:
        indexes = [index for index, minute in enumerate(minutes) if minute % step == 0]
        if min_ticks <= len(indexes) <= max_ticks:
            return indexes
    return range(0, len(starts), -(-len(starts) // max_ticks))

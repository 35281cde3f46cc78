"""Bars of charts over time: round spans in local time or UTC, axes with round numbers, geometry."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from exporter.read.chart import (
    MAX_BARS,
    SVG_WIDTH,
    bar_edges,
    bar_width,
    svg_chart,
    time_ticks,
    value_ticks,
    width_name,
)

BERLIN = ZoneInfo("Europe/Berlin")
KOLKATA = ZoneInfo("Asia/Kolkata")
BEIRUT = ZoneInfo("Asia/Beirut")
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
NOON = datetime(2026, 3, 5, 12, 10, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("span", "width", "name"),
    [
        (timedelta(seconds=1), MINUTE, "minute"),
        (15 * MINUTE, MINUTE, "minute"),
        (HOUR, MINUTE, "minute"),
        (HOUR + MINUTE, 5 * MINUTE, "5 minutes"),
        (6 * HOUR, 15 * MINUTE, "15 minutes"),
        (24 * HOUR, HOUR, "hour"),
        (7 * DAY, 3 * HOUR, "3 hours"),
        (14 * DAY, 6 * HOUR, "6 hours"),
        (30 * DAY, DAY, "day"),
        (365 * DAY, 7 * DAY, "week"),
        (3650 * DAY, 91 * DAY, "13 weeks"),
        (366 * 100 * DAY, 2 * 364 * DAY, "104 weeks"),
    ],
)
def test_bars_are_round_spans(span: timedelta, width: timedelta, name: str) -> None:
    assert bar_width(span) == width
    assert width_name(width) == name
    assert len(bar_edges(NOON - span, NOON, UTC)) - 1 <= MAX_BARS + 1


@pytest.mark.parametrize("zone", [UTC, BERLIN, KOLKATA, BEIRUT])
@pytest.mark.parametrize("hours", [0.2, 1, 3, 5, 24, 24 * 7, 24 * 14, 24 * 31, 24 * 400, 24 * 9000])
@pytest.mark.parametrize("until", [NOON, datetime(2026, 3, 29, 22, 7, tzinfo=UTC)])
def test_bars_cover_the_span_and_start_at_round_local_times(
    zone: ZoneInfo, hours: float, until: datetime
) -> None:
    since = until - timedelta(hours=hours)
    width = bar_width(until - since)
    edges = bar_edges(since, until, zone)
    assert edges[0] <= since < edges[1]
    assert edges[-2] < until <= edges[-1]
    assert all(edge.tzinfo is UTC for edge in edges)
    assert all(a < b for a, b in pairwise(edges))
    for edge in edges:
        local = edge.astimezone(zone)
        since_midnight = timedelta(hours=local.hour, minutes=local.minute, seconds=local.second)
        is_first_of_day = (edge - MINUTE).astimezone(zone).date() < local.date()
        assert since_midnight % min(width, DAY) == timedelta() or is_first_of_day
        if width >= DAY:
            assert is_first_of_day
        if width >= 7 * DAY:
            assert local.isoweekday() == 1


def test_day_bars_follow_local_midnight_through_both_clock_changes() -> None:
    spring = bar_edges(
        datetime(2026, 3, 1, tzinfo=BERLIN), datetime(2026, 4, 1, tzinfo=BERLIN), BERLIN
    )
    lengths = {a.astimezone(BERLIN).date().isoformat(): b - a for a, b in pairwise(spring)}
    assert lengths.pop("2026-03-29") == 23 * HOUR
    assert set(lengths.values()) == {24 * HOUR}
    autumn = bar_edges(
        datetime(2026, 10, 10, tzinfo=BERLIN), datetime(2026, 11, 1, tzinfo=BERLIN), BERLIN
    )
    lengths = {a.astimezone(BERLIN).date().isoformat(): b - a for a, b in pairwise(autumn)}
    assert lengths["2026-10-25"] == max(lengths.values())


def test_hour_bars_are_one_hour_long_and_three_hour_bars_follow_the_clock_when_it_changes() -> None:
    day = datetime(2026, 10, 25, tzinfo=BERLIN)  # 25 hours long
    end = datetime(2026, 10, 26, tzinfo=BERLIN)
    hours = bar_edges(day, end, BERLIN)
    assert len(hours) - 1 == 25
    assert {b - a for a, b in pairwise(hours)} == {HOUR}
    week = bar_edges(day - 3 * DAY, end + 3 * DAY, BERLIN)
    assert bar_width(6 * DAY) == 3 * HOUR
    assert {edge.astimezone(BERLIN).hour % 3 for edge in week} == {0}
    assert sorted({b - a for a, b in pairwise(week)}) == [3 * HOUR, 4 * HOUR]


def test_day_without_midnight_starts_with_its_first_moment() -> None:
    """In Beirut, the clock jumped from 24:00 on Saturday to 01:00 on Sunday."""
    edges = bar_edges(
        datetime(2024, 3, 1, tzinfo=BEIRUT), datetime(2024, 4, 5, tzinfo=BEIRUT), BEIRUT
    )
    assert datetime(2024, 3, 30, 22, tzinfo=UTC) in edges
    assert len(edges) - 1 == 35


def test_calendar_day_that_a_zone_skipped_has_no_bar() -> None:
    apia = ZoneInfo("Pacific/Apia")
    edges = bar_edges(datetime(2011, 12, 20, tzinfo=apia), datetime(2012, 1, 10, tzinfo=apia), apia)
    assert all(a < b for a, b in pairwise(edges))
    assert "2011-12-30" not in {edge.astimezone(apia).date().isoformat() for edge in edges}


def test_empty_span_has_no_bars() -> None:
    assert bar_edges(NOON, NOON, UTC) == []
    assert bar_edges(NOON, NOON - DAY, UTC) == []
    assert time_ticks([], UTC) == []


@pytest.mark.parametrize(
    ("hours", "labels"),
    [
        (1, ["11:15", "11:30", "11:45", "12:00"]),
        (
            24,
            ["12:00", "15:00", "18:00", "21:00", "03-05", "03:00", "06:00", "09:00", "12:00"],
        ),
        (24 * 7, ["02-27", "02-28", "03-01", "03-02", "03-03", "03-04", "03-05"]),
        (24 * 30, ["02-09", "02-16", "02-23", "03-02"]),
    ],
)
def test_time_labels_are_round_and_few(hours: float, labels: list[str]) -> None:
    ticks = time_ticks(bar_edges(NOON - timedelta(hours=hours), NOON, UTC), UTC)
    assert [tick.label for tick in ticks] == labels
    assert all(0 <= tick.position < 1 for tick in ticks)
    assert [tick.position for tick in ticks] == sorted({tick.position for tick in ticks})


@pytest.mark.parametrize("hours", [0.01, 0.5, 2, 24 * 3, 24 * 400, 24 * 4000, 24 * 300_000])
@pytest.mark.parametrize("max_ticks", [1, 4, 8])
def test_every_span_has_time_labels(hours: float, max_ticks: int) -> None:
    edges = bar_edges(NOON - timedelta(hours=hours), NOON, UTC)
    assert 1 <= len(time_ticks(edges, UTC, max_ticks)) <= max_ticks


def test_long_spans_are_labeled_with_the_year() -> None:
    for days in (301, 400, 500, 1000, 4000, 40_000):
        ticks = time_ticks(bar_edges(NOON - days * DAY, NOON, UTC), UTC)
        assert all(len(tick.label) == len("2026-03-02") for tick in ticks)
        assert 2 <= len(ticks) <= 4


def test_days_are_labeled_with_their_date_even_without_midnight() -> None:
    since = datetime(2024, 3, 31, 1, tzinfo=BEIRUT)
    ticks = time_ticks(bar_edges(since, since + 30 * DAY, BEIRUT), BEIRUT, max_ticks=1)
    assert [tick.label for tick in ticks] == ["03-31"]


def test_time_labels_are_local() -> None:
    edges = bar_edges(NOON - 24 * HOUR, NOON, KOLKATA)
    labels = [tick.label for tick in time_ticks(edges, KOLKATA)]
    assert "03-05" in labels
    assert "12:00" in labels


@pytest.mark.parametrize(
    ("maximum", "values"),
    [
        (0, [0, 1]),
        (1, [0, 1]),
        (3, [0, 1, 2, 3]),
        (7, [0, 2, 4, 6, 8]),
        (100, [0, 50, 100]),
        (249, [0, 100, 200, 300]),
        (1_700_000_000, [0, 500_000_000, 1_000_000_000, 1_500_000_000, 2_000_000_000]),
    ],
)
def test_value_scale_is_round_and_reaches_the_maximum(maximum: int, values: list[int]) -> None:
    assert value_ticks(maximum) == values


def test_value_scale_has_few_steps() -> None:
    for maximum in range(1, 3000):
        values = value_ticks(maximum)
        assert values[-2] < maximum <= values[-1]
        assert 2 <= len(values) <= 5


def test_bars_are_stacked_on_the_value_scale_and_fill_the_width() -> None:
    edges = [NOON, NOON + MINUTE, NOON + 2 * MINUTE]
    chart = svg_chart([(1, 2, 4), (0, 0, 0)], edges, 80, UTC)
    assert chart.values == [(0, 0), (0.25, 2), (0.5, 4), (0.75, 6), (1, 8)]
    first, second = chart.bars
    assert [segment.height for segment in first.segments] == [10, 20, 40]
    assert [segment.y for segment in first.segments] == [70, 50, 10]
    assert [segment.height for segment in second.segments] == [0, 0, 0]
    assert first.x + first.width <= second.x
    assert second.x + second.width <= SVG_WIDTH
    assert chart.times == [(0, "12:10"), (0.5, "12:11")]


def test_chart_without_bars_has_a_value_scale() -> None:
    chart = svg_chart([], [], 80)
    assert chart == (80, [], [(0, 0), (1, 1)], [])

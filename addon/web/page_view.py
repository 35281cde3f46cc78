"""Prepare what the templates of the page show: texts, times, bars. Runs no queries and escapes no HTML.

Text from clients is made printable here; the templates escape it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from exporter.read import lines
from exporter.read.chart import SVG_WIDTH, svg_bars
from exporter.read.human import printable, share, size
from exporter.read.status import is_failure, is_refusal

if TYPE_CHECKING:
    from exporter.health import Health
    from exporter.read.chart import ChartBar
    from exporter.read.gaps import RecordedGap
    from exporter.read.newest import Row
    from exporter.read.page import ColumnValue, RowPage, Traffic, TrafficBucket

MAX_FILTER_LENGTH = 500  # characters per search field
CHART_WIDTH = SVG_WIDTH
CHART_HEIGHT = 120
SEGMENTS = ("failed", "refused", "ok")  # CSS classes of a bar's segments, from the bottom up

_MAX_PATH_LENGTH = 400
_FIRST_REDIRECT = 300


@dataclass
class Page:
    """The contents of the list page. A part that could not be read is None or empty."""

    filters: dict[str, str]  # the search, by field name, without empty fields
    health: Health
    status: dict[str, Any]  # the counters; empty if no exporter is running
    with_traffic: bool = True  # False: only the parts that a live update replaces
    is_first: bool = True  # the newest rows, which update themselves
    error: str | None = None  # why the database gave no answer
    rows: RowPage | None = None
    gaps: list[RecordedGap] = field(default_factory=list)
    traffic: Traffic | None = None


def moment(at: datetime) -> str:
    """Format a time to the millisecond, in UTC."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3]


def minute(at: datetime) -> str:
    """Format a time to the minute, in UTC."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"


def last_write(text: str | None) -> str:
    """Format the time of the last write, given in ISO 8601 as in the status."""
    return moment(datetime.fromisoformat(text)) + " UTC" if text else "none yet"


def css_class(row: Row) -> str:
    """Return the style sheet's class for the row's outcome."""
    if is_failure(row.status_code):
        return "failed"
    if is_refusal(row.status_code):
        return "refused"
    return "redirect" if (row.status_code or 0) >= _FIRST_REDIRECT else "ok"


def url(row: Row) -> str:
    """Return the requested URL, with a long path shortened."""
    path = row.path
    if path is not None and len(path) > _MAX_PATH_LENGTH:
        row = row._replace(path=f"{path[:_MAX_PATH_LENGTH]}...")
    return lines.url(row)


def text(value: str | None) -> str:
    """Make text from a client printable."""
    return "-" if value is None else printable(value)


def value(column: ColumnValue) -> str | None:
    """Format a column's value. None stays None."""
    if column.value is None:
        return None
    if isinstance(column.value, bytes):
        return column.value.hex()
    if isinstance(column.value, datetime):
        return column.value.astimezone(UTC).isoformat(sep=" ", timespec="microseconds")
    return printable(str(column.value))


def bars(traffic: Traffic) -> list[tuple[str, ChartBar]]:
    """Return the bars of the chart with their titles. Each bar has the segments named in SEGMENTS."""
    stacks = [
        # In a sample, each count is rounded separately, so the rest could be -1.
        (bucket.failed, bucket.refused, max(0, bucket.requests - bucket.failed - bucket.refused))
        for bucket in traffic.buckets
    ]
    titles = map(_bar_title, traffic.buckets)
    return list(zip(titles, svg_bars(stacks, CHART_HEIGHT), strict=True))


def totals(traffic: Traffic) -> str:
    """Summarize the chart in one sentence."""
    requests = sum(bucket.requests for bucket in traffic.buckets)
    refused = sum(bucket.refused for bucket in traffic.buckets)
    failed = sum(bucket.failed for bucket in traffic.buckets)
    response_bytes = sum(bucket.response_bytes for bucket in traffic.buckets)
    about = "about " if traffic.sampled_percent else ""
    return (
        f"{about}{requests:,} requests, {size(response_bytes)}; {refused:,} refused (4xx),"
        f" {failed:,} failed ({share(failed, requests)})"
    )


def _bar_title(bucket: TrafficBucket) -> str:
    return (
        f"{minute(bucket.at)} UTC: {bucket.requests:,} requests, {bucket.refused:,} of them 4xx,"
        f" {bucket.failed:,} failed, {size(bucket.response_bytes)}"
    )

"""Prepare what the templates of the page show: texts, times, bars. Runs no queries and escapes no HTML.

Text from clients is made printable here; the templates escape it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.read import lines
from exporter.read.chart import bar_width, svg_chart, width_name
from exporter.read.human import package_text, plural, printable, share, size
from exporter.read.log_size import log_size_text
from exporter.read.status import is_failure, is_refusal

if TYPE_CHECKING:
    from exporter.health import Health
    from exporter.read.chart import SvgChart
    from exporter.read.gaps import RecordedGap
    from exporter.read.kept_advisories import Mark
    from exporter.read.log_size import LogSize
    from exporter.read.newest import Row
    from exporter.read.nodes import NodesSummary
    from exporter.read.page import ColumnValue, RowPage, Traffic, TrafficBucket

MAX_FILTER_LENGTH = 500  # characters per search field

_CHART_HEIGHT = 120  # units of the viewBox
_STYLE_SHEET = Path(__file__).with_name("files") / "style.css"
_MAX_PATH_LENGTH = 400
_FIRST_REDIRECT = 300
_MAX_ADVISORIES = 5  # that a row names


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
    proxies: NodesSummary | None = None
    log: LogSize | None = None
    compared_at: datetime | None = None  # when kept advisories were compared; None: none are kept
    marks: dict[str, Mark] = field(default_factory=dict)  # by Package URL


def alert(page: Page) -> str:
    """Return why the database gave no answer; empty if it did. Does not repeat what `health` says."""
    reason = str(page.status.get("last_error") or "").rstrip(".")
    if page.error and page.status.get("away") and reason and reason in page.error:
        return "No rows can be shown until PostgreSQL is available again."
    return page.error or ""


def style_sheet() -> str:
    """Return the style sheet, for pages that users see before they log in and may request files."""
    return _STYLE_SHEET.read_text(encoding="utf-8")


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
        return f"{column.value.astimezone(UTC):%Y-%m-%d %H:%M:%S.%fZ}"
    return printable(str(column.value))


def package(row: Row) -> str:
    """Return the package with its ecosystem, such as "npm left-pad 1.3.0"; empty: it is not known."""
    return package_text(row.purl) if row.purl else ""


def mark_title(mark: Mark) -> str:
    """Return the advisories that are about a package."""
    shown = ", ".join(map(printable, mark.advisories[:_MAX_ADVISORIES]))
    more = len(mark.advisories) - _MAX_ADVISORIES
    return f"{shown} and {more:,} more" if more > 0 else shown


def chart(traffic: Traffic) -> SvgChart:
    """Return the chart of requests. Its bars have the segments named in chart.SEGMENTS."""
    return svg_chart(list(map(_stack, traffic.buckets)), traffic.edges, _CHART_HEIGHT, UTC)


def bar_titles(traffic: Traffic) -> list[str]:
    """Return what each bar shows, in words."""
    return [
        f"{minute(bucket.at)} UTC: {plural(bucket.requests, 'request')}, {bucket.refused:,} refused"
        f" (4xx), {bucket.failed:,} failed, {size(bucket.response_bytes)}"
        for bucket in traffic.buckets
    ]


def legend(traffic: Traffic) -> list[tuple[str, str]]:
    """Return the legend: for each segment of a bar its CSS class, and its name with the total."""
    failed, refused, ok = map(sum, zip(*map(_stack, traffic.buckets), strict=True))
    whole = failed + refused + ok
    return [
        ("ok", f"ok {ok:,}"),
        ("refused", f"refused (4xx) {refused:,}"),
        ("failed", f"failed {failed:,}" + (f" ({share(failed, whole)})" if failed else "")),
    ]


def log_size(log: LogSize) -> str:
    """Return how large the log is."""
    return log_size_text(log)


def per_bar(traffic: Traffic) -> str:
    """Return the width of a bar, such as "hour"."""
    return width_name(bar_width(traffic.until - traffic.since))


def busiest(traffic: Traffic) -> str:
    """Return the height of the highest bar."""
    return f"{_about(traffic)}{max((bucket.requests for bucket in traffic.buckets), default=0):,}"


def totals(traffic: Traffic) -> str:
    """Return the number and size of the requests in all bars."""
    requests = sum(bucket.requests for bucket in traffic.buckets)
    response_bytes = sum(bucket.response_bytes for bucket in traffic.buckets)
    return f"{_about(traffic)}{plural(requests, 'request')}, {size(response_bytes)}"


def _about(traffic: Traffic) -> str:
    return "about " if traffic.sampled_percent else ""


def _stack(bucket: TrafficBucket) -> tuple[int, int, int]:
    """Return the counts in the order of chart.SEGMENTS."""
    # In a sample, each count is rounded separately, so the rest could be -1.
    rest = max(0, bucket.requests - bucket.failed - bucket.refused)
    return bucket.failed, bucket.refused, rest

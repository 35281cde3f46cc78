"""What the templates of the page show, as text for people: sizes, times, bars; escapes nothing, asks nothing.

Everything that came from a client is made printable here and escaped by the templates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from exporter.read import lines
from exporter.read.human import printable, share, size

if TYPE_CHECKING:
    from exporter.health import Health
    from exporter.read.page import ColumnValue, Gap, Rows, Traffic
    from exporter.read.tail import Row

MAX_ASKED = 500  # characters of one field of the search
CHART_WIDTH = 960
CHART_HEIGHT = 120

_TIMES = ("since", "until")
_LONGEST_PATH = 400
_REDIRECT, _REFUSED, _FAILED = 300, 400, 500


@dataclass
class Page:
    """What there is to be shown; what the database did not say is None."""

    asked: dict[str, str]
    health: Health
    status: dict[str, Any]
    whole: bool = True  # with the traffic, and not only what changes all the time
    is_first: bool = True  # the newest rows, which update themselves
    sentence: str | None = None  # why there is nothing
    rows: Rows | None = None
    gaps: list[Gap] = field(default_factory=list)
    traffic: Traffic | None = None


class Bar(NamedTuple):
    """One stretch of time in the chart, in the units of its viewBox."""

    x: float
    width: float
    ok: tuple[float, float]  # y and height, as of the next two
    refused: tuple[float, float]
    failed: tuple[float, float]
    title: str


def in_utc(asked: dict[str, str]) -> dict[str, str]:
    """The search with times that name no zone taken for UTC, which is what the page shows."""
    return {name: _utc(value) if name in _TIMES else value for name, value in asked.items()}


def moment(at: datetime) -> str:
    """A time to the millisecond, UTC."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3]


def minute(at: datetime) -> str:
    """A time to the minute, UTC."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"


def written_at(text: str | None) -> str:
    """The status's time of the last write."""
    return moment(datetime.fromisoformat(text)) + " UTC" if text else "none yet"


def kind(row: Row) -> str:
    """How a row ended, as a class of the style sheet."""
    if row.status_code is None or row.status_code >= _FAILED:
        return "failed"
    if row.status_code >= _REFUSED:
        return "refused"
    return "redirect" if row.status_code >= _REDIRECT else "ok"


def url(row: Row) -> str:
    """What was asked for, so much of it as anybody reads in a list."""
    path = row.path
    if path is not None and len(path) > _LONGEST_PATH:
        row = row._replace(path=f"{path[:_LONGEST_PATH]}...")
    return lines.url(row)


def text(value: str | None) -> str:
    """Text of a client's, printable."""
    return "-" if value is None else printable(value)


def value(column: ColumnValue) -> str | None:
    """A column's value as text; None stays None."""
    if column.value is None:
        return None
    if isinstance(column.value, bytes):
        return column.value.hex()
    if isinstance(column.value, datetime):
        return column.value.astimezone(UTC).isoformat(sep=" ", timespec="microseconds")
    return printable(str(column.value))


def bars(traffic: Traffic) -> list[Bar]:
    """The chart's bars, the highest as high as the chart."""
    top = max((bucket.requests for bucket in traffic.buckets), default=0) or 1
    step = CHART_WIDTH / (len(traffic.buckets) or 1)
    found = []
    for number, bucket in enumerate(traffic.buckets):
        failed, refused, all_of_it = (
            CHART_HEIGHT * count / top
            for count in (bucket.failed, bucket.failed + bucket.refused, bucket.requests)
        )
        title = (
            f"{minute(bucket.at)} UTC: {bucket.requests:,} requests, {bucket.refused:,} of them 4xx,"
            f" {bucket.failed:,} failed, {size(bucket.response_bytes)}"
        )
        found.append(
            Bar(
                x=round(number * step, 1),
                width=round(step * 0.85, 1),
                ok=_segment(refused, all_of_it),
                refused=_segment(failed, refused),
                failed=_segment(0, failed),
                title=title,
            )
        )
    return found


def totals(traffic: Traffic) -> str:
    """The chart in one sentence."""
    _, *columns = zip(*traffic.buckets, strict=True) if traffic.buckets else ((), (), (), (), ())
    requests, refused, failed, sent = (sum(column) for column in columns)
    about = "about " if traffic.sampled_percent else ""
    return (
        f"{about}{requests:,} requests, {size(sent)}; {refused:,} refused (4xx),"
        f" {failed:,} failed ({share(failed, requests)})"
    )


def _segment(low: float, high: float) -> tuple[float, float]:
    return round(CHART_HEIGHT - high, 1), round(high - low, 1)


def _utc(text: str) -> str:
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        return text
    return text if at.tzinfo else at.replace(tzinfo=UTC).isoformat()

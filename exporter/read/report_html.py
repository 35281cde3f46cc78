"""A report as one HTML page that needs no other file and runs no script; sums up nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .human import duration, printable, share, size

if TYPE_CHECKING:
    from datetime import datetime

    from jinja2 import Template

    from .report import Report

_TEMPLATE = Path(__file__).with_name("report.html")
PLOT_WIDTH = 960  # units of the plots; the page scales them
PLOT_HEIGHT = 140


class Column(NamedTuple):
    """One column of a plot; heights and places in the plot's units."""

    x: float
    width: float
    height: float
    failed_height: float
    title: str


def report_html(report: Report) -> str:
    """The page. What clients sent is made printable and escaped; times are those of this machine's zone."""
    return _template().render(
        report=report,
        requests=_columns(report, "requests"),
        bytes=_columns(report, "bytes"),
        width=PLOT_WIDTH,
        height=PLOT_HEIGHT,
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {"size": size, "duration": duration, "moment": _moment}
    environment.globals |= {"share": share}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _finalize(value: Any) -> Any:
    if value is None:
        return "-"
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _columns(report: Report, name: str) -> list[Column]:
    values = [getattr(bar, name) for bar in report.traffic]
    scale = PLOT_HEIGHT / (max(values) or 1)
    width = PLOT_WIDTH / len(values)
    return [
        Column(
            x=round(number * width + width * 0.1, 2),
            width=round(width * 0.8, 2),
            height=round(value * scale, 2),
            failed_height=round(bar.failures * scale, 2) if name == "requests" else 0,
            title=_title(bar.at, bar.requests, bar.failures, bar.bytes),
        )
        for number, (bar, value) in enumerate(zip(report.traffic, values, strict=True))
    ]


def _title(at: datetime, requests: int, failures: int, count: int) -> str:
    return f"{_moment(at)}: {requests:,} requests, {failures:,} failed, {size(count)}"


def _moment(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M}"

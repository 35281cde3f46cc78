"""Render a report as one self-contained HTML page without scripts. Computes no totals."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .chart import SEGMENTS, SVG_WIDTH, svg_chart
from .human import duration, noun_for, package_text, plural, printable, share, size
from .log_size import log_size_text
from .report_text import note_on_advisories

if TYPE_CHECKING:
    from datetime import datetime

    from jinja2 import Template

    from .report import Report, TrafficBar

_TEMPLATE = Path(__file__).with_name("report.html")
_CHART_HEIGHT = 140  # units of the viewBox


def report_html(report: Report) -> str:
    """Return the page, with times in the local time zone. Text from clients is printable and escaped."""
    traffic = report.traffic
    requests = [
        (bar.failures, bar.refusals, bar.requests - bar.failures - bar.refusals) for bar in traffic
    ]
    return _template().render(
        note_on_advisories=note_on_advisories(report.kept) if report.kept is not None else "",
        report=report,
        titles=list(map(_bar_title, traffic)),
        requests_chart=svg_chart(requests, report.edges, _CHART_HEIGHT),
        bytes_chart=svg_chart([(bar.bytes,) for bar in traffic], report.edges, _CHART_HEIGHT),
        totals=list(map(sum, zip(*requests, strict=True))),
        segments=SEGMENTS,
        svg_width=SVG_WIDTH,
    )


def page_environment() -> Environment:
    """Return a template environment in which all values are escaped and printable, and None is a dash."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {
        "number": "{:,}".format,
        "duration": duration,
        "moment": _moment,
        "package": package_text,
        "size": size,
    }
    environment.globals |= {
        "log_size_text": log_size_text,
        "noun_for": noun_for,
        "plural": plural,
        "share": share,
    }
    return environment


@cache
def _template() -> Template:
    return page_environment().from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _finalize(value: Any) -> Any:
    """Show None as a dash, and make all text printable. Markup has gone through here already."""
    if value is None:
        return "-"
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _bar_title(bar: TrafficBar) -> str:
    return (
        f"{_moment(bar.at)}: {plural(bar.requests, 'request')}, {bar.refusals:,} refused (4xx),"
        f" {bar.failures:,} failed, {size(bar.bytes)}"
    )


def _moment(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M}"

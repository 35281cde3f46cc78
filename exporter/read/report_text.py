"""A report as one screen of a terminal; sums up nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .human import duration, printable, share, size

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import RenderableType

    from .report import Report

_TOP = 5
_TWO_COLUMNS = 120  # cells; a narrower terminal has the tables below each other
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_CHART_LINES = 5


def report_text(report: Report, width: int) -> RenderableType:
    """The report for a terminal of this width, in cells; what clients sent is made printable."""
    tables = [_remotes(report), _failures(report), _biggest(report), _cache(report)]
    tables += [_first_seen(report), _unknown(report), _avoidable(report), _gaps(report)]
    notes = [Text(report.note_on_gaps, style="dim")] if report.note_on_gaps else []
    if width < _TWO_COLUMNS:
        return Group(_head(report), _chart(report, width), *tables, *notes)
    grid = Table.grid(padding=(0, 3), expand=True)
    grid.add_column(ratio=3)
    grid.add_column(ratio=2)
    for left, right in zip(tables[::2], tables[1::2], strict=True):
        grid.add_row(left, right)
    return Group(_head(report), _chart(report, width), grid, *notes)


def _head(report: Report) -> Text:
    filters = "".join(f", {name} {printable(it)}" for name, it in report.filters.items())
    text = Text(f"{_moment(report.since)} to {_moment(report.until)}{filters}\n", style="bold")
    fetched = report.fetched
    parts = [
        f"{report.requests:,} requests",
        f"{size(report.bytes)}",
        f"{share(report.failures, report.requests)} failed",
        f"{fetched.artifacts:,} artifacts, {fetched.new_artifacts:,} of them never seen before",
        f"{report.callers.clients:,} clients, {report.callers.users:,} users",
    ]
    return text.append("; ".join(parts) + "\n", style="not bold")


def _chart(report: Report, width: int) -> Text:
    """Requests over time; a column that holds failures is red as far up as they reach."""
    most = max(bar.requests for bar in report.traffic)
    text = Text()
    label = f"{most:,}"
    cells = max(1, min(3, (width - len(label) - 2) // len(report.traffic)))
    for line in reversed(range(_CHART_LINES)):
        text.append(f"{label if line == _CHART_LINES - 1 else '':>{len(label)}} ", style="dim")
        for bar in report.traffic:
            block = _block(bar.requests, most, line) * cells
            failing = bar.failures and _block(bar.failures, most, line) != " "
            text.append(block, style="red" if failing else "blue")
        text.append("\n")
    axis = len(report.traffic) * cells
    first, last = _moment(report.traffic[0].at), _moment(report.until)
    each = f"requests in {duration(report.bar_seconds * 1000)}"
    text.append(" " * (len(label) + 1))
    return text.append(
        f"{first}{each:^{max(0, axis - len(first) - len(last))}}{last}\n", style="dim"
    )


def _block(value: int, most: int, line: int) -> str:
    """The part of a column that falls into a line, counted from below."""
    if not most:
        return " "
    height = value * _CHART_LINES * 8 / most
    if value and not line:
        height = max(1.0, height)  # little is not nothing
    return _EIGHTHS[max(0, min(8, round(height - 8 * line)))]


def _remotes(report: Report) -> Table:
    table = _table("Remotes", "requests", "size", "failed", "p50", "p95")
    for it in report.remotes[:_TOP]:
        table.add_row(
            _name(it.name),
            f"{it.requests:,}",
            size(it.bytes),
            Text(share(it.failures, it.requests), style="red" if it.failures else ""),
            duration(it.p50_ms),
            duration(it.p95_ms),
        )
    return _or_nothing(table)


def _cache(report: Report) -> Table:
    table = _table("Caches by evidence", "requests", "hits", "of bytes")
    for it in report.cache[:_TOP]:
        hits, of_bytes = share(it.hits, it.requests), share(it.hit_bytes, it.bytes)
        table.add_row(_name(it.source), f"{it.requests:,}", hits, of_bytes)
    return _or_nothing(table)


def _failures(report: Report) -> Table:
    table = _table("Failures and refusals", "requests", "share")
    for it in report.failures_by_kind[:_TOP]:
        table.add_row(_name(it.kind), f"{it.requests:,}", share(it.requests, report.requests))
    return _or_nothing(table)


def _biggest(report: Report) -> Table:
    table = _table("Biggest artifacts", "fetches", "size")
    for it in report.fetched.biggest[:_TOP]:
        table.add_row(_name(it.purl), f"{it.fetches:,}", size(it.bytes))
    return _or_nothing(table)


def _avoidable(report: Report) -> Table:
    title = f"A cache would have saved {size(report.fetched.avoidable_bytes)}"
    table = _table(title, "fetches", "saved")
    for it in report.fetched.avoidable[:_TOP]:
        table.add_row(_name(it.purl), f"{it.fetches:,}", size(it.avoidable_bytes))
    return _or_nothing(table)


def _first_seen(report: Report) -> Table:
    table = _table(f"Never seen before: {report.fetched.new_artifacts:,}", "at", "user")
    for it in report.fetched.first_seen[:_TOP]:
        table.add_row(_name(it.purl), _moment(it.first_seen), _name(it.first_user))
    return _or_nothing(table)


def _unknown(report: Report) -> Table:
    table = _table(
        f"Unknown hosts: {report.callers.unknown_hosts:,}",
        "requests",
        "callers",
        "sent",
    )
    for it in report.callers.busiest_unknown_hosts[:_TOP]:
        table.add_row(_name(it.name), f"{it.requests:,}", f"{it.callers:,}", size(it.sent_bytes))
    return _or_nothing(table)


def _gaps(report: Report) -> Table:
    table = _table("Gaps: what the log has lost", "entries", "from", "to")
    for it in report.gaps[:_TOP]:
        name = _name(f"{it.reason} {it.node}")
        table.add_row(name, f"{it.entries:,}", _moment(it.from_at), _moment(it.to_at), style="red")
    return _or_nothing(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True, pad_edge=False)
    table.add_column(title, header_style="bold", ratio=1, no_wrap=True, overflow="ellipsis")
    for column in columns:
        table.add_column(column, header_style="dim", justify="right", no_wrap=True)
    return table


def _or_nothing(table: Table) -> Table:
    if not table.row_count:
        table.add_row(Text("none", style="dim"))
    return table


def _name(text: str | None) -> Text:
    return Text(printable(text or "-"))


def _moment(at: datetime) -> str:
    return f"{at.astimezone():%m-%d %H:%M}"

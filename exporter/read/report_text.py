"""Render a report for a terminal. Computes no totals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .chart import SEGMENTS, segment_tops, time_ticks, value_ticks
from .human import duration, package_text, plural, printable, share, size
from .log_size import log_size_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from rich.console import RenderableType

    from .kept_advisories import KeptSummary
    from .report import Report

_TOP = 5
_TWO_COLUMN_WIDTH = 120  # cells; on a narrower terminal the tables are in one column
_BLOCKS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = 8  # of a line, the resolution of _BLOCKS
_CHART_LINES = 6
_MAX_STEPS = 3  # of the value axis
_MAX_BAR_CELLS = 3
_LABEL_CELLS = 8  # for one label of the time axis, with space around it
_LEVEL_STYLES = {"green": "green", "amber": "yellow", "red": "red"}
_LOG_MARGIN = 3  # cells before the size of the log if it is beside the time
_COLORS = {"failed": "red", "refused": "yellow", "ok": "green"}


def report_text(report: Report, width: int) -> RenderableType:
    """Return the report for a terminal of `width` cells. Text from clients is printable."""
    tables = [_remotes(report), _failures(report), _biggest(report), _cache(report)]
    tables += [_first_seen(report), _unknown_hosts(report), _avoidable(report), _gaps(report)]
    notes = [Text(report.note_on_gaps, style="dim")] if report.note_on_gaps else []
    if report.kept is not None:
        notes.insert(0, Text(note_on_advisories(report.kept), style="dim"))
    affected = [_affected(report.kept)] if report.kept is not None else []
    if width < _TWO_COLUMN_WIDTH:
        return Group(_head(report, width), _chart(report, width), *affected, *tables, *notes)
    grid = Table.grid(padding=(0, 3), expand=True)
    grid.add_column(ratio=3)
    grid.add_column(ratio=2)
    for left, right in zip(tables[::2], tables[1::2], strict=True):
        grid.add_row(left, right)
    return Group(_head(report, width), _chart(report, width), *affected, grid, *notes)


def _head(report: Report, width: int) -> Text:
    filters = "".join(f", {name} {printable(value)}" for name, value in report.filters.items())
    since, until = (f"{at.astimezone():%Y-%m-%d %H:%M}" for at in (report.since, report.until))
    text = Text(f"{since} to {until}{filters}", style="bold")
    log = log_size_text(report.log) if report.log else ""
    is_beside = len(text) + len(log) < width - _LOG_MARGIN
    if is_beside:
        text.append(" " * _LOG_MARGIN).append(log, style="not bold dim")
    text.append("\n")
    fetched = report.fetched
    parts = [
        plural(report.requests, "request"),
        size(report.bytes),
        f"{share(report.failures, report.requests)} failed",
        f"{plural(fetched.artifacts, 'artifact')}, {fetched.new_artifacts:,} never seen before",
        f"{plural(report.callers.clients, 'client')}, {plural(report.callers.users, 'user')}",
    ]
    if report.partial_reads:
        parts.append(plural(report.partial_reads, "partial read"))
    text.append("; ".join(parts) + "\n", style="not bold")
    if not is_beside:
        text.append(f"{log}\n", style="not bold dim")
    if report.proxies is not None:
        style = _LEVEL_STYLES[report.proxies.level]
        text.append(f"{report.proxies.sentence}\n", style=f"not bold {style}")
    return text


def _chart(report: Report, width: int) -> Text:
    """Draw the requests over time. Empty if the terminal is too narrow for the bars."""
    stacks = [
        (bar.failures, bar.refusals, bar.requests - bar.failures - bar.refusals)
        for bar in report.traffic
    ]
    highest = max(map(sum, stacks))
    values = value_ticks(highest, _MAX_STEPS)
    margin = len(f"{values[-1]:,}") + 1
    bar_cells = min(_MAX_BAR_CELLS, (width - margin - 1) // len(stacks))
    if not bar_cells:
        return Text()
    lines_per_value = _CHART_LINES // (len(values) - 1)
    tops = segment_tops(stacks, values[-1], _CHART_LINES * _EIGHTHS)
    text = Text(f"Requests per {report.per_bar}, at most {highest:,}\n")
    for line in reversed(range(_CHART_LINES)):
        number, rest = divmod(line + 1, lines_per_value)
        scale = f"{'':{margin}}│" if rest else f"{values[number]:>{margin - 1},} ┤"
        text.append(scale, style="dim")
        for bar_tops in tops:
            text.append(_block(bar_tops[-1], line) * bar_cells, style=_color(bar_tops, line))
        text.append("\n")
    text.append(_time_axis(report, margin, bar_cells), style="dim")
    totals = dict(zip(SEGMENTS, map(sum, zip(*stacks, strict=True)), strict=True))
    text.append(" " * (margin + 1))
    for name in reversed(SEGMENTS):
        text.append("█", style=_COLORS[name]).append(f" {name} {totals[name]:,}   ")
    text.rstrip()
    return text


def _color(bar_tops: Sequence[float], line: int) -> str:
    """Return the color of a bar in a line: that of the worst requests that reach into it."""
    reaching = (
        name for name, top in zip(SEGMENTS, bar_tops, strict=True) if _block(top, line) != " "
    )
    return _COLORS[next(reaching, "ok")]


def _time_axis(report: Report, margin: int, bar_cells: int) -> str:
    """Return the line below the bars and, below it, the times at which the marked bars start."""
    cells = len(report.traffic) * bar_cells
    axis, labels, free_from = ["─"] * cells, "", margin
    for tick in time_ticks(report.edges, max_ticks=max(1, cells // _LABEL_CELLS)):
        place = round(tick.position * cells)
        start = max(margin, margin + 1 + place - len(tick.label) // 2)
        end = start + len(tick.label)
        if start >= free_from and end <= margin + 1 + cells:
            axis[place] = "┬"
            labels = labels.ljust(start) + tick.label
            free_from = end + 1
    return f"{0:>{margin - 1}} └{''.join(axis)}\n{labels}\n"


def _block(top: float, line: int) -> str:
    """Return the part of a bar that is in a line. `top` is in eighths of a line; line 0 is the lowest."""
    if top and not line:
        top = max(1.0, top)  # show that there is something
    return _BLOCKS[max(0, min(_EIGHTHS, round(top - _EIGHTHS * line)))]


def _remotes(report: Report) -> Table:
    table = _table("Remotes", "requests", "size", "failed", "p50", "p95")
    for remote in report.remotes[:_TOP]:
        failed = share(remote.failures, remote.requests)
        table.add_row(
            _name(remote.name),
            f"{remote.requests:,}",
            size(remote.bytes),
            Text(failed, style="red" if remote.failures else ""),
            duration(remote.p50_ms),
            duration(remote.p95_ms),
        )
    return _or_none(table)


def _cache(report: Report) -> Table:
    table = _table("Caches by evidence", "requests", "hits", "of bytes")
    for cache in report.cache[:_TOP]:
        hits = share(cache.hits, cache.requests)
        hit_bytes = share(cache.hit_bytes, cache.bytes)
        table.add_row(_name(cache.source), f"{cache.requests:,}", hits, hit_bytes)
    return _or_none(table)


def _failures(report: Report) -> Table:
    table = _table("Failures and refusals", "requests", "share")
    for failure in report.failures_by_kind[:_TOP]:
        of_all = share(failure.requests, report.requests)
        table.add_row(_name(failure.kind), f"{failure.requests:,}", of_all)
    return _or_none(table)


def _biggest(report: Report) -> Table:
    table = _table("Biggest artifacts", "fetches", "size")
    for artifact in report.fetched.biggest[:_TOP]:
        table.add_row(
            _artifact(report, artifact.purl), f"{artifact.fetches:,}", size(artifact.bytes)
        )
    return _or_none(table)


def _avoidable(report: Report) -> Table:
    title = f"A cache would have saved {size(report.fetched.avoidable_bytes)}"
    table = _table(title, "fetches", "saved")
    for artifact in report.fetched.avoidable[:_TOP]:
        table.add_row(
            _artifact(report, artifact.purl),
            f"{artifact.fetches:,}",
            size(artifact.avoidable_bytes),
        )
    return _or_none(table)


def _first_seen(report: Report) -> Table:
    table = _table(f"Never seen before: {report.fetched.new_artifacts:,}", "at", "user")
    for artifact in report.fetched.first_seen[:_TOP]:
        first_seen, user = _moment(artifact.first_seen), _name(artifact.first_user)
        table.add_row(_artifact(report, artifact.purl), first_seen, user)
    return _or_none(table)


def _unknown_hosts(report: Report) -> Table:
    title = f"Unknown hosts: {report.callers.unknown_hosts:,}"
    table = _table(title, "requests", "callers", "sent")
    for host in report.callers.busiest_unknown_hosts[:_TOP]:
        requests, callers = f"{host.requests:,}", f"{host.callers:,}"
        table.add_row(_name(host.name), requests, callers, size(host.sent_bytes))
    return _or_none(table)


def _gaps(report: Report) -> Table:
    gaps = report.gaps
    count = f": {gaps.gaps:,} with {plural(gaps.entries, 'request')}" if gaps.gaps else ""
    table = _table(f"Gaps in the log{count}", "lost", "from", "to")
    for gap in gaps.biggest[:_TOP]:
        name = _name(f"{gap.reason} {gap.node}")
        start, end = _moment(gap.from_at), _moment(gap.to_at)
        table.add_row(name, f"{gap.entries:,}", start, end, style="red")
    return _or_none(table)


def _affected(kept: KeptSummary) -> Table:
    table = _table(f"Affected packages: {kept.packages:,}", "advisory", "fetches", "users", "last")
    for each in kept.top[:_TOP]:
        more = f" and {len(each.advisories) - 1} more" if len(each.advisories) > 1 else ""
        possible = "possible: " if each.verdict == "possible" else ""
        table.add_row(
            _name(package_text(each.purl)),
            Text(f"{possible}{printable(each.advisories[0])}{more}"),
            f"{each.fetches:,}",
            f"{each.users:,}",
            _moment(each.last_at),
            style="yellow" if possible else "red",
        )
    return _or_none(table)


def note_on_advisories(kept: KeptSummary) -> str:
    """Say how old the kept advisories are, and what was not compared with them."""
    stored, compared = _moment(kept.kept_at), _moment(kept.compared_at)
    text = f"Advisories: {kept.advisories:,}, stored {stored}, compared {compared}."
    if kept.unchecked:
        text += (
            f" {plural(kept.unchecked, 'package')} fetched since then {'was' if kept.unchecked == 1 else 'were'}"
            " not compared (artifactapi affected --keep)."
        )
    return text


def _artifact(report: Report, purl: str) -> Text:
    """Return the package, marked if kept advisories are about it."""
    mark = report.marks.get(purl)
    name = _name(package_text(purl))
    if mark is None:
        return name
    style = "red" if mark.verdict == "affected" else "yellow"
    return Text(f"{mark.verdict}: ", style=style).append_text(name)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True, pad_edge=False)
    table.add_column(title, header_style="bold", ratio=1, no_wrap=True, overflow="ellipsis")
    for column in columns:
        table.add_column(column, header_style="dim", justify="right", no_wrap=True)
    return table


def _or_none(table: Table) -> Table:
    if not table.row_count:
        table.add_row(Text("none", style="dim"))
    return table


def _name(text: str | None) -> Text:
    return Text(printable(text or "-"))


def _moment(at: datetime) -> str:
    return f"{at.astimezone():%m-%d %H:%M}"

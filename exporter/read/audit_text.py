"""Say in words what an audit found: one sentence, then one line per node and its holes. Runs no queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from .human import are, duration, plural, printable, were

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from .audit import Audit, DayCount, NodeAudit, Span, Verdict

_STYLES: dict[Verdict, str] = {"complete": "green", "incomplete": "red", "unknown": "yellow"}
_WORDS: dict[Verdict, str] = {
    "complete": "Complete",
    "incomplete": "Not complete",
    "unknown": "Not known",
}
_MAX_LISTED = 5  # days or spans of one kind in a line; --json has all


def audit_lines(audit: Audit) -> Iterator[Text]:
    """Format the audit, the answer first. Text from proxies is printable."""
    yield Text(f"{_WORDS[audit.verdict]}: {_sentence(audit)}", style=_STYLES[audit.verdict])
    for node in audit.nodes:
        yield Text(f"{printable(node.node) or '(no name)'}: {'; '.join(_parts(node))}")


def _sentence(audit: Audit) -> str:
    nodes = audit.nodes
    seen = sum(node.seen for node in nodes)
    holes = [*_holes(nodes), *_unknowns(audit)]
    when = _days(audit)
    if holes:
        return f"{when}, {_joined(holes)}."
    if not seen:
        return f"{when}, no proxy saw a request."
    waiting = sum(node.waiting for node in nodes)
    pruned = sum(node.pruned for node in nodes)
    notes = []
    if pruned:
        notes.append(f"{pruned:,} of these rows {were(pruned)} pruned")
    if waiting:
        notes.append(f"the newest {plural(waiting, 'row')} {are(waiting)} about to be written")
    each = "the request" if seen == 1 else f"each of the {seen:,} requests"
    note = f" ({'; '.join(notes)})" if notes else ""
    return f"{when}, {each} that the proxies saw has its row{note}."


def _holes(nodes: list[NodeAudit]) -> Iterator[str]:
    lost = sum(sum(node.lost.values()) for node in nodes)
    if lost:
        recorded = "a gap" if lost == 1 else "gaps"
        yield f"{plural(lost, 'request')} {were(lost)} lost and recorded as {recorded}"
    rows = _total(it for node in nodes for it in node.missing_rows)
    if rows:
        yield f"{plural(rows, 'row')} that {were(rows)} written {are(rows)} missing from the table"
    gaps = _total(it for node in nodes for it in node.missing_gaps)
    if gaps:
        yield f"gaps of {plural(gaps, 'request')} are missing from access_log_gap"
    archived = _total(it for node in nodes for it in node.missing_archived)
    if archived:
        yield f"{plural(archived, 'row')} that {were(archived)} pruned {are(archived)} missing from the archive"
    undelivered = sum(node.undelivered for node in nodes)
    if undelivered:
        yield (
            f"{plural(undelivered, 'request')} {were(undelivered)} seen and not written:"
            " they wait on disk, or went to another database"
        )
    vanished = sum(node.vanished for node in nodes)
    if vanished:
        yield (
            f"{plural(vanished, 'row')} {were(vanished)} lost by the server after it had confirmed them,"
            " as in a failover"
        )


def _unknowns(audit: Audit) -> Iterator[str]:
    silent = [node for node in audit.nodes if node.unknown]
    if silent:
        yield (
            f"{plural(len(silent), 'proxy') if len(silent) == 1 else f'{len(silent):,} proxies'}"
            " did not report for some time, and nobody knows what passed through"
        )
    rows = _total(it for node in audit.nodes for it in node.uncounted_rows)
    if rows:
        yield (
            f"{plural(rows, 'row')} {are(rows)} in the table that no proxy counted"
            " (written by an earlier version, or by hand)"
        )
    if audit.missing_runs:
        yield f"{plural(audit.missing_runs, 'run')} {are(audit.missing_runs)} missing from access_log_run"


def _parts(node: NodeAudit) -> Iterator[str]:
    yield f"{plural(node.seen, 'request')} seen"
    yield f"{plural(node.rows, 'row')} found"
    if node.pruned:
        yield f"{node.pruned:,} pruned"
    if node.waiting:
        yield f"{node.waiting:,} about to be written"
    if node.undelivered:
        yield f"{node.undelivered:,} not written"
    if node.vanished:
        yield f"{node.vanished:,} lost by the server"
    if node.lost:
        reasons = ", ".join(f"{printable(reason)} {n:,}" for reason, n in node.lost.items())
        yield f"{sum(node.lost.values()):,} lost ({reasons})"
    else:
        yield "no gaps"
    for noun, what, counts in (
        ("row", "missing", node.missing_rows),
        ("request", "of missing gaps", node.missing_gaps),
        ("row", "missing from the archive", node.missing_archived),
        ("row", "that no proxy counted", node.uncounted_rows),
    ):
        if counts:
            days = _listed([f"{it.day} {it.count:,}" for it in counts])
            yield f"{plural(_total(counts), noun)} {what} ({days})"
    if node.no_proxy:
        yield f"no proxy running {_listed([_span(it) for it in node.no_proxy])}"
    if node.unknown:
        yield f"unknown {_listed([_span(it) for it in node.unknown])}"


def _days(audit: Audit) -> str:
    first, last = audit.first, audit.last
    if first is not None and first == last:
        return f"on {first} (UTC)"
    if first is None and last is None:
        return "in the whole log"
    if last is None:
        return f"since {first} (UTC)"
    return f"until {last} (UTC)" if first is None else f"from {first} to {last} (UTC)"


def _span(span: Span) -> str:
    took = duration(span.duration.total_seconds() * 1000)
    return f"{_moment(span.from_at)} to {_moment(span.to_at)} ({took})"


def _moment(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"


def _listed(texts: list[str]) -> str:
    more = len(texts) - _MAX_LISTED
    return ", ".join(texts[:_MAX_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _total(counts: Iterable[DayCount]) -> int:
    return sum(it.count for it in counts)

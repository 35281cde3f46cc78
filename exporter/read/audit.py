"""Compare the rows of access_log with the ledger of runs: is the log complete? Runs no queries.

docs/architecture.md says what this proves and what it cannot detect.
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

from msgspec import Struct

from .selection import SelectionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .ledger import Days, Evidence, GapSum, Run

type Verdict = Literal["complete", "incomplete", "unknown"]
type TimeSpan = tuple[datetime | None, datetime | None]  # start and end (exclusive); None: no limit

_IDLE_SECONDS = 10.0  # shorter pauses between two runs are restarts


class Span(Struct, frozen=True):
    """A span of time, by the database's clock."""

    from_at: datetime
    to_at: datetime

    @property
    def duration(self) -> timedelta:
        """How long it is."""
        return self.to_at - self.from_at


class DayCount(Struct, frozen=True):
    """A number of rows or requests of one day (UTC)."""

    day: date
    count: int


class NodeAudit(Struct, frozen=True):
    """What the ledger says about one node, and what the tables hold."""

    node: str
    verdict: Verdict
    seen: int  # requests; all that the following fields count, except `uncounted`
    rows: int  # found in the table, and in the archive
    lost: dict[str, int]  # entries of gaps, by reason
    missing_rows: list[DayCount]  # the ledger counted them, and the table does not have them
    missing_gaps: list[
        DayCount
    ]  # entries of gaps that the ledger counted, and the table does not have
    uncounted_rows: list[DayCount]  # in the table; no proxy counted them
    missing_archived: list[
        DayCount
    ]  # pruned rows that are not in the archive; none without --archive
    undelivered: int  # waited on disk or in memory when their proxy ended or was last seen
    waiting: int  # a running proxy is about to write them
    vanished: int  # the server had confirmed their rows, and has lost them together with its ledger
    pruned: int  # rows removed by `artifactapi prune`, and not in the archive
    no_proxy: list[Span]  # no proxy of this name was running
    unknown: list[Span]  # a proxy was gone or could not report, and left no journal


class Audit(Struct, frozen=True):
    """The result. `first` and `last` are the days (UTC) that were compared; None: no limit."""

    verdict: Verdict
    first: date | None
    last: date | None
    nodes: list[NodeAudit]
    missing_runs: int  # runs that counted rows, and are not in access_log_run


def audit(
    evidence: Evidence,
    days: Days,
    span: TimeSpan = (None, None),
    node: str | None = None,
) -> Audit:
    """Compare the evidence for these days.

    Args:
        evidence: From the database.
        days: The whole days that `evidence.table` counts.
        span: Start and end (exclusive) of the time that runs are looked at; None: no limit.
        node: Only this node; * matches any text.

    Raises:
        SelectionError: it would find nothing because of a mistake, which must not look complete: no proxy ever
            had this name, or the span is in the future.
    """
    is_selected = _matcher(node)
    ledgers = _ledgers(evidence, days, span)
    if node and not any(map(is_selected, ledgers)):
        raise SelectionError(
            f"no proxy named {node} has written to this log; `artifactapi nodes` lists those of the last 7 days."
        )
    nodes = [
        _audit_node(ledgers[name], span, evidence.now)
        for name in sorted(ledgers)
        if is_selected(name) and ledgers[name].is_of_these_days
    ]
    since, _ = span
    if not nodes and since is not None and since > evidence.now:
        raise SelectionError(f"since {since:%Y-%m-%d %H:%M} (UTC) is in the future.")
    known = {run.run_id for run in evidence.runs}
    missing_runs = {
        it.run_id for it in evidence.counted if it.run_id not in known and is_selected(it.node)
    }
    verdicts = {it.verdict for it in nodes}
    verdict: Verdict = "complete"
    if "unknown" in verdicts or missing_runs:
        verdict = "unknown"
    elif "incomplete" in verdicts:
        verdict = "incomplete"
    return Audit(verdict, days.first, days.last, nodes, len(missing_runs))


class _NodeLedger:
    """The evidence about one node."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.runs: list[Run] = []  # of any time
        self.runs_of_span: list[tuple[Run, _Pending]] = []
        self.expected: Counter[date] = Counter()  # rows
        self.expected_lost: Counter[tuple[str, date]] = Counter()  # by run and day
        self.gaps: list[GapSum] = []
        self.found: dict[date, int] = {}
        self.pruned: dict[date, int] = {}
        self.has_archive = False

    @property
    def is_of_these_days(self) -> bool:
        """Whether there is anything to say about it."""
        return bool(
            self.runs_of_span or self.expected or self.expected_lost or self.gaps or self.found
        )


class _Pending(NamedTuple):
    """Requests of a run that have neither a row nor a gap."""

    undelivered: int
    waiting: int  # a running proxy is about to write them


def _ledgers(evidence: Evidence, days: Days, span: TimeSpan) -> dict[str, _NodeLedger]:
    ledgers: dict[str, _NodeLedger] = {}

    def of(node: str) -> _NodeLedger:
        return ledgers.setdefault(node, _NodeLedger(node))

    counted = [it for it in evidence.counted if it.day in days]
    for it in counted:
        of(it.node).expected[it.day] += it.rows
        if it.lost:
            of(it.node).expected_lost[it.origin_run_id, it.day] += it.lost
    _leave_out_repeated(ledgers, evidence)
    for gap in evidence.gaps:
        if days.overlap(gap.from_day, gap.to_day):
            of(gap.node).gaps.append(gap)
    for (node, day), rows in evidence.table.items():
        of(node).found[day] = rows
    for (node, day), rows in evidence.pruned.items():
        if day in days:
            of(node).pruned[day] = rows
            of(node).has_archive = evidence.has_archive
    _add_runs(of, evidence, span, {it.origin_run_id for it in counted})
    return ledgers


def _leave_out_repeated(ledgers: Mapping[str, _NodeLedger], evidence: Evidence) -> None:
    """Expect rows once that were written again after they had left the table."""
    for (node, day), rows in evidence.repeated.items():
        if node in ledgers and day in ledgers[node].expected:
            expected = ledgers[node].expected
            expected[day] = max(0, expected[day] - rows)


def _add_runs(
    of: Callable[[str], _NodeLedger], evidence: Evidence, span: TimeSpan, origins: set[str]
) -> None:
    """`origins`: runs that saw requests of the days, whenever they ran."""
    pending = _pending(evidence)
    for run in evidence.runs:
        of(run.node).runs.append(run)
        if run.run_id in origins or _overlaps(run, span, evidence.now):
            of(run.node).runs_of_span.append((run, pending[run.run_id]))


def _overlaps(run: Run, span: TimeSpan, now: datetime) -> bool:
    since, until = span
    end = run.ended_at if run.ended_at and run.state != "unknown" else now
    return (until is None or run.started_at < until) and (since is None or end >= since)


def _pending(evidence: Evidence) -> dict[str, _Pending]:
    """What is left of each run."""
    settled: Counter[str] = Counter()  # rows and lost requests, by the run that saw them
    own_rows: Counter[str] = Counter()  # of these, rows that the run inserted itself
    for it in evidence.counted:
        settled[it.origin_run_id] += it.rows + it.lost
        if it.run_id == it.origin_run_id:
            own_rows[it.run_id] += it.rows
    found = {}
    for run in evidence.runs:
        # An import finds rows that an earlier import wrote: they are written, but not inserted.
        already_there = max(0, run.written - own_rows[run.run_id] - run.vanished)
        pending = max(0, run.seen - settled[run.run_id] - already_there - run.vanished)
        on_disk = min(pending, run.spooled) if run.state == "running" else pending
        found[run.run_id] = _Pending(on_disk, pending - on_disk)
    return found


def _matcher(node: str | None) -> Callable[[str], object]:
    pattern = re.escape(node).replace(r"\*", ".*") if node else ".*"
    return re.compile(pattern, re.DOTALL).fullmatch


def _audit_node(ledger: _NodeLedger, span: TimeSpan, now: datetime) -> NodeAudit:
    expected, found = ledger.expected, ledger.found
    removed = _removed(expected, found, ledger.pruned)
    lost: Counter[str] = Counter()
    for gap in ledger.gaps:
        lost[gap.reason] += gap.entries
    undelivered = sum(pending.undelivered for _, pending in ledger.runs_of_span)
    waiting = sum(pending.waiting for _, pending in ledger.runs_of_span)
    vanished = sum(run.vanished for run, _ in ledger.runs_of_span)
    all_lost = max(ledger.expected_lost.total(), lost.total())
    missing = {
        "missing_rows": _positive(
            {day: expected[day] - removed[day] - found.get(day, 0) for day in expected}
        ),
        "missing_gaps": _missing_gaps(ledger),
        "missing_archived": _positive(removed) if ledger.has_archive else [],
    }
    uncounted = _positive({day: found[day] - expected[day] + removed[day] for day in found})
    unknown = _unknown(ledger, span, now)
    verdict: Verdict = "complete"
    if unknown or uncounted:
        verdict = "unknown"
    elif lost or undelivered or vanished or any(missing.values()):
        verdict = "incomplete"
    return NodeAudit(
        node=ledger.node,
        verdict=verdict,
        seen=expected.total() + all_lost + undelivered + waiting + vanished,
        rows=sum(found.values()),
        lost=dict(sorted(lost.items())),
        **missing,
        uncounted_rows=uncounted,
        undelivered=undelivered,
        waiting=waiting,
        vanished=vanished,
        pruned=removed.total(),
        no_proxy=_no_proxy(ledger.runs, span, now),
        unknown=unknown,
    )


def _removed(
    expected: Counter[date], found: Mapping[date, int], pruned: Mapping[date, int]
) -> Counter[date]:
    """The pruned rows that are not in the table. Those that someone restored do not count."""
    return Counter(
        {
            day: min(rows, max(0, expected[day] - found.get(day, 0)))
            for day, rows in pruned.items()
            if day in expected
        }
    )


def _missing_gaps(ledger: _NodeLedger) -> list[DayCount]:
    missing = Counter(ledger.expected_lost)
    for gap in ledger.gaps:
        missing[gap.origin_run_id, gap.from_day] -= gap.entries
    by_day: Counter[date] = Counter()
    for (_, day), entries in missing.items():
        by_day[day] += max(0, entries)
    return _positive(by_day)


def _no_proxy(runs: Sequence[Run], span: TimeSpan, now: datetime) -> list[Span]:
    """The times between the first run of a node and the end of the span in which none was running."""
    since, until = span
    idle = []
    covered_to: datetime | None = None
    for run in sorted(runs, key=lambda run: run.started_at):
        if covered_to is not None and run.started_at > covered_to:
            idle.append(Span(covered_to, run.started_at))
        # A silent run may still be running, so its time is unknown and not idle.
        end = now if run.state == "silent" else run.ended_at or now
        covered_to = end if covered_to is None else max(covered_to, end)
    if covered_to is not None and covered_to < min(until or now, now):
        idle.append(Span(covered_to, min(until or now, now)))
    clipped = [_clipped(it, since, until) for it in idle]
    return [it for it in clipped if it is not None and it.duration.total_seconds() >= _IDLE_SECONDS]


def _unknown(ledger: _NodeLedger, span: TimeSpan, now: datetime) -> list[Span]:
    """When a proxy may have seen requests that nobody knows of: from its last report to the next start."""
    found = []
    for run, _ in ledger.runs_of_span:
        if run.state in {"silent", "unknown"}:
            starts = [it.started_at for it in ledger.runs if it.started_at > run.last_seen_at]
            found.append(_clipped(Span(run.last_seen_at, min(starts, default=now)), *span))
    return [it for it in found if it is not None]


def _clipped(span: Span, since: datetime | None, until: datetime | None) -> Span | None:
    start = span.from_at if since is None else max(span.from_at, since)
    end = span.to_at if until is None else min(span.to_at, until)
    return Span(start, end) if start <= end else None


def _positive(counts: Mapping[date, int]) -> list[DayCount]:
    return [DayCount(day, count) for day, count in sorted(counts.items()) if count > 0]

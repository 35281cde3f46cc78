"""The comparison of the ledger with the tables, against a model of proxies that write, lose and die."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings, strategies

from exporter.read.audit import Audit, audit
from exporter.read.audit_text import audit_lines
from exporter.read.ledger import Counted, Days, Evidence, GapSum, Run
from exporter.read.selection import SelectionError

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
_DAYS = [date(2026, 11, 17), date(2026, 11, 18), date(2026, 11, 19)]
_NODES = ["gate-1", "gate-2"]

# A unit test should be fast, and one example takes a millisecond.
few_examples = settings(max_examples=40)


class Batch(NamedTuple):
    """Requests of one run and day: written by `writer`, or found in the table already, or lost."""

    origin: int
    writer: int
    day: date
    inserted: int
    already_there: int  # only if the writer is the origin
    lost: int


class World(NamedTuple):
    """What happened, and what the database knows of it."""

    evidence: Evidence
    seen: int
    lost: int
    undelivered: int


def make_run(number: int, **changes: Any) -> Run:
    run = Run(
        run_id=f"run-{number}",
        node=_NODES[number % 2],
        version="1",
        state="stopped",
        started_at=NOW - timedelta(days=3),
        last_seen_at=NOW - timedelta(hours=1),
        ended_at=NOW - timedelta(hours=1),
        seen=0,
        written=0,
        spooled=0,
    )
    return run._replace(**changes)


@strategies.composite
def worlds(draw: DrawFn) -> World:
    runs = draw(strategies.integers(1, 4))
    numbers = strategies.integers(0, 20)
    batches = draw(
        strategies.lists(
            strategies.builds(
                Batch,
                origin=strategies.integers(0, runs - 1),
                writer=strategies.integers(0, runs - 1),
                day=strategies.sampled_from(_DAYS),
                inserted=numbers,
                already_there=numbers,
                lost=numbers,
            ),
            max_size=12,
        )
    )
    left = [draw(numbers) for _ in range(runs)]
    batches = [it if it.origin == it.writer else it._replace(already_there=0) for it in batches]
    counted: Counter[tuple[int, int, str, date]] = Counter()
    lost: Counter[tuple[int, int, str, date]] = Counter()
    gaps: Counter[tuple[int, str, date]] = Counter()
    table: Counter[tuple[str, date]] = Counter()
    seen, written = Counter(dict(enumerate(left))), Counter[int]()
    for it in batches:
        node = _NODES[it.origin % 2]
        key = (it.writer, it.origin, node, it.day)
        counted[key] += it.inserted
        lost[key] += it.lost
        gaps[it.origin, node, it.day] += it.lost
        table[node, it.day] += it.inserted
        seen[it.origin] += it.inserted + it.already_there + it.lost
        if it.origin == it.writer:
            written[it.origin] += it.inserted + it.already_there
    evidence = Evidence(
        runs=[make_run(n, seen=seen[n], written=written[n]) for n in range(runs)],
        counted=[
            Counted(
                f"run-{writer}", f"run-{origin}", node, day, rows, lost[writer, origin, node, day]
            )
            for (writer, origin, node, day), rows in counted.items()
        ],
        gaps=[
            GapSum(f"run-{origin}", node, day, day, "buffer_full", entries)
            for (origin, node, day), entries in gaps.items()
            if entries
        ],
        table={key: rows for key, rows in table.items() if rows},
        pruned={},
        now=NOW,
    )
    all_lost = sum(it.lost for it in batches)
    inserted = sum(it.inserted for it in batches)
    return World(evidence, inserted + all_lost + sum(left), all_lost, sum(left))


def total(found: Audit, field: str) -> int:
    values = [getattr(node, field) for node in found.nodes]
    return sum(
        value if isinstance(value, int) else sum(it.count for it in value) for value in values
    )


def text_of(found: Audit) -> str:
    return "\n".join(line.plain for line in audit_lines(found))


@few_examples
@given(world=worlds())
def test_audit_finds_what_happened(world: World) -> None:
    found = audit(world.evidence, Days())
    assert total(found, "seen") == world.seen
    assert total(found, "rows") == sum(world.evidence.table.values())
    assert total(found, "undelivered") == world.undelivered
    assert sum(sum(node.lost.values()) for node in found.nodes) == world.lost
    assert (found.verdict == "complete") == (not world.lost and not world.undelivered)
    for field in ("missing_rows", "missing_gaps", "uncounted_rows", "waiting", "pruned"):
        assert total(found, field) == 0, field


@few_examples
@given(world=worlds(), data=strategies.data())
def test_every_deleted_row_is_found(world: World, data: strategies.DataObject) -> None:
    if not world.evidence.table:
        return
    table = dict(world.evidence.table)
    key = data.draw(strategies.sampled_from(sorted(table)))
    deleted = data.draw(strategies.integers(1, table[key]))
    table[key] -= deleted
    if not table[key]:  # a dropped partition
        del table[key]
    found = audit(world.evidence._replace(table=table), Days())
    assert found.verdict == "incomplete"
    assert total(found, "missing_rows") == deleted
    (node,) = [node for node in found.nodes if node.missing_rows]
    assert (node.node, node.missing_rows[0].day) == key
    assert "missing from the table" in text_of(found)


@few_examples
@given(world=worlds(), data=strategies.data())
def test_every_deleted_gap_is_found(world: World, data: strategies.DataObject) -> None:
    if not world.evidence.gaps:
        return
    gaps = list(world.evidence.gaps)
    deleted = gaps.pop(data.draw(strategies.integers(0, len(gaps) - 1)))
    found = audit(world.evidence._replace(gaps=gaps), Days())
    assert found.verdict == "incomplete"
    assert total(found, "missing_gaps") == deleted.entries
    assert total(found, "seen") == world.seen


@few_examples
@given(world=worlds(), data=strategies.data())
def test_every_row_that_no_proxy_wrote_is_found(world: World, data: strategies.DataObject) -> None:
    table = dict(world.evidence.table)
    key = (data.draw(strategies.sampled_from(_NODES)), data.draw(strategies.sampled_from(_DAYS)))
    added = data.draw(strategies.integers(1, 9))
    table[key] = table.get(key, 0) + added
    found = audit(world.evidence._replace(table=table), Days())
    assert found.verdict == "unknown"
    assert total(found, "uncounted_rows") == added


@few_examples
@given(world=worlds(), data=strategies.data())
def test_a_pruned_day_is_no_hole_unless_more_is_missing(
    world: World, data: strategies.DataObject
) -> None:
    if not world.evidence.table:
        return
    key = data.draw(strategies.sampled_from(sorted(world.evidence.table)))
    rows = world.evidence.table[key]
    registered = data.draw(strategies.integers(0, rows))
    table = {it: count for it, count in world.evidence.table.items() if it != key}
    before = audit(world.evidence, Days())
    found = audit(world.evidence._replace(table=table, pruned={key: registered}), Days())
    assert total(found, "missing_rows") == rows - registered
    assert total(found, "pruned") == registered
    if registered == rows:
        assert found.verdict == before.verdict
    # The audit looked into the archive, too, and did not find them.
    found = audit(
        world.evidence._replace(table=table, pruned={key: registered}, has_archive=True), Days()
    )
    assert total(found, "missing_archived") == registered
    if registered:
        assert found.verdict == "incomplete"
    # Someone has restored the rows.
    restored = audit(world.evidence._replace(pruned={key: registered}), Days())
    assert restored == before


@few_examples
@given(world=worlds(), day=strategies.sampled_from(_DAYS))
def test_a_day_counts_only_its_own_rows(world: World, day: date) -> None:
    days = Days(day, day)
    table = {key: rows for key, rows in world.evidence.table.items() if key[1] in days}
    found = audit(world.evidence._replace(table=table), days)
    assert total(found, "rows") == sum(table.values())
    assert total(found, "missing_rows") == total(found, "uncounted_rows") == 0


def evidence_of(*runs: Run) -> Evidence:
    return Evidence(list(runs), [], [], {}, {}, NOW)


def test_silent_proxy_makes_the_time_since_its_last_report_unknown() -> None:
    silent = make_run(0, state="silent", ended_at=None)
    (node,) = audit(evidence_of(silent), Days()).nodes
    assert [(it.from_at, it.to_at) for it in node.unknown] == [(silent.last_seen_at, NOW)]
    assert (node.verdict, node.no_proxy) == ("unknown", [])
    # It came back as another run: a crash of the machine, for example.
    later = make_run(2, state="running", started_at=NOW - timedelta(minutes=10), ended_at=None)
    found = audit(evidence_of(silent, later), Days())
    (node,) = found.nodes
    assert [(it.from_at, it.to_at) for it in node.unknown] == [
        (silent.last_seen_at, later.started_at)
    ]
    assert found.verdict == "unknown"
    assert "1 proxy did not report for some time" in text_of(found)


@pytest.mark.parametrize(
    ("since_hours", "until_hours", "verdict"),
    [(None, None, "unknown"), (0.5, None, "unknown"), (None, 1.5, "complete"), (3, 2, "complete")],
)
def test_unknown_time_matters_only_within_the_span(
    since_hours: float | None, until_hours: float | None, verdict: str
) -> None:
    since, until = (
        None if hours is None else NOW - timedelta(hours=hours)
        for hours in (since_hours, until_hours)
    )
    silent = make_run(0, state="silent", ended_at=None)
    found = audit(evidence_of(silent), Days.covering(since, until), (since, until))
    assert found.verdict == verdict


def test_two_proxies_of_one_name_do_not_hide_each_others_pauses() -> None:
    def run(number: int, start: float, end: float) -> Run:
        started, ended = (NOW - timedelta(hours=hours) for hours in (start, end))
        return make_run(number, started_at=started, last_seen_at=ended, ended_at=ended)

    (node,) = audit(evidence_of(run(0, 10, 8), run(2, 9, 6), run(4, 3, 1)), Days()).nodes
    hours = [
        ((NOW - it.from_at) / timedelta(hours=1), (NOW - it.to_at) / timedelta(hours=1))
        for it in node.no_proxy
    ]
    assert hours == [(6, 3), (1, 0)]
    assert node.verdict == "complete"


def test_running_proxy_may_have_rows_that_it_is_about_to_write() -> None:
    running = make_run(0, state="running", ended_at=None, seen=10, written=3)
    counted = [Counted("run-0", "run-0", "gate-1", _DAYS[2], 3, 0)]
    evidence = evidence_of(running)._replace(counted=counted, table={("gate-1", _DAYS[2]): 3})
    found = audit(evidence, Days())
    assert (found.verdict, found.nodes[0].waiting, found.nodes[0].seen) == ("complete", 7, 10)
    assert "the newest 7 rows are about to be written" in text_of(found)
    on_disk = evidence._replace(runs=[running._replace(spooled=5)])
    found = audit(on_disk, Days())
    assert (found.verdict, found.nodes[0].waiting) == ("incomplete", 2)
    assert found.nodes[0].undelivered == 5


def test_deleted_run_is_found() -> None:
    counted = [Counted("run-7", "run-7", "gate-1", _DAYS[2], 3, 0)]
    evidence = evidence_of()._replace(counted=counted, table={("gate-1", _DAYS[2]): 3})
    found = audit(evidence, Days())
    assert (found.verdict, found.missing_runs) == ("unknown", 1)
    assert "1 run is missing from access_log_run" in text_of(found)
    # The origin may have written to another database.
    elsewhere = evidence._replace(
        counted=[Counted("run-0", "run-7", "gate-1", _DAYS[2], 3, 0)], runs=[make_run(0)]
    )
    assert audit(elsewhere, Days()).verdict == "complete"


def test_gap_that_reaches_over_the_whole_span_counts() -> None:
    gap = GapSum("run-0", "gate-1", _DAYS[0], _DAYS[2], "buffer_full", 5)
    evidence = evidence_of()._replace(gaps=[gap])
    for first, last, verdict in (
        (_DAYS[1], _DAYS[1], "incomplete"),
        (_DAYS[2], None, "incomplete"),
        (None, _DAYS[0], "incomplete"),
        (_DAYS[2] + timedelta(days=1), None, "complete"),
        (None, _DAYS[0] - timedelta(days=1), "complete"),
    ):
        assert audit(evidence, Days(first, last)).verdict == verdict


def test_only_the_selected_nodes_count() -> None:
    evidence = evidence_of(make_run(0, seen=3), make_run(1))
    assert audit(evidence, Days()).verdict == "incomplete"
    assert audit(evidence, Days(), node="gate-2").verdict == "complete"
    assert [it.node for it in audit(evidence, Days(), node="*-1").nodes] == ["gate-1"]
    with pytest.raises(SelectionError, match="no proxy named gate has written to this log"):
        audit(evidence, Days(), node="gate")


def test_text_of_a_proxy_cannot_control_the_terminal() -> None:
    hostile = make_run(0, node="a\x1b[31m\nComplete:")
    text = text_of(audit(evidence_of(hostile), Days()))
    assert len(text.splitlines()) == 2
    assert r"\x1b" in text


def test_empty_log_is_complete() -> None:
    found = audit(evidence_of(), Days())
    assert (found.verdict, found.nodes) == ("complete", [])
    assert text_of(found) == "Complete: in the whole log, no proxy saw a request."


@pytest.mark.parametrize(
    ("days", "text"),
    [
        (Days(_DAYS[0], _DAYS[0]), "on 2026-11-17 (UTC)"),
        (Days(_DAYS[0], _DAYS[2]), "from 2026-11-17 to 2026-11-19 (UTC)"),
        (Days(_DAYS[0], None), "since 2026-11-17 (UTC)"),
        (Days(None, _DAYS[0]), "until 2026-11-17 (UTC)"),
    ],
)
def test_the_sentence_names_the_days(days: Days, text: str) -> None:
    assert text in text_of(audit(evidence_of(), days))


def test_days_cover_the_whole_span() -> None:
    tokyo = datetime.fromisoformat("2026-11-18T08:00+09:00")
    midnight = datetime(2026, 11, 19, tzinfo=UTC)
    assert Days.covering(tokyo, midnight) == Days(_DAYS[0], _DAYS[1])
    assert Days.covering(None, None).bounds == {"since": "-infinity", "until": "infinity"}
    assert Days(_DAYS[0], date.max).bounds["until"] == "infinity"

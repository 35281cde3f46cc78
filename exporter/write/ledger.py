"""What this run tells the database about itself: how many requests it saw, and the rows it writes. Runs nothing.

The statements belong into the transaction that writes the rows, so that the counts are exact: a batch
that is sent again after a lost answer is refused by its primary key, together with its counts.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
from psycopg import sql

from ..run import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..rows.entry import AccessLogEntry
    from .gaps import Gap

type EndReason = Literal["stopped", "killed", "unknown"]
type RowCounts = Mapping[tuple[str, str], int]  # by node and day (UTC, YYYY-MM-DD)
type _Key = tuple[str, str, str]  # the run that saw the requests, node and day

UNKNOWN_RUN = str(uuid.UUID(int=0))  # of rows from a spool file that names no run

_NOTHING: Mapping[_Key, int] = MappingProxyType({})
# Arguments of a call that says nothing about the run itself.
_ONLY_ROWS = ("NULL", "0", "0", *["NULL"] * 7)
_IDLE_SECONDS = 10.0  # between two reports without a batch
_RATE_SECONDS = 10.0  # the rate is a mean over at least this time


class _Counted(NamedTuple):
    """Rows and losses of one run that saw the requests, node and day."""

    origin: str
    node: str
    day: str
    rows: int
    lost: int


class RunCounts(msgspec.Struct, frozen=True):
    """What became of the requests that a run has seen. They never decrease, except `waiting` and `spooled`."""

    written: int
    dropped: int
    rejected: int
    waiting: int
    spooled: int

    @property
    def seen(self) -> int:
        """All requests."""
        return self.written + self.dropped + self.rejected + self.waiting + self.spooled


class RunEnd(msgspec.Struct, frozen=True):
    """The end of a run that the database has not heard of yet. Can be stored as MessagePack."""

    run: Run
    counts: RunCounts
    reason: EndReason
    ended_at: float  # epoch seconds, by the clock that `run.started_at` is from


class RunLedger:
    """Makes the statements that record one run. Only the writer thread uses it."""

    def __init__(
        self, run: Run, counts: Callable[[], RunCounts], *, has_ended: bool = False
    ) -> None:
        """`counts` returns the counters of this process.

        `has_ended`: the run is not that of this process. Its rows are counted, and nothing else is said of it,
        except by `end_statement`.
        """
        self.run = run
        self.has_ended = has_ended
        self._counts = counts
        self._elsewhere = RunCounts(0, 0, 0, 0, 0)  # settled in other databases
        self._confirmed = 0
        self._started_at = time.monotonic() - max(0.0, time.time() - run.started_at)
        self._reported_at = -_IDLE_SECONDS  # monotonic seconds
        self._rate: float | None = None
        self._rate_since = (time.monotonic(), 0)  # and rows written until then

    @property
    def is_due(self) -> bool:
        """Whether the database has not heard from this run for some time."""
        return self.seconds_left <= 0

    @property
    def seconds_left(self) -> float:
        """Until the next report is due, if there is no batch."""
        return self._reported_at + _IDLE_SECONDS - time.monotonic()

    def reported(self) -> None:
        """The database has a statement of ours."""
        self._reported_at = time.monotonic()

    def rename(self, node: str) -> RunEnd:
        """Continue as another run under another name, in the same database; return the end of this one."""
        settled = msgspec.structs.replace(self.counts(), waiting=0, spooled=0)
        end = RunEnd(self.run, settled, "stopped", time.time())
        self.renew(node)
        return end

    @property
    def elsewhere(self) -> RunCounts:
        """What was settled in earlier runs of this process; its `waiting` and `spooled` mean nothing."""
        return self._elsewhere

    def renew(self, node: str | None = None) -> None:
        """Continue as another run: the rows go to another database, or have another role or node.

        What is settled belongs to the old run. What waits belongs to the new one.
        """
        self._elsewhere = self._counts()
        self._confirmed = 0
        self.has_ended = False
        self.run = Run.start(node or self.run.node)
        self._started_at = time.monotonic()
        self._reported_at = -_IDLE_SECONDS
        self._rate, self._rate_since = None, (time.monotonic(), self._elsewhere.written)

    def counts(self) -> RunCounts:
        """What became of the requests of this run."""
        now, before = self._counts(), self._elsewhere
        return RunCounts(
            now.written - before.written,
            now.dropped - before.dropped,
            now.rejected - before.rejected,
            now.waiting,
            now.spooled,
        )

    def end(self, reason: EndReason) -> RunEnd:
        """The end of this run, now."""
        return RunEnd(self.run, self.counts(), reason, time.time())

    def report(self, reason: EndReason | None = None) -> bytes:
        """The statement that says what the run has seen, and whether it ends now."""
        return self._statement(self.counts(), reason=reason)

    def record_rows(
        self, rows: RowCounts, origin: str | None = None, *, settled: bool = False, spooled: int = 0
    ) -> bytes:
        """The statements that count rows. They belong into the transaction that inserts them.

        Args:
            rows: How many rows this transaction inserts.
            origin: The run that saw the requests; None: this one.
            settled: Whether the counters do not include these rows yet.
            spooled: How many of the rows are still counted as spooled.
        """
        counts = self.counts()
        if settled and origin in {None, self.run.run_id}:
            added = sum(rows.values())
            waited = min(added - spooled, counts.waiting)
            counts = msgspec.structs.replace(
                counts,
                written=counts.written + added,
                waiting=counts.waiting - waited,
                spooled=counts.spooled - spooled,
            )
        origin = origin or self.run.run_id
        return self._statement(counts, rows={(origin, *key): n for key, n in rows.items()})

    def add_confirmed(self, rows: int) -> None:
        """The server has confirmed that it inserted and counted these rows. Others may be in doubt."""
        self._confirmed += rows

    def compare_confirmed(self) -> bytes:
        """The statement that compares the confirmed rows with what the server has; empty: there are none.

        It returns how many the server has lost. Call it when a connection is new.
        """
        if not self._confirmed:
            return b""
        return (
            f"SELECT access_log_run_confirm({_text(self.run.run_id)}, {self._confirmed})".encode()
        )

    def record_gaps(self, gaps: Iterable[Gap]) -> bytes:
        """The statements that count gaps. They belong into the transaction that inserts them."""
        lost: Counter[_Key] = Counter()
        for gap in gaps:
            lost[gap.run_id or UNKNOWN_RUN, gap.node, gap.from_at[:10]] += gap.entries
        return self._statement(self.counts(), lost=lost)

    def _statement(
        self,
        counts: RunCounts,
        *,
        reason: EndReason | None = None,
        rows: Mapping[_Key, int] = _NOTHING,
        lost: Mapping[_Key, int] = _NOTHING,
    ) -> bytes:
        self._update_rate(counts.written)
        return _statement(
            self.run,
            counts,
            age_s=time.monotonic() - self._started_at,
            reason=reason,
            rate=self._rate,
            rows=rows,
            lost=lost,
            has_ended=self.has_ended,
        )

    def _update_rate(self, written: int) -> None:
        now = time.monotonic()
        since, written_before = self._rate_since
        total = written + self._elsewhere.written
        if now - since >= _RATE_SECONDS:
            self._rate = (total - written_before) / (now - since)
            self._rate_since = now, total


def end_statement(end: RunEnd) -> bytes:
    """The statement that records the end of an earlier run."""
    ago_s = max(0.0, time.time() - end.ended_at)
    age_s = max(0.0, end.ended_at - end.run.started_at)
    return _statement(end.run, end.counts, age_s=age_s, ago_s=ago_s, reason=end.reason)


def row_counts(entries: Iterable[AccessLogEntry]) -> RowCounts:
    """Count the entries by node and day."""
    return Counter([(entry.node or "", entry.started_at[:10]) for entry in entries])


def _statement(
    run: Run,
    counts: RunCounts,
    *,
    age_s: float,
    reason: EndReason | None,
    ago_s: float = 0.0,
    rate: float | None = None,
    rows: Mapping[_Key, int] = _NOTHING,
    lost: Mapping[_Key, int] = _NOTHING,
    has_ended: bool = False,
) -> bytes:
    """One statement for each node, that of the run first: on Citus, each node has its place."""
    by_node: dict[str, list[_Counted]] = {run.node: []}
    for key in dict.fromkeys((*rows, *lost)):
        counted = _Counted(*key, rows=rows.get(key, 0), lost=lost.get(key, 0))
        by_node.setdefault(counted.node, []).append(counted)
    numbers = (counts.seen, counts.written, counts.dropped, counts.rejected, counts.spooled)
    own: Iterable[str] = (
        _text(run.version),
        f"{age_s:.3f}",
        f"{ago_s:.3f}",
        _text(reason),
        *map(str, numbers),
        "NULL" if rate is None else f"{rate:.3f}",
    )
    if has_ended:
        own = _ONLY_ROWS
    calls = [
        _call(run.run_id, node, own if node == run.node else _ONLY_ROWS, counted)
        for node, counted in by_node.items()
    ]
    return "; ".join(calls).encode()


def _call(run_id: str, node: str, values: Iterable[str], counted: Sequence[_Counted]) -> str:
    arguments = (
        _text(run_id),
        _text(node),
        *values,
        _array((_text(each.origin) for each in counted), "uuid"),
        _array((_text(each.node) for each in counted), "text"),
        _array((_text(each.day) for each in counted), "date"),
        _array((str(each.rows) for each in counted), "bigint"),
        _array((str(each.lost) for each in counted), "bigint"),
    )
    return f"SELECT access_log_run_record({', '.join(arguments)})"


def _array(elements: Iterable[str], element_type: str) -> str:
    return f"ARRAY[{','.join(elements)}]::{element_type}[]"


@functools.lru_cache(maxsize=1024)  # the same few names and days again and again, at 15 us each
def _text(value: str | None) -> str:
    return "NULL" if value is None else sql.Literal(value).as_string(None)

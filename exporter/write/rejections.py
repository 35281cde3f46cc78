"""Find the rows that PostgreSQL rejects, without losing rows to a mistake in the database.

An error does not say whether only this row is bad, or whether a DBA has changed the table so that it
accepts no row any more. So a row is given up only when the server accepts a similar one.
"""

from __future__ import annotations

import random
from itertools import batched
from typing import TYPE_CHECKING, NamedTuple

import psycopg

from ..postgres.connection import DeadlineConnection, describe
from ..postgres.faults import Fault, classify, is_certainly_bad, rejected_line
from .artifacts import fetches
from .copy_batch import CopyBatch
from .insert import RowsDiscardedError, insert_missing, insert_or_explain, would_accept

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from ..rows.entry import AccessLogEntry

_ROWS_PER_COPY = 32  # while we look for bad rows
_MAX_PROBES = 8  # rows from each source, to find one that the server accepts

type _Kind = tuple[str, bool]  # the row's partition, and whether it counts an artifact


class Rejection(NamedTuple):
    """An entry that PostgreSQL will never accept, and why."""

    entry: AccessLogEntry
    sqlstate: str
    reason: str


class NoRowAcceptedError(Exception):
    """The server rejected a row, and we know of no similar row that it accepts."""


class AcceptedRows:
    """The rows that the server accepted last."""

    def __init__(self) -> None:
        self._last: Sequence[AccessLogEntry] = ()
        self._last_with_artifacts: Sequence[AccessLogEntry] = ()

    def add(self, batch: Sequence[AccessLogEntry]) -> None:
        """Remember a batch of which every row was accepted. Does not decode a CopyBatch."""
        self._last = batch
        if batch.statement if isinstance(batch, CopyBatch) else fetches(batch):
            self._last_with_artifacts = batch

    def batches(self) -> Iterator[Sequence[AccessLogEntry]]:
        """At most two batches."""
        yield self._last
        if self._last_with_artifacts is not self._last:
            yield self._last_with_artifacts


class RejectionFinder:
    """Writes a batch of which the server rejects or already has some rows. For one batch only.

    A row is rejected if the server refuses it, then accepts another row of the same partition, and then
    refuses it again. If an artifact of the row cannot be counted, the other row must have one, too.
    """

    def __init__(
        self,
        connection: DeadlineConnection,
        accepted: AcceptedRows,
        waiting: Callable[[], Sequence[AccessLogEntry]],
        repaired: Collection[Fault],
        ledger_statement: Callable[[Sequence[AccessLogEntry]], bytes],
        *,
        is_counted: bool = False,
    ) -> None:
        """`waiting` returns some of the rows that wait to be written.

        `ledger_statement` returns the statement that counts inserted rows in the ledger; it may be empty.
        `is_counted`: the ledger and the table of artifacts count the whole batch already.
        """
        self._connection = connection
        self._accepted = accepted
        self._waiting = waiting
        self._repaired = repaired
        self._ledger_statement = (lambda _: b"") if is_counted else ledger_statement
        self._is_counted = is_counted
        self.stored: set[str] = set()  # flow ids of the rows that are in the table
        self.inserted = 0  # of these, rows that this call has inserted and the server has confirmed
        self._batch: Sequence[AccessLogEntry] = ()
        self._rejections: list[Rejection] = []
        self._accepted_kinds: dict[_Kind, AccessLogEntry] = {}  # with a row of each

    def write(self, batch: Sequence[AccessLogEntry]) -> list[Rejection]:
        """Write the rows, and return the rejected ones.

        Raises:
            NoRowAcceptedError: Some rows were written, perhaps; the others must wait.
            psycopg.Error, DeadlineExceededError: As before, but for a reason that is not in the rows.
        """
        self._batch = batch
        todo = [list(rows) for rows in batched(batch, _ROWS_PER_COPY)]
        todo.reverse()
        while todo:
            rows = todo.pop()
            try:
                left = self._insert(rows)
                self.stored |= {row.flow_id for row in rows} - {row.flow_id for row in left}
                todo += [[row] for row in left]
            except (psycopg.Error, UnicodeError) as e:
                if classify(e, self._repaired) is not Fault.ROW:
                    raise
                todo += self._split(rows, e)
        return self._rejections

    def give_up(
        self, row: AccessLogEntry, error: Exception, batch: Sequence[AccessLogEntry]
    ) -> list[Rejection]:
        """Reject a row that the server has not written in time, unless it is in the table by now.

        Raises:
            NoRowAcceptedError: The server accepts no other row either.
            psycopg.Error, DeadlineExceededError: It is too slow for other rows, too.
        """
        self._batch = batch
        probes = self._probes(row, with_artifact=False)
        good = next((probe for probe in probes if self._accepts([probe])), None)
        if good is None:
            raise NoRowAcceptedError(describe(error))
        if not self._is_stored(row, good):
            self._add(row, error)
        return self._rejections

    def _split(self, rows: list[AccessLogEntry], error: Exception) -> list[list[AccessLogEntry]]:
        """The server rejects one of these rows. Returns what is left to write, the last part first."""
        line = rejected_line(error, len(rows))
        if line is None and len(rows) > 1:
            half = len(rows) // 2
            return [rows[half:], rows[:half]]
        bad = rows[line or 0]
        if not self._reject(bad, error):
            return [rows]
        rest = [row for row in rows if row is not bad]
        return [rest] if rest else []

    def _insert(self, rows: list[AccessLogEntry]) -> list[AccessLogEntry]:
        """Write the rows that are not in the table; returns those that must be tried alone."""
        try:
            self._copy(rows)
        except psycopg.Error as e:
            is_duplicate = classify(e, self._repaired) is Fault.DUPLICATE
            if is_duplicate and len(rows) == 1:
                return []
            if len(rows) == 1 or not (is_duplicate or isinstance(e, RowsDiscardedError)):
                raise
        else:
            return []
        inserted = insert_missing(
            self._connection, rows, self._ledger_statement, count_artifacts=not self._is_counted
        )
        self.inserted += sum(inserted)
        self._accept([row for row, flag in zip(rows, inserted, strict=True) if flag])
        others = [row for row, flag in zip(rows, inserted, strict=True) if not flag]
        # They are in the table, or a trigger discards them, or they violate another unique key.
        if others and not self._accepts(others):
            return others
        self._accept(others)
        return []

    def _copy(self, rows: list[AccessLogEntry]) -> None:
        # In a transaction, so that nothing is stored if a trigger discards one of the rows.
        batch = CopyBatch.of(rows)
        insert_or_explain(
            self._connection,
            batch.without_artifacts() if self._is_counted else batch,
            ledger_statement=self._ledger_statement(rows),
        )
        self.inserted += len(rows)
        self._accept(rows)

    def _accept(self, rows: list[AccessLogEntry]) -> None:
        for row in rows:
            day = row.started_at[:10]
            self._accepted_kinds |= {(day, False): row, (day, bool(row.artifact_complete)): row}
        if rows:
            self._accepted.add(rows)

    def _reject(self, row: AccessLogEntry, error: Exception) -> bool:
        """Reject the row, unless it is in the table; False if it must be tried once more before.

        Raises:
            NoRowAcceptedError: It must not be rejected.
        """
        if not is_certainly_bad(error):
            kind = self._kind(row)
            if kind not in self._accepted_kinds:
                probes = self._probes(row, with_artifact=kind[1])
                good = next((probe for probe in probes if self._accepts([probe])), None)
                if good is None:
                    raise NoRowAcceptedError(describe(error))
                self._accept([good])
                return False
            if self._is_stored(row, self._accepted_kinds[kind]):
                self.stored.add(row.flow_id)
                return True  # it was written before, when the server still accepted it
        self._add(row, error)
        return True

    def _add(self, row: AccessLogEntry, error: Exception) -> None:
        state = getattr(error, "sqlstate", None) or ""
        self._rejections.append(Rejection(row, state, describe(error)))

    def _kind(self, row: AccessLogEntry) -> _Kind:
        """If the row could be stored without its artifact, it must be compared with such rows."""
        is_about_artifact = bool(row.artifact_complete) and self._accepts(
            [row], count_artifacts=False
        )
        return row.started_at[:10], is_about_artifact

    def _probes(self, row: AccessLogEntry, *, with_artifact: bool) -> Iterator[AccessLogEntry]:
        """Other rows, at the time of this one."""
        for source in (*self._accepted.batches(), self._batch, self._waiting()):
            others = [
                other
                for other in source
                if other.flow_id != row.flow_id and (other.artifact_complete or not with_artifact)
            ]
            for other in random.sample(others, min(_MAX_PROBES, len(others))):
                yield other._replace(started_at=row.started_at)

    def _is_stored(self, row: AccessLogEntry, accepted: AccessLogEntry) -> bool:
        """Whether the row is in the table. Our role may be unable to read it, so insert under its key."""
        probe = accepted._replace(started_at=row.started_at, flow_id=row.flow_id)
        try:
            insert_or_explain(self._connection, [probe], force_rollback=True)
        except psycopg.Error as e:
            fault = classify(e, self._repaired)
            if fault not in {Fault.ROW, Fault.DUPLICATE}:
                raise
            return fault is Fault.DUPLICATE
        return False

    def _accepts(self, rows: list[AccessLogEntry], *, count_artifacts: bool = True) -> bool:
        try:
            return would_accept(
                self._connection,
                rows,
                count_artifacts=count_artifacts,
                ledger_statement=self._ledger_statement(rows),  # no row's fault if that fails
            )
        except (psycopg.Error, UnicodeError) as e:
            if classify(e, self._repaired) not in {Fault.ROW, Fault.DUPLICATE}:
                raise
            return False

"""Write what killed proxies have left in their journals: every exchange once, and the rest as gaps.

Idempotent: a second recovery of the same journal finds its rows by their keys and its gaps by their ids.
"""

from __future__ import annotations

import errno
import logging
import uuid
from itertools import batched
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec.structs import replace

from ..exchange import Exchange
from ..gil import yielding_gil
from ..rows.entry_builder import EntryBuilder
from ..rows.text import timestamp
from ..run import Run
from .database import Database
from .gaps import Gap
from .journal import checksum, journal_database
from .journal_file import (
    ALIVE_AT,
    BEGUN,
    CHECK,
    COUNTERS,
    COUNTERS_AT,
    DROPPED,
    DROPS_RECORDED,
    ELSEWHERE,
    ELSEWHERE_LOST,
    LAST_BEGUN_AT,
    LOST,
    OLDEST_OPEN_AT,
    RECORD,
    REJECTED,
    RELEASED,
    RING_AT,
    SKIPPED,
    SPOOLED,
    DeadJournalFile,
    Identity,
    JournalError,
    is_other_version,
    journal_paths,
    read_identity,
)
from .ledger import RunCounts, RunEnd, RunLedger
from .worker import build_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ..rows.entry import AccessLogEntry
    from ..settings import Settings
    from .encoding import Encoded
    from .gaps import Reason
    from .rejections import Rejection

logger = logging.getLogger(__name__)

_FIELDS = Exchange.__struct_fields__
_MAX_RUN_SECONDS = 10 * 366 * 86_400.0  # a time further away from the start of the run is damaged


class Counters(NamedTuple):
    """The counters of a journal; see `Journal` and `Safe`. None: damaged. Times are epoch seconds."""

    begun: int | None
    skipped: int | None
    dropped: int | None
    released: int | None
    drops_recorded: int | None
    rejected: int | None
    spooled: int | None
    lost: int | None
    elsewhere: int | None
    elsewhere_lost: int | None
    last_begun_at: float
    oldest_open_at: float
    alive_at: float


class JournalContent:
    """What a journal says. Every value may be damaged, so everything is checked."""

    def __init__(self, content: bytes, identity: Identity) -> None:
        self.identity = identity
        self._content = content
        self.counters = counters = _read_counters(content, identity)
        found = _find_records(content, identity.key)
        released = counters.released or 0
        self._records = {n: at for n, at in sorted(found.items()) if n >= released}
        self.is_damaged = None in counters

    def __len__(self) -> int:
        return len(self._records)

    def exchanges(self) -> Iterator[Encoded]:
        """Those that were not safe yet, oldest first, as this version encodes them; empty: damaged."""
        fields = self.identity.fields
        for start, end in self._records.values():
            payload = self._content[start:end]
            yield (payload if fields == _FIELDS else _converted(payload, fields)), None

    @property
    def begun(self) -> int:
        """Requests of this process that had begun, without those that were not to be logged."""
        return max((self.counters.begun or 0) - (self.counters.skipped or 0), 0)

    @property
    def lost(self) -> int:
        """Requests that were in flight, or are not in the journal because it was full or is damaged."""
        dropped, released = self.counters.dropped, self.counters.released
        if dropped is None or released is None:
            return 0
        return max(self.begun - dropped - released - len(self._records), 0)

    @property
    def unrecorded_drops(self) -> int:
        """Drops whose gaps were not safe yet."""
        dropped, recorded = self.counters.dropped, self.counters.drops_recorded
        return 0 if dropped is None or recorded is None else max(dropped - recorded, 0)


def _read_counters(content: bytes, identity: Identity) -> Counters:
    area = content[COUNTERS_AT : COUNTERS_AT + 8 * COUNTERS].ljust(8 * COUNTERS, b"\0")
    words, times = memoryview(area).cast("Q"), memoryview(area).cast("d")

    def count(word: int) -> int | None:
        number, remainder = divmod(words[word], CHECK)
        return number - 1 if number and not remainder else None

    def at(word: int) -> float:
        started_at, value = identity.run.started_at, times[word]
        is_plausible = abs(value - started_at) < _MAX_RUN_SECONDS  # false for NaN
        return value if is_plausible else started_at

    return Counters(
        begun=count(BEGUN),
        skipped=count(SKIPPED),
        dropped=count(DROPPED),
        released=count(RELEASED),
        drops_recorded=count(DROPS_RECORDED),
        rejected=count(REJECTED),
        spooled=count(SPOOLED),
        lost=count(LOST),
        elsewhere=count(ELSEWHERE),
        elsewhere_lost=count(ELSEWHERE_LOST),
        last_begun_at=at(LAST_BEGUN_AT),
        oldest_open_at=at(OLDEST_OPEN_AT),
        alive_at=at(ALIVE_AT),
    )


def _find_records(content: bytes, key: bytes) -> dict[int, tuple[int, int]]:
    """Start and end of each whole exchange, by its number; those that are safe already are among them."""
    found = {}
    at = content.find(key, RING_AT)
    while at >= 0:
        start = at + RECORD.size
        next_at = at + 1
        if start <= len(content):
            _, expected, length, number = RECORD.unpack_from(content, at)
            end = start + length
            # Without a length, the rest of the head was not written.
            if length and end <= len(content) and checksum(content[start:end], number) == expected:
                found[number] = (start, end)
                next_at = end
        at = content.find(key, next_at)
    return found


def _converted(payload: bytes, fields: tuple[str, ...]) -> bytes:
    """An exchange that another version has recorded, with the fields of this one; empty: it is damaged."""
    try:
        values: dict[str, Any] = dict(zip(fields, msgspec.msgpack.decode(payload), strict=True))
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        return b""
    return msgspec.msgpack.encode([values.get(name) for name in _FIELDS])


class RecoveredRun(NamedTuple):
    """What became of the requests of a killed run that were not safe yet."""

    run: Run
    entries: int  # in PostgreSQL, or on disk
    lost: int  # recorded as gaps
    is_damaged: bool  # then `lost` is only a lower bound

    def __str__(self) -> str:
        """In words, for messages."""
        rows = "1 row" if self.entries == 1 else f"{self.entries} rows"
        lost = f"{'at least ' if self.is_damaged else ''}{self.lost} lost"
        return (
            f"recovered {rows} of a killed proxy, {lost} ({self.run.node}, run {self.run.run_id})"
        )


class DeadJournal:
    """The journal of a killed run, on its way to the table. One thread uses it."""

    def __init__(self, file: DeadJournalFile, content: JournalContent, settings: Settings) -> None:
        """`settings` are those of the recovering process. Raises SettingsError like EntryBuilder."""
        self.run = content.identity.run
        self.path = file.path
        self._file = file
        self._content = content
        self._builder = EntryBuilder(replace(settings, node=self.run.node))
        self._batch_entries = settings.batch.max_entries
        times = (content.counters.oldest_open_at, content.counters.last_begun_at)
        self._from_at, self._to_at = timestamp(min(times)), timestamp(max(times))
        self._entries = 0
        self._lost: dict[Reason, Gap] = {}

    def batches(self) -> Iterator[Sequence[AccessLogEntry]]:
        """The rows, oldest first; from the beginning at each call."""
        self._entries, self._lost = 0, {}
        exchanges = yielding_gil(self._content.exchanges())
        for batch in batched(exchanges, self._batch_entries):
            entries, unreadable = build_rows(self._builder, batch)
            self._lose("unreadable", len(unreadable))
            for entry in entries:
                self._from_at = min(self._from_at, entry.started_at)
            self._entries += len(entries)
            yield entries
        self._lose("killed", self._content.lost)
        self._lose("buffer_full", self._content.unrecorded_drops)
        self._lose("journal_damaged", int(self._content.is_damaged))

    def reject(self, rejections: Sequence[Rejection]) -> None:
        """PostgreSQL did not accept these rows of the last batch."""
        self._entries -= len(rejections)
        self._lose("rejected", len(rejections))

    def gaps(self) -> list[Gap]:
        """What is lost, once `batches` has ended. Another recovery finds gaps with the same ids."""
        return list(self._lost.values())

    def end(self, *, is_written: bool = False) -> RunEnd:
        """How the run ended, once `batches` has ended. The rows in the journal were waiting then.

        `is_written`: they are in PostgreSQL, and the run itself is to count them as written.
        """
        content, counters = self._content, self._content.counters
        dropped = max(
            (counters.dropped or 0) + (counters.lost or 0) - (counters.elsewhere_lost or 0), 0
        )
        rejected = (counters.rejected or 0) + self._losses("rejected", "unreadable")
        spooled = counters.spooled or 0
        seen = content.begun - (counters.elsewhere or 0)
        lost = dropped + content.lost
        waiting = 0 if is_written else self._entries
        written = max(seen - lost - rejected - spooled - waiting, 0)
        return RunEnd(
            self.run,
            RunCounts(written, lost, rejected, waiting, spooled),
            "unknown" if content.is_damaged else "killed",
            max(counters.alive_at, counters.last_begun_at),
        )

    def _losses(self, *reasons: Reason) -> int:
        return sum(gap.entries for reason, gap in self._lost.items() if reason in reasons)

    def _lose(self, reason: Reason, entries: int) -> None:
        if not entries:
            return
        before = self._lost[reason].entries if reason in self._lost else 0
        self._lost[reason] = Gap(
            str(uuid.uuid5(uuid.UUID(self.run.run_id), reason)),
            self.run.node,
            self._from_at,
            self._to_at,
            reason,
            before + entries,
            self.run.run_id,
        )

    def finish(self) -> RecoveredRun:
        """Delete it: its rows and gaps are in PostgreSQL or on disk."""
        self._file.remove()
        lost = sum(gap.entries for gap in self._lost.values())
        return RecoveredRun(self.run, self._entries, lost, self._content.is_damaged)

    def close(self) -> None:
        """Leave it to another process."""
        self._file.close()


class Recovery:
    """Finds the journals of killed runs, and holds them until they are recovered. One thread uses it."""

    def __init__(self, settings: Settings, own: Path | None, *, any_database: bool = False) -> None:
        """`own`: our own journal. `any_database`: take also what is meant for other databases."""
        self._own = own
        self._any_database = any_database
        self._reported: set[Path] = set()
        self.journals: list[DeadJournal] = []
        self.reconfigure(settings)

    def reconfigure(self, settings: Settings) -> None:
        """Use other settings, and forget the journals found so far."""
        self.close()
        self._reported.clear()
        self._settings = settings
        self._database = journal_database(settings)

    def find(self) -> None:
        """Take the journals of killed runs that wait for this database; warn about those that do not."""
        for path in journal_paths(self._own):
            if path in self._reported:
                continue
            try:
                file = DeadJournalFile(path)
            except (BlockingIOError, FileNotFoundError):
                continue  # a running process uses it, or has just recovered it
            except (JournalError, OSError) as e:
                is_link = isinstance(e, OSError) and e.errno == errno.ELOOP
                self._warn("journal ignored: %s (%s)", path, "it is a link" if is_link else e)
                continue
            try:
                journal = self._read(file)
            except BaseException:
                file.close()
                raise
            if journal is None:
                file.close()
            else:
                self.journals.append(journal)

    def _read(self, file: DeadJournalFile) -> DeadJournal | None:
        content = file.read()
        identity = read_identity(content)
        if identity is None and is_other_version(content):
            self._warn("journal ignored: %s (%s)", file.path, "another version wrote it")
            return None
        if identity is None:  # nothing in it can be read, but somebody was killed
            identity, content = _unknown_identity(file.path, self._settings), b""
        if identity.database != self._database and not self._any_database:
            self._warn(
                "a killed proxy has left rows for another database, %s (%s); to write them to this one: "
                "artifactapi recover --redirect",
                file.path,
                identity.database,
            )
            return None
        return DeadJournal(file, JournalContent(content, identity), self._settings)

    def _warn(self, text: str, path: Path, reason: object) -> None:
        self._reported.add(path)
        name = ascii(str(path))[1:-1]  # anybody can create a file with line breaks in its name
        logger.warning(f"artifactapi: {text}", name, reason)  # noqa: G004 - one of two constants

    def finish(self, journal: DeadJournal) -> RecoveredRun:
        """Delete the journal; see `DeadJournal.finish`."""
        self.journals.remove(journal)
        return journal.finish()

    def give_up(self, journal: DeadJournal) -> None:
        """Leave the journal alone from now on."""
        self.journals.remove(journal)
        self._reported.add(journal.path)
        journal.close()

    def close(self) -> None:
        """Leave the journals to other processes."""
        journals, self.journals = self.journals, []
        for journal in journals:
            journal.close()


def recover_journals(settings: Settings, *, any_database: bool = False) -> Iterator[RecoveredRun]:
    """Write what killed proxies have left for this database, without a proxy.

    Args:
        settings: Those of the proxy; they name the database and say what to redact.
        any_database: Also take what was meant for other databases.

    Raises:
        DatabaseUnavailable: The rest stays for later.
        SettingsError: The remotes file is wrong.
    """
    recovery = Recovery(settings, None, any_database=any_database)
    try:
        recovery.find()
        for journal in list(recovery.journals):
            _write_journal(journal, settings)
            yield recovery.finish(journal)
    finally:
        recovery.close()


def _write_journal(journal: DeadJournal, settings: Settings) -> None:
    """Write it in the name of the killed run: this process is no proxy. Raises DatabaseUnavailable."""
    nothing = RunCounts(0, 0, 0, 0, 0)
    ledger = RunLedger(journal.run, lambda: nothing, has_ended=True)
    database = Database(settings.database, ledger=ledger)
    try:
        for entries in journal.batches():
            journal.reject(database.write(entries, journal.run.run_id))
        database.write_gaps(journal.gaps())
        database.report_end(journal.end(is_written=ledger.has_ended))
        if (
            not ledger.has_ended
        ):  # the killed run was another role's, so this process has a run of its own
            database.report_run("stopped")
    finally:
        database.close()


def _unknown_identity(path: Path, settings: Settings) -> Identity:
    """For a file without a readable head. Its name has the id of the run."""
    run_id = path.stem[-36:]
    try:
        uuid.UUID(run_id)
    except ValueError:
        run_id = str(uuid.uuid5(uuid.NAMESPACE_OID, path.name))
    run = Run(run_id, settings.node_name, None, path.stat().st_mtime)
    return Identity(run, journal_database(settings), 0, 0)

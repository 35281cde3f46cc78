"""The writer thread: takes batches, writes them to PostgreSQL or to disk, retries. The only thread we keep.

It decides when to write and when to retry. What an error means is decided in postgres/faults.py.
docs/architecture.md draws its states.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import threading
import time
from typing import TYPE_CHECKING

from ..postgres.connection import Deadline
from ..postgres.dsn import database_name
from ..settings import data_folder
from .build import RowBuilder
from .database import Database, DatabaseUnavailable
from .intake import Intake, State
from .journal import Journal, Safe
from .ledger import RunCounts, RunEnd, RunLedger
from .progress import Progress
from .recovery import Recovery
from .retry import Retry, retry_delays
from .spool import Spool
from .worker import BuildFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..rows.entry import AccessLogEntry
    from ..run import Run
    from ..settings import Settings
    from .buffer import Buffer
    from .database import Rejection
    from .recovery import DeadJournal

logger = logging.getLogger(__name__)

THREAD_NAME = "artifactapi-writer"
_STOP_RETRY_SECONDS = 0.1  # between the last attempts of a stop
_SPOOL_SHARE = 0.25  # of the time to stop: reserved for the spool
_COMPACT_SECONDS = 0.2  # how often the buffer is compacted during a pause
_REPLAY_BATCHES = 100  # from the spool, between two new batches
_GAPS_RETRY_SECONDS = (
    15.0  # after access_log_gap has rejected the gaps, which only the user can fix
)
_MAX_REFUSED_ENTRIES = 1024  # in memory, while we look for an entry that the server accepts
_SAMPLE_ENTRIES = 8  # of the batch that waits
_SAMPLE_BATCHES = 8  # of the spool
# Between two looks for the journals of killed proxies. It doubles, because right after a kill a child of
# the proxy that is just starting its own program may still hold the lock for a moment.
_MIN_FIND_SECONDS, _MAX_FIND_SECONDS = 1.0, 60.0
_JOIN_SECONDS = 1.0  # for the thread to notice that its time is over


def spool_database(settings: Settings) -> str:
    """The name of the database that rows on disk wait for."""
    dsn = settings.database.dsn
    return database_name(dsn) if dsn else "embedded PostgreSQL"


class Writer:
    """Owns one thread, which runs from the start, and that thread's one connection."""

    def __init__(self, settings: Settings, buffer: Buffer, journal: Journal, run: Run) -> None:
        self._ledger = RunLedger(run, self.counts)
        self.progress = Progress(self._ledger)
        self.spool = Spool(
            data_folder() / "spool", spool_database(settings), settings.spool.max_bytes, run.run_id
        )
        self._buffer = buffer
        self._journal = journal
        self._recovery = Recovery(settings, journal.path)
        self._find_at = 0.0  # monotonic seconds
        self._find_seconds = _MIN_FIND_SECONDS
        # The start of the oldest request in flight (epoch seconds); None: there is none. Called in the thread.
        self.oldest_open_at: Callable[[], float | None] = lambda: None
        self._settings = settings
        self._applied_settings = settings  # the thread looks for new ones between two attempts
        self._deadline = Deadline()
        self.builder = RowBuilder(settings, self._deadline)
        self._intake = Intake(buffer, self.builder, self.spool, self.progress, settings.batch)
        self._deadline.on_wait = self._intake.during_call
        self._database = Database(
            settings.database, self._deadline, self._sample_waiting, self._ledger
        )
        self._retry = Retry(settings.database)
        self.command_to_read = (
            ""  # to be logged once the database is reached; any thread may set it
        )
        self._batch: Sequence[AccessLogEntry] = ()  # neither in PostgreSQL nor on disk yet
        self._batch_due_at = float("inf")  # monotonic seconds, while we wait for a batch
        self._unreported_ends: list[RunEnd] = []  # of earlier runs
        self._has_reported_end = False
        self._is_replaying = False  # the spool holds more than one round of replay
        self._is_stopping = False
        self._stop_by = float("inf")  # monotonic seconds; after that, entries in memory are lost
        self._next_gaps_at = 0.0  # monotonic seconds
        self._stop_attempt_failed = False  # then a stop only saves to disk
        self._interrupt = threading.Event()  # ends a pause: a stop, or new settings
        self._thread = self._start()

    @property
    def is_unavailable(self) -> bool:
        """Whether the last attempt to reach PostgreSQL failed."""
        return self._retry.is_unavailable

    @property
    def run(self) -> Run:
        """The run that sees the requests now."""
        return self._ledger.run

    def counts(self) -> RunCounts:
        """What became of the requests. Any thread may call it."""
        progress, buffer = self.progress, self._buffer
        # Read the parts before the total: all of them only grow, so `waiting` is never negative.
        written, rejected = progress.written, progress.rejected
        dropped = buffer.dropped + progress.dropped
        spooled = self.spool.entries
        waiting = buffer.seen - written - dropped - rejected - spooled
        return RunCounts(written, dropped, rejected, waiting, spooled)

    @property
    def reconnects(self) -> int:
        """How often an idle connection had been closed by the server."""
        return self._database.reconnects

    def reconfigure(self, settings: Settings) -> None:
        """Use other settings from the next attempt on; waiting entries go to the new database."""
        self._settings = settings
        self._interrupt.set()
        self._buffer.wake()

    def ensure_running(self) -> None:
        """Restart the thread if it died. Call from the thread that fills the buffer."""
        if not self._thread.is_alive() and not self._is_stopping:
            self.progress.failures += 1
            self._thread = self._start()

    def stop(self, drain_seconds: float) -> bool:
        """Write what is left, for at most `drain_seconds` and one more. True if nothing was lost.

        Idempotent. What PostgreSQL does not take in time goes to the spool. What the spool does not
        take is counted as dropped.
        """
        stop_by = time.monotonic() + drain_seconds
        give_up_at = stop_by - drain_seconds * _SPOOL_SHARE
        self._deadline.give_up_at = min(self._deadline.give_up_at, give_up_at)
        self._stop_by = min(self._stop_by, stop_by)
        self._is_stopping = True
        self._interrupt.set()
        self._buffer.wake()
        self._thread.join(stop_by + _JOIN_SECONDS - time.monotonic())
        return not self._thread.is_alive() and self.progress.dropped == 0

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        delays = retry_delays(self._applied_settings.database)
        while True:
            try:
                self._work()
                break
            except BaseException as e:  # noqa: BLE001 - the log must survive any bug of ours
                self.progress.count_failure(BuildFailure.of(e))
                self._database.disconnect()  # its transaction may be half done
                self._pause(next(delays))
        if not self._has_reported_end:
            self.spool.keep_end(self._ledger.end("stopped"))
        self._recovery.close()
        self.builder.close()
        self._database.close()
        self.spool.close()
        self._journal.close()

    def _work(self) -> None:
        self._open()
        while True:
            is_last = self._is_stopping and not len(self._buffer)
            self._apply_settings()
            self._journal.set_identity(self._ledger.run, self._applied_settings)
            self._find_journals()
            self._take_batch()
            self._journal.tick(self.oldest_open_at())
            self.progress.count_drops(self._buffer)
            self.progress.count_spool_losses(self.spool.lost)
            if self._may_try():
                self._deliver()
            if self._batch or self._retry.is_unavailable or self.progress.gaps:
                self._save()
            self._release()
            if is_last and not self._batch and self._intake.state is State.EMPTY:
                return

    def _open(self) -> None:
        """Connect before there is anything to write, so that a wrong setup shows at startup."""
        self.builder.start_worker()
        self._intake.call_started()
        self._inherit()
        self.spool.check()
        for waiting in self.spool.waiting_for_others():
            logger.warning(
                "artifactapi: rows of an earlier run wait on disk for another database, %s (%d %s); to "
                "write them to this one: artifactapi spool --redirect",
                waiting.database,
                waiting.files,
                "file" if waiting.files == 1 else "files",
            )
        try:
            self._database.open()
            self._log_command_to_read()
        except DatabaseUnavailable as e:
            self._count_failed_attempt(e)

    def _log_command_to_read(self) -> None:
        if not self.command_to_read:
            return
        can_read = self._database.can_read()
        command, self.command_to_read = self.command_to_read, ""
        if can_read:
            logger.info("artifactapi: show the rows with: %s", command)
        else:
            logger.info(
                "artifactapi: this database role can only write; to show the rows, set read.dsn in the "
                "settings file to a role that can read (artifactapi init prints its grants)"
            )

    def _inherit(self) -> None:
        """Take over what earlier runs could not tell this database."""
        self.progress.gaps.inherit(self.spool.inherited_gaps())
        self._unreported_ends = self.spool.inherited_ends()

    def _apply_settings(self) -> None:
        settings = self._settings
        if settings is not self._applied_settings:
            is_other_database = settings.database.dsn != self._applied_settings.database.dsn
            if is_other_database:
                self._leave_database()
            self._applied_settings = settings
            if settings.node_name != self._ledger.run.node:
                self._unreported_ends.append(self._ledger.rename(settings.node_name))
            self._intake.batch = settings.batch
            self._database.reconfigure(settings.database)
            self.spool.reconfigure(spool_database(settings), settings.spool.max_bytes)
            if is_other_database:
                self._inherit()
            self._recovery.reconfigure(settings)
            self._find_at = 0.0
            self._retry.reconfigure(settings.database)
            self.builder.reconfigure(settings)  # last: it fails if the remotes file is wrong by now

    def _leave_database(self) -> None:
        """This run ends for the old database, if that is available. What waits goes to the new one."""
        if not self._retry.is_unavailable:
            with contextlib.suppress(DatabaseUnavailable):  # then it shows this run as silent
                self._database.report_run("stopped")
        self._ledger.renew()

    def _take_batch(self) -> None:
        """Take a batch if there is none; wait until one is complete, old enough, or a retry is due.

        Take none if a report of this run is due before.
        """
        if self._batch:
            return
        if not (self._is_stopping or self._is_replaying):
            now = time.monotonic()
            self._batch_due_at = min(
                self._batch_due_at, now + self._applied_settings.batch.max_seconds
            )
            is_unavailable = self._retry.is_unavailable
            soon = self._retry.seconds_left if is_unavailable else self._ledger.seconds_left
            is_woken = self._intake.wait(min(self._batch_due_at - now, soon))
            if not (is_woken or is_unavailable or time.monotonic() >= self._batch_due_at):
                return
        self._batch_due_at = float("inf")
        self._batch = self._intake.next_batch()

    def _may_try(self) -> bool:
        """Whether to call PostgreSQL now. A stop does not wait for the next retry."""
        if self._is_stopping:
            return not self._stop_attempt_failed and not self._is_out_of_time()
        return self._retry.is_due

    def _is_out_of_time(self) -> bool:
        return time.monotonic() >= self._deadline.give_up_at

    def _deliver(self) -> None:
        """Write the spool, the batch and the gaps, or note that PostgreSQL is unavailable."""
        self._intake.call_started()
        try:
            if self._retry.is_unavailable:
                self._database.open()
            if self._is_stopping:  # the spool is safe on disk, so it comes last
                self._write_batch()
                self._write_gaps()
                self._replay(max_batches=None)
                self._report_end()
            else:
                self._recover(self._write_journal)
                self._replay(max_batches=_REPLAY_BATCHES)
                self._write_batch()
                self._write_gaps()
                self._database.report_run()
                self._log_command_to_read()
        except DatabaseUnavailable as e:
            self._count_failed_attempt(e)
        else:
            if self._retry.is_unavailable:
                self.progress.set_error(None)
            self._retry.succeeded(self.progress.all_written)
            self._is_replaying = not self.spool.settle(may_delete=not self.progress.gaps)

    def _write_batch(self) -> None:
        if self._batch:
            rejections = self._write(self._batch)
            batch, self._batch = self._batch, ()
            self.progress.count_written(batch, rejections)

    def _write(
        self, entries: Sequence[AccessLogEntry], origin: str | None = None, *, spooled: int = 0
    ) -> list[Rejection]:
        """See `Database.write`; and measure it."""
        started_at = time.monotonic()
        rejections = self._database.write(entries, origin, spooled=spooled)
        self.progress.count_batch(len(entries), time.monotonic() - started_at)
        return rejections

    def _write_gaps(self) -> None:
        is_due = self._is_stopping or time.monotonic() >= self._next_gaps_at
        if self.progress.gaps and is_due:
            gaps = self.progress.gaps.to_send()
            try:
                self._database.write_gaps(gaps)
            except DatabaseUnavailable as e:
                if not e.configuration:
                    raise
                # The rows do not wait for the gaps.
                self._next_gaps_at = time.monotonic() + _GAPS_RETRY_SECONDS
                self.progress.count_refused_gaps(str(e))
                self._keep_gaps()
            else:
                self.progress.gaps.written(gaps)
                if self._next_gaps_at:
                    self._next_gaps_at = 0.0
                    self.progress.set_error(None)
        while self._unreported_ends:
            self._database.report_end(self._unreported_ends[-1])
            self._unreported_ends.pop()
        self._release()

    def _report_end(self) -> None:
        """Report the end of this run if nothing is left but what is on disk."""
        is_done = not self._batch and not len(self._buffer) and self._intake.state is State.EMPTY
        if is_done and not self.progress.gaps:
            self._database.report_run("stopped")
            self._has_reported_end = True

    def _release(self) -> None:
        """Tell the journal what is safe: everything taken that is neither with us nor in the intake.

        A gap is safe in PostgreSQL or on disk. Rows do not wait for gaps that PostgreSQL refuses.
        """
        gaps = self.progress.gaps
        if self._batch or (gaps and gaps.changed and not self._next_gaps_at):
            return
        elsewhere = self._ledger.elsewhere
        self._journal.release(
            Safe(
                accepted=self._buffer.taken - self._intake.held,
                drops=self.progress.drops,
                rejected=self.progress.rejected - elsewhere.rejected,
                spooled=self.spool.entries,
                lost=self.progress.dropped,
                elsewhere=elsewhere.written + elsewhere.dropped + elsewhere.rejected,
                elsewhere_lost=elsewhere.dropped,
            )
        )

    def _find_journals(self) -> None:
        if time.monotonic() >= self._find_at and not self._is_stopping:
            self._find_at = time.monotonic() + self._find_seconds
            self._find_seconds = min(2 * self._find_seconds, _MAX_FIND_SECONDS)
            self._journal.check()
            self._recovery.find()

    def _recover(self, deliver: Callable[[DeadJournal], bool]) -> None:
        """Deliver what killed proxies have left in their journals, until `deliver` returns False."""
        for journal in list(self._recovery.journals):
            try:
                if self._is_stopping or not deliver(journal):
                    return
            except DatabaseUnavailable:
                raise
            except Exception as e:  # noqa: BLE001 - a journal that we cannot handle must not stop this log
                self.progress.count_failure(BuildFailure.of(e))
                self._recovery.give_up(journal)
            else:
                run = self._recovery.finish(journal)
                logger.info("artifactapi: %s.", run)

    def _write_journal(self, journal: DeadJournal) -> bool:
        for entries in journal.batches():
            if self._is_stopping:
                return False
            self._intake.call_started()
            rejections = self._write(entries, journal.run.run_id)
            journal.reject(rejections)
            self.progress.count_recovered(len(entries), rejections)
        self.progress.gaps.inherit(journal.gaps())
        self.progress.gaps.changed = True
        self._unreported_ends.append(journal.end())
        self._write_gaps()
        self._keep_gaps()
        return True

    def _save_journal(self, journal: DeadJournal) -> bool:
        """Save it to disk: a journal does not survive a crash of the machine."""
        if not self.spool.adopt(journal.batches(), journal.end):
            return False
        self._unreported_ends.append(journal.end())
        self.progress.gaps.inherit(journal.gaps())
        self.progress.gaps.changed = True
        self._keep_gaps()
        return not self.progress.gaps.changed

    def _keep_gaps(self) -> None:
        """Save the gaps that are not in PostgreSQL to disk, if they have changed."""
        gaps = self.progress.gaps
        if gaps and gaps.changed:
            gaps.changed = not self.spool.keep_gaps(gaps.snapshot())

    def _replay(self, max_batches: int | None) -> None:
        """Write batches from the spool, oldest first; None: all of them, while there is time."""
        for _ in itertools.count() if max_batches is None else range(max_batches):
            batch = self.spool.oldest()
            if batch is None or self._is_out_of_time():
                break
            self._intake.call_started()
            origin = self.spool.origin(batch)
            spooled = len(batch.entries) if origin is None else 0
            rejections = self._write(batch.entries, origin, spooled=spooled)
            self.spool.remove(batch)
            self.progress.count_written(batch.entries, rejections, origin)

    def _sample_waiting(self) -> list[AccessLogEntry]:
        """Some of the entries that wait, at random, to find one that the server accepts."""
        batch = [*self._batch]
        # Only a few of them: the first row that the server accepts may be the newest one in the buffer.
        some = random.sample(batch, min(_SAMPLE_ENTRIES, len(batch)))
        return [*some, *self.spool.sample(_SAMPLE_BATCHES), *self._intake.sample()]

    def _count_failed_attempt(self, error: DatabaseUnavailable) -> None:
        self.progress.retries += 1
        self.progress.set_error(str(error))
        self._stop_attempt_failed = self._is_stopping
        waiting = len(self._batch) + len(self._buffer) + self.spool.entries
        self._retry.failed(
            str(error), waiting, configuration=error.configuration, refused=error.refused
        )

    def _save(self) -> None:
        """Save the batch and the gaps to disk. If the disk is full, keep the batch and wait."""
        self.spool.run_id = self._ledger.run.run_id
        gaps = self.progress.gaps
        self._recover(self._save_journal)
        if gaps.changed:
            gaps.changed = not self.spool.keep_gaps(gaps.snapshot())
        if not self._batch:
            return
        if self.spool.append(self._batch):
            self._batch = ()
            if time.monotonic() >= self._stop_by:
                self._give_up()
        elif not self._is_stopping:
            if self._retry.is_refused and len(self._batch) < _MAX_REFUSED_ENTRIES:
                self._batch = [*self._batch, *self._intake.next_batch()]
            self._pause(self._retry.seconds_left)
        elif not self._is_out_of_time():
            self._stop_attempt_failed = False
            self._pause(_STOP_RETRY_SECONDS)
        else:
            self._give_up()

    def _give_up(self) -> None:
        """The time to stop is over: everything still in memory is lost, and counted."""
        starts = [entry.started_at for entry in self._batch] + self._intake.discard()
        self._batch = ()
        self.progress.count_lost_at_stop(starts)
        self.spool.keep_gaps(self.progress.gaps.snapshot())

    def _pause(self, seconds: float) -> None:
        """Wait, unless `_interrupt` is set; meanwhile compact the buffer."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._interrupt.wait(min(left, _COMPACT_SECONDS)):
                break
            self._intake.compact()
        self._interrupt.clear()

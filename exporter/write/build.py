"""Build rows in a worker process, or in this thread if there is no worker.

While Python computes in one thread, the proxy's event loop stands still. In another process it does not.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ..rows.entry_builder import EntryBuilder
from ..settings import DatabaseSettings, ReadSettings
from .channel import Channel
from .worker import BuildResult, build_rows, code_digest, send_exchanges

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..postgres.connection import Deadline
    from ..rows.entry import AccessLogEntry
    from ..settings import Settings
    from .encoding import Encoded

logger = logging.getLogger(__name__)

_START_SECONDS = 5.0  # for the first answer: Python starts in less than a second
_ANSWER_SECONDS = 2.0  # for each later answer: a batch takes a few milliseconds
_STALL_SECONDS = 1  # that it may read nothing of what we send
_RESTART_SECONDS = 30.0  # before the next worker starts; doubles while workers give no answer
_MAX_RESTART_SECONDS = 3600.0
_POLL_MICROSECONDS = 100_000  # how soon a stop is noticed
_EXIT_SECONDS = 1.0
_MAX_REASON = 300
_NO_ANSWER = "it does not answer"

_PACKAGE = __package__ or ""
_ROOT = Path(__file__).resolve().parents[_PACKAGE.count(".") + 1]
# The proxy's module search path without the working directory.
_PATH = os.pathsep.join([str(_ROOT), *(it for it in sys.path if Path(it).is_absolute())])
_CODE = f"from {_PACKAGE}.worker import main; main()"
_DIGEST = code_digest()


class WorkerError(Exception):
    """The worker is gone or does not answer. The text is the reason, without a subject."""


class PendingRows:
    """Exchanges whose rows are being built. `result` waits for them."""

    def __init__(self, builder: RowBuilder, exchanges: list[Encoded]) -> None:
        self.exchanges = exchanges
        self._builder = builder

    def result(self) -> BuildResult:
        """The rows. Never fails: without an answer from the worker, this thread builds them."""
        return self._builder.finish(self)


class RowBuilder:
    """Turns exchanges into rows, one batch at a time. One thread uses it.

    Nothing is lost with the worker: this side keeps the exchanges until their rows are there.
    """

    def __init__(self, settings: Settings, deadline: Deadline) -> None:
        """No wait lasts beyond `deadline`. Raises SettingsError like EntryBuilder."""
        self.failures = 0  # workers that were given up
        self._deadline = deadline
        self._settings, self._entry_builder = settings, EntryBuilder(settings)
        self._worker: Worker | None = None
        self._pending: PendingRows | None = None  # sent to the worker, not yet answered
        self._has_warned = False
        self._start_at = 0.0  # monotonic seconds of the next attempt to start a worker
        self._restart_seconds = _RESTART_SECONDS

    def build(self, exchanges: list[Encoded]) -> PendingRows:
        """Start to build the rows of these exchanges; call `result` before the next `build`."""
        pending = PendingRows(self, exchanges)
        self.start_worker()
        self._send(pending)
        return pending

    def preview(self, exchanges: Sequence[Encoded]) -> Sequence[AccessLogEntry]:
        """Rows of exchanges that stay where they are: like those that `build` will make, or nearly so."""
        return build_rows(EntryBuilder(self._settings), exchanges).entries

    def start_worker(self) -> None:
        """Start the worker if there is none and an attempt is due."""
        if self._worker is None and time.monotonic() >= self._start_at:
            self._start_at = time.monotonic() + self._restart_seconds
            try:
                self._worker = Worker()
                self._worker.configure(self._settings)
            except (OSError, WorkerError) as e:
                self._give_up(e)

    def reconfigure(self, settings: Settings) -> None:
        """Use other settings, also for pending rows. Raises SettingsError like EntryBuilder."""
        self._entry_builder, self._settings = EntryBuilder(settings), settings
        pending = self._pending
        self.close()
        self._start_at = 0.0
        self.start_worker()
        if pending is not None:
            self._send(pending)

    def close(self) -> None:
        """End the worker. Idempotent; the next `build` starts another."""
        worker, self._worker, self._pending = self._worker, None, None
        if worker is not None:
            worker.close()

    def finish(self, pending: PendingRows) -> BuildResult:
        """The rows of `pending`; see `PendingRows.result`."""
        return self._answer(pending) or build_rows(self._entry_builder, pending.exchanges)

    def _send(self, pending: PendingRows) -> None:
        if self._worker is None:
            return
        try:
            self._worker.send(pending.exchanges)
            self._pending = pending
        except Exception as e:  # noqa: BLE001 - the exchanges are not lost, whatever a bug of ours raises
            self._give_up(e)

    def _answer(self, pending: PendingRows) -> BuildResult | None:
        """The worker's answer; None if it does not have these exchanges or gives no answer."""
        if self._worker is None or self._pending is not pending:
            return None
        try:
            answer = self._worker.receive(self._deadline)
        except Exception as e:  # noqa: BLE001 - unpickling raises whatever it likes
            self._give_up(e)
            return None
        if self._has_warned:
            logger.info("artifactapi: worker process restarted; it builds the rows again.")
        self._pending, self._has_warned = None, False
        self._restart_seconds = _RESTART_SECONDS
        return answer

    def _give_up(self, error: Exception) -> None:
        self.failures += 1
        self.close()
        self._restart_seconds = min(2 * self._restart_seconds, _MAX_RESTART_SECONDS)
        if not self._has_warned:
            self._has_warned = True
            reason = (
                error if isinstance(error, WorkerError) else f"{error} ({type(error).__name__})"
            )
            logger.warning(
                "artifactapi: worker process stopped; the proxy builds rows itself, at more CPU, until a new "
                "worker runs: %s",
                reason,
            )


class Worker:
    """The worker process and the socket to it. Its methods raise OSError or WorkerError."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            for end in (ours, theirs):  # an addon may have called socket.setdefaulttimeout
                end.setblocking(True)
            for option, timeout in (
                (socket.SO_SNDTIMEO, (_STALL_SECONDS, 0)),
                (socket.SO_RCVTIMEO, (0, _POLL_MICROSECONDS)),
            ):  # struct timeval, see socket(7)
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *timeout))
            self._channel = Channel(ours)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _CODE],
                    env={**os.environ, "PYTHONPATH": _PATH},
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,  # it writes nothing there but the reason for its end
                    start_new_session=True,  # signals from a terminal are for the proxy
                )
            except OSError:
                self._channel.close()
                raise
        self._has_answered = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def configure(self, settings: Settings) -> None:
        """Tell it the settings. Must come before `send`."""
        # It needs no connection string, and those may hold a password.
        without_dsn = replace(settings, database=DatabaseSettings(), read=ReadSettings())
        with self._explaining_its_end():
            self._channel.send(pickle.dumps((_DIGEST, without_dsn)))

    def send(self, exchanges: Sequence[Encoded]) -> None:
        """Give it exchanges to build."""
        with self._explaining_its_end():
            send_exchanges(self._channel, exchanges)

    def receive(self, deadline: Deadline) -> BuildResult:
        """Wait for the rows of the exchanges that were sent last."""
        started = time.monotonic()
        timeout = _ANSWER_SECONDS if self._has_answered else _START_SECONDS

        def check() -> None:
            # During a stop, leave half of the time to build the rows here and to write them.
            half = (deadline.give_up_at - started) / 2
            if time.monotonic() - started > min(timeout, half):
                raise WorkerError(_NO_ANSWER)

        with self._explaining_its_end():
            answer: BuildResult = pickle.loads(self._channel.receive(check))  # noqa: S301 - by our worker
        self._has_answered = True
        return answer

    def close(self) -> None:
        """Kill it. It has nothing to save."""
        self._channel.close()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process inside a system call ends later
            self._process.communicate(timeout=_EXIT_SECONDS)

    @contextmanager
    def _explaining_its_end(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            raise WorkerError(self._last_output()) from None
        except BlockingIOError:
            raise WorkerError(_NO_ANSWER) from None

    def _last_output(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            _, errors = self._process.communicate(timeout=_EXIT_SECONDS)
            lines = errors.decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "")
            return last[:_MAX_REASON] or f"it exited with status {self._process.returncode}"
        return "it closed its socket"

"""Have batches built by a process of their own, and build them here where that can't be done.

While Python computes in one thread the proxy's event loop stands still; in another process it does not.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ..rows.entry import EntryBuilder
from ..settings import DatabaseSettings, PageSettings
from .worker import BuildResult, build, digest_of_code, send, send_exchanges

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..exchange import Exchange
    from ..postgres.connection import Deadline
    from ..settings import Settings

logger = logging.getLogger(__name__)

_START_SECONDS = 5.0  # for the first answer: starting a Python takes less than a second
_ANSWER_SECONDS = 2.0  # for each after that: a batch takes some milliseconds
_STALL_SECONDS = 1  # how long the process may take no byte, or send none once it has begun to
_RESTART_SECONDS = 30.0  # pause before another is started; doubles while none gives an answer
_LONGEST_RESTART_SECONDS = 3600.0
_TICK_SECONDS = 0.1  # how soon a stop is noticed
_END_SECONDS = 1.0
_MAX_WORDS = 300
_SILENT = "it does not answer"

_PACKAGE = __package__ or ""
_ROOT = Path(__file__).resolve().parents[_PACKAGE.count(".") + 1]
# Where the proxy finds its modules, but for the folder one happens to be in.
_PATH = os.pathsep.join([str(_ROOT), *(it for it in sys.path if Path(it).is_absolute())])
_CODE = f"from {_PACKAGE}.worker import main; main()"
_DIGEST = digest_of_code()


class WorkerError(Exception):
    """The process is not there, or does not answer."""


class BatchBuilder:
    """Builds one batch at a time: `begin` it, do something else, `finish` it. One thread uses it.

    What was begun is kept until it is finished, so that nothing is lost with the process.
    """

    def __init__(self, settings: Settings, deadline: Deadline) -> None:
        """No wait is longer than `deadline` has it. Raises SettingsError as EntryBuilder does."""
        self.failures = 0  # times the process had to be given up
        self._deadline = deadline
        self._under_way: list[Exchange] = []
        self._worker: Worker | None = None
        self._is_asked = False  # the process has the exchanges under way
        self._is_troubled = False  # and that was said
        self._start_at = 0.0  # monotonic seconds: when the next attempt is due
        self._restart_seconds = _RESTART_SECONDS
        self._settings, self._here = settings, EntryBuilder(settings)

    @property
    def is_busy(self) -> bool:
        """Whether a batch was begun and not yet finished."""
        return bool(self._under_way)

    def start(self) -> None:
        """Start the process now, so that it is there when it is needed."""
        if self._worker is None and time.monotonic() >= self._start_at:
            self._start_at = time.monotonic() + self._restart_seconds
            try:
                self._worker = Worker()
                self._worker.prepare(self._settings)
            except (OSError, WorkerError) as e:
                self._give_up(e)

    def reconfigure(self, settings: Settings) -> None:
        """Go on with other settings, also for what is under way. Raises as the constructor."""
        self._here, self._settings = EntryBuilder(settings), settings
        self.close()
        self._start_at = 0.0
        self.start()
        self._ask()

    def begin(self, exchanges: list[Exchange]) -> None:
        """Take over these exchanges; nothing may be under way."""
        self._under_way = exchanges
        self.start()
        self._ask()

    def finish(self) -> BuildResult:
        """What became of those begun."""
        built = self._answer() or build(self._here, self._under_way)
        self._under_way = []
        return built

    def abandon(self) -> list[Exchange]:
        """Those that were begun, when there is no time to finish them; ends the process."""
        self.close()
        exchanges, self._under_way = self._under_way, []
        return exchanges

    def close(self) -> None:
        """End the process. Idempotent; the next batch starts another."""
        worker, self._worker, self._is_asked = self._worker, None, False
        if worker is not None:
            worker.close()

    def _ask(self) -> None:
        if self._worker is None or not self._under_way:
            return
        try:
            self._worker.send(self._under_way)
            self._is_asked = True
        except Exception as e:  # noqa: BLE001 - what can't be pickled raises what it likes
            self._give_up(e)

    def _answer(self) -> BuildResult | None:
        """What the process says of those under way; None if they are to be built here."""
        if self._worker is None or not self._is_asked:
            return None
        try:
            built = self._worker.answer(self._deadline)
        except Exception as e:  # noqa: BLE001 - what can't be unpickled raises what it likes
            self._give_up(e)
            return None
        if self._is_troubled:
            logger.info("The access log has a second process to build rows again.")
        self._is_asked, self._is_troubled = False, False
        self._restart_seconds = _RESTART_SECONDS
        return built

    def _give_up(self, error: Exception) -> None:
        self.failures += 1
        self.close()
        self._restart_seconds = min(2 * self._restart_seconds, _LONGEST_RESTART_SECONDS)
        if not self._is_troubled:
            self._is_troubled = True
            why = error if isinstance(error, WorkerError) else f"{error} ({type(error).__name__})"
            logger.warning(
                "The access log's second process, which builds rows, is given up: %s. "
                "Until another does, the proxy builds them itself, which costs it more.",
                why,
            )


class Worker:
    """The process and the socket to it. What goes wrong raises OSError or WorkerError."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            stall = struct.pack("@ll", _STALL_SECONDS, 0)  # a struct timeval, see socket(7)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, stall)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, stall)
            self._connection = Connection(ours.detach())
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _CODE],
                    env={**os.environ, "PYTHONPATH": _PATH},
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,  # it writes nothing but why it ends
                    start_new_session=True,  # a terminal's signals are the proxy's to answer
                )
            except OSError:
                self._connection.close()
                raise
        self._has_answered = False

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def prepare(self, settings: Settings) -> None:
        """Say by which settings it is to build."""
        # It needs no connection string, which may hold a password.
        bare = replace(settings, database=DatabaseSettings(), page=PageSettings())
        with self._describing_its_end():
            send(self._connection, (_DIGEST, bare))

    def send(self, exchanges: Sequence[Exchange]) -> None:
        """Have these built. Raises whatever pickling does, too."""
        with self._describing_its_end():
            send_exchanges(self._connection, exchanges)

    def answer(self, deadline: Deadline) -> BuildResult:
        """What it has built of those sent."""
        began = time.monotonic()
        longest = _ANSWER_SECONDS if self._has_answered else _START_SECONDS
        while not self._connection.poll(_TICK_SECONDS):
            # At a stop the rows still have to be built here, and written.
            share = (deadline.give_up_at - began) / 2
            if time.monotonic() - began > min(longest, share):
                raise WorkerError(_SILENT)
        with self._describing_its_end():
            built: BuildResult = self._connection.recv()
        self._has_answered = True
        return built

    def close(self) -> None:
        """End it. It has nothing to save."""
        self._connection.close()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # no signal reaches one amid a system call
            self._process.communicate(timeout=_END_SECONDS)

    @contextmanager
    def _describing_its_end(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            raise WorkerError(self._last_words()) from None
        except BlockingIOError:
            raise WorkerError(_SILENT) from None

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            _, errors = self._process.communicate(timeout=_END_SECONDS)
            lines = errors.decode(errors="replace").split("\n")
            said = next((line for line in reversed(lines) if line.strip()), "")
            return said[:_MAX_WORDS] or f"it has ended with status {self._process.returncode}"
        return "it has closed its socket"

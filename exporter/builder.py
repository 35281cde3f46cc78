"""Have batches built by a process of their own, and build them here where that can't be done.

While Python computes in one thread the proxy's event loop stands still; in another process it does not.
"""

from __future__ import annotations

import logging
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from .entry import EntryBuilder
from .settings import DatabaseSettings, PageSettings
from .worker import Built, build, send_exchanges

if TYPE_CHECKING:
    from .connection import Patience
    from .exchange import Exchange
    from .settings import Settings

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0  # a batch takes some milliseconds, starting a Python less than a second
_STALL_SECONDS = 2  # how long the process may take no byte, or send none once it has begun to
_RESTART_SECONDS = 30.0  # pause between two attempts to have one
_TICK_SECONDS = 0.1  # how soon a stop is noticed
_END_SECONDS = 1.0

_PACKAGE = __package__ or ""
_ROOT = Path(__file__).resolve().parents[_PACKAGE.count(".") + 1]
_CODE = f"import sys; sys.path.insert(0, sys.argv[1]); from {_PACKAGE}.worker import main; main()"


class WorkerError(Exception):
    """The process is not there, or does not answer."""


class BatchBuilder:
    """Builds one batch at a time: `begin` it, do something else, `finish` it. One thread uses it.

    What was begun is kept until it is finished, so that nothing is lost with the process.
    """

    def __init__(self, settings: Settings, patience: Patience) -> None:
        """No wait is longer than `patience` has it. Raises SettingsError as EntryBuilder does."""
        self.failures = 0  # times the process had to be given up
        self._patience = patience
        self._under_way: list[Exchange] = []
        self._worker: Worker | None = None
        self._is_asked = False  # the process has the exchanges under way
        self._is_troubled = False  # and that was said
        self._start_at = 0.0  # monotonic seconds: when the next attempt is due
        self._settings, self._here = settings, EntryBuilder(settings)

    @property
    def is_busy(self) -> bool:
        """Whether a batch was begun and not yet finished."""
        return bool(self._under_way)

    def start(self) -> None:
        """Start the process now, so that it is there when it is needed."""
        if self._worker is None and time.monotonic() >= self._start_at:
            self._start_at = time.monotonic() + _RESTART_SECONDS
            try:
                self._worker = Worker()
                # It needs no connection string, which may hold a password.
                self._worker.connection.send(
                    replace(self._settings, database=DatabaseSettings(), page=PageSettings())
                )
            except OSError as e:
                self._give_up(WorkerError(f"it can't be started: {e}"))

    def use(self, settings: Settings) -> None:
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

    def finish(self) -> Built:
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
            send_exchanges(self._worker.connection, self._under_way)
            self._is_asked = True
        except Exception as e:  # noqa: BLE001 - what can't be pickled raises what it likes
            self._give_up(e)

    def _answer(self) -> Built | None:
        """What the process says of those under way; None if they are to be built here."""
        if self._worker is None or not self._is_asked:
            return None
        try:
            built = self._worker.answer(self._patience)
        except Exception as e:  # noqa: BLE001 - what can't be unpickled raises what it likes
            self._give_up(e)
            return None
        self._is_asked, self._is_troubled = False, False
        return built

    def _give_up(self, error: Exception) -> None:
        self.failures += 1
        self.close()
        if not self._is_troubled:
            self._is_troubled = True
            logger.warning(
                "The access log's process for building rows is given up: %s (%s). "
                "Until there is another they are built in the proxy's, which costs it more.",
                error,
                type(error).__name__,
            )


class Worker:
    """The process and the socket to it."""

    def __init__(self) -> None:
        """Raises OSError if it can't be started."""
        ours, theirs = socket.socketpair()
        with theirs:
            stall = struct.pack("@ll", _STALL_SECONDS, 0)  # a struct timeval, see socket(7)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, stall)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, stall)
            self.connection = Connection(ours.detach())
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _CODE, str(_ROOT)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's signals are the proxy's to answer
                )
            except OSError:
                self.connection.close()
                raise

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def answer(self, patience: Patience) -> Built:
        """What it has built; raises OSError or WorkerError if that does not come."""
        until = time.monotonic() + _ANSWER_SECONDS
        while not self.connection.poll(_TICK_SECONDS):
            if time.monotonic() > min(until, patience.give_up_at):
                raise WorkerError("it does not answer")
        try:
            built: Built = self.connection.recv()
        except EOFError:
            raise WorkerError("it has ended") from None
        return built

    def close(self) -> None:
        """End it. It has nothing to save."""
        self.connection.close()
        self._process.kill()
        with suppress(
            subprocess.TimeoutExpired
        ):  # not even that ends one in the midst of a system call
            self._process.wait(_END_SECONDS)

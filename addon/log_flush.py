"""Make our log messages visible at once when mitmproxy's output goes to a file or a pipe.

mitmproxy prints its log to stdout, and Python writes to a file or pipe only when 8 kB have gathered.
On a quiet proxy a warning could stay there for days. So this flushes stdout after each of our
messages. Other output stays buffered.
"""

from __future__ import annotations

import logging
import select
import sys
import threading
from contextlib import suppress
from typing import TextIO

_PREFIX = "artifactapi: "  # all our messages start with it


def flush_messages() -> FlushHandler | None:
    """Start to flush stdout after our messages. None: stdout is a terminal, which shows each line.

    Call it once mitmproxy logs to stdout: this handler must come after the one that prints.
    """
    if sys.stdout is None or sys.stdout.isatty():
        return None
    handler = FlushHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    return handler


class FlushHandler(logging.Handler):
    """Flushes a stream after our messages, in a thread, so that a slow pipe delays nobody. Thread-safe."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.INFO)
        self._stream = stream
        self._lock = threading.Lock()  # of the next two
        self._is_needed = False
        self._has_thread = False

    def handle(self, record: logging.LogRecord) -> bool:
        """Flush soon if this is our message. Without the handler's lock: this is called for each connection."""
        if isinstance(record.msg, str) and record.msg.startswith(_PREFIX):
            self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        del record  # mitmproxy has printed it
        with self._lock:
            self._is_needed = True
            if self._has_thread:
                return
            self._has_thread = True
        try:
            # Not a daemon: killed inside a flush, it would break Python's own flush at exit.
            threading.Thread(target=self._run, name="artifactapi-flush", daemon=False).start()
        except RuntimeError:  # Python exits, and flushes
            self._has_thread = False

    def stop(self) -> None:
        """Remove the handler. A flush that is under way ends by itself."""
        logging.getLogger().removeHandler(self)

    def _run(self) -> None:
        while self._take():
            # mitmproxy notices a closed output when it prints, and ends.
            with suppress(OSError, ValueError):
                # A flush that waits for the reader would hold the stream's lock. Wait without it.
                poll = select.poll()
                poll.register(self._stream, select.POLLOUT)
                poll.poll()
                self._stream.flush()

    def _take(self) -> bool:
        """Return whether a flush is needed. If not, the thread ends."""
        with self._lock:
            self._has_thread, self._is_needed = self._is_needed, False
            return self._has_thread

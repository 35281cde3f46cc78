"""A mitmproxy script that starts a thread and runs an INSERT for each request; it uses ARTIFACTAPI_DSN."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from addon.flow.tracker import FlowTracker
from exporter import Settings
from tests.bench.log_writers import ThreadPerRequestWriter


class ThreadPerRequest(FlowTracker):
    """artifactapi's hooks with a thread and an INSERT for each request."""

    name = "thread_per_request"

    def running(self) -> None:
        """Connect."""
        self._writer = ThreadPerRequestWriter(Settings().with_dsn(os.environ["ARTIFACTAPI_DSN"]))
        self._writer.__enter__()
        self.log_access = self._writer.log_access

    def done(self) -> None:
        """Wait for the threads."""
        self._writer.flush()
        self._writer.__exit__()


addons = [ThreadPerRequest()]

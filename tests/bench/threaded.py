"""A script for mitmproxy with a thread and an INSERT for each request, into the table of ARTIFACTAPI_DSN."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from addon.flow.tracker import FlowTracker
from exporter import Settings
from tests.bench.sinks import ThreadPerRequest


class Threaded(FlowTracker):
    """Our hook in front of their way."""

    name = "threaded"

    def running(self) -> None:
        """Connect."""
        self._sink = ThreadPerRequest(Settings().with_dsn(os.environ["ARTIFACTAPI_DSN"]))
        self._sink.__enter__()
        self.log_access = self._sink.log_access

    def done(self) -> None:
        """Wait for the threads."""
        self._sink.settle()
        self._sink.__exit__()


addons = [Threaded()]

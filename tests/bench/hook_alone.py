"""A mitmproxy script with artifactapi's hooks that discards every exchange."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from addon.flow.tracker import FlowTracker


class HookAlone(FlowTracker):
    """Measures the cost of the hooks without building rows."""

    name = "hook_alone"

    def running(self) -> None:
        """Accept and discard every exchange."""
        self.log_access = lambda _exchange: True


addons = [HookAlone()]

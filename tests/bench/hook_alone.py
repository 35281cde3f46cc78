"""A script for mitmproxy with our hook, which hands its exchanges to nobody."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from addon.flow.tracker import FlowTracker


class HookAlone(FlowTracker):
    """What is left of the cost if no row is made of a flow."""

    name = "hook_alone"

    def running(self) -> None:
        """Take everything, keep nothing."""
        self.log_access = lambda _exchange: True


addons = [HookAlone()]

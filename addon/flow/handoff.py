"""Keep the exporter and the flows under way while mitmproxy loads the edited script anew.

This module is not loaded anew, the script is: the old one gives, the new one takes in the same turn
of the event loop. What nobody takes, because the script was taken away or is broken, is ended.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable

    from mitmproxy.http import HTTPFlow

    from addon.flow.state import FlowState
    from exporter import Exporter

_CLAIM_SECONDS = 1.0


class Handoff(NamedTuple):
    """What one instance of the script leaves to the next."""

    exporter: Exporter
    flows: dict[HTTPFlow, FlowState]


# Weak: when the script is taken away for good, no flow is kept alive for a next one.
_flows: WeakKeyDictionary[HTTPFlow, FlowState] = WeakKeyDictionary()
_exporters: list[Exporter] = []


def offer(estate: Handoff, end: Callable[[Exporter], None]) -> None:
    """Leave this to the next instance; without one, `end` is called for the exporter, in a thread."""
    _flows.update(estate.flows)
    _exporters.append(estate.exporter)
    atexit.register(estate.exporter.stop)

    def end_unclaimed() -> None:
        if estate.exporter in _exporters:
            _exporters.remove(estate.exporter)
            threading.Thread(target=end, args=(estate.exporter,), daemon=True).start()

    asyncio.get_running_loop().call_later(_CLAIM_SECONDS, end_unclaimed)


def claim() -> tuple[Exporter | None, dict[HTTPFlow, FlowState]]:
    """What the instance before has left."""
    flows = dict(_flows)
    _flows.clear()
    exporter = _exporters.pop() if _exporters else None
    if exporter is not None:
        atexit.unregister(exporter.stop)
    return exporter, flows

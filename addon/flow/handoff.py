"""Keep the exporter and the open flows while mitmproxy reloads the script.

mitmproxy reloads the script but not this module. The old instance offers, and the new one claims in the
same turn of the event loop. What nobody claims, because the script was removed or is broken, is stopped.
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
    """What one instance of the script passes to the next."""

    exporter: Exporter
    flows: dict[HTTPFlow, FlowState]


# Weak, so that no flow stays in memory if the script is removed for good.
_flows: WeakKeyDictionary[HTTPFlow, FlowState] = WeakKeyDictionary()
_exporters: list[Exporter] = []


def offer(handoff: Handoff, stop: Callable[[Exporter], None]) -> None:
    """Offer this to the next instance. If nobody claims it, `stop` is called with the exporter, in a thread."""
    _flows.update(handoff.flows)
    _exporters.append(handoff.exporter)
    atexit.register(handoff.exporter.stop)

    def stop_unclaimed() -> None:
        if handoff.exporter in _exporters:
            _exporters.remove(handoff.exporter)
            threading.Thread(target=stop, args=(handoff.exporter,), daemon=True).start()

    asyncio.get_running_loop().call_later(_CLAIM_SECONDS, stop_unclaimed)


def claim() -> tuple[Exporter | None, dict[HTTPFlow, FlowState]]:
    """What the previous instance offered."""
    flows = dict(_flows)
    _flows.clear()
    exporter = _exporters.pop() if _exporters else None
    if exporter is not None:
        atexit.unregister(exporter.stop)
    return exporter, flows

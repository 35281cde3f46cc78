"""Keep flows under way while mitmproxy loads the edited script anew; this module is not loaded anew."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from mitmproxy.http import HTTPFlow

    from addon.flows import Note

# Weak: when the script is taken away for good, no flow is kept alive for a next one.
_flows: WeakKeyDictionary[HTTPFlow, Note] = WeakKeyDictionary()


def give(flows: dict[HTTPFlow, Note]) -> None:
    """Leave flows for the next instance of the script."""
    _flows.update(flows)


def take() -> dict[HTTPFlow, Note]:
    """The flows that the instance before has left."""
    flows = dict(_flows)
    _flows.clear()
    return flows

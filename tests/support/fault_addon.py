"""A mitmproxy addon that interferes with a flow as a request header says.

The header is `X-Fault: HOOK ACTION` for the addon that runs before artifactapi, and `X-Fault-Late`
for the one that runs after it. `fault_addons` loads both.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mitmproxy import http

if TYPE_CHECKING:
    from collections.abc import Callable

HOOKS = ("requestheaders", "request", "responseheaders", "response", "http_connect")
_SCRIPT = """
import sys

sys.path.insert(0, {root!r})
from tests.support.fault_addon import FaultAddon

addons = [FaultAddon({header!r})]
"""


class FaultAddon:
    """Runs the action that one request header names."""

    def __init__(self, header: str) -> None:
        self.name = f"fault-{header}"
        self._header = header
        for hook in HOOKS:
            setattr(self, hook, partial(self._run_action, hook))

    def _run_action(self, hook: str, flow: http.HTTPFlow) -> None:
        chosen_hook, _, action = flow.request.headers.get(self._header, "").partition(" ")
        if chosen_hook == hook:
            _ACTIONS[action](flow)


def _answer(flow: http.HTTPFlow) -> None:
    flow.response = http.Response.make(403, b"not here\n", {"Content-Type": "text/plain"})


def _change(flow: http.HTTPFlow) -> None:
    assert flow.response
    flow.response.status_code = 299
    flow.response.content = b"x" * 4321


def _stream(flow: http.HTTPFlow) -> None:
    assert flow.response
    flow.response.stream = True


def _double(flow: http.HTTPFlow) -> None:
    """Stream each chunk twice, with a generator."""
    assert flow.response
    del flow.response.headers["content-length"]
    flow.response.stream = lambda data: (part for part in (data, data))


_ACTIONS: dict[str, Callable[[http.HTTPFlow], None]] = {
    "kill": http.HTTPFlow.kill,
    "answer": _answer,
    "change": _change,
    "stream": _stream,
    "double": _double,
}


def fault_addons(folder: Path, script: Path) -> list[Path]:
    """Write two fault addons; return the scripts for `-s`, with `script` between them."""
    root = str(Path(__file__).resolve().parents[2])
    before, after = folder / "fault_before.py", folder / "fault_after.py"
    before.write_text(_SCRIPT.format(root=root, header="X-Fault"))
    after.write_text(_SCRIPT.format(root=root, header="X-Fault-Late"))
    return [before, script, after]

"""A mitmproxy addon that does to a flow what a header of its request tells it to.

`X-Meddle: HOOK DEED` in a request, for the addon that runs before ours; `X-Meddle-Late` for the
one after it. Loaded twice, by two names: see `fault_addons`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mitmproxy import http

if TYPE_CHECKING:
    from collections.abc import Callable

HOOKS = ("requestheaders", "request", "responseheaders", "response", "http_connect")
_BODY = """
import sys

sys.path.insert(0, {root!r})
from tests.support.fault_addon import FaultAddon

addons = [FaultAddon({header!r})]
"""


class FaultAddon:
    """Obeys one header."""

    def __init__(self, header: str) -> None:
        self.name = f"fault-{header}"
        self._header = header
        for hook in HOOKS:
            setattr(self, hook, partial(self._obey, hook))

    def _obey(self, hook: str, flow: http.HTTPFlow) -> None:
        told, _, deed = flow.request.headers.get(self._header, "").partition(" ")
        if told == hook:
            _DEEDS[deed](flow)


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
    """Stream, with every byte twice, as a generator."""
    assert flow.response
    del flow.response.headers["content-length"]
    flow.response.stream = lambda data: (part for part in (data, data))


_DEEDS: dict[str, Callable[[http.HTTPFlow], None]] = {
    "kill": http.HTTPFlow.kill,
    "answer": _answer,
    "change": _change,
    "stream": _stream,
    "double": _double,
}


def fault_addons(folder: Path, ours: Path) -> list[Path]:
    """Scripts for `-s`: an obedient one before and one after ours."""
    root = str(Path(__file__).resolve().parents[2])
    before, after = folder / "meddle_before.py", folder / "meddle_after.py"
    before.write_text(_BODY.format(root=root, header="X-Meddle"))
    after.write_text(_BODY.format(root=root, header="X-Meddle-Late"))
    return [before, ours, after]

"""A mitmproxy addon that tampers with downloads as the proxy login says, before artifactapi sees them.

The login is a build's name; its end says what happens to the files of packages: `-byte` changes one
byte, `-version` delivers another version, `-host` takes them from another host.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mitmproxy import http

_SCRIPT = """
import sys

sys.path.insert(0, {root!r})
from tests.support.tampering_addon import Tampering

addons = [Tampering({versions!r})]
"""
_FILES = (".whl", ".tgz", ".crate", "/download", ".gem", ".zip", ".tar.gz")


class Tampering:
    """Tampers with each file of a package.

    Args:
        versions: Part of a path, and what replaces it: two versions that the registry has.
    """

    def __init__(self, versions: tuple[str, str]) -> None:
        self._versions = versions

    def request(self, flow: http.HTTPFlow) -> None:
        """Change the path or the host."""
        if not flow.request.path.endswith(_FILES):
            return
        if _login(flow).endswith("-version"):
            flow.request.path = flow.request.path.replace(*self._versions)
        if _login(flow).endswith("-host"):
            flow.request.host = "localhost"

    def response(self, flow: http.HTTPFlow) -> None:
        """Change a byte in the middle of a file."""
        is_file = flow.request.path.endswith(_FILES) or "/storage/" in flow.request.path
        if is_file and _login(flow).endswith("-byte") and flow.response and flow.response.content:
            content = bytearray(flow.response.content)
            content[len(content) // 2] ^= 1
            flow.response.content = bytes(content)


def _login(flow: http.HTTPFlow) -> str:
    login = flow.metadata.get("proxyauth")
    return str(login[0]) if login else ""


def tampering_script(folder: Path, versions: tuple[str, str]) -> Path:
    """Write a script for `-s`, to load before artifactapi."""
    path = folder / "tampering.py"
    root = str(Path(__file__).resolve().parents[2])
    path.write_text(_SCRIPT.format(root=root, versions=versions), encoding="utf-8")
    return path

"""Add a link to the page /access-log to mitmweb's own page.

mitmweb's page is one HTML file that starts a compiled application. When mitmweb sends that file, this
adds one element after the application's. It changes neither the file nor the application.

Import this only in mitmweb. The handler derives from mitmweb's own, which is not a public interface
(mitmproxy/tools/web/app.py of mitmproxy 12), so `register` can fail with another mitmproxy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mitmproxy.tools.web import app
from mitmproxy.tools.web.app import IndexHandler

_LINK = Path(__file__).with_name("files") / "index_link.html"
_INDEX = "index.html"
_END = b"</body>"
_REGISTERED_KEY = "artifactapi_index_link"


def register(master: Any) -> None:
    """Add the link in this WebMaster. Idempotent, because tornado cannot remove a handler.

    Raises:
        AttributeError, ImportError, OSError, TypeError, ValueError: this version of mitmweb has a
            different structure.
    """
    if _REGISTERED_KEY in master.app.settings:
        return
    if _END not in Path(app.__file__).with_name(_INDEX).read_bytes():
        raise ValueError(f"{_INDEX} has no {_END.decode()}")
    # Handlers added later take precedence over those that the application was created with.
    master.app.add_handlers(r".*", [(r"/", _LinkedIndexHandler)])
    master.app.settings[_REGISTERED_KEY] = True


class _LinkedIndexHandler(IndexHandler):
    """Answers with mitmweb's page or, before the login, with its login form."""

    def render_string(self, template_name: str, **kwargs: Any) -> bytes:
        """Add the link to mitmweb's page while the script is loaded, but not to the login form."""
        page: bytes = super().render_string(template_name, **kwargs)
        addons: Any = self.master.addons
        if not template_name.endswith(_INDEX) or not addons.get("artifactapi"):
            return page
        before, end, after = page.rpartition(_END)
        return before + _LINK.read_bytes() + end + after

"""The content view "access log" of mitmweb and the console: the row of a flow; reads no database.

It keeps the facts of the newest exchanges, and makes a row of them when somebody looks. Only where
there is somebody to look: mitmdump has no use for it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import yaml
from mitmproxy import contentviews, ctx, http
from msgspec.structs import replace

from exporter.read.human import printable
from exporter.rows.entry_builder import EntryBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

    from exporter import Exchange, Settings

NAME = "access log"
_KEPT = 10_000  # exchanges of about 1.5 kB each; mitmweb keeps the whole flows beside them


class RecentExchanges:
    """The newest exchanges by the id of their flow. Used by the event loop's thread alone."""

    def __init__(self) -> None:
        self._exchanges: OrderedDict[str, Exchange] = OrderedDict()

    def remembering(self, log_access: Callable[[Exchange], bool]) -> Callable[[Exchange], bool]:
        """The same function, which also keeps what it is called with, but for the body."""

        def log_and_keep(exchange: Exchange) -> bool:
            self._exchanges[exchange.flow_id] = (
                replace(exchange, body=None) if exchange.body is not None else exchange
            )
            if len(self._exchanges) > _KEPT:
                self._exchanges.popitem(last=False)
            return log_access(exchange)

        return log_and_keep

    def row(self, flow: http.HTTPFlow, settings: Settings) -> str:
        """The row of this flow as YAML, or why there is none."""
        exchange = self._exchanges.get(flow.id)
        if exchange is None:
            return (
                "# No row is known of this flow: it has not ended, is not logged (artifactapi_filter),\n"
                "# or is too long ago; the page /access-log has those too.\n"
            )
        entry = EntryBuilder(settings).build(exchange)
        place = urlencode({"at": entry.started_at, "id": entry.flow_id})
        text: str = yaml.safe_dump(entry._asdict(), sort_keys=False, allow_unicode=True)
        text = "\n".join(printable(line) for line in text.split("\n"))
        return (
            "# What the row of this flow says. An identity that came with a redirect, and the SHA-256,\n"
            f"# only the row itself has: /access-log/row?{place}\n{text}"
        )


class AccessLogView(contentviews.Contentview):
    """Shows the row whatever the body is; never chosen by itself."""

    name = NAME
    syntax_highlight = "yaml"

    def prettify(self, data: bytes, metadata: contentviews.Metadata) -> str:  # noqa: ARG002
        """The row of the flow that the body belongs to."""
        flow = metadata.flow
        addon: Any = ctx.master.addons.get("artifactapi")  # the one that runs now
        if not isinstance(flow, http.HTTPFlow):
            return "# Only HTTP exchanges have a row.\n"
        if addon is None:
            return "# The access log is not running.\n"
        return str(addon.row_of(flow))

    def render_priority(self, data: bytes, metadata: contentviews.Metadata) -> float:  # noqa: ARG002
        """Less than that of any other."""
        return -1


def register() -> None:
    """Offer the view. Idempotent, also over a reload of the script."""
    if NAME not in contentviews.registry:
        contentviews.add(AccessLogView())

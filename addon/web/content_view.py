"""The content view "access log" of mitmweb and the console: the row of a flow. Reads no database.

It keeps the newest exchanges in memory and builds a row from one when a user opens the view.
mitmdump has no users to show it to, so it is not used there.
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
_MAX_EXCHANGES = 10_000  # about 1.5 kB each; mitmweb keeps the complete flows in memory anyway


class RecentExchanges:
    """The newest exchanges by flow id. Not thread-safe: use it from the event loop's thread."""

    def __init__(self) -> None:
        self._exchanges: OrderedDict[str, Exchange] = OrderedDict()

    def recording(self, log_access: Callable[[Exchange], bool]) -> Callable[[Exchange], bool]:
        """Wrap `log_access` so that each exchange is also kept here, without its body."""

        def log_and_keep(exchange: Exchange) -> bool:
            self._exchanges[exchange.flow_id] = (
                replace(exchange, body=None) if exchange.body is not None else exchange
            )
            if len(self._exchanges) > _MAX_EXCHANGES:
                self._exchanges.popitem(last=False)
            return log_access(exchange)

        return log_and_keep

    def row(self, flow: http.HTTPFlow, settings: Settings) -> str:
        """Return the row of this flow as YAML, or a comment that says why there is none."""
        exchange = self._exchanges.get(flow.id)
        if exchange is None:
            return (
                "# This view has no row for this flow. The flow has not ended, is not logged\n"
                "# (artifactapi_filter), or is too old; the page /access-log finds old flows, too.\n"
            )
        entry = EntryBuilder(settings).build(exchange)
        query = urlencode({"at": entry.started_at, "id": entry.flow_id})
        text: str = yaml.safe_dump(entry._asdict(), sort_keys=False, allow_unicode=True)
        text = "\n".join(printable(line) for line in text.split("\n"))
        return (
            "# The row of this flow. Only the stored row has the SHA-256 and an identity learned from\n"
            f"# a redirect: /access-log/row?{query}\n{text}"
        )


class AccessLogView(contentviews.Contentview):
    """Shows the row for any kind of body. mitmproxy never selects it automatically."""

    name = NAME
    syntax_highlight = "yaml"

    def prettify(self, data: bytes, metadata: contentviews.Metadata) -> str:  # noqa: ARG002
        """Return the row of the flow that the body belongs to."""
        flow = metadata.flow
        addon: Any = ctx.master.addons.get("artifactapi")  # after a reload, the new instance
        if not isinstance(flow, http.HTTPFlow):
            return "# Only HTTP exchanges have a row.\n"
        if addon is None:
            return "# The access log is not running.\n"
        return str(addon.row_of(flow))

    def render_priority(self, data: bytes, metadata: contentviews.Metadata) -> float:  # noqa: ARG002
        """Return a lower priority than any other view has."""
        return -1


def register() -> None:
    """Add the view to mitmproxy. Idempotent, even if the script is reloaded."""
    if NAME not in contentviews.registry:
        contentviews.add(AccessLogView())

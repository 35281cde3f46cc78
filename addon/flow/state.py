"""What is remembered about a flow between its hooks. No logic here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from mitmproxy.connection import Server

    from exporter import RequestedUrl

    type Asked = tuple[RequestedUrl, bytes, tuple[tuple[bytes, bytes], ...]]


class FlowState:
    """State of one flow while it runs.

    The defaults are class attributes: most flows keep them, so a new state costs almost nothing.
    """

    # What the client asked for, before addons change it: URL, authority of HTTP/2 and 3, header fields.
    asked: Asked | None = None
    is_import = False  # read from a file
    has_whole_request = False  # only of a flow from a file: the next hook is `request`, or it was
    is_connect = False  # a CONNECT request
    refused_by_mitmproxy = False  # a request that mitmproxy's validation did not accept
    is_tunnel = False  # a CONNECT request that was granted
    has_response_head = False  # from upstream or from an addon
    answered_by_addon = False
    has_whole_response = False
    original_server: Server | None = None  # of a replayed flow: its server before the replay
    opened_connection = False  # this is the first exchange on its upstream connection
    ended = False
    cut_by_shutdown = False
    orphaned = False  # its client disconnected, and no hook ended it
    websocket_sent_bytes = 0
    websocket_received_bytes = 0
    last_websocket_message: object = None
    resume_task: asyncio.Task[None] | None = None  # ended, but a user has intercepted it

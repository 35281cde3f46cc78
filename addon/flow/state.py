"""What is remembered of a flow between its hooks; no logic here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from mitmproxy.connection import Server


class FlowState:
    """What is remembered of a flow while it runs.

    Most flows never differ from these: an attribute of the class costs a new state nothing.
    """

    is_unusual = False  # anything but a request that a client made of upstream
    is_import = False
    is_connect = False
    is_tunnel = False  # a CONNECT that was granted
    head_came = False  # the response head, from upstream or from an addon
    answered_by_addon = False
    response_came = False  # all of it
    old_server: Server | None = None  # the one a replayed flow had before
    connected_anew = False  # first exchange on its upstream connection
    ended = False
    cut_by_shutdown = False
    orphaned = False  # its client left, and no hook ended it
    websocket_sent = 0
    websocket_received = 0
    last_message: object = None
    held: asyncio.Task[None] | None = None  # ended, but a user has intercepted it

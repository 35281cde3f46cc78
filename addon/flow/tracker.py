"""Turn each wire flow into exactly one exchange, however it ends; one short method a hook.

mitmproxy has no hook that means "this flow is over and the client has what it gets". A flow is
marked when its last hook comes, and captured in the `update` that follows: that one runs after
all other addons had their say, also those that come later in the chain.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from mitmproxy.flow import Error

from addon.flow.capture import capture, capture_tls_failure
from addon.flow.state import FlowState
from addon.flow.streaming import Streaming, count_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mitmproxy import flowfilter, http
    from mitmproxy.connection import Client
    from mitmproxy.proxy.server_hooks import ServerConnectionHookData
    from mitmproxy.tls import TlsData

    from exporter import Exchange

logger = logging.getLogger(__name__)

# How long a flow may outlive its client before it is taken for one that no hook will end.
_ORPHAN_SECONDS = 2.0


class FlowTracker:
    """Follows flows on mitmproxy's event loop and hands each that ended to `log_access`, once."""

    def __init__(self) -> None:
        self.log_access: Callable[[Exchange], bool] | None = None
        self.wait_for_room: Callable[[int], bool] | None = None
        self.filter: flowfilter.TFilter | None = None
        self.count_unreadable: Callable[[float], None] | None = None
        self.failures = 0
        self.streaming = Streaming()
        self._open: dict[http.HTTPFlow, FlowState] = {}
        self._fresh_servers: set[str] = set()  # connections no exchange has used yet
        self._tunnels: dict[
            str, http.HTTPFlow
        ] = {}  # by client: nothing was asked through them yet

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """A flow begins; one that is not live and has no client comes from a file."""
        self._open[flow] = state = FlowState()
        if not (flow.live or flow.client_conn.connected):
            state.is_unusual = state.is_import = True
        if flow.is_replay == "request":
            state.is_unusual = True
            state.old_server = flow.server_conn
        if self._tunnels:
            self._forget_tunnel(flow.client_conn)

    def request(self, flow: http.HTTPFlow) -> None:
        """The request is complete; for one saved without an answer that is the end."""
        state = self._open.get(flow)
        if state is not None and state.is_import and flow.response is None and flow.error is None:
            state.ended = True

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """The response head came, from upstream or made by an addon."""
        state = self._open.get(flow)
        if state is not None:
            state.head_came = True

    def response(self, flow: http.HTTPFlow) -> None:
        """The response is complete; a websocket goes on, and a saved error has its own hook."""
        state = self._open.get(flow)
        if state is not None:
            state.response_came = True
            state.ended = flow.websocket is None and not (state.is_import and flow.error)

    def error(self, flow: http.HTTPFlow) -> None:
        """The flow failed."""
        self._end(flow)

    def websocket_end(self, flow: http.HTTPFlow) -> None:
        """The websocket was closed, by whomever."""
        self._end(flow)

    def http_connect(self, flow: http.HTTPFlow) -> None:
        """A client asks for a tunnel."""
        self._open[flow] = state = FlowState()
        state.is_unusual = state.is_connect = True

    def http_connected(self, flow: http.HTTPFlow) -> None:
        """The tunnel is there; what is asked through it are flows of their own."""
        state = self._open.get(flow)
        if state is not None:
            state.is_tunnel = True
            self._tunnels[flow.client_conn.id] = flow

    def http_connect_error(self, flow: http.HTTPFlow) -> None:
        """The tunnel was refused, by upstream, mitmproxy or an addon."""
        self._end(flow)

    def server_connected(self, data: ServerConnectionHookData) -> None:
        """A new upstream connection: the first exchange on it paid for it."""
        self._fresh_servers.add(data.server.id)

    def server_disconnected(self, data: ServerConnectionHookData) -> None:
        """An upstream connection is gone."""
        self._fresh_servers.discard(data.server.id)

    def tls_failed_client(self, data: TlsData) -> None:
        """A client does not trust our certificate; there will be no flow."""
        self._forget_tunnel(data.context.client)
        if self.log_access is not None and self.filter is None:
            self.log_access(capture_tls_failure(data))

    def client_disconnected(self, client: Client) -> None:
        """What no hook has ended ends here, after a grace for hooks that are still on their way."""
        tunnel = self._tunnels.pop(client.id, None)
        if tunnel is not None:
            self._record(tunnel, self._open.pop(tunnel))
        # A replayed flow bears the client of its original, and outlives it.
        left = [
            flow
            for flow in self._open
            if flow.client_conn is client and flow.is_replay != "request"
        ]
        if left:
            asyncio.get_running_loop().call_later(_ORPHAN_SECONDS, self._end_orphans, left)

    def update(self, flows: Sequence[http.HTTPFlow]) -> None:
        """Runs after each hook, when every addon has had its say; flows of other kinds have no state."""
        for flow in flows:
            state = self._open.get(flow)
            if state is None:
                continue
            if state.ended:
                self._finish(flow, state)
            elif flow.websocket is not None:
                self._count_message(flow, state)
            elif state.is_connect:
                self._end_if_killed(flow, state)
            elif state.is_import:
                continue
            elif flow.response is not None and not state.head_came:
                state.is_unusual = state.answered_by_addon = True
            else:
                message = flow.response or flow.request
                if message.stream or self.streaming.may_begin_late:
                    count_stream(message, self.streaming)

    def end_all(self) -> None:
        """The proxy stops: record what is still under way."""
        for flow, state in self._open.items():
            state.is_unusual = True
            state.cut_by_shutdown = not state.is_import
            self._record(flow, state)
        self._open.clear()
        self._tunnels.clear()

    def hand_over(self) -> dict[http.HTTPFlow, FlowState]:
        """What is under way, for the next instance of a script that is loaded anew."""
        flows, self._open = self._open, {}
        self._tunnels.clear()
        for state in flows.values():
            if state.held is not None:
                state.held.cancel()
                state.held = None
        return flows

    def take_over(self, flows: dict[http.HTTPFlow, FlowState]) -> None:
        """Go on with the flows of the instance before."""
        self._open.update(flows)
        self._tunnels.update({f.client_conn.id: f for f, state in flows.items() if state.is_tunnel})
        self.update([flow for flow, state in flows.items() if state.ended])

    def _forget_tunnel(self, client: Client) -> None:
        """Something is asked through it, or it came to a row of its own."""
        tunnel = self._tunnels.pop(client.id, None)
        if tunnel is not None:
            del self._open[tunnel]

    def _end(self, flow: http.HTTPFlow) -> None:
        state = self._open.get(flow)
        if state is not None:
            state.ended = True

    def _finish(self, flow: http.HTTPFlow, state: FlowState) -> None:
        if not flow.intercepted:
            del self._open[flow]
            self._record(flow, state)
        elif state.held is None:
            # Its user may yet change or kill it, and mitmweb fires no hook for either.
            state.held = asyncio.create_task(self._await_user(flow))

    def _end_if_killed(self, flow: http.HTTPFlow, state: FlowState) -> None:
        """A CONNECT that is killed: no hook follows."""
        if flow.error is not None and flow.error.msg == Error.KILLED_MESSAGE:
            del self._open[flow]
            self._record(flow, state)

    async def _await_user(self, flow: http.HTTPFlow) -> None:
        await flow.wait_for_resume()  # type: ignore[no-untyped-call]
        self.update([flow])

    def _count_message(self, flow: http.HTTPFlow, state: FlowState) -> None:
        messages = flow.websocket.messages if flow.websocket is not None else ()
        message = messages[-1] if messages else None
        if message is None or message is state.last_message:
            return
        state.last_message = message
        if not message.dropped:
            if message.from_client:
                state.websocket_sent += len(message.content)
            else:
                state.websocket_received += len(message.content)

    def _end_orphans(self, flows: Sequence[http.HTTPFlow]) -> None:
        for flow in flows:
            state = self._open.pop(flow, None)
            if state is not None:
                state.is_unusual = True
                state.orphaned = flow.error is None
                self._record(flow, state)

    def _record(self, flow: http.HTTPFlow, state: FlowState) -> None:
        """Capture and hand over. Nothing of ours may reach the proxied request, whatever happens."""
        if state.held is not None:
            state.held.cancel()  # a kill does not end the wait
        if self._fresh_servers and flow.server_conn.id in self._fresh_servers:
            self._fresh_servers.discard(flow.server_conn.id)
            state.connected_anew = True
        try:
            if self.log_access is not None and (self.filter is None or self.filter(flow)):
                exchange = capture(flow, state, with_body=self.streaming.digests)
                if state.is_import and self.wait_for_room is not None:
                    # mitmproxy reads a file with its loop blocked: only here nobody is held up.
                    self.wait_for_room(exchange.size)
                self.log_access(exchange)
        except Exception:
            if self.count_unreadable is not None:
                self.count_unreadable(flow.timestamp_created)
            self.failures += 1
            if self.failures == 1:
                logger.warning("A flow could not be read for the access log.", exc_info=True)

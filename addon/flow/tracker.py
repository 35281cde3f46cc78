"""Follow flows through mitmproxy's hooks and log each exactly once, however it ends.

mitmproxy has no hook for "this flow is over and the client has received what it gets". So the last hook
of a flow only marks it, and the `update` event that follows captures it: mitmproxy sends `update` after
all addons, including later ones in the chain, have handled the hook.
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

# If a client has been gone for this long, no hook will end its flows any more.
_ORPHAN_SECONDS = 2.0


class FlowTracker:
    """Passes each ended flow to `log_access`, once. Runs on mitmproxy's event loop."""

    def __init__(self) -> None:
        # See Exporter, which has these methods.
        self.begin: Callable[[float], None] | None = None
        self.skip: Callable[[], None] | None = None
        self.log_access: Callable[[Exchange], bool] | None = None
        self.wait_for_room: Callable[[Exchange], bool] | None = None
        self.count_unreadable: Callable[[float], None] | None = None
        self.filter: flowfilter.TFilter | None = None
        self.streaming = Streaming()
        self.reads_indexes = False  # of Debian packages
        self.failures = 0
        self._open: dict[http.HTTPFlow, FlowState] = {}
        self._unused_connections: set[str] = set()  # ids of upstream connections
        self._unused_tunnels: dict[str, http.HTTPFlow] = {}  # CONNECT flows by id of the client

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """A flow begins. A flow that is not live and has no client comes from a file."""
        self._open[flow] = state = FlowState()
        if self.begin is not None:
            self.begin(_created_at(flow))
        asked = flow.request.data
        state.asked = (
            (asked.scheme, asked.host, asked.port, asked.path),
            asked.authority,
            asked.headers.fields,
        )
        if not (flow.live or flow.client_conn.connected):
            state.is_import = True
        elif (
            flow.error is not None
        ):  # only mitmproxy's validation of the request runs before this hook
            state.refused_by_mitmproxy = True
        if flow.is_replay == "request":
            state.original_server = flow.server_conn
        if self._unused_tunnels:
            self._discard_tunnel(flow.client_conn)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """The response head is there, from upstream or from an addon."""
        state = self._open.get(flow)
        if state is not None:
            state.has_response_head = True

    def response(self, flow: http.HTTPFlow) -> None:
        """The response is complete. A websocket goes on, and a saved error has its own hook."""
        state = self._open.get(flow)
        if state is not None:
            state.has_whole_response = True
            state.ended = flow.websocket is None and not (state.is_import and flow.error)

    def error(self, flow: http.HTTPFlow) -> None:
        """The flow failed."""
        self._mark_ended(flow)

    def websocket_end(self, flow: http.HTTPFlow) -> None:
        """The websocket was closed by either side."""
        self._mark_ended(flow)

    def http_connect(self, flow: http.HTTPFlow) -> None:
        """A client requests a tunnel."""
        self._open[flow] = state = FlowState()
        if self.begin is not None:
            self.begin(_created_at(flow))
        state.is_connect = True

    def http_connected(self, flow: http.HTTPFlow) -> None:
        """The tunnel is open. Requests inside it are flows of their own."""
        state = self._open.get(flow)
        if state is not None:
            state.is_tunnel = True
            self._unused_tunnels[flow.client_conn.id] = flow

    def http_connect_error(self, flow: http.HTTPFlow) -> None:
        """The tunnel was refused by upstream, by mitmproxy or by an addon."""
        self._mark_ended(flow)

    def server_connected(self, data: ServerConnectionHookData) -> None:
        """A new upstream connection. Its setup time belongs to the first exchange on it."""
        self._unused_connections.add(data.server.id)

    def server_disconnected(self, data: ServerConnectionHookData) -> None:
        """An upstream connection was closed."""
        self._unused_connections.discard(data.server.id)

    def tls_failed_client(self, data: TlsData) -> None:
        """A client rejected our certificate. There will be no flow."""
        tunnel = self._unused_tunnels.get(data.context.client.id)
        self._discard_tunnel(data.context.client)
        if self.log_access is not None and self.filter is None:
            started_at = data.context.client.timestamp_start
            if self.begin is not None:
                self.begin(started_at)
            try:
                self.log_access(capture_tls_failure(data, tunnel))
            except Exception as e:  # noqa: BLE001 - it is logged
                self._count_unreadable(started_at, e)

    def client_disconnected(self, client: Client) -> None:
        """End the flows that no hook ended, after a grace period for hooks that are still to come."""
        tunnel = self._unused_tunnels.pop(client.id, None)
        if tunnel is not None:
            self._log(tunnel, self._open.pop(tunnel))
        # A replayed flow keeps the client of its original, and goes on without it.
        left = [
            flow
            for flow in self._open
            if flow.client_conn is client and flow.is_replay != "request"
        ]
        if left:
            asyncio.get_running_loop().call_later(_ORPHAN_SECONDS, self._end_orphans, left)

    def update(self, flows: Sequence[http.HTTPFlow]) -> None:
        """Runs after each hook, when every addon has handled it. Other kinds of flows have no state here."""
        for flow in flows:
            state = self._open.get(flow)
            if state is None:
                continue
            if state.ended:
                self._finish(flow, state)
            elif flow.websocket is not None:
                self._count_message(flow, state)
            elif state.is_connect:
                self._finish_if_killed(flow, state)
            elif state.is_import:
                self._finish_if_unanswered(flow, state)
            elif flow.response is not None and not state.has_response_head:
                state.answered_by_addon = True
            else:
                message = flow.response or flow.request
                if message.stream or self.streaming.may_begin_late:
                    count_stream(message, self.streaming)

    def end_all(self) -> None:
        """The proxy stops: log the open flows."""
        for flow, state in self._open.items():
            state.cut_by_shutdown = not state.is_import
            self._log(flow, state)
        self._open.clear()
        self._unused_tunnels.clear()

    def hand_over(self) -> dict[http.HTTPFlow, FlowState]:
        """Give the open flows to the next instance of a reloaded script."""
        flows, self._open = self._open, {}
        self._unused_tunnels.clear()
        for state in flows.values():
            if state.resume_task is not None:
                state.resume_task.cancel()
                state.resume_task = None
        return flows

    def take_over(self, flows: dict[http.HTTPFlow, FlowState]) -> None:
        """Take the open flows of the previous instance."""
        self._open.update(flows)
        tunnels = {flow.client_conn.id: flow for flow, state in flows.items() if state.is_tunnel}
        self._unused_tunnels.update(tunnels)
        self.update([flow for flow, state in flows.items() if state.ended])

    def oldest_open_at(self) -> float | None:
        """When the oldest open flow began (epoch seconds); None: none is open. Any thread may call it."""
        oldest = next(iter(self._open.copy()), None)
        return None if oldest is None else _created_at(oldest)

    @property
    def open_count(self) -> int:
        """How many flows have begun and not ended."""
        return len(self._open)

    def _discard_tunnel(self, client: Client) -> None:
        """Do not log the tunnel of this client: it is used, or its failure has its own row."""
        tunnel = self._unused_tunnels.pop(client.id, None)
        if tunnel is not None:
            del self._open[tunnel]
            if self.skip is not None:
                self.skip()

    def _mark_ended(self, flow: http.HTTPFlow) -> None:
        state = self._open.get(flow)
        if state is not None:
            state.ended = True

    def _finish(self, flow: http.HTTPFlow, state: FlowState) -> None:
        if not flow.intercepted:
            del self._open[flow]
            self._log(flow, state)
        elif state.resume_task is None:
            # The user may still change or kill the flow, and mitmweb calls no hook for either.
            state.resume_task = asyncio.create_task(self._finish_when_resumed(flow))

    async def _finish_when_resumed(self, flow: http.HTTPFlow) -> None:
        await flow.wait_for_resume()  # type: ignore[no-untyped-call]
        self.update([flow])

    def _finish_if_killed(self, flow: http.HTTPFlow, state: FlowState) -> None:
        """Mitmproxy calls no hook after a CONNECT was killed."""
        if flow.error is not None and flow.error.msg == Error.KILLED_MESSAGE:
            del self._open[flow]
            self._log(flow, state)

    def _finish_if_unanswered(self, flow: http.HTTPFlow, state: FlowState) -> None:
        """A flow that was saved without a response ends with its `request` hook.

        We have no such hook, because each takes time in each flow. The second update is the one after it.
        """
        if state.has_whole_request and flow.response is None and flow.error is None:
            state.ended = True
            self._finish(flow, state)
        state.has_whole_request = True

    def _count_message(self, flow: http.HTTPFlow, state: FlowState) -> None:
        messages = flow.websocket.messages if flow.websocket is not None else ()
        message = messages[-1] if messages else None
        if message is None or message is state.last_websocket_message:
            return
        state.last_websocket_message = message
        if not message.dropped:
            if message.from_client:
                state.websocket_sent_bytes += len(message.content)
            else:
                state.websocket_received_bytes += len(message.content)

    def _end_orphans(self, flows: Sequence[http.HTTPFlow]) -> None:
        for flow in flows:
            state = self._open.pop(flow, None)
            if state is not None:
                state.orphaned = flow.error is None
                self._log(flow, state)

    def _log(self, flow: http.HTTPFlow, state: FlowState) -> None:
        """Capture the flow and pass it on. No exception of ours may reach the proxied request."""
        if state.resume_task is not None:
            state.resume_task.cancel()  # a kill does not end its wait
        if flow.server_conn.id in self._unused_connections:
            self._unused_connections.discard(flow.server_conn.id)
            state.opened_connection = True
        try:
            if self.log_access is not None and (self.filter is None or self.filter(flow)):
                exchange = capture(
                    flow,
                    state,
                    with_body=self.streaming.digests,
                    with_indexes=self.reads_indexes,
                )
                if state.is_import and self.wait_for_room is not None:
                    # mitmproxy blocks its event loop while it reads a file, so a wait delays nobody.
                    self.wait_for_room(exchange)
                self.log_access(exchange)
            elif self.skip is not None:
                self.skip()
        except Exception as e:  # noqa: BLE001 - it is logged
            self._count_unreadable(_created_at(flow), e)

    def _count_unreadable(self, began_at: float, error: Exception) -> None:
        """Count a flow that could not be read, and log the first such error. `began_at`: epoch seconds."""
        if self.count_unreadable is not None:
            self.count_unreadable(began_at)
        self.failures += 1
        if self.failures == 1:
            logger.warning(
                "artifactapi: a flow could not be read; it is recorded as a gap.", exc_info=error
            )


def _created_at(flow: http.HTTPFlow) -> float:
    """When a flow began, epoch seconds. mitmproxy does not check this value of a file, so it may be anything."""
    try:
        return float(flow.timestamp_created)
    except (TypeError, ValueError, OverflowError):
        return 0.0

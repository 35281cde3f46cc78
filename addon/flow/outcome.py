"""What the client got, and why: status and kind of error of a flow that has ended; pure functions.

mitmproxy answers some failures itself without a trace on the flow, and says most of what went
wrong in a message alone. The table below is of mitmproxy 12 (proxy/layers/http and
proxy/layers/tls), each line provoked on the wire by a test. What can't be known is None.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from mitmproxy import ctx
from mitmproxy.connection import ConnectionState
from mitmproxy.flow import Error

if TYPE_CHECKING:
    from mitmproxy import http

    from addon.flow.state import FlowState

_BAD_GATEWAY = 502
_TOO_LARGE = 413
_BAD_REQUEST = 400
_PROXY_AUTH = 407
_MULTIPLEXED = (b"h2", b"h3")
# RFC 6455 7.4.1: normal closure, going away, no status given.
_NORMAL_CLOSE_CODES = frozenset({None, 1000, 1001, 1005})

# (pattern, error_type, status mitmproxy makes of it while the client listens)
_MESSAGES: tuple[tuple[re.Pattern[str], str, int | None], ...] = tuple(
    (re.compile(pattern), error_type, status)
    for pattern, error_type, status in (
        (r"Request body exceeds mitmproxy's body_size_limit", "too_large", _TOO_LARGE),
        (r"Response body exceeds mitmproxy's body_size_limit", "too_large", _BAD_GATEWAY),
        (
            r"from client, refusing|Invalid request scheme|HTTP CONNECT request",
            "protocol",
            _BAD_REQUEST,
        ),
        (r"from server, refusing|Cannot parse HTTP response", "protocol", _BAD_GATEWAY),
        (
            r"unexpected server response: b[\"']HTTP/1",
            "upstream_closed",
            _BAD_GATEWAY,
        ),  # half a head
        (r"unexpected server response", "protocol", _BAD_GATEWAY),
        (r"Connection killed", "killed", _BAD_GATEWAY),
        (
            (
                r"\[Errno -\d+\]|Name or service not known|nodename nor servname|getaddrinfo failed"
                r"|No address associated|name resolution"
            ),
            "dns",
            _BAD_GATEWAY,
        ),
        (r"\[Errno (?:110|60)\]|timed out|[Tt]imeout", "connect_timeout", _BAD_GATEWAY),
        (r"Connect call failed|\[Errno|Multiple exceptions|[Rr]efused", "connect", _BAD_GATEWAY),
        (
            r"[Cc]ertificate|does not speak TLS|OpenSSL|TLS|SSL|QUIC handshake|handshake",
            "tls_upstream",
            _BAD_GATEWAY,
        ),
        (r"closed|peer unexpectedly|EOF|NO_ERROR", "upstream_closed", _BAD_GATEWAY),
        (r"protocol error|Received|invalid|Invalid", "protocol", _BAD_GATEWAY),
    )
)
# HTTP/1 heads that mitmproxy answers with 400 by itself leave these alone.
_CLIENT_GONE = re.compile(r"Client disconnected|HTTP/1 protocol error|peer closed|NO_ERROR|stream ")
# mitmproxy says "by client" whichever side reset the stream.
_RESET = re.compile(r"stream (?:reset|closed) by client \((?:H3_)?(?P<code>\w+)")
_CANCELS = frozenset({"CANCEL", "REQUEST_CANCELLED"})  # what only who asked has a use for


class Outcome(NamedTuple):
    """How an exchange ended: None everywhere means well, but for the status."""

    status_code: int | None
    error_type: str | None
    error: str | None


def outcome(flow: http.HTTPFlow, state: FlowState) -> Outcome:
    """How this flow ended, as far as mitmproxy lets anyone know. Call it once it has."""
    response = flow.response
    head_sent = response is not None and state.head_came and bool(response.stream)
    if state.cut_by_shutdown or state.orphaned:
        return _cut(flow, state, head_sent=head_sent)
    if state.is_connect:
        return _connect_outcome(flow)
    if flow.error is None:
        return _answered(flow, state)
    message = flow.error.msg
    if message == Error.KILLED_MESSAGE:
        sent = response is not None and state.response_came and head_sent
        return Outcome(response.status_code if sent and response else None, "killed", message)
    if response is not None and (head_sent or (state.is_import and response.timestamp_end)):
        return Outcome(response.status_code, _kind(flow, message)[0], message)
    error_type, status = _kind(flow, message)
    # Nobody waits for a replay; and of an old flow it is not known who was told what.
    told = status if not (state.is_import or flow.is_replay == "request") else None
    return Outcome(told, error_type, message)


def _cut(flow: http.HTTPFlow, state: FlowState, *, head_sent: bool) -> Outcome:
    """No hook ended it: the proxy stops, or lost it."""
    began = head_sent or flow.websocket or state.is_tunnel
    status = flow.response.status_code if flow.response and began else None
    if state.cut_by_shutdown:
        return Outcome(status, "shutdown", "The proxy was stopped.")
    return Outcome(status, "_OTHER", "mitmproxy ended this exchange without a word.")


def _answered(flow: http.HTTPFlow, state: FlowState) -> Outcome:
    response = flow.response
    if response is None:
        return Outcome(None, None, None)
    status = response.status_code
    websocket = flow.websocket
    if websocket is not None and websocket.close_code not in _NORMAL_CLOSE_CODES:
        text = f"WebSocket closed with code {websocket.close_code}."
        side = "client_disconnected" if websocket.closed_by_client else "upstream_closed"
        return Outcome(status, side, text)
    if state.answered_by_addon and status == _PROXY_AUTH:
        return Outcome(status, "proxy_auth", None)
    return Outcome(status, None, None)


def _connect_outcome(flow: http.HTTPFlow) -> Outcome:
    """A CONNECT that made no tunnel, or one that nothing was ever asked through."""
    if flow.error is not None:
        return Outcome(None, "killed", flow.error.msg)
    status = flow.response.status_code if flow.response else None
    text = flow.server_conn.error
    if text:
        return Outcome(status, _kind(flow, text)[0], text)
    return Outcome(status, "proxy_auth" if status == _PROXY_AUTH else None, None)


def _kind(flow: http.HTTPFlow, message: str) -> tuple[str, int | None]:
    """Kind of error, and the status the client got of mitmproxy's own making."""
    if message.startswith("Client disconnected"):
        return ("upstream_timeout" if _timed_out(flow) else "client_disconnected"), None
    # A saved or replayed flow bears a client that went long ago.
    left = flow.live and flow.is_replay != "request"
    if left and not flow.client_conn.state & ConnectionState.CAN_WRITE:
        if flow.request.timestamp_end is None and not _CLIENT_GONE.match(message):
            return "protocol", _BAD_REQUEST  # mitmproxy sends 400 and closes before any hook
        return "client_disconnected", None
    reset = _RESET.match(message)
    if reset:
        return _reset_kind(flow, reset["code"])
    for pattern, error_type, status in _MESSAGES:
        if pattern.search(message):
            return error_type, status
    return "_OTHER", _BAD_GATEWAY


def _reset_kind(flow: http.HTTPFlow, code: str) -> tuple[str, int | None]:
    if flow.server_conn.alpn not in _MULTIPLEXED or code in _CANCELS:
        return "client_disconnected", None
    if flow.client_conn.alpn not in _MULTIPLEXED:
        return "upstream_closed", _BAD_GATEWAY
    return "_OTHER", None  # nobody can tell who it was, and so not what the client got


def _timed_out(flow: http.HTTPFlow) -> bool:
    """The inactivity time-out says "Client disconnected." too; the idle time tells them apart.

    Only where the connection carries one exchange at a time: others would have kept it alive.
    """
    if flow.error is None or flow.client_conn.alpn in _MULTIPLEXED:
        return False
    asked = flow.request.timestamp_end or flow.request.timestamp_start
    last_sign = max(asked, flow.server_conn.timestamp_tcp_setup or 0.0)
    return bool(flow.error.timestamp - last_sign >= ctx.options.tcp_timeout)

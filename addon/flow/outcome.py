"""What the client received, and why: status and error type of a flow that has ended. Pure functions.

mitmproxy answers some failures itself and leaves no trace of that on the flow; often an error message is
the only evidence. The table below is for mitmproxy 12 (proxy/layers/http and proxy/layers/tls). A test
provokes each line on the wire. What cannot be known is None.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mitmproxy import ctx
from mitmproxy.connection import ConnectionState
from mitmproxy.flow import Error

if TYPE_CHECKING:
    from mitmproxy import http

    from addon.flow.state import FlowState

_BAD_REQUEST = 400
_PROXY_AUTH = 407
_TOO_LARGE = 413
_BAD_GATEWAY = 502
_MULTIPLEXED = (b"h2", b"h3")
# RFC 6455 7.4.1: normal closure, going away, no status given.
_NORMAL_CLOSE_CODES = frozenset({None, 1000, 1001, 1005})

_REQUEST_TOO_LARGE = "Request body exceeds mitmproxy's body_size_limit."
# The error type of a message, by how it begins: mitmproxy's own words come first, and what a peer
# contributed (a reason phrase, raw bytes) comes last, so it cannot choose the type. Only the words of
# OSError and OpenSSL tell why a connection failed; no field of the flow does.
_MESSAGES = tuple(
    (re.compile(pattern, re.DOTALL), error_type)
    for pattern, error_type in (
        (r"(?:Request|Response) body exceeds mitmproxy's body_size_limit", "too_large"),
        (r"Connection killed", "killed"),
        # An upstream proxy gave another answer to CONNECT than 2xx.
        (r"Upstream proxy \S+ refused HTTP CONNECT request|Error connecting to ", "connect"),
        (r"Received .* from server, refusing|Cannot parse HTTP response", "protocol"),
        (
            r"unexpected server response: b[\"']HTTP/1",
            "upstream_closed",
        ),  # an incomplete response head
        (r"unexpected server response", "protocol"),
        (r"HTTP/1 protocol error: peer (?:unexpectedly )?closed", "upstream_closed"),
        (r"HTTP/2 connection closed", "upstream_closed"),
        (r"HTTP/[123] protocol error|Received HTTP/2 data frame", "protocol"),
        (
            r"server closed connection|peer closed connection|connection closed|EOF",
            "upstream_closed",
        ),
        (r"\[Errno (?:-\d+|8)\]", "dns"),  # getaddrinfo; 8 is EAI_NONAME on macOS
        (r"(?:Multiple exceptions: .*)?\[Errno (?:110|60)\]|.*timed out", "connect_timeout"),
        (r"\[Errno \d+\]|Multiple exceptions|connection cancelled", "connect"),
        (r"Certificate |The remote server |OpenSSL |tlsv1 |sslv3 |ssl/tls ", "tls_upstream"),
    )
)
# QUIC reports the peer's own words, if it sent any.
_QUIC_MESSAGES = tuple(
    (re.compile(pattern), error_type)
    for pattern, error_type in (
        (r"[Tt]imeout|timed out", "connect_timeout"),
        (r"(?i)certificate|TLS|handshake|crypto", "tls_upstream"),
        (r"closed|NO_ERROR", "upstream_closed"),
        (r"(?i)protocol|invalid", "protocol"),
    )
)
# The client left. In lower case it is why mitmproxy canceled the attempt to connect to upstream.
_DISCONNECTED = ("Client disconnected", "client disconnected")
# Messages of a client that left. For any other message after an incomplete HTTP/1 head, mitmproxy sends 400.
_CLIENT_GONE = re.compile(r"Client disconnected|HTTP/1 protocol error|peer closed|NO_ERROR|stream ")
# mitmproxy says "by client" no matter which side reset the stream.
_RESET = re.compile(r"stream (?:reset|closed) by client \((?:H3_)?(?P<code>\w+)")
_CANCELS = frozenset({"CANCEL", "REQUEST_CANCELLED"})  # codes that only the requesting side sends


# How an exchange ended: status code, error type and error. Without an error, the last two are None.
type Outcome = tuple[int | None, str | None, str | None]


def outcome(flow: http.HTTPFlow, state: FlowState) -> Outcome:
    """How this flow ended, as far as mitmproxy tells. Call it after the flow has ended."""
    if state.cut_by_shutdown or state.orphaned:
        return _without_end(flow, state)
    if state.is_connect:
        return _connect_outcome(flow, state)
    if flow.error is None:
        return _answered(flow, state)
    response, message, head_sent = flow.response, flow.error.msg, _is_head_sent(flow, state)
    if message == Error.KILLED_MESSAGE:
        sent = response is not None and state.has_whole_response and head_sent
        return (response.status_code if sent and response else None, "killed", message)
    if response is not None and (head_sent or (state.is_import and response.timestamp_end)):
        return (response.status_code, _failure(flow, state, message)[0], message)
    error_type, status = _failure(flow, state, message)
    # A replay has no client. For a flow from a file it is unknown what the client received.
    received = status if not (state.is_import or flow.is_replay == "request") else None
    return (received, error_type, message)


def _is_head_sent(flow: http.HTTPFlow, state: FlowState) -> bool:
    """Whether the client has received the head of a streamed response."""
    return flow.response is not None and state.has_response_head and bool(flow.response.stream)


def _without_end(flow: http.HTTPFlow, state: FlowState) -> Outcome:
    """No hook ended the flow: the proxy stops, or mitmproxy lost track of it."""
    began = _is_head_sent(flow, state) or flow.websocket or state.is_tunnel
    status = flow.response.status_code if flow.response and began else None
    if state.cut_by_shutdown:
        return (status, "shutdown", "The proxy was stopped.")
    return (status, "_OTHER", "mitmproxy ended this exchange without reporting it.")


def _answered(flow: http.HTTPFlow, state: FlowState) -> Outcome:
    response = flow.response
    if response is None:
        return (None, None, None)
    status = response.status_code
    websocket = flow.websocket
    if websocket is not None and websocket.close_code not in _NORMAL_CLOSE_CODES:
        text = f"WebSocket closed with code {websocket.close_code}."
        side = "client_disconnected" if websocket.closed_by_client else "upstream_closed"
        return (status, side, text)
    if state.answered_by_addon and status == _PROXY_AUTH:
        return (status, "proxy_auth", None)
    return (status, None, None)


def _connect_outcome(flow: http.HTTPFlow, state: FlowState) -> Outcome:
    """A CONNECT that was refused, or whose tunnel was never used."""
    if flow.error is not None:
        return (None, "killed", flow.error.msg)
    status = flow.response.status_code if flow.response else None
    text = flow.server_conn.error
    if text:
        left = text.startswith(_DISCONNECTED)  # before it could receive the response
        return (None if left else status, _failure(flow, state, text)[0], text)
    return (status, "proxy_auth" if status == _PROXY_AUTH else None, None)


def _failure(flow: http.HTTPFlow, state: FlowState, message: str) -> tuple[str, int | None]:
    """Error type, and the status that mitmproxy itself sent to the client.

    The status follows mitmproxy's ErrorCode.http_status_code: 400 and 413 for a request that it does
    not accept, 502 for everything that upstream or the way there did wrong.
    """
    if state.refused_by_mitmproxy:
        return "protocol", _BAD_REQUEST
    if message.startswith(_DISCONNECTED):
        return ("upstream_timeout" if _timed_out(flow) else "client_disconnected"), None
    # The client of a saved or replayed flow left long ago.
    has_client = flow.live and flow.is_replay != "request"
    if has_client and not flow.client_conn.state & ConnectionState.CAN_WRITE:
        if flow.request.timestamp_end is None and not _CLIENT_GONE.match(message):
            return "protocol", _BAD_REQUEST  # mitmproxy sends 400 and closes before it calls a hook
        return "client_disconnected", None
    reset = _RESET.match(message)
    if reset:
        return _reset_kind(flow, reset["code"])
    return _error_type(flow, message), _TOO_LARGE if message == _REQUEST_TOO_LARGE else _BAD_GATEWAY


def _error_type(flow: http.HTTPFlow, message: str) -> str:
    for pattern, error_type in _MESSAGES:
        if pattern.match(message):
            return error_type
    if flow.server_conn.transport_protocol == "udp":
        for pattern, error_type in _QUIC_MESSAGES:
            if pattern.search(message):
                return error_type
    return "_OTHER"


def _reset_kind(flow: http.HTTPFlow, code: str) -> tuple[str, int | None]:
    if flow.server_conn.alpn not in _MULTIPLEXED or code in _CANCELS:
        return "client_disconnected", None
    if flow.client_conn.alpn not in _MULTIPLEXED:
        return "upstream_closed", _BAD_GATEWAY
    return "_OTHER", None  # unknown which side it was, so unknown what the client received


def _timed_out(flow: http.HTTPFlow) -> bool:
    """Whether "Client disconnected." was mitmproxy's inactivity timeout; the idle time tells them apart.

    Only possible where a connection carries one exchange at a time: another would have kept it alive.
    """
    if flow.error is None or flow.client_conn.alpn in _MULTIPLEXED:
        return False
    requested_at = flow.request.timestamp_end or flow.request.timestamp_start
    last_activity = max(requested_at, flow.server_conn.timestamp_tcp_setup or 0.0)
    return bool(flow.error.timestamp - last_activity >= ctx.options.tcp_timeout)

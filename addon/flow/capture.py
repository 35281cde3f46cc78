"""Copy the raw facts of a finished flow into an Exchange: immutable, bounded, no decoding, no I/O."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from msgspec.structs import replace

from addon.flow.interning import CHARACTER_BYTES, TEXT_BYTES, InternedFields, InternedTexts
from addon.flow.outcome import outcome
from addon.flow.streaming import body_bytes, body_digest
from exporter import Exchange

if TYPE_CHECKING:
    from mitmproxy import http
    from mitmproxy.connection import Client, Server
    from mitmproxy.tls import TlsData

    from addon.flow.interning import Field
    from addon.flow.state import FlowState

# More than the table keeps of each, in UTF-8 (four bytes a character), so that the cut is marked there.
MAX_TARGET_PART_BYTES = 4 * 2048 + 4
MAX_VALUE_BYTES = 4 * 512 + 4
MAX_FIELDS = 32
MAX_ERROR_CHARACTERS = 2048
_FIXED_BYTES = 512  # what an Exchange takes without its texts, rounded up
_USUAL_BYTES = 2048  # with no more text than this in all, nothing needs to be cut
_OK = 200
_SWITCHING_PROTOCOLS = 101
_USER_AGENT = b"user-agent"
_USER_AGENT_LENGTH = len(_USER_AGENT)

_MAX_TEXT_BYTES = (  # what a cut leaves: target, error, two values in characters, four in bytes, fields
    2 * MAX_TARGET_PART_BYTES
    + CHARACTER_BYTES * (MAX_ERROR_CHARACTERS + 2 * MAX_VALUE_BYTES)
    + 4 * MAX_VALUE_BYTES
    + MAX_FIELDS * (3 * TEXT_BYTES + MAX_VALUE_BYTES)
    + 8 * TEXT_BYTES
)
_texts: InternedTexts[bytes] = InternedTexts()
_names: InternedTexts[str] = InternedTexts()
_fields = InternedFields()


def capture(flow: http.HTTPFlow, state: FlowState, *, with_body: bool = False) -> Exchange:
    """The facts of a flow that has ended. The flow is not referred to by the result.

    Nor is its body, unless `with_body` asks for what a digest is taken from.
    """
    request = flow.request.data
    server = flow.server_conn
    ending = plain_ending(flow, state) or unusual_ending(flow, state)
    status_code, error_type, error, ended_at, head_at, request_bytes, response_bytes, source = (
        ending
    )
    response = flow.response
    body = sha256 = None
    if with_body and status_code == _OK and error is None and request.method == b"GET":
        body, sha256 = _content(flow)
    asked = server is not state.old_server  # else it is known from the original of a replay alone
    target = b"" if state.is_connect else request.path
    login = flow.metadata.get("proxyauth")
    agent = _user_agent(request.headers.fields)
    _texts.bytes = _names.bytes = _fields.bytes = 0
    fields = _response_fields(response.data.headers.fields) if response is not None else ()
    host = _names[_host(flow)]
    method, scheme, http_version = (
        _texts[request.method],
        _texts[request.scheme],
        _texts[request.http_version],
    )
    user_agent = _texts[agent] if agent is not None else None
    proxy_user = _names[str(login[0])] if login else None
    text_bytes = TEXT_BYTES + len(target) + _texts.bytes + _names.bytes + _fields.bytes
    if error is not None:
        text_bytes += CHARACTER_BYTES * len(error)
    # By position: by name takes forty times as long.
    exchange = Exchange(
        _import_id(flow) if state.is_import else flow.id,
        request.timestamp_start,
        ended_at,
        head_at,
        connect_seconds(server) if state.connected_anew else None,
        flow.client_conn.peername,
        server.peername if asked else None,
        proxy_user,
        method,
        scheme,
        host,
        request.port,
        target,
        http_version,
        user_agent,
        request_bytes,
        status_code,
        error_type,
        error,
        fields,
        response_bytes,
        server.tls_version if asked else None,
        source,
        body,
        sha256,
        _FIXED_BYTES + min(text_bytes, _MAX_TEXT_BYTES) + len(body or b""),
    )
    return exchange if text_bytes <= _USUAL_BYTES and len(fields) <= MAX_FIELDS else _cut(exchange)


# status_code, error_type, error, ended_at, head_at, request_bytes, response_bytes, response_source
Ending = tuple[
    int | None,
    str | None,
    str | None,
    float | None,
    float | None,
    int | None,
    int | None,
    str | None,
]


def plain_ending(flow: http.HTTPFlow, state: FlowState) -> Ending | None:
    """How nearly every flow ends: upstream answered, and nothing was out of the ordinary; else None.

    Says what `unusual_ending` would, without a question for each thing that may happen.
    """
    response = flow.response
    if state.is_unusual or response is None or flow.error is not None or flow.websocket is not None:
        return None
    request, answer = flow.request, response.data
    if (
        request.stream
        or response.stream
        or flow.is_replay
        or answer.status_code == _SWITCHING_PROTOCOLS
    ):
        return None
    sent, received = request.data.content, answer.content
    return (
        answer.status_code,
        None,
        None,
        answer.timestamp_end,
        answer.timestamp_start,
        len(sent) if sent is not None else None,
        len(received) if received is not None else None,
        "upstream",
    )


def unusual_ending(flow: http.HTTPFlow, state: FlowState) -> Ending:
    """How any flow ended."""
    response = flow.response
    status_code, error_type, error = outcome(flow, state)
    # Else the client got another response, of mitmproxy's making.
    delivered = response is not None and status_code == response.status_code
    return (
        status_code,
        error_type,
        error,
        _ended_at(flow),
        response.timestamp_start if delivered and response is not None else None,
        _request_bytes(flow, state),
        _response_bytes(flow, state) if delivered else None,
        _source(flow, state) if delivered else None,
    )


def _cut(x: Exchange) -> Exchange:
    """With less of its text, but still more than a row keeps, so that the cut is marked there."""
    return replace(
        x,
        proxy_user=x.proxy_user and x.proxy_user[:MAX_VALUE_BYTES],
        method=x.method[:MAX_VALUE_BYTES],
        scheme=x.scheme[:MAX_VALUE_BYTES],
        host=x.host[:MAX_VALUE_BYTES],
        target=_cut_target(x.target),
        http_version=x.http_version[:MAX_VALUE_BYTES],
        user_agent=x.user_agent and x.user_agent[:MAX_VALUE_BYTES],
        error=x.error and x.error[:MAX_ERROR_CHARACTERS],
        response_fields=tuple(
            (name, value[:MAX_VALUE_BYTES]) for name, value in x.response_fields[:MAX_FIELDS]
        ),
    )


def capture_tls_failure(data: TlsData) -> Exchange:
    """A client that would not have our certificate, or no TLS with us at all: there is no flow."""
    client, server = data.context.client, data.context.server
    address = server.address or ("", 0)
    return Exchange(
        flow_id=client.id,
        started_at=client.timestamp_start,
        ended_at=None,
        head_at=None,
        connect_seconds=None,
        client=client.peername,
        server=server.peername,
        proxy_user=None,
        method=b"",
        scheme=b"https",
        host=(client.sni or address[0])[:MAX_VALUE_BYTES],
        port=address[1],
        target=b"",
        http_version=b"",
        user_agent=None,
        request_bytes=None,
        status_code=None,
        error_type="tls_client",
        error=(client.error or "")[:MAX_ERROR_CHARACTERS] or None,
        response_fields=(),
        response_bytes=None,
        tls_version=None,
        response_source=None,
        body=None,
        sha256=None,
        size=_FIXED_BYTES + CHARACTER_BYTES * (MAX_ERROR_CHARACTERS + MAX_VALUE_BYTES),
    )


def connect_seconds(server: Server) -> float | None:
    """TCP and TLS set-up of this connection, seconds; None if none was made."""
    ready = server.timestamp_tls_setup or server.timestamp_tcp_setup
    if ready is None or server.timestamp_start is None:
        return None
    return ready - server.timestamp_start


def _response_fields(fields: tuple[Field, ...]) -> tuple[Field, ...]:
    """Those that a column is read from."""
    others, shared = _fields.others, _fields
    return tuple([ours for field in fields if field[0] not in others and (ours := shared[field])])


def _user_agent(fields: tuple[Field, ...]) -> bytes | None:
    for name, value in fields:
        if len(name) == _USER_AGENT_LENGTH and name.lower() == _USER_AGENT:
            return value
    return None


def _cut_target(target: bytes) -> bytes:
    path, mark, query = target.partition(b"?")
    return path[:MAX_TARGET_PART_BYTES] + mark + query[:MAX_TARGET_PART_BYTES]


def _host(flow: http.HTTPFlow) -> str:
    """The host that was asked; the client's name for it where only an address is known."""
    if flow.client_conn.proxy_mode.type_name in ("transparent", "wireguard", "local", "tun"):
        return flow.request.pretty_host
    return flow.request.data.host


def _ended_at(flow: http.HTTPFlow) -> float | None:
    if flow.websocket is not None and flow.websocket.timestamp_end is not None:
        return flow.websocket.timestamp_end
    if flow.error is not None:
        return flow.error.timestamp
    return flow.response.timestamp_end if flow.response is not None else None


def _request_bytes(flow: http.HTTPFlow, state: FlowState) -> int | None:
    if flow.websocket is not None:
        return state.websocket_sent
    return None if state.is_connect else body_bytes(flow.request)


def _response_bytes(flow: http.HTTPFlow, state: FlowState) -> int | None:
    if flow.websocket is not None:
        return state.websocket_received
    response = flow.response
    if response is None or state.is_tunnel or response.status_code == _SWITCHING_PROTOCOLS:
        return None  # what is_temporary after a change of protocol is not ours to count
    return body_bytes(response)


def _content(flow: http.HTTPFlow) -> tuple[bytes | None, bytes | None]:
    """The body of the response if it is there, and its digest if it has one."""
    response = flow.response
    return (response.data.content, body_digest(response)) if response is not None else (None, None)


def _source(flow: http.HTTPFlow, state: FlowState) -> str | None:
    if flow.is_replay == "response":
        return "replay"
    if state.answered_by_addon or (state.is_connect and not state.is_tunnel):
        return "addon"
    if state.is_import and flow.server_conn.timestamp_start is None:
        return None
    return "upstream"


def _import_id(flow: http.HTTPFlow) -> str:
    """The id of a saved flow; HAR files have none, and mitmproxy makes up another at each reading.

    No socket has port 0: mitmproxy gives it to the clients of HAR files alone.
    """
    client: Client = flow.client_conn
    if client.peername and client.peername[1] == 0:
        request, response = flow.request, flow.response
        parts = (request.method, request.url, request.timestamp_start, _ended_at(flow))
        answer = (response.status_code, body_bytes(response)) if response else ()
        return str(uuid.uuid5(uuid.NAMESPACE_URL, repr((parts, answer))))
    return flow.id

"""Copy the raw facts of a finished flow into an Exchange: immutable, bounded, no decoding, no I/O."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from addon.outcome import outcome
from addon.streamed import body_bytes, body_digest
from exporter import RESPONSE_FIELDS, Exchange

if TYPE_CHECKING:
    from mitmproxy import http
    from mitmproxy.connection import Client, Server
    from mitmproxy.tls import TlsData

    from addon.flows import Note

# More than the table keeps of each, in UTF-8 (four bytes a character), so that the cut is marked there.
MAX_TARGET_PART_BYTES = 4 * 2048 + 4
MAX_VALUE_BYTES = 4 * 512 + 4
MAX_FIELDS = 32
MAX_ERROR_CHARACTERS = 2048
_CHARACTER_BYTES = 4  # of a str, at most
_FIXED_BYTES = 1024  # what an Exchange without its text takes, rounded up

# Which of our names a header name is, None for none; remembered, since names repeat and
# lowering each costs more than all the rest of a capture.
_known_names: dict[bytes, bytes | None] = {}
_MAX_KNOWN_NAMES = 4096


def capture(flow: http.HTTPFlow, note: Note, *, with_body: bool = False) -> Exchange:
    """The facts of a flow that has ended. The flow is not referred to by the result.

    Nor is its body, unless `with_body` asks for what a digest is taken from.
    """
    request = flow.request.data
    response = flow.response
    status_code, error_type, error = outcome(flow, note)
    fields = _response_fields(response.data.headers.fields) if response is not None else ()
    user_agent = _value_of(request.headers.fields, b"user-agent")
    target = _bounded_target(request.path) if not note.is_connect else b""
    if error is not None:
        error = error[:MAX_ERROR_CHARACTERS]
    method = request.method[:MAX_VALUE_BYTES]
    scheme = request.scheme[:MAX_VALUE_BYTES]
    http_version = request.http_version[:MAX_VALUE_BYTES]
    host = _host(flow)[:MAX_VALUE_BYTES]
    delivered = response is not None and status_code == response.status_code
    whole = with_body and error is None and status_code == 200 and request.method == b"GET"  # noqa: PLR2004
    body = response.data.content if whole and response is not None else None
    login = flow.metadata.get("proxyauth")
    proxy_user = str(login[0])[:MAX_VALUE_BYTES] if login else None
    server = flow.server_conn if flow.server_conn is not note.old_server else None
    return Exchange(
        flow_id=_import_id(flow) if note.is_import else flow.id,
        started_at=request.timestamp_start,
        ended_at=_ended_at(flow),
        head_at=response.timestamp_start if delivered and response is not None else None,
        connect_seconds=connect_seconds(flow.server_conn) if note.connected_anew else None,
        client=flow.client_conn.peername,
        server=server.peername if server is not None else None,
        proxy_user=proxy_user,
        method=method,
        scheme=scheme,
        host=host,
        port=request.port,
        target=target,
        http_version=http_version,
        user_agent=user_agent,
        request_bytes=_request_bytes(flow, note),
        status_code=status_code,
        error_type=error_type,
        error=error,
        response_fields=fields,
        response_bytes=_response_bytes(flow, note) if delivered else None,
        tls_version=server.tls_version if server is not None else None,
        response_source=_source(flow, note) if delivered else None,
        body=body,
        sha256=body_digest(response) if whole and response is not None else None,
        size=_FIXED_BYTES
        + len(body or b"")
        + len(target)
        + len(user_agent or b"")
        + len(method)
        + len(scheme)
        + len(http_version)
        + _CHARACTER_BYTES * (len(host) + len(error or "") + len(proxy_user or ""))
        + sum(len(value) for _, value in fields),
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
        size=_FIXED_BYTES + _CHARACTER_BYTES * (MAX_ERROR_CHARACTERS + MAX_VALUE_BYTES),
    )


def connect_seconds(server: Server) -> float | None:
    """TCP and TLS set-up of this connection, seconds; None if none was made."""
    ready = server.timestamp_tls_setup or server.timestamp_tcp_setup
    if ready is None or server.timestamp_start is None:
        return None
    return ready - server.timestamp_start


def _response_fields(fields: tuple[tuple[bytes, bytes], ...]) -> tuple[tuple[bytes, bytes], ...]:
    found = []
    for name, value in fields:
        known = _known_names[name] if name in _known_names else _learn(name)
        if known is not None:
            found.append((known, value[:MAX_VALUE_BYTES]))
    return tuple(found[:MAX_FIELDS])


def _learn(name: bytes) -> bytes | None:
    if len(_known_names) >= _MAX_KNOWN_NAMES:
        _known_names.clear()
    lower = name.lower()
    known = lower if lower in RESPONSE_FIELDS else None
    if len(name) <= MAX_VALUE_BYTES:
        _known_names[name] = known
    return known


def _value_of(fields: tuple[tuple[bytes, bytes], ...], name: bytes) -> bytes | None:
    for key, value in fields:
        if len(key) == len(name) and key.lower() == name:
            return value[:MAX_VALUE_BYTES]
    return None


def _bounded_target(target: bytes) -> bytes:
    if len(target) <= MAX_TARGET_PART_BYTES:
        return target
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


def _request_bytes(flow: http.HTTPFlow, note: Note) -> int | None:
    if flow.websocket is not None:
        return note.websocket_sent
    return None if note.is_connect else body_bytes(flow.request)


def _response_bytes(flow: http.HTTPFlow, note: Note) -> int | None:
    if flow.websocket is not None:
        return note.websocket_received
    response = flow.response
    if response is None or note.is_tunnel or response.status_code == 101:  # noqa: PLR2004
        return None  # what passes after a change of protocol is not ours to count
    return body_bytes(response)


def _source(flow: http.HTTPFlow, note: Note) -> str | None:
    if flow.is_replay == "response":
        return "replay"
    if note.answered_by_addon or (note.is_connect and not note.is_tunnel):
        return "addon"
    if note.is_import and flow.server_conn.timestamp_start is None:
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

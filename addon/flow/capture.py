"""Copy the raw facts of a finished flow into an Exchange: immutable, bounded, not decoded. No I/O."""

from __future__ import annotations

import ipaddress
import uuid
from typing import TYPE_CHECKING

from mitmproxy.net.http import url

from addon.flow.outcome import outcome
from addon.flow.streaming import body_bytes, body_digest
from exporter import MAX_INDEX_BYTES, RESPONSE_FIELDS, Exchange, is_package_index

if TYPE_CHECKING:
    from mitmproxy import http
    from mitmproxy.connection import Client, Server
    from mitmproxy.tls import TlsData

    from addon.flow.state import Asked, FlowState
    from exporter import RequestedUrl

    # Status code, error type, error, when it ended, when the response head came (epoch seconds), bytes of
    # the request, bytes of the response, source of the response: as in Exchange.
    type _End = tuple[
        int | None,
        str | None,
        str | None,
        float | None,
        float | None,
        int | None,
        int | None,
        str | None,
    ]

type Field = tuple[bytes, bytes]

# Bounds. Each is a little more than the table keeps (in UTF-8, up to four bytes per character), so
# that the row builder sees that the text is too long, and marks the cut.
MAX_TARGET_PART_BYTES = 4 * 2048 + 4
MAX_VALUE_BYTES = 4 * 512 + 4
MAX_FIELDS = 32
MAX_ERROR_CHARACTERS = 2048

_OK = 200
_SWITCHING_PROTOCOLS = 101
# Modes in which the client connects to an address; the name is in the Host header or the TLS handshake.
_TRANSPARENT_MODES = ("transparent", "wireguard", "local", "tun")
# Modes with tunnels, which a client may open to an address because it resolves names itself.
_TUNNEL_MODES = ("regular", "upstream")
# How mitmproxy reports a client that left before its TLS ClientHello was answered.
_CLIENT_LEFT = "connection closed early"


def capture(
    flow: http.HTTPFlow, state: FlowState, *, with_body: bool = False, with_indexes: bool = False
) -> Exchange:
    """The facts of a flow that has ended. The result holds no reference to the flow.

    Nor to its body, unless `with_body` asks for it, to compute a digest, or `with_indexes` asks for
    those of Debian packages, to read epochs.
    """
    request, response, client = flow.request.data, flow.response, flow.client_conn
    # Unless it was connected for this flow, the server is only known from the original of a replay.
    server = flow.server_conn if flow.server_conn is not state.original_server else None
    host, requested_url = _addressed(flow, state)
    end = _ordinary_end(flow, state) or _end(flow, state)
    status_code, error_type, error, ended_at, head_at, request_bytes, response_bytes, source = end
    body = sha256 = None
    if with_body:
        body, sha256 = _body(flow, status_code, error)
    elif with_indexes and is_package_index(request.path):
        body, _ = _body(flow, status_code, error)
        if body is not None and len(body) > MAX_INDEX_BYTES:
            body = None
    # In the order of the fields: msgspec takes 1 us longer if they are named.
    return Exchange(
        _import_id(flow) if state.is_import else flow.id,
        request.timestamp_start,
        ended_at,
        head_at,
        connect_seconds(flow.server_conn) if state.opened_connection else None,
        client.peername,
        server.peername if server is not None else None,
        _proxy_user(flow),
        request.method[:MAX_VALUE_BYTES],
        request.scheme[:MAX_VALUE_BYTES],
        host[:MAX_VALUE_BYTES],
        request.port,
        b"" if state.is_connect else _cut_target(request.path),
        request.http_version[:MAX_VALUE_BYTES],
        _user_agent(request.headers.fields),
        request_bytes,
        status_code,
        error_type,
        error and error[:MAX_ERROR_CHARACTERS],
        _response_fields(response.data.headers.fields) if response is not None else (),
        response_bytes,
        server.tls_version if server is not None else None,
        source,
        body,
        sha256,
        requested_url,
    )


def _ordinary_end(flow: http.HTTPFlow, state: FlowState) -> _End | None:
    """What `_end` returns for nearly all exchanges, but 3 us sooner. None: ask that function."""
    request, response = flow.request, flow.response
    if (
        response is None
        or flow.error is not None
        or flow.websocket is not None
        or not state.ended
        or state.cut_by_shutdown
        or state.orphaned
        or state.is_connect
        or state.is_import
        or state.answered_by_addon
        or flow.is_replay is not None
        or request.stream
        or response.stream
        or response.data.status_code == _SWITCHING_PROTOCOLS
    ):
        return None
    sent, received = request.data.content, response.data.content
    if sent is None or received is None:
        return None
    return (
        response.data.status_code,
        None,
        None,
        response.data.timestamp_end,
        response.data.timestamp_start,
        len(sent),
        len(received),
        "upstream",
    )


def _end(flow: http.HTTPFlow, state: FlowState) -> _End:
    """What an exchange says about its end, see `_End`."""
    response = flow.response
    status_code, error_type, error = outcome(flow, state)
    head_at = response_bytes = source = None
    # Otherwise the client received a response that mitmproxy made up.
    if response is not None and status_code == response.status_code:
        head_at = response.timestamp_start
        response_bytes = _response_bytes(response, flow, state)
        source = _source(flow, state)
    ended_at, request_bytes = _ended_at(flow), _request_bytes(flow, state)
    return (
        status_code,
        error_type,
        error,
        ended_at,
        head_at,
        request_bytes,
        response_bytes,
        source,
    )


def _body(
    flow: http.HTTPFlow, status_code: int | None, error: str | None
) -> tuple[bytes | None, bytes | None]:
    """The complete body of a download, or its SHA-256 if it was streamed."""
    response = flow.response
    # With another status, the client received a response that mitmproxy made up.
    if response is None or not status_code == response.status_code == _OK:
        return None, None
    if error is not None or flow.request.data.method != b"GET":
        return None, None
    return response.data.content, body_digest(response)


def _cut_url(scheme: bytes, host: str, port: int, target: bytes) -> RequestedUrl:
    return scheme[:MAX_VALUE_BYTES], host[:MAX_VALUE_BYTES], port, _cut_target(target)


def capture_tls_failure(data: TlsData, tunnel: http.HTTPFlow | None) -> Exchange:
    """A client that rejected our certificate, or failed to set up TLS with us: there is no flow.

    `tunnel` is the CONNECT that it came through, if any.
    """
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
        proxy_user=_proxy_user(tunnel) if tunnel is not None else None,
        method=b"",
        scheme=b"https",
        host=(client.sni or address[0])[:MAX_VALUE_BYTES],
        port=address[1],
        target=b"",
        http_version=b"",
        user_agent=None,
        request_bytes=None,
        status_code=None,
        error_type="client_disconnected" if client.error == _CLIENT_LEFT else "tls_client",
        error=(client.error or "")[:MAX_ERROR_CHARACTERS] or None,
        response_fields=(),
        response_bytes=None,
        tls_version=None,
        response_source=None,
        body=None,
        sha256=None,
    )


def connect_seconds(server: Server) -> float | None:
    """TCP and TLS setup of this connection, seconds; None if there was none."""
    ready = server.timestamp_tls_setup or server.timestamp_tcp_setup
    if ready is None or server.timestamp_start is None:
        return None
    return ready - server.timestamp_start


def _response_fields(fields: tuple[Field, ...]) -> tuple[Field, ...]:
    """The header fields that a column is read from, names in lower case."""
    found = [
        (lower, value[:MAX_VALUE_BYTES])
        for name, value in fields
        if (lower := name.lower()) in RESPONSE_FIELDS
    ]
    return tuple(found[:MAX_FIELDS])


def _proxy_user(flow: http.HTTPFlow) -> str | None:
    """Return the name of the login at the proxy; mitmproxy keeps it as (name, password)."""
    login = flow.metadata.get("proxyauth")
    return str(login[0])[:MAX_VALUE_BYTES] if login else None


def _user_agent(fields: tuple[Field, ...]) -> bytes | None:
    for name, value in fields:
        if name.lower() == b"user-agent":
            return value[:MAX_VALUE_BYTES]
    return None


def _cut_target(target: bytes) -> bytes:
    if len(target) <= MAX_TARGET_PART_BYTES:
        return target
    path, mark, query = target.partition(b"?")
    return path[:MAX_TARGET_PART_BYTES] + mark + query[:MAX_TARGET_PART_BYTES]


def _addressed(flow: http.HTTPFlow, state: FlowState) -> tuple[str, RequestedUrl | None]:
    """The host that the request went to, and the URL that the client asked for if that differs."""
    request, asked = flow.request.data, state.asked or _asked(flow)
    host = name = _asked_name(flow, asked)
    fetched = request.scheme, request.host, request.port, request.path
    if asked[0] == fetched and flow.client_conn.proxy_mode.type_name != "reverse":
        return host, None
    if not _is_asked_host(flow, asked):
        host = request.host
    requested_url = _requested_url(flow, asked, name)
    if requested_url is None or requested_url == (request.scheme, host, request.port, request.path):
        return host, None
    return host, _cut_url(*requested_url)


def _asked(flow: http.HTTPFlow) -> Asked:
    """What `FlowState.asked` holds, of the request as it is now."""
    request = flow.request.data
    url = request.scheme, request.host, request.port, request.path
    return url, request.authority, request.headers.fields


def _is_asked_host(flow: http.HTTPFlow, asked: Asked) -> bool:
    """Whether no addon has chosen another host. To choose one also changes the Host header."""
    request, ((_, host, _, _), authority, fields) = flow.request.data, asked
    if request.host != host:
        return False
    if request.headers.fields is fields and request.authority is authority:
        return True
    return _host_header(_asked(flow), request.http_version) == _host_header(
        asked, request.http_version
    )


def _asked_name(flow: http.HTTPFlow, asked: Asked) -> str:
    """The host that the client asked for: the name that it used, even if it connected to an address."""
    (scheme, host, _, _), mode = asked[0], flow.client_conn.proxy_mode.type_name
    # Outside a tunnel, the target names the host, whatever the Host header says (RFC 9112 3.2.2).
    is_in_tunnel = (
        (mode == "socks5" or (mode in _TUNNEL_MODES and scheme == b"https"))
        and (host[-1:].isdigit() or ":" in host)
        and _is_address(host)
    )
    if not (is_in_tunnel or mode in _TRANSPARENT_MODES):
        return host
    header = _host_header(asked, flow.request.data.http_version)
    name = url.parse_authority(header, check=False)[0] if header else host
    return (flow.client_conn.sni or name) if name == host else name


def _host_header(asked: Asked, http_version: bytes) -> str:
    """Like mitmproxy's `Request.host_header`, as the client sent it; empty: none."""
    _, authority, fields = asked
    if authority and not http_version.startswith(b"HTTP/1"):
        return authority.decode("utf-8", "surrogateescape")
    for name, value in fields:
        if name.lower() == b"host":
            return value.decode("utf-8", "surrogateescape")
    return ""


def _requested_url(flow: http.HTTPFlow, asked: Asked, name: str) -> RequestedUrl | None:
    """The URL that the client asked for; None: unknown. `name` is its host, except in reverse mode."""
    scheme, host, port, target = asked[0]
    if flow.client_conn.proxy_mode.type_name != "reverse":
        return scheme, name, port, target
    # Unless the option keep_host_header is set, mitmproxy has replaced the Host header by the name of its
    # upstream. Then only TLS tells what the client asked for; it asked on the port where we listen.
    client = flow.client_conn
    client_scheme = b"https" if client.tls else b"http"
    header = _host_header(asked, flow.request.data.http_version)
    if header and header != url.hostport(scheme.decode("ascii", "replace"), host, port):
        header_name, header_port = url.parse_authority(header, check=False)
        default = url.default_port(client_scheme) or 0
        return client_scheme, header_name, header_port or default, target
    if client.sni:
        return client_scheme, client.sni, client.sockname[1], target
    return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _ended_at(flow: http.HTTPFlow) -> float | None:
    if flow.websocket is not None and flow.websocket.timestamp_end is not None:
        return flow.websocket.timestamp_end
    if flow.error is not None:
        return flow.error.timestamp
    return flow.response.timestamp_end if flow.response is not None else None


def _request_bytes(flow: http.HTTPFlow, state: FlowState) -> int | None:
    if flow.websocket is not None:
        return state.websocket_sent_bytes
    return None if state.is_connect else body_bytes(flow.request)


def _response_bytes(response: http.Response, flow: http.HTTPFlow, state: FlowState) -> int | None:
    if flow.websocket is not None:
        return state.websocket_received_bytes
    if state.is_tunnel or response.status_code == _SWITCHING_PROTOCOLS:
        return None  # another protocol follows; its bytes are not a body
    return body_bytes(response)


def _source(flow: http.HTTPFlow, state: FlowState) -> str | None:
    if flow.is_replay == "response":
        return "replay"
    if state.answered_by_addon or (state.is_connect and not state.is_tunnel):
        return "addon"
    if state.is_import and flow.server_conn.timestamp_start is None:
        return None
    return "upstream"


def _import_id(flow: http.HTTPFlow) -> str:
    """The id of a saved flow. HAR files have no ids, and mitmproxy makes up new ones each time.

    HAR files are recognized by the client port 0, which no socket has.
    """
    client: Client = flow.client_conn
    if client.peername and client.peername[1] == 0:
        request, response = flow.request, flow.response
        parts = (request.method, request.url, request.timestamp_start, _ended_at(flow))
        answer = (response.status_code, body_bytes(response)) if response else ()
        return str(uuid.uuid5(uuid.NAMESPACE_URL, repr((parts, answer))))
    return flow.id

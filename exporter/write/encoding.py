"""Exchanges as MessagePack: what waits in the buffer, stands in the journal and goes to the worker process.

An exchange is encoded once, when it is logged. As one object of bytes it takes less memory than its values,
and nothing is left for the garbage collector to look at.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import astuple, replace

from ..exchange import Exchange

# An exchange without its body, and its body, which only a digest or the epochs of an index need.
type Encoded = tuple[bytes, bytes | None]

_OVERHEAD_BYTES = 160  # of the two objects, their tuple and its place in a queue, rounded up
_MAX_INTEGER = 2**63 - 1  # of MessagePack, and a little more than the columns of a row hold
_TEXT = 1  # type of MessagePack's extension for text with lone surrogates


def encode(exchange: Exchange) -> Encoded:
    """Encode an exchange. Raises TypeError or ValueError for a value that no exchange should have."""
    body = exchange.body
    bare = exchange if body is None else replace(exchange, body=None)
    if body is not None and type(body) is not bytes:
        body = bytes(memoryview(body))
    try:
        return _encode(bare), body
    except (UnicodeEncodeError, OverflowError, TypeError):
        return _encode([*map(_plain, astuple(bare))]), body


def decode(encoded: Encoded) -> Exchange:
    """The exchange of `encode`. Raises msgspec.MsgspecError or TypeError if it is none."""
    payload, body = encoded
    try:
        exchange = _decode(payload)
    except msgspec.ValidationError:  # a value is of another type; its row may be as good
        exchange = Exchange(*map(_immutable, _decode_any(payload)))
    return exchange if body is None else replace(exchange, body=body)


def memory_bytes(encoded: Encoded) -> int:
    """How much memory it takes, bytes."""
    payload, body = encoded
    return _OVERHEAD_BYTES + len(payload) + (0 if body is None else len(body))


def _plain(value: Any) -> Any:
    """A value as MessagePack can hold it: no lone surrogates, no large integers, no subclasses.

    Lone surrogates stand for bytes that are not UTF-8. They come back: to replace them before a text is
    redacted could hide a secret. Large integers come from files that are damaged.
    """
    if isinstance(value, str):
        text = str.__str__(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            return msgspec.msgpack.Ext(_TEXT, text.encode("utf-8", "surrogatepass"))
        return text
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return max(-_MAX_INTEGER, min(_MAX_INTEGER, int(value)))
    return [*map(_plain, value)] if isinstance(value, tuple) else value


def _immutable(value: Any) -> Any:
    return tuple(map(_immutable, value)) if isinstance(value, list) else value


def _extension(code: int, data: memoryview) -> str:
    if code != _TEXT:
        raise TypeError(f"no exchange has a value of the type {code}")
    return bytes(data).decode("utf-8", "surrogatepass")


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Exchange).decode
_decode_any = msgspec.msgpack.Decoder(ext_hook=_extension).decode

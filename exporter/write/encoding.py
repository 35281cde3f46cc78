"""Exchanges as MessagePack: what waits in the buffer, stands in the journal and goes to the worker process.

An exchange is encoded once, when it is logged. As one object of bytes it takes less memory than its values,
and nothing is left for the garbage collector to look at.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import asdict, replace

from ..exchange import Exchange
from ..rows.text import clean

# An exchange without its body, and its body, which only the computation of a digest needs.
type Encoded = tuple[bytes, bytes | None]

_OVERHEAD_BYTES = 160  # of the two objects, their tuple and its place in a queue, rounded up
_MAX_INTEGER = 2**63 - 1  # of MessagePack, and a little more than the columns of a row hold

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Exchange).decode


def encode(exchange: Exchange) -> Encoded:
    """Encode an exchange. Raises TypeError or ValueError for a value that no exchange should have."""
    body = exchange.body
    bare = exchange if body is None else replace(exchange, body=None)
    try:
        return _encode(bare), body
    except (UnicodeEncodeError, OverflowError, TypeError):
        return _encode(replace(bare, **{k: _repaired(v) for k, v in asdict(bare).items()})), body


def decode(encoded: Encoded) -> Exchange:
    """The exchange of `encode`. Raises msgspec.MsgspecError if it is none."""
    payload, body = encoded
    exchange = _decode(payload)
    return exchange if body is None else replace(exchange, body=body)


def memory_bytes(encoded: Encoded) -> int:
    """How much memory it takes, bytes."""
    payload, body = encoded
    return _OVERHEAD_BYTES + len(payload) + (0 if body is None else len(body))


def _repaired(value: Any) -> Any:
    """A value as its column will have it. MessagePack holds no lone surrogates and no large integers.

    Lone surrogates stand for bytes that are not UTF-8. Large integers come from files that are damaged.
    """
    if isinstance(value, str):
        return str(clean(value, len(value)))
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return 0
    return tuple(map(_repaired, value)) if isinstance(value, tuple) else value

"""Any exchange can be encoded, takes as much memory as it says, and gives the same row when it is decoded."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

from exporter import Settings
from exporter.exchange import RESPONSE_FIELDS
from exporter.rows.entry_builder import EntryBuilder
from exporter.write.encoding import decode, encode, memory_bytes
from tests.support.samples import make_exchange

_CHANGES: list[dict[str, Any]] = [
    {},
    {"body": b"the body", "sha256": b"\xff" * 32},
    {"client": None, "server": ("::1", 443, 0, 0)},
    {"client": ("/run/proxy.sock",), "server": None},
    {"response_fields": tuple((name, name.upper()) for name in sorted(RESPONSE_FIELDS))},
    {"target": bytes(range(256)) * 32, "request_bytes": 2**62},
    {"error": "café €", "ended_at": None, "head_at": None, "status_code": None},
    {"requested_url": (b"https", "pypi.example", 443, b"/simple/?a=b")},
    {"started_at": float("nan"), "ended_at": float("inf")},
]


@pytest.mark.parametrize("changes", _CHANGES)
def test_every_value_comes_back(changes: dict[str, Any]) -> None:
    exchange = make_exchange(1, **changes)
    assert repr(decode(encode(exchange))) == repr(exchange)


class _Name(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "caf\udce9.example"},
        {"error": "broken \ud800 text \udcff"},
        {"proxy_user": "b\udcfcild", "host": "\x00"},
        {"requested_url": (b"https", "caf\udce9.example", 443, b"/")},
        {"host": _Name("odd.example"), "body": b"x"},
        {"port": 2**70, "status_code": -(2**70)},
        {"client": ("192.0.2.1\udcff", 2**64)},
    ],
)
def test_values_that_messagepack_cannot_hold_give_the_same_row(changes: dict[str, Any]) -> None:
    exchange = make_exchange(1, **changes)
    decoded = decode(encode(exchange))
    build = EntryBuilder(Settings(node="test")).build
    assert build(decoded) == build(exchange)
    assert decoded.body == exchange.body


def test_a_value_of_no_known_type_is_an_error() -> None:
    with pytest.raises(TypeError):
        encode(make_exchange(1, host=object()))


@pytest.mark.parametrize("length", [0, 10, 500, 20_000])
def test_memory_is_not_underestimated(length: int) -> None:
    target = random.Random(length).randbytes(length)
    encoded = encode(make_exchange(1, target=target, body=target or None))
    used_bytes = sys.getsizeof(encoded) + sum(map(sys.getsizeof, filter(None, encoded))) + 8
    assert used_bytes <= memory_bytes(encoded) <= used_bytes + 64

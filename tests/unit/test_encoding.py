"""Any exchange can be encoded, takes as much memory as it says, and gives the same row when it is decoded."""

from __future__ import annotations

import random
import sys
from typing import Any

import msgspec
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


class _Bytes(bytes):
    __slots__ = ()


class _Number(int):
    __slots__ = ()


class _Seconds(float):
    __slots__ = ()


_TOKEN = "AKIAIOSFODNN7EXAMPLE"


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
        {"host": f"\udcff{_TOKEN}", "proxy_user": f"\udce9{_TOKEN}"},
        {"requested_url": (b"https", f"\udcff{_TOKEN}.example", 443, b"/")},
        {"host": "\udcff" * 255, "proxy_user": "\udcff" * 256, "error": "\udcff" * 600},
        {"flow_id": "\ud800\udcff"},
        {"started_at": 10**30, "ended_at": 10**30, "head_at": None},
        {"started_at": -(10**30), "ended_at": None, "head_at": 1.0},
        {"target": _Bytes(b"/a?b=c"), "flow_id": _Name("x"), "port": _Number(443)},
        {"started_at": _Seconds(1.5e9), "response_fields": ((_Bytes(b"age"), _Bytes(b"5")),)},
        # Of other types than the fields of an exchange, but the row can be made all the same.
        {"method": "GET", "http_version": "HTTP/1.1", "tls_version": b"TLSv1.3"},
        {"client": "", "server": "/run/upstream.sock"},
        {"client": (b"\x00abstract",), "server": b"\x00abstract"},
        {"client": ("192.0.2.1", None), "server": ("192.0.2.2", 1.5)},
        {"port": True, "status_code": 200.0, "host": "caf\udce9.example"},
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


def test_no_row_has_a_secret_after_bytes_that_are_not_utf_8() -> None:
    exchange = make_exchange(1, host=f"\udcff{_TOKEN}", error=f"cannot use \udcff{_TOKEN}")
    row = EntryBuilder(Settings(node="test")).build(decode(encode(exchange)))
    assert row.host == r"\xffREDACTED"
    assert row.error == r"cannot use \xffREDACTED"


def test_a_body_is_bytes() -> None:
    assert encode(make_exchange(1, body=bytearray(b"body")))[1] == b"body"
    with pytest.raises(TypeError):
        encode(make_exchange(1, body="body"))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00",
        b"\x91\x00",
        b"\x80",
        msgspec.msgpack.encode([msgspec.msgpack.Ext(7, b"")] * 26),
    ],
)
def test_what_is_no_exchange_is_an_error(payload: bytes) -> None:
    with pytest.raises((msgspec.MsgspecError, TypeError)):
        decode((payload, None))


@pytest.mark.parametrize("length", [0, 10, 500, 20_000])
def test_memory_is_not_underestimated(length: int) -> None:
    target = random.Random(length).randbytes(length)
    encoded = encode(make_exchange(1, target=target, body=target or None))
    used_bytes = sys.getsizeof(encoded) + sum(map(sys.getsizeof, filter(None, encoded))) + 8
    assert used_bytes <= memory_bytes(encoded) <= used_bytes + 64

"""Compare the buffer with a plain list, and test its wake-ups, compaction and memory use."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from exporter.settings import BufferSettings
from exporter.write.buffer import Buffer
from exporter.write.encoding import decode, encode, memory_bytes
from tests.support.samples import make_exchange

if TYPE_CHECKING:
    from exporter import Exchange
    from exporter.write.encoding import Encoded

ROOT = Path(__file__).resolve().parents[2]


def put(buffer: Buffer, exchange: Exchange) -> bool:
    return buffer.put(encode(exchange), exchange.started_at)


def sized(number: int, size: int) -> Exchange:
    """Return an exchange that takes this much memory in a buffer."""
    bare = make_exchange(number, target=b"/")
    return replace(bare, target=b"/" * (size - memory_bytes(encode(bare)) - 2))


def test_a_body_that_is_not_needed_leaves_half_of_the_free_room() -> None:
    buffer = Buffer(BufferSettings(max_bytes=65_536), wake_entries=8)
    fits, is_large = (encode(make_exchange(n, body=b"x" * 25_000)) for n in range(2))

    assert buffer.put(fits, 0.0, needs_body=False)
    assert buffer.put(is_large, 0.0, needs_body=False)

    assert [*buffer.take(8), *buffer.take(8)] == [fits, (is_large[0], None)]


def test_a_drop_counts_whatever_its_time_is() -> None:
    buffer = Buffer(BufferSettings(max_entries=1), wake_entries=1)
    for started_at in (1.0, 2.0, None, "3.0"):
        buffer.put(encode(make_exchange()), started_at)  # type: ignore[arg-type]
    assert (buffer.seen, buffer.dropped, buffer.unplaced_drops) == (4, 3, 2)
    assert buffer.take_drops() == [("buffer_full", 2.0)]


@pytest.mark.parametrize("seed", range(50))
def test_each_entry_is_taken_once_in_order_or_counted_as_dropped(seed: int) -> None:
    rng = random.Random(seed)
    bounds = BufferSettings(
        max_entries=rng.choice([rng.randint(1, 40), 400]),
        max_bytes=rng.choice([65_536, 10**9]),
    )
    buffer = Buffer(bounds, wake_entries=8)
    model: list[Encoded] = []
    taken: list[Encoded] = []
    expected: list[Encoded] = []
    dropped = 0
    for number in range(1000):
        if rng.random() < 0.02:
            buffer.compact()
        if rng.random() < 0.8:
            body = rng.choice([None, b"x" * 5_000, b"x" * 60_000])
            encoded = encode(make_exchange(number, body=body))
            fits = (
                len(model) < bounds.max_entries
                and sum(map(memory_bytes, model)) + memory_bytes(encoded) <= bounds.max_bytes
            )
            assert buffer.put(encoded, 0.0) is fits
            if fits:
                model.append(encoded)
            else:
                dropped += 1
        else:
            count = rng.randint(1, 10)
            batch = buffer.take(count)
            size = sum(map(memory_bytes, batch))
            assert len(batch) == min(count, len(model)) or size >= bounds.max_bytes // 16
            assert sum(map(memory_bytes, batch[:-1])) < bounds.max_bytes // 16
            expected += model[: len(batch)]
            del model[: len(batch)]
            taken += batch
    assert taken == expected
    assert buffer.dropped == dropped
    assert len(buffer) == len(model)
    assert buffer.seen == len(taken) + len(model) + dropped
    assert buffer.bytes_in - buffer.bytes_out == sum(map(memory_bytes, model))


def test_concurrent_put_and_take_lose_nothing() -> None:
    buffer = Buffer(BufferSettings(), wake_entries=128)
    taken: list[Exchange] = []

    def consume() -> None:
        while len(taken) < 20_000:
            buffer.wait(0.01)
            taken.extend(map(decode, buffer.take(100)))

    consumer = threading.Thread(target=consume)
    consumer.start()
    exchange = make_exchange()
    for number in range(20_000):
        put(buffer, replace(exchange, port=number))
    consumer.join(10)
    assert [x.port for x in taken] == list(range(20_000))


def test_entry_that_fills_a_batch_wakes_the_consumer() -> None:
    buffer = Buffer(BufferSettings(), wake_entries=3)
    put(buffer, make_exchange(1))
    put(buffer, make_exchange(2))
    started = time.monotonic()
    buffer.wait(0.05)
    assert time.monotonic() - started >= 0.05
    woken = threading.Event()

    def wait_for_third_entry() -> None:
        buffer.wait(60)
        woken.set()

    waiter = threading.Thread(target=wait_for_third_entry)
    waiter.start()
    put(buffer, make_exchange(3))
    assert woken.wait(10)
    waiter.join(10)


@pytest.mark.parametrize(
    ("bounds", "count", "size"),
    [
        (BufferSettings(max_bytes=1_000_000), 3, 100_000),
        (BufferSettings(max_entries=10), 5, 1000),
        (BufferSettings(max_entries=1), 1, 1000),
    ],
)
def test_nearly_full_buffer_wakes_the_consumer_before_it_drops(
    bounds: BufferSettings, count: int, size: int
) -> None:
    buffer = Buffer(bounds, wake_entries=128)
    for number in range(count):
        assert put(buffer, sized(number, size))
    started = time.monotonic()
    buffer.wait(60)
    assert time.monotonic() - started < 10


def test_compaction_preserves_order_and_size() -> None:
    buffer = Buffer(BufferSettings(max_entries=1000), wake_entries=128)
    exchanges = [
        make_exchange(number, error="\udcff", body=b"x" * number if number % 5 == 0 else None)
        for number in range(600)
    ]
    for exchange in exchanges[:500]:
        assert put(buffer, exchange)
    before = buffer.bytes_in - buffer.bytes_out
    while buffer.compact():
        pass
    assert (len(buffer), buffer.bytes_in - buffer.bytes_out) == (500, before)
    assert len(buffer._entries) < 128
    for exchange in exchanges[500:]:
        assert put(buffer, exchange)
    taken = [*buffer.take(100), *buffer.take(1), *buffer.take(1000)]
    assert taken == [*map(encode, exchanges)]
    assert (len(buffer), buffer.bytes_in) == (0, buffer.bytes_out)


def test_drained_buffer_returns_memory_to_the_system() -> None:
    """Memory shrinks after a drain. Runs in a new process: memory that other tests left would hide it."""
    script = """
import psutil
from exporter.write.buffer import Buffer
from exporter.settings import BufferSettings
from exporter.write.encoding import encode
from tests.support.samples import make_exchange

buffer = Buffer(BufferSettings(), 128)
survivors = []

def fill():
    for number in range(60_000):
        buffer.put(encode(make_exchange(number, target=b"/%d" % number * 20)), 0.0)
        if number % 500 == 0:
            survivors.append([number])  # like the proxy's long-lived objects, allocated in between
            while buffer.compact():
                pass
    return psutil.Process().memory_info().rss

def drain():
    while buffer.take(128):
        pass
    return psutil.Process().memory_info().rss

drain()
make_exchange()
before = psutil.Process().memory_info().rss
print(fill() - before, drain() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    full_bytes, drained_bytes = map(int, done.stdout.split())
    assert full_bytes > 10 * 1024 * 1024
    assert drained_bytes < full_bytes / 3


@pytest.mark.parametrize("compacted", [0, 1, 3])
def test_a_sample_has_the_newest_entries_and_takes_none(compacted: int) -> None:
    buffer = Buffer(BufferSettings(), wake_entries=8)
    entries = [make_exchange(number, body=b"x" * 100) for number in range(400)]
    for exchange in entries:
        put(buffer, exchange)
    for _ in range(compacted):
        assert buffer.compact()
    found = [*map(decode, buffer.sample(5))]
    assert {x.flow_id for x in found} >= {x.flow_id for x in entries[-5:]}
    assert len(found) <= 15
    assert all(x.body is None for x in found)
    assert len(buffer) == 400
    assert [decode(x) for _ in range(400) for x in buffer.take(1)] == entries

"""Time the steps of capturing and writing a flow separately, with pytest-benchmark: `just microbench`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from addon.flow.capture import capture
from addon.flow.state import FlowState
from exporter import Settings, load_remotes
from exporter.rows.entry_builder import EntryBuilder
from exporter.rows.redaction import redact_path, redact_query
from exporter.rows.text import path_text
from exporter.run import Run
from exporter.settings import BufferSettings
from exporter.write.buffer import Buffer
from exporter.write.copy_batch import copy_text
from exporter.write.encoding import encode
from exporter.write.journal import Journal, Safe
from tests.bench.synthetic_flows import REPEATING_URLS, capture_exchanges, generate_url, make_flows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mitmproxy import http

    from exporter import Exchange
    from exporter.rows.packages.identity import Remotes

_NEW_URLS = 20_000  # more than any cache holds
_POLICIES = ("keys", "signed", "drop", "full")


@pytest.fixture(scope="module")
def repeating() -> list[Exchange]:
    """Exchanges with repeating URLs."""
    return capture_exchanges(REPEATING_URLS, new_urls=False)


@pytest.fixture(scope="module")
def new() -> list[Exchange]:
    """Exchanges whose URLs repeat only after every cache has evicted them."""
    return capture_exchanges(_NEW_URLS, new_urls=True)


@pytest.fixture(scope="module")
def remotes() -> Remotes:
    """The remotes that the package ships with."""
    return load_remotes(Settings())


def _cycle_through[Value](
    work: Callable[[Value], object], values: Iterable[Value]
) -> Callable[[], Any]:
    """Return a function that applies `work` to the next value at each call, in an endless cycle."""
    cycle: Iterator[Value] = itertools.cycle(values)
    return lambda: work(next(cycle))


def test_capture(benchmark: Any) -> None:
    flows = []
    for flow, response in make_flows(REPEATING_URLS, new_urls=False):
        flow.response = response
        flows.append(flow)
    state = FlowState()
    state.has_response_head = state.has_whole_response = True

    def work(flow: http.HTTPFlow) -> object:
        return capture(flow, state)

    assert benchmark(_cycle_through(work, flows)).status_code == 200


def test_buffer(benchmark: Any, repeating: list[Exchange]) -> None:
    """With the encoding."""
    buffer = Buffer(BufferSettings(), 128)

    def work(exchange: Exchange) -> object:
        buffer.put(encode(exchange), exchange.started_at)
        return buffer.take(1)

    assert benchmark(_cycle_through(work, repeating))


def test_journal(benchmark: Any, repeating: list[Exchange]) -> None:
    """Both calls for one request, and the encoding."""
    journal = Journal(Run.start("bench"), Settings().with_dsn("host=db.example"))
    numbers = itertools.count(1)

    def work(exchange: Exchange) -> None:
        journal.begin(exchange.started_at)
        journal.put(encode(exchange)[0])
        number = next(numbers)
        if not number % 1000:
            journal.release(Safe(number))

    benchmark(_cycle_through(work, repeating))
    assert journal.unrecorded == 0
    journal.close()


def test_entry_of_repeating_urls(benchmark: Any, repeating: list[Exchange]) -> None:
    builder = EntryBuilder(Settings(node="bench"))
    for exchange in repeating:  # fills the caches
        builder.build(exchange)
    assert benchmark(_cycle_through(builder.build, repeating)).status_code == 200


def test_entry_of_new_urls(benchmark: Any, new: list[Exchange]) -> None:
    builder = EntryBuilder(Settings(node="bench"))
    assert benchmark(_cycle_through(builder.build, new)).status_code == 200


def test_identify_repeating_urls(benchmark: Any, remotes: Remotes) -> None:
    benchmark(_cycle_through(_identify(remotes), _paths(REPEATING_URLS)))


def test_identify_new_urls(benchmark: Any, remotes: Remotes) -> None:
    benchmark(_cycle_through(_identify(remotes), _paths(_NEW_URLS)))


def test_redact_path(benchmark: Any) -> None:
    assert benchmark(_cycle_through(redact_path, [path for _, path in _paths(REPEATING_URLS)]))


@pytest.mark.parametrize("policy", _POLICIES)
def test_redact_query(benchmark: Any, policy: Any) -> None:
    query = "page=2&X-Amz-Signature=0123456789abcdef&X-Amz-Credential=someone&sort=name"
    assert "0123" not in (benchmark(redact_query, query, policy) or "") or policy == "full"


def test_path_text(benchmark: Any) -> None:
    raw_paths = [generate_url(number).target.partition(b"?")[0] for number in range(_NEW_URLS)]
    assert benchmark(_cycle_through(path_text, raw_paths))


def test_format_a_batch(benchmark: Any, repeating: list[Exchange]) -> None:
    builder = EntryBuilder(Settings(node="bench"))
    entries = [builder.build(x) for x in repeating[:128]]
    assert benchmark(copy_text, entries).count("\n") == 128


def _paths(count: int) -> list[tuple[str, str]]:
    urls = (generate_url(number) for number in range(count))
    return [(url.host, url.target.decode().partition("?")[0]) for url in urls]


def _identify(remotes: Remotes) -> Callable[[tuple[str, str]], object]:
    return lambda host_and_path: remotes.identify(*host_and_path)

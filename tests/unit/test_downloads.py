"""A file counts once, when all of its bytes arrived at one client; reading parts of it is not a download."""

from __future__ import annotations

import random
from typing import Any

import pytest

from exporter.rows import downloads
from exporter.rows.downloads import Download, Downloads

CLIENT = ("192.0.2.1", "build-42")
WHEEL = ("pkg:pypi/demo@1.0", "demo-1.0-py3-none-any.whl")


def part(start: int, end: int, size: int = 1000, **changes: Any) -> Download:
    """A 206 response with the bytes from `start` up to `end`."""
    content_range = f"bytes {start}-{end - 1}/{size}".encode()
    whole = Download(CLIENT, WHEEL, 206, False, end - start, content_range)
    return whole._replace(**changes)


def full(**changes: Any) -> Download:
    return Download(CLIENT, WHEEL, 200, False, 1000, None)._replace(**changes)


def test_whole_responses_are_downloads() -> None:
    tracker = Downloads()
    assert tracker.completes(full()) is True
    assert tracker.completes(full()) is True
    assert tracker.completes(full(status_code=304, response_bytes=0)) is True


@pytest.mark.parametrize("status", [None, 301, 302, 404, 416, 500])
def test_other_responses_deliver_nothing(status: int | None) -> None:
    assert Downloads().completes(full(status_code=status)) is None


def test_reading_the_metadata_of_a_wheel_is_partial() -> None:
    tracker = Downloads()
    for start, end in ((984, 1000), (900, 984), (850, 900)):
        assert tracker.completes(part(start, end)) is False


def test_the_unit_of_a_range_ignores_case() -> None:
    assert Downloads().completes(part(0, 1000, content_range=b"Bytes 0-999/1000")) is True


def test_parts_that_cover_the_file_complete_it_once() -> None:
    tracker = Downloads()
    assert tracker.completes(part(500, 1000)) is False
    assert tracker.completes(part(0, 250)) is False
    assert tracker.completes(part(250, 500)) is True
    assert tracker.completes(part(250, 500)) is False  # the next download begins
    assert tracker.completes(part(0, 1000)) is True


def test_parts_in_any_order_and_overlapping_complete_exactly_with_the_last_byte() -> None:
    chance = random.Random(7)
    for _ in range(200):
        tracker, missing = Downloads(), set(range(100))
        while missing:
            start = chance.randrange(100)
            end = min(100, start + chance.randrange(1, 40))
            missing -= set(range(start, end))
            assert tracker.completes(part(start, end, 100)) is not bool(missing)
            if missing:
                assert tracker.completes(part(start, end, 100)) is False


def test_a_download_that_broke_off_and_was_resumed_is_complete() -> None:
    tracker = Downloads()
    assert tracker.completes(full(failed=True, response_bytes=600)) is False
    assert tracker.completes(part(600, 1000)) is True


def test_a_part_that_broke_off_counts_as_far_as_it_came() -> None:
    tracker = Downloads()
    assert tracker.completes(part(0, 600, failed=True, response_bytes=100)) is False
    assert tracker.completes(part(600, 1000)) is False
    assert tracker.completes(part(100, 600)) is True


def test_parts_of_two_clients_or_files_or_versions_of_a_file_do_not_add_up() -> None:
    for other in (
        {"client": ("192.0.2.2", "build-42")},
        {"client": ("192.0.2.1", "build-43")},
        {"file": ("pkg:pypi/demo@1.0", "demo-1.0.tar.gz")},
        {"content_range": b"bytes 500-999/1001"},
    ):
        tracker = Downloads()
        assert tracker.completes(part(0, 500)) is False
        assert tracker.completes(part(500, 1000, **other)) is False


@pytest.mark.parametrize(
    "content_range",
    [None, b"", b"bytes */1000", b"bytes 0-999/*", b"items 0-999/1000", b"bytes 0-" + b"9" * 50],
)
def test_a_range_that_is_not_known_is_partial(content_range: bytes | None) -> None:
    assert Downloads().completes(part(0, 1000, content_range=content_range)) is False


def test_a_server_that_claims_more_than_it_sent_completes_nothing() -> None:
    assert Downloads().completes(part(0, 1000, response_bytes=10)) is False


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_MAX_FILES", 10)
    tracker = Downloads()
    for number in range(100):
        assert tracker.completes(part(0, 10, file=(f"pkg:pypi/p{number}", None))) is False
        assert len(tracker._files) <= 10
    for number in range(200):
        assert tracker.completes(part(2 * number, 2 * number + 1)) is False
        assert all(len(file.parts) <= downloads._MAX_PARTS for file in tracker._files.values())


def test_old_parts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_MAX_AGE_SECONDS", -1.0)
    tracker = Downloads()
    assert tracker.completes(part(0, 500)) is False
    assert tracker.completes(part(500, 1000)) is False

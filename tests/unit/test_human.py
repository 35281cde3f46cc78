"""Formatting of numbers, and of text from clients, for people."""

from __future__ import annotations

import json
import sys

import pytest

from exporter.read.human import duration, printable, printable_json, share, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (5_432_100_000, "5.4 GB"),
        (10**19, "10000.0 PB"),
    ],
)
def test_sizes(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (None, "-"),
        (0, "0.0 ms"),
        (9.94, "9.9 ms"),
        (12.3, "12 ms"),
        (999.4, "999 ms"),
        (999.6, "1.0 s"),
        (59_900, "59.9 s"),
        (59_960, "1m"),
        (190_000, "3m 10s"),
        (1_800_000, "30m"),
        (7_500_000, "2h 05m"),
        (7_200_000, "2h"),
        (90_000_000, "25h"),
    ],
)
def test_durations(milliseconds: float | None, text: str) -> None:
    assert duration(milliseconds) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "-"),
        (0, 5, "0.0 %"),
        (1, 100_000, "<0.1 %"),
        (1, 3, "33.3 %"),
        (99_999, 100_000, ">99.9 %"),
        (5, 5, "100.0 %"),
    ],
)
def test_only_exact_shares_show_as_0_and_100_percent(part: int, whole: int, text: str) -> None:
    assert share(part, whole) == text


def test_every_character_becomes_printable_and_json_keeps_its_meaning() -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    assert printable(text).isprintable()
    escaped = printable_json(json.dumps(text, ensure_ascii=False))
    assert escaped.isprintable()
    assert json.loads(escaped) == text

"""How the log is doing, in words, by its counters."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.health import judge

_FINE = {
    "dropped": 0,
    "rejected": 0,
    "waiting": 3,
    "spooled": 0,
    "failures": 0,
    "away": False,
    "last_error": None,
}


@pytest.mark.parametrize(
    ("changes", "level", "word", "part"),
    [
        ({}, "green", "Logging", "Every request gets its row."),
        ({"last_error": "once upon a time"}, "green", "Logging", "Every request"),
        (
            {"away": True, "last_error": "No route."},
            "amber",
            "Waiting",
            "(No route); 3 requests wait",
        ),
        ({"away": True, "waiting": 1, "spooled": 4}, "amber", "Waiting", "5 requests wait"),
        ({"away": True, "dropped": 1}, "red", "Losing", "1 request got no row; 3 wait"),
        ({"dropped": 1200, "rejected": 34}, "amber", "Logging, with gaps", "1,234 requests since"),
        ({"failures": 1}, "amber", "Logging, after a failure", "see mitmproxy's event log"),
    ],
)
def test_counters_become_a_colour_a_word_and_a_sentence(
    changes: dict[str, Any], level: str, word: str, part: str
) -> None:
    health = judge(_FINE | changes)
    assert (health.level, health.word) == (level, word)
    assert part in health.sentence


def test_without_an_exporter_nothing_is_logged() -> None:
    assert judge(None).level == "red"

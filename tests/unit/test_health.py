"""`judge` turns the counters of the log into a color, a word and a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.health import judge

_HEALTHY = {
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
        ({}, "green", "Logging", "Every request is logged."),
        ({"last_error": "an earlier error"}, "green", "Logging", "Every request"),
        (
            {"away": True, "last_error": "No route."},
            "amber",
            "Waiting",
            "(No route): 3 requests waiting",
        ),
        ({"away": True, "waiting": 1, "spooled": 4}, "amber", "Waiting", "5 requests waiting"),
        ({"away": True, "dropped": 1}, "red", "Losing rows", "1 request lost, 3 waiting"),
        (
            {"dropped": 1200, "rejected": 34},
            "amber",
            "Logging, with gaps",
            "1,234 requests were lost since",
        ),
        ({"dropped": 1}, "amber", "Logging, with gaps", "1 request was lost since"),
        ({"failures": 1}, "amber", "Logging, after a failure", "see mitmproxy's event log"),
    ],
)
def test_counters_give_a_level_a_word_and_a_sentence(
    changes: dict[str, Any], level: str, word: str, part: str
) -> None:
    health = judge(_HEALTHY | changes)
    assert (health.level, health.word) == (level, word)
    assert part in health.sentence


def test_a_missing_exporter_is_red() -> None:
    assert judge(None).level == "red"

"""The days of the log are those of UTC."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta


def midnight(day: date) -> datetime:
    """When this day begins."""
    return datetime.combine(day, time(), UTC)


def day_span(day: date) -> tuple[datetime, datetime]:
    """When this day begins and ends (exclusive)."""
    start = midnight(day)
    return start, start + timedelta(days=1)

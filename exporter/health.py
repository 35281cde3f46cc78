"""Summarize the state of the log in one word and one sentence, from its counters. Does no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Health(NamedTuple):
    """The state of the log. `word` repeats what `level` shows as a color."""

    level: Literal["green", "amber", "red"]
    word: str
    sentence: str


def judge(status: Mapping[str, Any] | None) -> Health:
    """Return the state of the log.

    Args:
        status: the counters from `Exporter.status`, or None if no exporter is running.
    """
    if status is None:
        return Health("red", "Stopped", "The access log is not running; requests are not logged.")
    lost = status["dropped"] + status["rejected"]
    pending = status["waiting"] + status["spooled"]
    if status["away"]:
        reason = str(status["last_error"] or "unknown reason").rstrip(".")
        if lost:
            return Health(
                "red",
                "Losing rows",
                f"PostgreSQL is unavailable ({reason}): {_requests(lost)} lost, {pending:,} waiting.",
            )
        return Health(
            "amber",
            "Waiting",
            f"PostgreSQL is unavailable ({reason}): {_requests(pending)} waiting, none lost.",
        )
    if lost:
        return Health(
            "amber",
            "Logging, with gaps",
            f"Rows are being written, but {_requests(lost)} {'was' if lost == 1 else 'were'} lost"
            " since startup; see the gaps.",
        )
    if status["failures"]:
        return Health(
            "amber",
            "Logging, after a failure",
            "Rows are being written and none were lost, but the writer failed and was restarted;"
            " see mitmproxy's event log.",
        )
    return Health("green", "Logging", "Every request is logged.")


def _requests(count: int) -> str:
    return f"{count:,} request{'' if count == 1 else 's'}"

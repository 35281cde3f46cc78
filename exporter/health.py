"""Say in one word and one sentence how the log is doing, from its counters; reads and writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Health(NamedTuple):
    """The word is for people who see no colours, the level for those who do."""

    level: Literal["green", "amber", "red"]
    word: str
    sentence: str


def judge(status: Mapping[str, Any] | None) -> Health:
    """How the log is doing by `Exporter.status`; None: there is no exporter."""
    if status is None:
        return Health("red", "Stopped", "The access log is not running: no request gets a row.")
    lost = status["dropped"] + status["rejected"]
    kept = status["waiting"] + status["spooled"]
    if status["away"]:
        reason = str(status["last_error"] or "no reason is known").rstrip(".")
        if lost:
            return Health(
                "red",
                "Losing",
                f"The database is away ({reason}) and {_requests(lost)} got no row; {kept} wait.",
            )
        return Health(
            "amber",
            "Waiting",
            f"The database is away ({reason}); {_requests(kept)} wait, and nothing is lost.",
        )
    if lost:
        return Health(
            "amber",
            "Logging, with gaps",
            f"Rows are being written, but {_requests(lost)} since the start got none: see the gaps.",
        )
    if status["failures"]:
        return Health(
            "amber",
            "Logging, after a failure",
            "Rows are being written and none is lost, but the writer has failed and started again:"
            " see mitmproxy's event log.",
        )
    return Health("green", "Logging", "Every request gets its row.")


def _requests(count: int) -> str:
    return f"{count:,} request{'' if count == 1 else 's'}"

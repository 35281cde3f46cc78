"""When to try PostgreSQL again after a failure, and what to log about the outage."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..settings import DatabaseSettings

logger = logging.getLogger(__name__)

_MAX_REASONS = 8  # causes logged during one outage
_SUMMARY_SECONDS = 60.0  # between two log messages during one outage
_SETTLE_SECONDS = (
    5.0  # a server that stops or fails over gives other causes from one attempt to the next
)
_CONFIGURATION_RETRY_SECONDS = 15.0  # for what only the user can fix


class Retry:
    """Whether PostgreSQL is available, and when the next attempt is due. One thread uses it.

    It logs one warning when an outage begins, one per minute and per new cause that is not just part of
    the same event, and one message when it is over. Never an ERROR: during startup mitmproxy exits for one.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        self._delays = retry_delays(settings)
        self._settings = settings
        self.is_refused = False  # the server answered the last attempt and accepted no row
        self._next_at = 0.0  # monotonic seconds
        self._unavailable_since: float | None = None
        self._next_summary_at = 0.0
        self._next_cause_at = 0.0
        self._written_before = 0  # entries written before this outage
        self._reasons: set[str] = set()  # logged during this outage

    @property
    def is_unavailable(self) -> bool:
        """Whether the last attempt failed."""
        return self._unavailable_since is not None

    @property
    def is_due(self) -> bool:
        """Whether the next attempt may be made now."""
        return self.seconds_left <= 0

    @property
    def seconds_left(self) -> float:
        """Until the next attempt is due."""
        return self._next_at - time.monotonic()

    def reconfigure(self, settings: DatabaseSettings) -> None:
        """Use other settings; the next attempt is due at once."""
        self._settings = settings
        self._next_cause_at = 0.0
        self._reset()

    def succeeded(self, written: int) -> None:
        """An attempt succeeded. `written`: entries written so far, in total."""
        if self._unavailable_since is not None:
            logger.info(
                "artifactapi: PostgreSQL available again after %.1f s; wrote %d buffered %s.",
                time.monotonic() - self._unavailable_since,
                recovered := written - self._written_before,
                "row" if recovered == 1 else "rows",
            )
            self._unavailable_since = None
            self._reasons.clear()
        self._written_before = written
        self.is_refused = False
        self._reset()

    def failed(
        self, reason: str, waiting: int, *, configuration: bool = False, refused: bool = False
    ) -> None:
        """An attempt failed.

        Args:
            reason: Why; fit for the log.
            waiting: Entries in memory and on disk.
            configuration: Only the user can fix it, so the next attempt can wait longer.
            refused: The server answers and accepts no row.
        """
        delay = _CONFIGURATION_RETRY_SECONDS if configuration else next(self._delays)
        now = time.monotonic()
        is_settled = configuration or refused or now >= self._next_cause_at
        is_new = reason not in self._reasons and len(self._reasons) < _MAX_REASONS and is_settled
        self.is_refused = refused
        self._next_at = now + delay
        if self._unavailable_since is None:
            self._unavailable_since = now
            state = "rejects the log" if configuration or refused else "unavailable"
            logger.warning("artifactapi: PostgreSQL %s; buffering rows: %s", state, reason)
        elif is_new:
            logger.warning(
                "artifactapi: PostgreSQL still unavailable; the cause changed: %s", reason
            )
        elif now >= self._next_summary_at:
            logger.warning(
                "artifactapi: PostgreSQL unavailable for %.0f s; %d %s buffered: %s",
                now - self._unavailable_since,
                waiting,
                "row" if waiting == 1 else "rows",
                reason,
            )
        else:
            return
        self._reasons.add(reason)
        self._next_cause_at = now + _SETTLE_SECONDS
        self._next_summary_at = now + _SUMMARY_SECONDS

    def _reset(self) -> None:
        self._delays, self._next_at = retry_delays(self._settings), 0.0


def retry_delays(settings: DatabaseSettings) -> Iterator[float]:
    """Seconds between attempts: doubling from retry_min_seconds to retry_max_seconds, with jitter.

    The upper half of each delay is random, so that many proxies do not reconnect at the same moment.
    """
    delay = settings.retry_min_seconds
    while True:
        yield delay / 2 + random.uniform(0, delay / 2)  # noqa: S311 - not a secret
        delay = min(delay * 2, settings.retry_max_seconds)

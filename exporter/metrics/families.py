"""Turn the figures of `Exporter.status` into metrics. Does no I/O.

Names and units follow prometheus.io/docs/practices/naming. No label holds text from a client, a
connection string or the id of the run; `node` and the version are what every row and report shows.
"""

from __future__ import annotations

import platform
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.core import Metric


class _Figure(NamedTuple):
    """A metric that is one number of the status."""

    name: str
    key: str  # in the status; the metric is absent while its value is None
    text: str


_COUNTERS = (
    _Figure("requests_seen", "seen", "Requests that have ended, since the start of the proxy."),
    _Figure("requests_written", "written", "Requests whose row is in PostgreSQL."),
    _Figure(
        "requests_dropped",
        "dropped",
        "Requests without a row, because memory and disk were full or a stop ran out of time.",
    ),
    _Figure(
        "requests_rejected",
        "rejected",
        "Requests without a row, because PostgreSQL rejected it or none could be built.",
    ),
    _Figure("requests_unjournaled", "unjournaled", "Requests for which the journal had no room."),
    _Figure("rows_recovered", "recovered", "Rows written for earlier runs of a proxy."),
    _Figure("write_retries", "retries", "Calls to PostgreSQL that had to be repeated."),
    _Figure("internal_failures", "failures", "Internal errors, after which the log went on."),
)
_GAUGES = (
    _Figure("requests_waiting", "waiting", "Requests whose row waits in memory."),
    _Figure("requests_spooled", "spooled", "Requests whose row waits on disk."),
    _Figure(
        "requests_in_flight",
        "in_flight",
        "Requests that have begun and not ended; requests seen do not include them.",
    ),
    _Figure("buffer_bytes", "buffer_bytes", "Memory of the buffer in use."),
    _Figure("buffer_limit_bytes", "buffer_max_bytes", "Setting buffer.max_bytes."),
    _Figure("buffer_limit_requests", "buffer_max_entries", "Setting buffer.max_entries."),
    _Figure("spool_bytes", "spool_bytes", "Disk space of the rows of this proxy that wait there."),
    _Figure("spool_limit_bytes", "spool_max_bytes", "Setting spool.max_bytes."),
)
_JOURNAL_GAUGES = (
    _Figure("journal_bytes", "journal_used_bytes", "Memory of the journal in use."),
    _Figure("journal_limit_bytes", "journal_bytes", "Memory of the journal."),
)
_TIMES = (
    _Figure("last_write_timestamp", "last_written_at", "When PostgreSQL took the latest batch."),
    _Figure("last_error_timestamp", "last_error_at", "When the latest error that counts occurred."),
)
_PREFIX = "artifactapi_"


class LogCollector:
    """Reads the figures at each scrape. Thread-safe if `status` is."""

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """`status`: see `Exporter.status`."""
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """All metrics of this project."""
        status = self._status()
        yield from _info(status)
        for figure in _COUNTERS:
            yield CounterMetricFamily(
                _PREFIX + figure.name, figure.text, value=float(status[figure.key])
            )
        yield GaugeMetricFamily(
            f"{_PREFIX}postgres_available",
            "0 while PostgreSQL is unavailable: the last attempt to reach it failed.",
            value=float(not status["away"]),
        )
        has_journal = status["journal"] == "on"
        yield GaugeMetricFamily(
            f"{_PREFIX}journal_available",
            "Whether there is a journal, so that a killed proxy loses no row.",
            value=float(has_journal),
        )
        for figure in (*_GAUGES, *(_JOURNAL_GAUGES if has_journal else ())):
            yield GaugeMetricFamily(
                _PREFIX + figure.name,
                figure.text,
                value=float(status[figure.key]),
                unit="bytes" if figure.name.endswith("_bytes") else "",
            )
        for figure in _TIMES:
            if status[figure.key] is not None:
                yield GaugeMetricFamily(
                    f"{_PREFIX}{figure.name}_seconds",
                    f"{figure.text[:-1]}, in seconds since the epoch.",
                    value=datetime.fromisoformat(status[figure.key]).timestamp(),
                    unit="seconds",
                )
        yield _histogram(
            "batch_rows", "Rows of the batches that PostgreSQL took.", status["batch_rows"]
        )
        yield _histogram(
            "batch_duration_seconds",
            "How long PostgreSQL took to write a batch and commit it.",
            status["batch_seconds"],
            unit="seconds",
        )


def _info(status: Mapping[str, Any]) -> Iterator[Metric]:
    yield InfoMetricFamily(
        f"{_PREFIX}build",
        "Versions; an empty one is unknown.",
        {"version": status["version"] or "", "python": platform.python_version()},
    )
    yield InfoMetricFamily(f"{_PREFIX}node", "Name of the proxy.", {"node": status["node"]})


def _histogram(name: str, text: str, values: Mapping[str, Any], unit: str = "") -> Metric:
    buckets = [(_bound(name), float(count)) for name, count in values["buckets"].items()]
    return HistogramMetricFamily(
        _PREFIX + name, text, buckets=buckets, sum_value=values["sum"], unit=unit
    )


def _bound(name: str) -> str:
    """OpenMetrics writes bounds as floating-point numbers: 1.0."""
    return name if name == "+Inf" else str(float(name))

"""Read the metrics of a proxy as Prometheus does, with the parser of prometheus_client."""

from __future__ import annotations

import http.client
import re
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
_LOGGED = re.compile(r"metrics at http://(?:\[(\S+)\]|(\S+)):(\d+)/metrics")


class Answer(NamedTuple):
    """A response to a scrape."""

    status: int
    headers: Mapping[str, str]
    body: str


def logged_address(output: Callable[[], str]) -> tuple[str, int]:
    """Wait until a proxy has logged where its metrics are; return the latest address and port."""
    found = eventually(lambda: _LOGGED.findall(output()))[-1]
    return found[0] or found[1], int(found[2])


def get(
    address: tuple[str, int],
    path: str = "/metrics",
    *,
    method: str = "GET",
    accept: str = OPEN_METRICS,
) -> Answer:
    """Send one request. Raises OSError, also if there is no answer within 5 seconds."""
    connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request(method, path, headers={"Accept": accept})
        response = connection.getresponse()
        return Answer(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read().decode(),
        )
    finally:
        connection.close()


def scrape(address: tuple[str, int]) -> dict[str, float]:
    """The value of each sample, by its name and labels, as in `name{label="value"}`."""
    answer = get(address)
    assert answer.status == 200, answer
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    samples = [
        sample
        for family in text_string_to_metric_families(answer.body)
        for sample in family.samples
    ]
    found = {_name(sample.name, sample.labels): float(sample.value) for sample in samples}
    assert len(found) == len(samples), "a sample occurs twice"
    return found


def _name(name: str, labels: Mapping[str, str]) -> str:
    shown = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{shown}}}" if shown else name

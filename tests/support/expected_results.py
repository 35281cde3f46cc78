"""Compute in Python the results that SQL views and queries must return for given rows."""

from __future__ import annotations

import itertools
import math
import struct
from collections import defaultdict
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime

    from .access_log import Row

HITS = frozenset({"HIT", "STALE", "UPDATING", "REVALIDATED"})


def group_by(rows: Iterable[Row], key: Callable[[Row], Any]) -> Iterator[tuple[Any, list[Row]]]:
    """Yield each key with its rows, like GROUP BY."""
    found: defaultdict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    yield from found.items()


def not_null(rows: Iterable[Row], column: str) -> list[Any]:
    """Return the non-NULL values of a column, which are those that an aggregate uses."""
    return [row[column] for row in rows if row[column] is not None]


def as_float4(values: Iterable[float]) -> list[float]:
    """Round values to four bytes, as the server stores a `real`."""
    return [struct.unpack("f", struct.pack("f", value))[0] for value in values]


def percent(part: int, whole: int, places: str) -> float:
    """Return the percentage, rounded like a `numeric`. For example, `places` "0.01" keeps two decimals."""
    return float((Decimal(100) * part / whole).quantize(Decimal(places), ROUND_HALF_UP))


def percentile(values: list[float], share: float) -> float | None:
    """Return the percentile with linear interpolation, like SQL's percentile_cont."""
    if not values:
        return None
    values = sorted(values)
    index = (len(values) - 1) * share
    low, high = values[math.floor(index)], values[math.ceil(index)]
    return low + (high - low) * (index - math.floor(index))


def is_fetch(row: Row) -> bool:
    """Return whether the client had the complete artifact after this request."""
    return bool(row["artifact_complete"])


def remote_or_host(row: Row) -> str:
    """Return the remote, or the host if there is no remote."""
    return str(row["remote"] or row["host"])


def caller(row: Row) -> str:
    """Return the proxy user, or the client's address if there is no user."""
    return str(row["proxy_user"] or row["client_ip"])


def callers(rows: Iterable[Row]) -> int:
    """Count the distinct callers."""
    return len({caller(row) for row in rows})


def hour_of(moment: datetime) -> datetime:
    """Return the start of the hour."""
    return moment.replace(minute=0, second=0, microsecond=0)


def day_of(moment: datetime) -> datetime:
    """Return the start of the day."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def failed(row: Row) -> bool:
    """Return whether there was no response, or a server error."""
    return row["status_code"] is None or row["status_code"] >= 500


def columns_key(*columns: str) -> Callable[[Row], Any]:
    """Return a key function for `group_by`: one value, or a tuple of several."""
    if len(columns) == 1:
        return lambda row: row[columns[0]]
    return lambda row: tuple(row[column] for column in columns)


def nearly_equal(one: Any, other: Any) -> bool:
    """Compare two values or two rows; floats may differ by rounding."""
    if isinstance(one, tuple):
        return all(itertools.starmap(nearly_equal, zip(one, other, strict=True)))
    if isinstance(one, float):
        return other is not None and math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)

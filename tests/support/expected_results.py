"""What SQL would answer, computed from rows in Python: the other half of the tests of views and queries."""

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
    """GROUP BY: each key with its rows."""
    found: defaultdict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    yield from found.items()


def not_null(rows: Iterable[Row], column: str) -> list[Any]:
    """The values an aggregate sees: those that are not NULL."""
    return [row[column] for row in rows if row[column] is not None]


def as_float4(values: Iterable[float]) -> list[float]:
    """As the server sees a `real`: the nearest number of four bytes, not its shortest text."""
    return [struct.unpack("f", struct.pack("f", value))[0] for value in values]


def percent(part: int, whole: int, places: str) -> float:
    """The share of `part` in per cent, rounded as a numeric is; `places` as in "0.01"."""
    return float((Decimal(100) * part / whole).quantize(Decimal(places), ROUND_HALF_UP))


def percentile(values: list[float], share: float) -> float | None:
    """As SQL's percentile_cont: between two values it lies on the line from one to the other."""
    if not values:
        return None
    values = sorted(values)
    place = (len(values) - 1) * share
    low, high = values[math.floor(place)], values[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def is_fetch(row: Row) -> bool:
    """Whether the client had the whole artifact after this request."""
    return bool(row["artifact_complete"])


def remote_or_host(row: Row) -> str:
    """The remote, or the host where it is no known one."""
    return str(row["remote"] or row["host"])


def caller(row: Row) -> str:
    """The proxy user, or the address of one without."""
    return str(row["proxy_user"] or row["client_ip"])


def callers(rows: Iterable[Row]) -> int:
    """How many different ones."""
    return len({caller(row) for row in rows})


def hour_of(moment: datetime) -> datetime:
    """The hour it is in, its beginning."""
    return moment.replace(minute=0, second=0, microsecond=0)


def day_of(moment: datetime) -> datetime:
    """The day it is in, its beginning."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def failed(row: Row) -> bool:
    """No response, or one that says the server failed."""
    return row["status_code"] is None or row["status_code"] >= 500


def columns_key(*columns: str) -> Callable[[Row], Any]:
    """A key for `grouped`: one value, or a tuple of several."""
    if len(columns) == 1:
        return lambda row: row[columns[0]]
    return lambda row: tuple(row[column] for column in columns)


def nearly_equal(one: Any, other: Any) -> bool:
    """Whether two values, or all of two rows, are the same but for the last digits of a fraction."""
    if isinstance(one, tuple):
        return all(itertools.starmap(nearly_equal, zip(one, other, strict=True)))
    if isinstance(one, float):
        return other is not None and math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)

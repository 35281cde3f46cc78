"""Which rows of access_log are meant, as SQL with bound values; runs no query and formats no row."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import LiteralString

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s|m|h|d|w)", re.ASCII)
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_STATUS = re.compile(r"[1-9]\d\d", re.ASCII)
_STATUS_CLASS = re.compile(r"([1-9])xx", re.ASCII | re.IGNORECASE)
_ERROR_TYPE = re.compile(r"_?[A-Za-z][A-Za-z_]*", re.ASCII)
_ANY_ERROR = {"": True, "any": True, "true": True, "none": False, "false": False}
# The column of each field that may be a glob.
_GLOBBED: dict[LiteralString, LiteralString] = {
    "remote": "remote",
    "host": "host",
    "package": "package",
    "user": "proxy_user",
}
_TIMES = ("since", "until")
# What `text` is looked for in.
_SEARCHED: tuple[LiteralString, ...] = ("host", "path", "package", "purl", "proxy_user")

type Condition = tuple[LiteralString, Any]


class SelectionError(ValueError):
    """What was asked for can't be understood; one sentence that says which part and what is expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which rows; None leaves a question out. All that are asked must be true of a row.

    Raises:
        SelectionError: a value that no row could be asked for.
    """

    remote: str | None = None  # this one, and the next three: the value itself, or a glob with *
    host: str | None = None
    package: str | None = None
    user: str | None = None  # proxy_user
    status: str | None = None  # "404", "4xx", or "none": no response
    error: bool | str | None = None  # whether there was one, or its error_type
    slower_ms: float | None = None
    since: datetime | None = None  # of started_at, which the partitions go by; aware
    until: datetime | None = None  # exclusive
    text: str | None = None  # part of host, path, package, purl or user, in upper or lower case

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and not _is_storable(value):
                raise SelectionError(f"{field.name} holds a character that no row can hold.")
            if isinstance(value, datetime) and value.tzinfo is None:
                raise SelectionError(f"{field.name} needs a time zone.")
        if self.slower_ms is not None and not (
            math.isfinite(self.slower_ms) and self.slower_ms >= 0
        ):
            raise SelectionError("slower must be a duration such as 500ms.")
        self._status_condition()

    @classmethod
    def parse(cls, texts: Mapping[str, str | None], now: datetime | None = None) -> Selection:
        """The selection that a command line or the query of a URL writes as text.

        Args:
            texts: By remote, host, package, user, status, error ("any", "none" or a type), slower
                (a duration), since, until (see `parse_moment`), text; None and, but for error,
                empty is as if left out.
            now: What "10m" counts back from, aware; by default the clock's.

        Raises:
            SelectionError: a name or a text that can't be understood.
        """
        given = {k: v.strip() for k, v in texts.items() if v is not None}
        unknown = given.keys() - set(FILTER_NAMES)
        if unknown:
            raise SelectionError(f"There is no filter {min(unknown)!r}.")
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name == "error":
                values["error"] = _parse_error(value)
            elif value and name == "slower":
                values["slower_ms"] = parse_duration(value, "slower") / timedelta(milliseconds=1)
            elif value and name in {"since", "until"}:
                values[name] = parse_moment(value, name, now)
            elif value:
                values[name] = value
        return cls(**values)

    def filters(self) -> dict[str, str]:
        """What is asked beside the time, as text: without it no row has to be looked for."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: str(value)
            for name, value in given.items()
            if value is not None and name not in _TIMES
        }

    def time_alone(self) -> Selection:
        """The same time, whatever else is asked."""
        return Selection(since=self.since, until=self.until)

    def where(self) -> tuple[sql.Composed, dict[str, Any]]:
        """A condition on the columns of access_log, and the values it binds by name.

        The names begin with `where_`, so that a query can bind others beside them. Nothing asked is
        the condition `true`.
        """
        conditions: list[LiteralString] = []
        values: dict[str, Any] = {}
        for name, (condition, value) in self._conditions():
            conditions.append(condition)
            if value is not None:
                values[f"where_{name}"] = value
        if not conditions:
            return sql.Composed([sql.SQL("true")]), {}
        return sql.SQL(" AND ").join(map(sql.SQL, conditions)), values

    def _conditions(self) -> Iterator[tuple[str, Condition]]:
        if self.since is not None:
            yield "since", ("started_at >= %(where_since)s", self.since)
        if self.until is not None:
            yield "until", ("started_at < %(where_until)s", self.until)
        for name, column in _GLOBBED.items():
            if (value := getattr(self, name)) is not None:
                yield name, _matches(column, name, value)
        if (status := self._status_condition()) is not None:
            yield "status", status
        if isinstance(self.error, str):
            yield "error", ("error_type = %(where_error)s", self.error)
        elif self.error is not None:
            yield "error", (f"error_type IS {'NOT ' if self.error else ''}NULL", None)
        if self.slower_ms is not None:
            yield "slower", ("duration_ms > %(where_slower)s", float(self.slower_ms))
        if self.text is not None:
            any_of: LiteralString = " OR ".join(f"{it} ILIKE %(where_text)s" for it in _SEARCHED)
            yield "text", (f"({any_of})", f"%{_escaped(self.text)}%")

    def _status_condition(self) -> Condition | None:
        if self.status is None:
            return None
        if self.status.lower() == "none":
            return "status_code IS NULL", None
        if _STATUS.fullmatch(self.status):
            return "status_code = %(where_status)s", int(self.status)
        if found := _STATUS_CLASS.fullmatch(self.status):
            return "status_code / 100 = %(where_status)s", int(found[1])
        raise SelectionError(
            f"status {self.status!r} can't be understood; expected one such as 404, 4xx or none."
        )


# The names that `Selection.parse` takes: of a command's options and of the page's fields.
FILTER_NAMES = tuple(f.name.removesuffix("_ms") for f in fields(Selection))


def parse_duration(text: str, name: str = "The duration") -> timedelta:
    """The length of `500ms`, `2s`, `10m`, `24h`, `7d` or `2w`.

    Raises:
        SelectionError: it is none; the sentence begins with `name`.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise SelectionError(
            f"{name} {text!r} can't be understood; expected a duration such as 500ms, 2s, 10m, 24h or 7d."
        )
    try:
        return timedelta(seconds=float(found[1]) * _UNIT_SECONDS[found[2]])
    except OverflowError:
        raise SelectionError(f"{name} {text!r} is longer than time itself.") from None


def parse_moment(text: str, name: str = "The time", now: datetime | None = None) -> datetime:
    """The aware time that is a duration before `now`, or that ISO 8601 writes; local where it says no zone.

    Raises:
        SelectionError: it is neither; the sentence begins with `name`.
    """
    try:
        if _DURATION.fullmatch(text.strip()):
            return (now or datetime.now(UTC)) - parse_duration(text, name)
        moment = datetime.fromisoformat(text.strip())
        return moment.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise SelectionError(
            f"{name} {text!r} can't be understood; expected how long ago, such as 10m, 24h or 7d,"
            " or a time such as 2026-01-31T12:00."
        ) from None


def _parse_error(text: str) -> bool | str:
    if text.lower() in _ANY_ERROR:
        return _ANY_ERROR[text.lower()]
    if not _ERROR_TYPE.fullmatch(text):
        raise SelectionError(
            f"error {text!r} can't be understood; expected any, none or an error_type such as dns."
        )
    return text


def _matches(column: LiteralString, name: LiteralString, value: str) -> Condition:
    """Equality where it will do: it can use an index."""
    if name == "host":  # rows have it in lower case
        value = value.lower()
    if "*" in value:
        return f"{column} LIKE %(where_{name})s", _escaped(value).replace("*", "%")
    return f"{column} = %(where_{name})s", value


def _escaped(text: str) -> str:
    r"""Text that LIKE takes for itself: PostgreSQL docs, 9.7.1, with the default escape \."""
    return re.sub(r"([\\%_])", r"\\\1", text)


def _is_storable(text: str) -> bool:
    """Postgres' text holds no NUL, and UTF-8 no lone surrogate."""
    return "\x00" not in text and not any("\ud800" <= c <= "\udfff" for c in text)

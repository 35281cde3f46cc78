"""Select rows of access_log: parse filters, and turn them into SQL with bound values. Runs no queries."""

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
# The filters that accept a * and the column of each.
_GLOB_COLUMNS: dict[LiteralString, LiteralString] = {
    "remote": "remote",
    "host": "host",
    "package": "package",
    "user": "proxy_user",
}
_TIMES = ("since", "until")
# The columns that the filter `text` searches.
_TEXT_COLUMNS: tuple[LiteralString, ...] = ("host", "path", "package", "purl", "proxy_user")

type Condition = tuple[LiteralString, Any]


class SelectionError(ValueError):
    """A filter is not valid. The message is one sentence that names it and says what is expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Filters on rows. A row must match all of them; None matches every row.

    Raises:
        SelectionError: a value is not valid.
    """

    remote: str | None = None  # a value, or a pattern with *; likewise the next three
    host: str | None = None
    package: str | None = None
    user: str | None = None  # proxy_user
    status: str | None = None  # "404", "4xx", or "none": no response
    error: bool | str | None = None  # with or without an error, or with this error_type
    slower_ms: float | None = None
    since: datetime | None = (
        None  # earliest started_at, with a time zone; partitions are by this column
    )
    until: datetime | None = None  # exclusive
    text: str | None = None  # part of the host, path, package, purl or user; ignores case

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and not _is_storable(value):
                raise SelectionError(f"{field.name} holds a character that no row can contain.")
            if isinstance(value, datetime) and value.tzinfo is None:
                raise SelectionError(f"{field.name} needs a time zone.")
        if self.slower_ms is not None and not (
            math.isfinite(self.slower_ms) and self.slower_ms >= 0
        ):
            raise SelectionError("slower must be a duration such as 500ms.")
        self._status_condition()

    @classmethod
    def parse(cls, texts: Mapping[str, str | None], now: datetime | None = None) -> Selection:
        """Parse filters from the options of a command or the query of a URL.

        Args:
            texts: Values by filter name: remote, host, package, user, status, error ("any", "none" or
                a type), slower (a duration), since and until (see `parse_time`), text. None means no
                filter. So does an empty value, except for `error`, where it means "any".
            now: The time that durations such as "10m" count back from, with a time zone; default: now.

        Raises:
            SelectionError: a name or a value is not valid.
        """
        given = {name: text.strip() for name, text in texts.items() if text is not None}
        unknown = given.keys() - set(FILTER_NAMES)
        if unknown:
            raise SelectionError(f"There is no filter {min(unknown)!r}.")
        values: dict[str, Any] = {}
        for name, text in given.items():
            if name == "error":
                values["error"] = _parse_error(text)
            elif text and name == "slower":
                values["slower_ms"] = parse_duration(text, "slower") / timedelta(milliseconds=1)
            elif text and name in _TIMES:
                values[name] = parse_time(text, name, now)
            elif text:
                values[name] = text
        return cls(**values)

    def filters(self) -> dict[str, str]:
        """Return all filters except the time span, as text."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: str(value)
            for name, value in values.items()
            if value is not None and name not in _TIMES
        }

    def time_only(self) -> Selection:
        """Return a selection with the same time span and no other filters."""
        return Selection(since=self.since, until=self.until)

    def where(self) -> tuple[sql.Composed, dict[str, Any]]:
        """Return a condition on the columns of access_log, and the values that it binds by name.

        The names start with `where_`, so a query can bind others too. Without filters the condition
        is `true`.
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
        for name, column in _GLOB_COLUMNS.items():
            if (value := getattr(self, name)) is not None:
                yield name, _glob_condition(column, name, value)
        if (status := self._status_condition()) is not None:
            yield "status", status
        if isinstance(self.error, str):
            yield "error", ("error_type = %(where_error)s", self.error)
        elif self.error is not None:
            yield "error", (f"error_type IS {'NOT ' if self.error else ''}NULL", None)
        if self.slower_ms is not None:
            yield "slower", ("duration_ms > %(where_slower)s", float(self.slower_ms))
        if self.text is not None:
            any_column: LiteralString = " OR ".join(
                f"{column} ILIKE %(where_text)s" for column in _TEXT_COLUMNS
            )
            yield "text", (f"({any_column})", f"%{_like_escaped(self.text)}%")

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
            f"status {self.status!r} is not valid; expected a status such as 404, 4xx or none."
        )


# The names that `Selection.parse` accepts. Command options and the page's fields have the same names.
FILTER_NAMES = tuple(f.name.removesuffix("_ms") for f in fields(Selection))


def parse_duration(text: str, name: str = "The duration") -> timedelta:
    """Parse a duration such as `500ms`, `2s`, `10m`, `24h`, `7d` or `2w`.

    Raises:
        SelectionError: it is not a duration. The sentence starts with `name`.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise SelectionError(
            f"{name} {text!r} is not valid; expected a duration such as 500ms, 2s, 10m, 24h or 7d."
        )
    try:
        return timedelta(seconds=float(found[1]) * _UNIT_SECONDS[found[2]])
    except OverflowError:
        raise SelectionError(f"{name} {text!r} is too long.") from None


def parse_time(text: str, name: str = "The time", now: datetime | None = None) -> datetime:
    """Parse a time: how long before `now` as a duration, or ISO 8601, in local time unless it has a zone.

    Raises:
        SelectionError: it is neither. The sentence starts with `name`.
    """
    try:
        if _DURATION.fullmatch(text.strip()):
            return (now or datetime.now(UTC)) - parse_duration(text, name)
        return datetime.fromisoformat(text.strip()).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise SelectionError(
            f"{name} {text!r} is not valid; expected how long ago, such as 10m, 24h or 7d,"
            " or a time such as 2026-01-31T12:00."
        ) from None


def _parse_error(text: str) -> bool | str:
    if text.lower() in _ANY_ERROR:
        return _ANY_ERROR[text.lower()]
    if not _ERROR_TYPE.fullmatch(text):
        raise SelectionError(
            f"error {text!r} is not valid; expected any, none or an error_type such as dns."
        )
    return text


def _glob_condition(column: LiteralString, name: LiteralString, value: str) -> Condition:
    """Compare for equality unless there is a *, because equality can use an index."""
    if name == "host":  # lower case in all rows
        value = value.lower()
    if "*" in value:
        return f"{column} LIKE %(where_{name})s", _like_escaped(value).replace("*", "%")
    return f"{column} = %(where_{name})s", value


def _like_escaped(text: str) -> str:
    r"""Escape the wildcards of LIKE: PostgreSQL docs, 9.7.1, with the default escape character \."""
    return re.sub(r"([\\%_])", r"\\\1", text)


def _is_storable(text: str) -> bool:
    """Return whether PostgreSQL can store the text: UTF-8, without NUL and lone surrogates."""
    return "\x00" not in text and not any("\ud800" <= c <= "\udfff" for c in text)

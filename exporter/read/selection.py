"""Select rows of access_log: parse filters, and turn them into SQL with bound values. Runs no queries."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, fields
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import tzinfo
    from typing import LiteralString

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s|m|h|d|w)", re.ASCII)
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_STATUS = re.compile(r"[1-9]\d\d", re.ASCII)
_STATUS_CLASS = re.compile(r"([1-9])xx", re.ASCII | re.IGNORECASE)
_METHOD = re.compile(r"\S+", re.ASCII)  # a proxy logs any method that has no spaces
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_IPV4_MAPPED_BITS = 96  # the prefix ::ffff:0:0/96, RFC 4291 2.5.5.2
# The values of the column error_type. A test compares them with the schema and with the proxy.
ERROR_TYPES = (
    *("dns", "connect", "connect_timeout", "tls_upstream", "tls_client", "upstream_closed"),
    *("upstream_timeout", "client_disconnected", "protocol", "too_large", "killed", "proxy_auth"),
    *("shutdown", "_OTHER"),
)
_ERROR_TYPES = {name.lower(): name for name in ERROR_TYPES}
_ANY_ERROR = {"": True, "any": True, "true": True, "none": False, "false": False}
_FLAGS = {"yes": True, "true": True, "no": False, "false": False}
_TIMES = ("since", "until")
# The columns that the filter `text` searches.
_TEXT_COLUMNS: tuple[LiteralString, ...] = ("host", "path", "package", "purl", "proxy_user")

type Condition = tuple[LiteralString, Any]


class PortableCondition(NamedTuple):
    """A condition for DuckDB. Where it is not complete, it is true for other rows as well."""

    text: str  # with parameters such as $where_host
    values: dict[str, Any]
    is_complete: bool


class SelectionError(ValueError):
    """A filter is not valid. The message is one sentence that names it and says what is expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Filters on rows. A row must match all of them; None matches every row.

    Raises:
        SelectionError: a value is not valid.
    """

    remote: str | None = (
        None  # a value, or a pattern with *; likewise host, package, user, who, node
    )
    host: str | None = None
    package: str | None = None
    method: str | None = None  # ignores case
    status: str | None = None  # "404", "4xx", or "none": no response
    failed: bool | None = None  # without a response, or with status 500 and above
    error: bool | str | None = None  # with or without an error, or one of ERROR_TYPES
    slower_ms: float | None = None
    who: str | None = None  # proxy_user, or else the client address
    user: str | None = None  # proxy_user
    client: str | None = None  # an address, or a network such as 192.0.2.0/24
    node: str | None = None
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
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise SelectionError("since must be earlier than until.")
        dict(self._conditions())  # checks the other values

    @classmethod
    def parse(
        cls,
        texts: Mapping[str, str | None],
        now: datetime | None = None,
        zone: tzinfo | None = None,
    ) -> Selection:
        """Parse filters from the options of a command or the query of a URL.

        Args:
            texts: Values by filter name, which is the name of the attribute. Only the filter of
                `slower_ms` is called slower; it is a duration. `error` is "any", "none" or a type.
                `failed` is "yes" or "no".
                For since and until see `parse_time`. None means no filter. So does an empty value,
                except for `error`, where it means "any".
            now: The time that durations such as "10m" count back from, with a time zone; default: now.
            zone: The zone of days and of times without a zone; default: local time.

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
            elif text and name == "failed":
                values["failed"] = _parse_flag(text, "failed")
            elif text and name == "slower":
                values["slower_ms"] = parse_duration(text, "slower") / timedelta(milliseconds=1)
            elif text and name in _TIMES:
                values[name] = parse_time(text, name, now, zone)
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
        is true for every row.
        """
        conditions: list[LiteralString] = []
        values: dict[str, Any] = {}
        for name, (condition, value) in self._conditions():
            conditions.append(condition)
            if value is not None:
                values[f"where_{name}"] = value
        if not conditions:
            # Not a constant: with one, Citus 12.1 finds no row in a view of the log and loaded rows.
            return sql.Composed([sql.SQL("started_at IS NOT NULL")]), {}
        return sql.SQL(" AND ").join(map(sql.SQL, conditions)), values

    def portable_where(self) -> PortableCondition:
        """Return the part of the condition that DuckDB understands as PostgreSQL does."""
        conditions: list[str] = []
        values: dict[str, Any] = {}
        is_complete = True
        for name, (condition, value) in self._conditions():
            if "inet" in condition or (name == "text" and not value.isascii()):
                is_complete = False  # DuckDB has no addresses, and folds the case of other letters
                continue
            conditions.append(re.sub(r"%\((\w+)\)s", r"$\1", condition))
            if value is not None:
                values[f"where_{name}"] = value
        return PortableCondition(" AND ".join(conditions) or "true", values, is_complete)

    def _conditions(self) -> Iterator[tuple[str, Condition]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                name = field.name.removesuffix("_ms")
                yield name, _CONDITIONS[name](value)


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


def parse_time(
    text: str,
    name: str = "The time",
    now: datetime | None = None,
    zone: tzinfo | None = None,
) -> datetime:
    """Parse a time before `now` as a duration, a day, or ISO 8601.

    A day is `today`, `yesterday` or a weekday, and means its last midnight. Days, and times without a
    zone, are in `zone`; default: local time.

    Raises:
        SelectionError: it is none of these. The sentence starts with `name`.
    """
    now = now or datetime.now(UTC)
    word = text.strip().lower()
    try:
        if word == "now":
            return now
        if _DURATION.fullmatch(word):
            return now - parse_duration(word, name)
        today = now.astimezone(zone).date()
        days_ago = _days_ago(word, today.weekday())
        if days_ago is not None:
            at = datetime.combine(today - timedelta(days=days_ago), time())
        else:
            at = datetime.fromisoformat(text.strip())
        return (at if at.tzinfo else at.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise SelectionError(
            f"{name} {text!r} is not valid; expected how long ago, such as 10m, 24h or 7d,"
            " a day such as today, yesterday or monday, or a time such as 2026-01-31T12:00."
        ) from None


def _days_ago(word: str, today: int) -> int | None:
    """Return how many days ago a day was, or None if the word names none. `today` is 0 on Mondays."""
    if word in {"today", "yesterday"}:
        return int(word == "yesterday")
    for number, day in enumerate(_WEEKDAYS):
        if word in {day, day[:3]}:
            return (today - number) % len(_WEEKDAYS)
    return None


def _parse_flag(text: str, name: str) -> bool:
    if text.lower() not in _FLAGS:
        raise SelectionError(f"{name} {text!r} is not valid; expected yes or no.")
    return _FLAGS[text.lower()]


def _parse_error(text: str) -> bool | str:
    name = text.lower()
    return _ANY_ERROR[name] if name in _ANY_ERROR else _ERROR_TYPES.get(name, text)


def glob_condition(name: LiteralString, column: LiteralString, value: str) -> Condition:
    """Compare for equality unless there is a *, because equality can use an index.

    The condition binds the value as `where_` and the name.
    """
    if "*" in value:
        pattern = _like_escaped(value).replace("*", "%")
        return f"{column} LIKE %(where_{name})s ESCAPE '\\'", pattern
    return f"{column} = %(where_{name})s", value


def _who_condition(who: str) -> Condition:
    """Compare with what access_log_caller returns. A plain value can use the index on proxy_user."""
    if "*" in who:
        return glob_condition("who", "access_log_caller(proxy_user, client_ip)", who)
    try:
        address = _as_stored(ipaddress.ip_network(re.sub(r"%.*", "", who))).network_address
    except ValueError:
        return glob_condition("who", "proxy_user", who)
    return (
        "(proxy_user = %(where_who)s OR"
        " (proxy_user IS NULL AND client_ip = %(where_who)s::text::inet))"
    ), str(address)


def _method_condition(method: str) -> Condition:
    if not _METHOD.fullmatch(method):
        raise SelectionError(
            f"method {method!r} is not valid; expected one word such as GET or POST."
        )
    return "upper(method) = %(where_method)s", method.upper()


def _status_condition(status: str) -> Condition:
    if status.lower() == "none":
        return "status_code IS NULL", None
    if _STATUS.fullmatch(status):
        return "status_code = %(where_status)s", int(status)
    if found := _STATUS_CLASS.fullmatch(status):
        return "status_code - mod(status_code, 100) = %(where_status)s", int(found[1]) * 100
    raise SelectionError(f"status {status!r} is not valid; expected 100 to 999, 4xx or none.")


def _error_condition(error: bool | str) -> Condition:
    if not isinstance(error, str):
        return f"error_type IS {'NOT ' if error else ''}NULL", None
    if error not in ERROR_TYPES:
        raise SelectionError(
            f"error {error!r} is not valid; expected any, none, {', '.join(ERROR_TYPES[:-1])}"
            f" or {ERROR_TYPES[-1]}."
        )
    return "error_type = %(where_error)s", error


def _text_condition(text: str) -> Condition:
    """Search all columns at once, because that can use an index; see retention/text_indexes.py.

    A text with the character that separates the columns could match across two of them, and an empty
    one matches a row without values.
    """
    columns: LiteralString = ", ".join(_TEXT_COLUMNS)
    any_column: LiteralString = " OR ".join(
        f"{column} ILIKE %(where_text)s ESCAPE '\\'" for column in _TEXT_COLUMNS
    )
    all_columns: LiteralString = (
        f"access_log_search_text({columns}) ILIKE %(where_text)s ESCAPE '\\'"
    )
    condition = all_columns if text and "\n" not in text else f"({any_column})"
    return condition, f"%{_like_escaped(text)}%"


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Parse the filter `client`. An address is a network with one address."""
    try:
        return _as_stored(ipaddress.ip_network(re.sub(r"%[^/]*", "", text), strict=False))
    except ValueError:
        raise SelectionError(
            f"client {text!r} is not valid; expected an address such as 192.0.2.7 or a network"
            " such as 192.0.2.0/24."
        ) from None


def _as_stored(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Unmap an IPv4-mapped network, as the rows have it."""
    mapped = network.network_address.ipv4_mapped if network.version == 6 else None  # noqa: PLR2004
    if mapped is None or network.prefixlen < _IPV4_MAPPED_BITS:
        return network
    return ipaddress.IPv4Network((mapped, network.prefixlen - _IPV4_MAPPED_BITS))


def _like_escaped(text: str) -> str:
    r"""Escape the wildcards of LIKE: PostgreSQL docs, 9.7.1, with the default escape character \."""
    return re.sub(r"([\\%_])", r"\\\1", text)


def _is_storable(text: str) -> bool:
    """Return whether PostgreSQL can store the text: UTF-8, without NUL and lone surrogates."""
    return "\x00" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


_CONDITIONS: dict[str, Callable[[Any], Condition]] = {
    "remote": lambda value: glob_condition("remote", "remote", value),
    "host": lambda value: glob_condition("host", "host", value.lower()),  # lower case in all rows
    "package": lambda value: glob_condition("package", "package", value),
    "method": _method_condition,
    "status": _status_condition,
    "failed": lambda value: (
        "access_log_failed(status_code)" if value else "NOT access_log_failed(status_code)",
        None,
    ),
    "error": _error_condition,
    "slower": lambda value: ("duration_ms > %(where_slower)s", float(value)),
    "who": _who_condition,
    "user": lambda value: glob_condition("user", "proxy_user", value),
    "client": lambda value: ("client_ip <<= %(where_client)s::inet", str(_network(value))),
    "node": lambda value: glob_condition("node", "node", value),
    "since": lambda value: ("started_at >= %(where_since)s", value),
    "until": lambda value: ("started_at < %(where_until)s", value),
    "text": _text_condition,
}

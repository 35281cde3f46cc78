"""Rows as lines for a terminal of any width, or for none; finds no rows."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from ..rows.cache_status import FROM_CACHE
from .human import duration, printable, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from .tail import Row

_GAP = "  "
_MIN_WHAT = 8  # a narrower terminal breaks the lines
_SERVER_ERROR = 500
_SHORT = {"REVALIDATED": "REVALID", "UPDATING": "UPDATE"}


class _TailColumn(NamedTuple):
    """A cell of fixed width; `least` is the narrowest terminal it is shown in."""

    name: str
    width: int
    least: int
    to_the_right: bool
    text: Callable[[Row], str]
    style: Callable[[Row], str]


def header(width: int | None) -> Text:
    """The line above the rows; `width` in cells, None for what is no terminal."""
    cells = [_aligned(it.name, it) for it in _shown(width)]
    return Text(_GAP.join([*cells, "what"]), style="bold")


def line(row: Row, width: int | None) -> Text:
    """One row as a line with its colours, cut to `width` cells; what a client sent is made printable."""
    text = Text()
    for column in _shown(width):
        text.append(_aligned(column.text(row), column), style=column.style(row))
        text.append(_GAP)
    error = f"{_GAP}{printable(row.error_type)}" if row.error_type else ""
    what = printable(row.purl) if row.purl else url(row)
    if width is not None:
        what = _shortened(what, max(_MIN_WHAT, width - text.cell_len - cell_len(error)))
    text.append(what)
    return text.append(error, style="red")


def _shown(width: int | None) -> list[_TailColumn]:
    return [it for it in _COLUMNS if width is None or width >= it.least]


def _aligned(text: str, column: _TailColumn) -> str:
    if cell_len(text) >= column.width:
        return _shortened(text, column.width)
    padding = " " * (column.width - cell_len(text))
    return padding + text if column.to_the_right else text + padding


def _shortened(text: str, width: int) -> str:
    """Without its middle: a URL's host and, more yet, its file's name tell the most."""
    if cell_len(text) <= width:
        return text
    room = 2 * width // 3
    tail = text[-room:]
    while cell_len(tail) > room:
        tail = tail[1:]
    return set_cell_size(text, width - 1 - cell_len(tail)) + "\u2026" + tail


def _time(row: Row) -> str:
    now = datetime.now().astimezone()
    try:
        at = row.started_at.astimezone()
    except OverflowError:  # at the edge of the calendar there may be no local time
        at = row.started_at
    if at.date() == now.date():
        return f"{at:%H:%M:%S.%f}"[:12]
    return f"{at:%m-%d %H:%M}" if at.year == now.year else f"{at:%Y-%m-%d}"


def _status(row: Row) -> str:
    return "-" if row.status_code is None else str(row.status_code)


def _status_style(row: Row) -> str:
    if row.status_code is None or row.status_code >= _SERVER_ERROR:
        return "bold red"
    return {4: "yellow", 3: "blue", 2: "green"}.get(row.status_code // 100, "")


def _cache(row: Row) -> str:
    word = row.cache_status or "-"
    return printable(_SHORT.get(word, word))


def _cache_style(row: Row) -> str:
    if row.cache_status is None:
        return "dim"
    return "green" if row.cache_status in FROM_CACHE else "yellow"


def who(row: Row) -> str:
    """The proxy user, or else the address."""
    return printable(row.proxy_user or str(row.client_ip or "-"))


def url(row: Row) -> str:
    """What was asked for."""
    default = {"http": 80, "https": 443}.get(row.scheme or "")
    port = "" if row.port in (None, default) else f":{row.port}"
    scheme = f"{row.scheme}://" if row.scheme else ""
    return printable(f"{scheme}{row.host or ''}{port}{row.path or ''}")


_COLUMNS = (
    _TailColumn("time", 12, 0, to_the_right=False, text=_time, style=lambda _: ""),
    _TailColumn("status", 6, 0, to_the_right=True, text=_status, style=_status_style),
    _TailColumn(
        "method",
        7,
        120,
        to_the_right=False,
        text=lambda row: printable(row.method or "-"),
        style=lambda _: "",
    ),
    _TailColumn(
        "size",
        8,
        60,
        to_the_right=True,
        text=lambda row: size(row.response_bytes),
        style=lambda _: "dim",
    ),
    _TailColumn(
        "took",
        7,
        70,
        to_the_right=True,
        text=lambda row: duration(row.duration_ms),
        style=lambda _: "dim",
    ),
    _TailColumn("cache", 7, 110, to_the_right=False, text=_cache, style=_cache_style),
    _TailColumn("who", 16, 100, to_the_right=False, text=who, style=lambda _: "cyan"),
)

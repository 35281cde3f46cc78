"""Format rows as lines of text, for a terminal of any width or for a pipe. Runs no queries."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from ..rows.cache_status import FROM_CACHE
from .human import duration, package, printable, size
from .status import is_failure, is_refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from .newest import Row

_SEPARATOR = "  "
_MIN_WHAT_CELLS = 8  # on a narrower terminal, lines wrap
_SHORT_CACHE_STATUS = {"REVALIDATED": "REVALID", "UPDATING": "UPDATE"}
_DEFAULT_PORTS = {"http": 80, "https": 443}


class _TailColumn(NamedTuple):
    """A column of fixed width, in cells. Terminals narrower than `min_terminal` do not show it."""

    name: str
    width: int
    min_terminal: int
    right_aligned: bool
    text: Callable[[Row], str]
    style: Callable[[Row], str]


def header(width: int | None) -> Text:
    """Return the header line. `width` is the terminal's, in cells; None: not a terminal."""
    cells = [_aligned(column.name, column) for column in _shown_columns(width)]
    return Text(_SEPARATOR.join([*cells, "what"]), style="bold")


def line(row: Row, width: int | None) -> Text:
    """Format one row with colors, cut to `width` cells. Text from clients is printable."""
    text = Text()
    for column in _shown_columns(width):
        text.append(_aligned(column.text(row), column), style=column.style(row))
        text.append(_SEPARATOR)
    error = f"{_SEPARATOR}{printable(row.error_type)}" if row.error_type else ""
    room = None if width is None else max(_MIN_WHAT_CELLS, width - text.cell_len - cell_len(error))
    text.append(_package(row.purl, room) if row.purl else _shortened(url(row), room))
    return text.append(error, style="red")


def caller(row: Row) -> str:
    """Return the proxy user, or else the client address. In SQL: access_log_caller."""
    return printable(row.proxy_user or str(row.client_ip or "-"))


def url(row: Row) -> str:
    """Return the requested URL, without its query."""
    is_default = row.port is None or row.port == _DEFAULT_PORTS.get(row.scheme or "")
    port = "" if is_default else f":{row.port}"
    scheme = f"{row.scheme}://" if row.scheme else ""
    return printable(f"{scheme}{row.host or ''}{port}{row.path or ''}")


def _shown_columns(width: int | None) -> list[_TailColumn]:
    return [column for column in _COLUMNS if width is None or width >= column.min_terminal]


def _aligned(text: str, column: _TailColumn) -> str:
    if cell_len(text) >= column.width:
        return _shortened(text, column.width)
    padding = " " * (column.width - cell_len(text))
    return padding + text if column.right_aligned else text + padding


def _package(purl: str, width: int | None) -> str:
    """Return the name and version of a package, with its ecosystem if there is room for all of it."""
    found = package(purl)
    name = found.name if found else printable(purl)
    full = str(found or name)
    if width is None or cell_len(full) <= width:
        return full
    return name if cell_len(name) <= width else set_cell_size(name, width - 1) + "\u2026"


def _shortened(text: str, width: int | None) -> str:
    """Cut out the middle: the host at the start and, even more, the file name at the end matter most."""
    if width is None or cell_len(text) <= width:
        return text
    max_tail_cells = 2 * width // 3
    tail = text[-max_tail_cells:]
    while cell_len(tail) > max_tail_cells:
        tail = tail[1:]
    return set_cell_size(text, width - 1 - cell_len(tail)) + "\u2026" + tail


def _time(row: Row) -> str:
    now = datetime.now().astimezone()
    try:
        at = row.started_at.astimezone()
    except OverflowError:  # the first or last day of the calendar
        at = row.started_at
    if at.date() == now.date():
        return f"{at:%H:%M:%S.%f}"[:12]
    return f"{at:%m-%d %H:%M}" if at.year == now.year else f"{at:%Y-%m-%d}"


def _status(row: Row) -> str:
    return "-" if row.status_code is None else str(row.status_code)


def _status_style(row: Row) -> str:
    if is_failure(row.status_code):
        return "bold red"
    if is_refusal(row.status_code):
        return "yellow"
    return {3: "blue", 2: "green"}.get((row.status_code or 0) // 100, "")


def _cache(row: Row) -> str:
    status = row.cache_status or "-"
    return printable(_SHORT_CACHE_STATUS.get(status, status))


def _cache_style(row: Row) -> str:
    if row.cache_status is None:
        return "dim"
    return "green" if row.cache_status in FROM_CACHE else "yellow"


_COLUMNS = (
    _TailColumn("time", 12, 0, right_aligned=False, text=_time, style=lambda _: ""),
    _TailColumn("status", 6, 0, right_aligned=True, text=_status, style=_status_style),
    _TailColumn(
        "method",
        7,
        120,
        right_aligned=False,
        text=lambda row: printable(row.method or "-"),
        style=lambda _: "",
    ),
    _TailColumn(
        "size",
        8,
        60,
        right_aligned=True,
        text=lambda row: size(row.response_bytes),
        style=lambda _: "dim",
    ),
    _TailColumn(
        "took",
        7,
        70,
        right_aligned=True,
        text=lambda row: duration(row.duration_ms),
        style=lambda _: "dim",
    ),
    _TailColumn("cache", 7, 110, right_aligned=False, text=_cache, style=_cache_style),
    _TailColumn("who", 16, 100, right_aligned=False, text=caller, style=lambda _: "cyan"),
)

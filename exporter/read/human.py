"""Numbers and foreign text as a person reads them; knows no table and no terminal."""

from __future__ import annotations

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_KILO = 1000
_BASIC_PLANE = 0xFFFF


def printable(text: str) -> str:
    r"""Text a terminal or a page may be shown: control characters and the like become \x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_json(text: str) -> str:
    r"""JSON a terminal may be shown, with the same meaning: what is not printable becomes \u009b."""
    return "".join(c if c.isprintable() else _json_escape(c) for c in text)


def size(count: float | None) -> str:
    """Bytes in decimal units: 1.2 MB; "-" where unknown."""
    if count is None:
        return "-"
    amount = float(count)
    for unit in _UNITS:
        if round(amount, 1) < _KILO or unit == _UNITS[-1]:
            return f"{count:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= _KILO
    raise AssertionError


def duration(milliseconds: float | None) -> str:
    """0.8 ms, 12 ms, 1.2 s, 3m 10s, 30m, 2h 05m; "-" where unknown."""
    if milliseconds is None:
        return "-"
    if milliseconds < 10:  # noqa: PLR2004
        return f"{milliseconds:.1f} ms"
    if milliseconds < 999.5:  # noqa: PLR2004
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 59.95:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:  # noqa: PLR2004
        return f"{minutes}m {rest:02}s" if rest else f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if minutes else f"{hours}h"


def share(part: float, whole: float) -> str:
    """A part as percentage; "-" of nothing, and neither 0 % nor 100 % unless it is that."""
    if not whole:
        return "-"
    percentage = 100 * part / whole
    if 0 < percentage < 0.1:  # noqa: PLR2004
        return "<0.1 %"
    if 99.9 < percentage < 100:  # noqa: PLR2004
        return ">99.9 %"
    return f"{percentage:.1f} %"


def _json_escape(character: str) -> str:
    code = ord(character)
    if code <= _BASIC_PLANE:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"

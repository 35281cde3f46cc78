"""Format numbers, packages, and text from clients, for people. Knows no table and no terminal."""

from __future__ import annotations

from typing import NamedTuple

from packageurl import PackageURL

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_KILO = 1000
_LAST_OF_BASIC_PLANE = 0xFFFF
# Ecosystems whose namespace is the vendor of a distribution and not a part of the name.
_DISTRIBUTIONS = frozenset({"alpm", "apk", "deb", "rpm"})


class PackageText(NamedTuple):
    """A package as its users call it: "deb" and "g++-12 12.2.0-14+deb12u1"."""

    ecosystem: str
    name: str  # with the version, if it is known

    def __str__(self) -> str:
        return f"{self.ecosystem} {self.name}"


def printable(text: str) -> str:
    r"""Make text safe to show: replace unprintable characters with escapes such as \x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_json(text: str) -> str:
    r"""Make JSON safe to show, without changing its meaning: escape unprintable characters as \u009b."""
    return "".join(c if c.isprintable() else _json_escape(c) for c in text)


def package(purl: str) -> PackageText | None:
    """Return the package that a Package URL names, decoded and printable; None if it is not valid."""
    try:
        parts = PackageURL.from_string(purl)
    except ValueError:
        return None
    name = parts.name
    if parts.namespace and parts.type not in _DISTRIBUTIONS:
        name = f"{parts.namespace}/{name}"
    qualifiers: dict[str, str] = dict(parts.qualifiers)
    version = qualifiers.get("tag") or parts.version  # of an image; its version is a digest
    return PackageText(printable(parts.type), printable(f"{name} {version}" if version else name))


def package_text(purl: str) -> str:
    """Return the package with its ecosystem, or the text itself if it is not a valid Package URL."""
    return str(package(purl) or printable(purl))


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: "1 request", "2,000 requests"."""
    return f"{count:,} {noun_for(count, noun)}"


def noun_for(count: int, noun: str) -> str:
    """Return the noun for this count, without the count."""
    return noun if count == 1 else f"{noun}s"


def are(count: int) -> str:
    """Return the verb for this count: "is" or "are"."""
    return "is" if count == 1 else "are"


def were(count: int) -> str:
    """Return the verb for this count: "was" or "were"."""
    return "was" if count == 1 else "were"


def size(count: float | None) -> str:
    """Format bytes in decimal units, such as 1.2 MB. None: "-".

    rich.filesize.decimal would write "999 bytes", which is too long for a table, and "1,000.0 kB".
    """
    if count is None:
        return "-"
    amount = float(count)
    for unit in _UNITS:
        if round(amount, 1) < _KILO or unit == _UNITS[-1]:
            return f"{count:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= _KILO
    raise AssertionError


def duration(milliseconds: float | None) -> str:
    """Format a duration, such as 0.8 ms, 12 ms, 1.2 s, 3m 10s, 30m or 2h 05m. None: "-"."""
    if milliseconds is None:
        return "-"
    if milliseconds < 10:  # noqa: PLR2004
        return f"{milliseconds:.1f} ms"
    if milliseconds < 999.5:  # noqa: PLR2004
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 59.95:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    minutes, remainder = divmod(round(seconds), 60)
    if minutes < 60:  # noqa: PLR2004
        return f"{minutes}m {remainder:02}s" if remainder else f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if minutes else f"{hours}h"


def share(part: float, whole: float) -> str:
    """Format a part of a whole in percent. Only exact values show as 0.0 % and 100.0 %. "-" if the whole is 0."""
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
    if code <= _LAST_OF_BASIC_PLANE:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"

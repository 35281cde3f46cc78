"""Read plain lists of packages: one per line, or CSV with a header. Opens no files.

Lists of compromised packages circulate in such forms:

    pkg:npm/left-pad@1.3.0
    @scope/name@1.2.3            # with --type npm
    Package,Version
    left-pad,= 1.3.0 || = 1.3.1
"""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING, NamedTuple

from .limits import SourceError
from .model import ALL_VERSIONS, Advisory, AffectedPackage, Event, Range
from .names import (
    DISTRIBUTIONS,
    PackageVersion,
    column_of,
    package_column,
    package_key,
    parse_purl,
    purl_type,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_EVERY_VERSION = (Range((Event("introduced", ALL_VERSIONS),)),)
_EVERY = frozenset({"", "*", "all", "any", "all versions", "any version"})
_COMMENT = re.compile(r"(?:^|\s)#.*")
_DELIMITERS = (",", "\t", ";")
_COLUMNS = {  # headers in lower case, without punctuation
    "purl": {"purl", "package url"},
    "name": {"package", "name", "package name", "component", "module", "library", "packages"},
    "version": {
        *("version", "versions", "package version", "package versions", "affected version"),
        *("affected versions", "malicious version", "malicious versions", "compromised version"),
        *("compromised versions", "bad version", "bad versions", "version s", "affected version s"),
    },
    "type": {"type", "ecosystem", "registry", "package manager", "purl type"},
    "id": {"id", "advisory", "advisory id", "cve", "osv id"},
}
_SEPARATOR = re.compile(r"\s*(?:\|\||[,;|]|\s)\s*")
_OPERATOR = re.compile(r"={1,3}\s*")
_RANGE_CHARACTERS = frozenset("<>^*")
_SHOWN = 80  # characters of a line that an error shows


class _Row(NamedTuple):
    """What one line says."""

    key: str
    column: str
    versions: list[str]  # empty: every version
    id: str | None = None


def read_list(
    lines: Iterable[str], source: str, default_type: str | None
) -> Iterator[AffectedPackage]:
    """Yield the packages in a list; all of them belong to one advisory, unless a column names others.

    Args:
        lines: Text, without line ends.
        source: The file's name, which is also the advisory's id.
        default_type: Of names that are not Package URLs, such as npm; None: such names are an error.

    Raises:
        SourceError: a line cannot be understood.
    """
    versions: dict[tuple[str, str], list[str] | None] = {}  # None: every version
    columns: dict[str, str] = {}
    for row in _rows(lines, source, default_type):
        columns[row.key] = row.column
        place = (row.id or source, row.key)
        known = versions.setdefault(place, [])
        if not row.versions:
            versions[place] = None
        elif known is not None:
            known += row.versions
    advisories: dict[str, Advisory] = {}
    for (name, key), found in versions.items():
        advisory = advisories.setdefault(name, Advisory(id=name, source=source, severity="listed"))
        ranges, listed = (_EVERY_VERSION, []) if found is None else ((), found)
        yield AffectedPackage(
            advisory, key, ranges, tuple(dict.fromkeys(listed)), column=columns[key]
        )


def _rows(lines: Iterable[str], source: str, default_type: str | None) -> Iterator[_Row]:
    numbered = ((number, _COMMENT.sub("", line).strip()) for number, line in enumerate(lines, 1))
    content = ((number, line) for number, line in numbered if line)
    first = next(content, None)
    if first is None:
        return
    columns = _header(first[1])
    if columns is None:
        yield _plain_row(*first, source, default_type)
        for number, line in content:
            yield _plain_row(number, line, source, default_type)
        return
    delimiter, places = columns
    for number, line in content:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        yield _table_row(number, cells, places, source, default_type)


def _header(line: str) -> tuple[str, dict[str, int]] | None:
    """Return the delimiter, and the places of the columns that we know, if the line is a header."""
    for delimiter in _DELIMITERS:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        words = [" ".join(re.findall(r"[a-z]+", cell.lower())) for cell in cells]
        places = {
            column: words.index(word)
            for column, names in _COLUMNS.items()
            for word in names
            if word in words
        }
        if "purl" in places or ("name" in places and (len(cells) > 1 or len(places) > 1)):
            return delimiter, places
    return None


def _table_row(
    number: int, cells: list[str], places: dict[str, int], source: str, default_type: str | None
) -> _Row:
    def cell(column: str) -> str:
        place = places.get(column)
        return cells[place].strip() if place is not None and place < len(cells) else ""

    where = f"{source}, line {number}"
    row_id = cell("id")[:_SHOWN] or None
    versions = _versions(cell("version"), where)
    if cell("purl"):
        package = _purl(cell("purl"), where)
        column = package_column(cell("purl")) or ""
        return _Row(package.key, column, versions or _one(package), row_id)
    start = _start(cell("type") or default_type, cell("name"), where)
    key = package_key(start, cell("name"))
    if key is None:
        raise SourceError(f"{where}: the name of the package is missing.")
    return _Row(key, column_of(start, cell("name")), versions, row_id)


def _plain_row(number: int, line: str, source: str, default_type: str | None) -> _Row:
    where = f"{source}, line {number}"
    if line.lower().startswith("pkg:"):
        package = _purl(line, where)
        return _Row(package.key, package_column(line) or "", _one(package))
    start = _start(default_type, line, where)
    name, version = _split(start, line)
    key = package_key(start, name)
    if key is None or re.search(r"\s", name):
        raise SourceError(
            f"{where}: {line[:_SHOWN]!r} is not a package; expected a Package URL, name@version or a"
            " CSV file with a header."
        )
    return _Row(key, column_of(start, name), _versions(version, where))


def _split(start: str, line: str) -> tuple[str, str]:
    """Split name@version, name==version, group:name:version or `name version`. Names can start with @."""
    for separator in ("==", "@"):
        place = line.find(separator, 1)
        if place > 0:
            return line[:place].strip(), line[place + len(separator) :]
    if start == "maven" and line.count(":") > 1:
        group, name, version = line.split(":", 2)
        return f"{group}:{name}", version
    name, _, version = line.partition(" ")
    return name, version


def _purl(text: str, where: str) -> PackageVersion:
    package = parse_purl(text)
    if package is None:
        raise SourceError(
            f"{where}: {text[:_SHOWN]!r} is not a Package URL; expected pkg:type/name@version."
        )
    return package


def _one(package: PackageVersion) -> list[str]:
    return [] if package.version is None else [package.version]


def _start(name: str | None, line: str, where: str) -> str:
    """Return the start of the package's key. A distribution's packages need a vendor: a purl has it."""
    if name is None:
        raise SourceError(
            f"{where}: the ecosystem of {line[:_SHOWN]!r} is not known; add --type, such as --type npm,"
            " or write Package URLs."
        )
    known = purl_type(name)
    if known is None or known in DISTRIBUTIONS:
        raise SourceError(
            f"{where}: the type {name[:_SHOWN]!r} names no ecosystem; expected one such as npm, pypi, maven"
            " or Debian."
        )
    return known


def _versions(text: str, where: str) -> list[str]:
    """Split exact versions: `= 1.0 || = 1.1`, `1.0, 1.1`, `(1.0)`. Empty: every version."""
    text = text.strip().strip("()[]").strip()
    if text.lower() in _EVERY:
        return []
    if _RANGE_CHARACTERS & set(text):
        raise SourceError(
            f"{where}: {text[:_SHOWN]!r} is a range of versions; a list can hold only exact versions."
        )
    return [part for part in _SEPARATOR.split(_OPERATOR.sub("", text)) if part]

"""Read plain lists of packages: one per line, or CSV with a header. Opens no files.

Lists of compromised packages circulate in such forms:

    pkg:npm/left-pad@1.3.0
    @scope/name@1.2.3            # with --type npm
    Package,Version
    left-pad,= 1.3.0 || = 1.3.1
"""

from __future__ import annotations

import csv
import itertools
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
_DELIMITERS = (",", "\t", ";", "|")
_COLUMNS = {  # headers in lower case, without punctuation
    "purl": {"purl", "package url"},
    "name": {
        "package",
        "name",
        "package name",
        "component",
        "module",
        "library",
        "packages",
        "npm package",
        "package npm",
        "npm package name",
        "library name",
    },
    "version": {
        *("version", "versions", "package version", "package versions", "affected version"),
        *("affected versions", "malicious version", "malicious versions", "compromised version"),
        *(
            "compromised versions",
            "bad version",
            "bad versions",
            "versions affected",
            "vulnerable versions",
            "version s",
            "affected version s",
        ),
    },
    "type": {"type", "ecosystem", "registry", "package manager", "purl type"},
    "id": {"id", "advisory", "advisory id", "cve", "osv id"},
}
_SEPARATOR = re.compile(r"\s*(?:\|\||[,;|]|\s)\s*")
_OPERATOR = re.compile(r"={1,3}\s*")
_WORDS_BETWEEN = frozenset({"", "and", "or", "&"})
_MARKUP = str.maketrans("", "", "`\"'")  # of Markdown, JSON and Python; in no name or version
_BULLET = re.compile(r"^[-*+\u2022]\s+")
_TABLE_RULE = re.compile(r"[-\s|:+]+")  # the line below the header of a table in Markdown
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# name@version, name==version, name: version, name (version); names can start with @.
_NAME_AND_VERSIONS = re.compile(
    r"(?P<name>@?[^\s@=,;:|()\[\]]+)\s*(?:==|[@=,;:|(\[\s]|$)(?P<versions>.*)", re.DOTALL
)
_NAME = re.compile(r"@?[A-Za-z0-9_][A-Za-z0-9._~/+-]*(?<!~)", re.ASCII)
_FILE = re.compile(r".*\.(?:tgz|whl|tar\.gz|gem|crate|jar|nupkg)", re.IGNORECASE)
_NO_NAMESPACE = frozenset({"cargo", "cran", "gem", "hackage", "hex", "nuget", "pub", "pypi"})
_BRANCHES = frozenset({"composer", "github"})  # whose versions can be names of branches
_VERSION = re.compile(r"[vr]?(?:\d+[:!])?\d[A-Za-z0-9._+~^-]*", re.ASCII)
_RANGE = re.compile(
    r"[~^!].*|.*[<>*\s,;|=].*|.*\.x(?!-dev)(?:[.-].*)?|\d+(?:\.\d+){2}-\d+(?:\.\d+){2}",
    re.IGNORECASE | re.DOTALL,
)
_SHOWN = 80  # characters of a line that an error shows


class _Row(NamedTuple):
    """What one line says."""

    key: str
    column: str
    versions: list[str]  # empty: every version
    id: str | None = None


class _Columns(NamedTuple):
    """What a header says."""

    delimiter: str
    width: int  # cells
    places: dict[str, int]  # of the columns that we know


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
    content = (
        (f"{source}, line {number}", text)
        for number, line in enumerate(lines, 1)
        if (text := _COMMENT.sub("", line).strip()) and not _TABLE_RULE.fullmatch(text)
    )
    first = next(content, None)
    if first is None:
        return
    columns = _header(_checked(*first))
    if columns is None:
        for where, line in itertools.chain((first,), content):
            yield from _plain_rows(_checked(where, line), where, default_type)
        return
    for where, line in content:
        cells = _cells(_checked(where, line), columns.delimiter)
        if any(cells[columns.width :]):
            raise SourceError(
                f"{where}: more cells than the header; put versions with commas between them in quotes."
            )
        yield _table_row(where, cells, columns.places, default_type)


def _checked(where: str, line: str) -> str:
    """Return a line, which must be whole, without the outer borders of a table in Markdown."""
    if _CONTROL.search(line) or line.count('"') % 2:
        raise SourceError(
            f"{where}: {line[:_SHOWN]!r} has a control character, or a quote that does not end in this line."
        )
    return line.removeprefix("|").removesuffix("|").strip() if line.startswith("|") else line


def _cells(line: str, delimiter: str) -> list[str]:
    cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    return [cell.translate(_MARKUP).strip() for cell in cells]


def _header(line: str) -> _Columns | None:
    """Return what a header says, or None if the line is none."""
    for delimiter in _DELIMITERS:
        cells = _cells(line, delimiter)
        words = [" ".join(re.findall(r"[a-z]+", cell.lower())) for cell in cells]
        places = {
            column: words.index(word)
            for column, names in _COLUMNS.items()
            for word in names
            if word in words
        }
        if "purl" in places or ("name" in places and (len(cells) > 1 or len(places) > 1)):
            return _Columns(delimiter, len(cells), places)
    return None


def _table_row(
    where: str, cells: list[str], places: dict[str, int], default_type: str | None
) -> _Row:
    def cell(column: str) -> str:
        place = places.get(column)
        return cells[place] if place is not None and place < len(cells) else ""

    row_id = cell("id")[:_SHOWN] or None
    if cell("purl"):
        row = _purl_row(cell("purl"), where)
        start = row.key.partition("/")[0]
        return row._replace(
            versions=_versions(start, cell("version"), where) or row.versions, id=row_id
        )
    start = _start(cell("type") or default_type, cell("name"), where)
    if not cell("name"):
        raise SourceError(f"{where}: the name of the package is missing.")
    row = _named_row(start, cell("name"), where)
    versions = _versions(start, cell("version"), where)
    return row._replace(versions=list(dict.fromkeys([*row.versions, *versions])), id=row_id)


def _plain_rows(line: str, where: str, default_type: str | None) -> Iterator[_Row]:
    text = _BULLET.sub("", line.translate(_MARKUP).strip(), count=1).rstrip(",;. ")
    if text.lower().startswith("pkg:"):
        for purl in filter(None, re.split(r"[\s,;]+", text)):
            yield _purl_row(purl, where)
    else:
        yield _named_row(_start(default_type, line, where), text, where)


def _named_row(start: str, text: str, where: str) -> _Row:
    """Read a name, with or without versions."""
    prefix, colon, rest = text.partition(":")
    if colon and purl_type(prefix) == start:  # npm:left-pad@1.3.0
        text = rest.strip()
    name, versions = _split(start, text)
    key = package_key(start, name)
    parts = name.split("/")
    is_name = _NAME.fullmatch(name.replace(":", "/", 1) if start == "maven" else name)
    is_placed = all(parts) and (len(parts) == 1 or start not in _NO_NAMESPACE)
    is_scoped = start != "npm" or len(parts) == 1 + name.startswith("@")
    if key is None or not (is_name and is_placed and is_scoped) or _FILE.fullmatch(name):
        raise SourceError(
            f"{where}: {text[:_SHOWN]!r} is not a package; expected a Package URL, name@version or a"
            " CSV file with a header."
        )
    return _Row(key, column_of(start, name), _versions(start, versions, where))


def _split(start: str, text: str) -> tuple[str, str]:
    """Split a package and its versions. Maven's packages are group:name."""
    group = ""
    if start == "maven" and ":" in text:
        group, _, text = text.partition(":")
        group = f"{group.strip()}:"
    found = _NAME_AND_VERSIONS.fullmatch(text)
    return (group + found["name"], found["versions"]) if found else (text, "")


def _purl_row(text: str, where: str) -> _Row:
    text = text.replace("/@", "/%40")  # people write the scope of an npm package as it is
    package = _purl(text, where)
    if package.version is not None and _RANGE.fullmatch(package.version):
        raise _range_error(package.version, where)
    return _Row(package.key, package_column(text) or "", _one(package))


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


def _versions(start: str, text: str, where: str) -> list[str]:
    """Split exact versions: `= 1.0 || = 1.1`, `1.0, 1.1`, `(1.0)`. Empty: every version."""
    text = text.strip().strip("()[]").strip()
    if text.lower() in _EVERY:
        return []
    parts = [part.rstrip(".") for part in _SEPARATOR.split(_OPERATOR.sub("", text))]
    versions = [part for part in parts if part.lower() not in _WORDS_BETWEEN]
    for version in versions:
        if _RANGE.fullmatch(version):
            raise _range_error(version, where)
        if "@" in version or not (start in _BRANCHES or _VERSION.fullmatch(version)):
            raise SourceError(
                f"{where}: {version[:_SHOWN]!r} is not an exact version; expected a form such as 1.3.0."
            )
    return versions


def _range_error(text: str, where: str) -> SourceError:
    return SourceError(
        f"{where}: {text[:_SHOWN]!r} is a range of versions; a list can hold only exact versions."
    )

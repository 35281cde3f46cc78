"""Read advisories in the OSV format, https://ossf.github.io/osv-schema/ version 1.7. Opens no files."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from .model import Advisory, AffectedPackage, Event, Range
from .names import column_of, ecosystem_type, package_column, package_key, parse_purl

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_SUMMARY = 300  # characters that are kept
_MAX_ID = 100
_MAX_RANGES, _MAX_EVENTS, _MAX_VERSIONS = 1000, 10_000, 50_000  # of one package in one advisory


class _Package(Struct):
    ecosystem: str = ""
    name: str = ""
    purl: str | None = None


class _Range(Struct):
    type: str = ""
    events: list[dict[str, str]] = []


class _Affected(Struct):
    package: _Package | None = None
    ranges: list[_Range] | None = None
    versions: list[str] | None = None


class _Severity(Struct):
    type: str = ""
    score: str = ""


class _Document(Struct):
    id: str
    modified: str = ""
    affected: list[_Affected] | None = None
    summary: str | None = None
    details: str | None = None
    aliases: list[str] | None = None
    severity: list[_Severity] | None = None
    withdrawn: str | None = None
    database_specific: Any = None


_DECODER = msgspec.json.Decoder(_Document)


class OsvReader:
    """Reads OSV documents and counts what it leaves out."""

    def __init__(self, *, include_withdrawn: bool = False) -> None:
        self._include_withdrawn = include_withdrawn
        self.skipped: Counter[str] = Counter()  # by reason, which is the end of a sentence
        # Many packages have a version 1.0.0: without sharing, versions take most of the memory.
        self._shared: dict[Any, Any] = {}

    def read_json(self, text: bytes, source: str) -> Iterator[AffectedPackage]:
        """Yield the packages that one document names.

        Raises:
            msgspec.MsgspecError: the text is not JSON, or not an OSV document.
            RecursionError: the JSON is nested too deeply.
        """
        return self._read(_DECODER.decode(text), source)

    def read(self, document: Any, source: str) -> Iterator[AffectedPackage]:
        """Like `read_json`, for a document that is already parsed, such as one in YAML."""
        return self._read(msgspec.convert(document, _Document), source)

    def _read(self, document: _Document, source: str) -> Iterator[AffectedPackage]:
        if document.withdrawn and not self._include_withdrawn:
            self.skipped["withdrawn"] += 1
            return
        advisory = Advisory(
            id=document.id[:_MAX_ID],
            source=source,
            summary=_summary(document),
            severity=_severity(document),
            aliases=", ".join(document.aliases or ())[:_MAX_SUMMARY],
            withdrawn=document.withdrawn or "",
            modified=document.modified,
        )
        if not document.affected:
            self.skipped["advisories that name no package"] += 1
        for affected in document.affected or ():
            found = self._affected(advisory, affected)
            if found is not None:
                yield found

    def _affected(self, advisory: Advisory, affected: _Affected) -> AffectedPackage | None:
        named = self._name(affected.package)
        git = [each for each in affected.ranges or () if each.type == "GIT"]
        self.skipped["ranges of Git commits"] += len(git)
        if named is None:
            is_git = bool(git) and len(git) == len(affected.ranges or ()) and not affected.versions
            is_named = affected.package is not None and affected.package.name.strip()
            self.skipped["packages without a valid name"] += not (is_git or is_named)
            return None
        key, release, column = named
        ranges = [each for each in affected.ranges or () if each.type != "GIT"]
        versions = affected.versions or ()
        if (
            len(ranges) > _MAX_RANGES
            or len(versions) > _MAX_VERSIONS
            or any(len(each.events) > _MAX_EVENTS for each in ranges)
        ):
            raise msgspec.ValidationError(
                f"more than {_MAX_RANGES} ranges, {_MAX_EVENTS} events or {_MAX_VERSIONS} versions of a package"
            )
        if git and not ranges and not versions:
            return None
        return AffectedPackage(
            advisory=advisory,
            key=key,
            ranges=tuple(map(self._range, ranges)),
            versions=tuple(self._shared.setdefault(version, version) for version in versions),
            release=release,
            column="" if key.endswith(f"/{column}") else column,
        )

    def _range(self, each: _Range) -> Range:
        events = (Event(kind, version) for event in each.events for kind, version in event.items())
        found = Range(
            tuple(self._shared.setdefault(event, event) for event in events),
            is_semver=each.type == "SEMVER",
        )
        return self._shared.setdefault(found, found)  # type: ignore[no-any-return]

    def _name(self, package: _Package | None) -> tuple[str, str | None, str] | None:
        """Return the package's key, the distribution's release, and the column package of its rows.

        None: a proxy does not see such packages.
        """
        if package is None or not (package.name.strip() or package.purl):
            return None
        known = ecosystem_type(package.ecosystem)
        if known is not None:
            key = package_key(known[0], package.name)
            if key is None:
                return None
            return key, known[1], column_of(known[0], package.name)
        if package.purl and (parsed := parse_purl(package.purl)) is not None:
            return parsed.key, None, package_column(package.purl) or ""
        self.skipped["packages of an ecosystem that a proxy does not see"] += 1
        return None


def _summary(document: _Document) -> str:
    text = document.summary or (document.details or "").strip().partition("\n")[0]
    return text[:_MAX_SUMMARY]


def _severity(document: _Document) -> str:
    """Return a word such as high, if the database has one, or else the CVSS vector."""
    if document.id.startswith("MAL-"):  # OpenSSF malicious-packages
        return "malicious"
    specific = document.database_specific
    if isinstance(specific, dict) and isinstance(word := specific.get("severity"), str):
        return word.lower()[:_MAX_ID]
    return next((each.score[:_MAX_ID] for each in document.severity or ()), "")

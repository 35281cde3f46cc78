"""Read CycloneDX (JSON, XML) and SPDX (JSON, YAML, tag-value) documents as advisories. Opens no files.

Vulnerabilities in a CycloneDX document are advisories about the components that they affect. Without
vulnerabilities, a document is a list of packages: each of its components.

msgspec reads the few fields that matter in a tenth of the time and memory of the libraries that build
whole documents (cyclonedx-python-lib, spdx-tools).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import msgspec
from msgspec import Struct, field

from .limits import MAX_XML_BYTES, MAX_XML_DEPTH, MEBIBYTE, SourceError
from .model import ALL_VERSIONS, Advisory, AffectedPackage, Event, Range
from .names import package_column, parse_purl

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Iterator

_MAX_SUMMARY = 300  # characters that are kept
_MAX_ID = 100
# CycloneDX, vulnerabilities[].analysis.state
_NOT_AFFECTED = frozenset({"not_affected", "false_positive", "resolved", "resolved_with_pedigree"})
_VERS = re.compile(r"vers:(?P<scheme>[a-z0-9.+-]+)/(?P<constraints>.+)")
_CONSTRAINT = re.compile(r"(?P<sign>>=|<=|!=|[<>=]?)(?P<version>.+)")
_SIGNS = {">=": "introduced", ">": "after", "<": "fixed", "<=": "last_affected"}
_TAG = re.compile(r"^ExternalRef:\s*PACKAGE[-_]MANAGER\s+purl\s+(\S+)\s*$", re.MULTILINE)


class _Component(Struct):
    purl: str | None = None
    ref: str | None = field(default=None, name="bom-ref")
    components: list[_Component] | None = None


class _Rating(Struct):
    severity: str | None = None
    vector: str | None = None


class _AffectedVersion(Struct):
    version: str | None = None
    range: str | None = None
    status: str | None = None


class _Affects(Struct):
    ref: str = ""
    versions: list[_AffectedVersion] | None = None


class _Analysis(Struct):
    state: str | None = None


class _Vulnerability(Struct):
    id: str | None = None
    description: str | None = None
    ratings: list[_Rating] | None = None
    affects: list[_Affects] | None = None
    analysis: _Analysis | None = None
    rejected: str | None = None


class _Metadata(Struct):
    component: _Component | None = None


class _CycloneDx(Struct):
    components: list[_Component] | None = None
    vulnerabilities: list[_Vulnerability] | None = None
    metadata: _Metadata | None = None


class _ExternalRef(Struct):
    type: str = field(default="", name="referenceType")
    locator: str = field(default="", name="referenceLocator")


class _SpdxPackage(Struct):
    refs: list[_ExternalRef] | None = field(default=None, name="externalRefs")


class _Spdx(Struct):
    packages: list[_SpdxPackage] | None = None


class _GraphElement(Struct):
    type: str = ""
    purl: str | None = field(default=None, name="software_packageUrl")


class _Spdx3(Struct):
    graph: list[_GraphElement] = field(default_factory=list, name="@graph")


class SbomReader:
    """Reads documents and counts what it leaves out in `skipped`, by reason."""

    def __init__(self, skipped: Counter[str], *, include_withdrawn: bool = False) -> None:
        self._skipped = skipped
        self._include_withdrawn = include_withdrawn

    def read_cyclonedx(self, text: bytes, source: str) -> Iterator[AffectedPackage]:
        """Yield the packages in a CycloneDX document in JSON.

        Raises:
            msgspec.MsgspecError: the document is not valid.
            RecursionError: it is nested too deeply.
        """
        return self._cyclonedx(msgspec.json.decode(text, type=_CycloneDx), source)

    def read_cyclonedx_xml(self, text: bytes, source: str) -> Iterator[AffectedPackage]:
        """Like `read_cyclonedx`, for XML without a DOCTYPE.

        Raises:
            ET.ParseError: the text is not XML.
            SourceError: it is too large, nested too deeply, has a DOCTYPE, or is no CycloneDX document.
        """
        return self._cyclonedx(_parsed_xml(text, source), source)

    def read_spdx(self, text: bytes, source: str) -> Iterator[AffectedPackage]:
        """Yield the packages in an SPDX 2 document in JSON. Raises as `read_cyclonedx`."""
        return self._spdx(msgspec.json.decode(text, type=_Spdx), source)

    def read_parsed_spdx(self, document: Any, source: str) -> Iterator[AffectedPackage]:
        """Like `read_spdx`, for a document that is already parsed, such as one in YAML."""
        return self._spdx(msgspec.convert(document, _Spdx), source)

    def read_spdx3(self, text: bytes, source: str) -> Iterator[AffectedPackage]:
        """Yield the packages in an SPDX 3 document in JSON. Raises as `read_cyclonedx`."""
        graph = msgspec.json.decode(text, type=_Spdx3).graph
        packages = (each.purl for each in graph if each.type == "software_Package")
        return self._listed(packages, source)

    def read_spdx_tags(self, text: str, source: str) -> Iterator[AffectedPackage]:
        """Yield the packages in an SPDX 2 document in the tag-value form."""
        return self._listed(_TAG.findall(text), source)

    def _cyclonedx(self, document: _CycloneDx, source: str) -> Iterator[AffectedPackage]:
        components = list(_all_components(document))
        if not document.vulnerabilities:
            yield from self._listed((each.purl for each in components), source)
            return
        purls = {each.ref: each.purl for each in components if each.ref}
        for vulnerability in document.vulnerabilities:
            yield from self._vulnerability(vulnerability, purls, source)

    def _vulnerability(
        self, vulnerability: _Vulnerability, purls: dict[str, str | None], source: str
    ) -> Iterator[AffectedPackage]:
        if vulnerability.analysis and vulnerability.analysis.state in _NOT_AFFECTED:
            self._skipped["vulnerabilities that do not affect the product"] += 1
            return
        if vulnerability.rejected and not self._include_withdrawn:
            self._skipped["withdrawn"] += 1
            return
        advisory = Advisory(
            id=(vulnerability.id or source)[:_MAX_ID],
            source=source,
            summary=(vulnerability.description or "").strip().partition("\n")[0][:_MAX_SUMMARY],
            severity=_severity(vulnerability),
            withdrawn=vulnerability.rejected or "",
        )
        if not vulnerability.affects:
            self._skipped["advisories that name no package"] += 1
        for affects in vulnerability.affects or ():
            # A reference to another document ends with #ref: CycloneDX, BOM-Link.
            ref = affects.ref
            purl = purls.get(ref) or purls.get(unquote(ref.rpartition("#")[2])) or ref
            package = parse_purl(purl)
            if package is None:
                self._skipped["components without a Package URL"] += 1
                continue
            listed = [] if package.version is None else [package.version]
            ranges, versions = _versions(affects.versions) if affects.versions else ((), listed)
            if ranges or versions or not affects.versions:
                yield _affected(advisory, purl, ranges or _every(versions), versions)

    def _listed(self, purls: Iterable[str | None], source: str) -> Iterator[AffectedPackage]:
        advisory = Advisory(id=source[:_MAX_ID], source=source, severity="listed")
        for purl in purls:
            package = parse_purl(purl) if purl else None
            if purl is None or package is None:
                self._skipped["components without a Package URL"] += 1
                continue
            versions = [] if package.version is None else [package.version]
            yield _affected(advisory, purl, _every(versions), versions)

    def _spdx(self, document: _Spdx, source: str) -> Iterator[AffectedPackage]:
        for package in document.packages or ():
            purls = [ref.locator for ref in package.refs or () if ref.type == "purl"]
            yield from self._listed(purls or [None], source)


def _all_components(document: _CycloneDx) -> Iterator[_Component]:
    waiting = list(document.components or ())
    if document.metadata and document.metadata.component:
        waiting += document.metadata.component.components or ()
    while waiting:
        component = waiting.pop()
        waiting += component.components or ()
        yield component


def _affected(
    advisory: Advisory, purl: str, ranges: tuple[Range, ...], versions: list[str]
) -> AffectedPackage:
    package = parse_purl(purl)
    if package is None:
        raise AssertionError
    column = package_column(purl) or ""
    return AffectedPackage(
        advisory,
        package.key,
        ranges,
        tuple(versions),
        column="" if package.key.endswith(f"/{column}") else column,
    )


def _every(versions: list[str]) -> tuple[Range, ...]:
    """Return the range of all versions, if no version is named."""
    return () if versions else (Range((Event("introduced", ALL_VERSIONS),)),)


def _versions(found: list[_AffectedVersion]) -> tuple[tuple[Range, ...], list[str]]:
    """Return the affected ranges and versions. A version of unknown status may be affected."""
    ranges: list[Range] = []
    versions: list[str] = []
    for each in found:
        if each.status == "unaffected":
            continue
        if each.status == "unknown":
            ranges.append(Range((Event("unknown", each.version or each.range or ""),)))
        elif each.range:
            parsed = _vers(each.range)
            ranges += [parsed[0]] if parsed[0].events else []
            versions += parsed[1]
        elif each.version:
            versions.append(each.version)
        else:
            ranges.append(Range((Event("unknown", ""),)))
    return tuple(ranges), versions


def _vers(text: str) -> tuple[Range, list[str]]:
    """Parse a range such as vers:npm/>=1.0.0|<1.3.1. The rules: VERSION-RANGE-SPEC of purl-spec.

    What has no event in the OSV format, such as !=, becomes an unknown event, which is never safe.
    """
    found = _VERS.fullmatch(re.sub(r"\s", "", text))
    if found is None:
        return Range((Event("unknown", text),)), []
    events: list[Event] = []
    versions: list[str] = []
    is_open = False
    for part in found["constraints"].split("|"):
        if part == "*":
            return Range((Event("introduced", ALL_VERSIONS),)), []
        constraint = _CONSTRAINT.fullmatch(part)
        if constraint is None:
            return Range((Event("unknown", text),)), []
        sign, version = constraint["sign"], unquote(constraint["version"])
        if sign in {"", "="}:
            versions.append(version)
            continue
        if sign in {"<", "<="} and not is_open:
            events.append(Event("introduced", ALL_VERSIONS))
        is_open = sign in {">", ">="}
        events.append(Event(_SIGNS.get(sign, "unknown"), version))
    return Range(tuple(events), is_semver=found["scheme"] == "semver"), versions


def _severity(vulnerability: _Vulnerability) -> str:
    for rating in vulnerability.ratings or ():
        if text := rating.severity or rating.vector:
            return text[:_MAX_ID]
    return ""


class _Builder(ET.TreeBuilder):
    """Builds a tree of bounded depth, and rejects a DOCTYPE: entities can expand to gigabytes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source
        self._depth = 0

    def doctype(self, *_: object) -> None:
        raise SourceError(f"{self._source}: an XML document with a DOCTYPE is not allowed.")

    def start(self, tag: Any, attrs: Any, /) -> ET.Element:
        self._depth += 1
        if self._depth > MAX_XML_DEPTH:
            raise SourceError(f"{self._source}: the document is nested too deeply.")
        return super().start(tag.rpartition("}")[2], attrs)  # without the namespace

    def end(self, tag: Any, /) -> ET.Element:
        self._depth -= 1
        return super().end(tag.rpartition("}")[2])


def _parsed_xml(text: bytes, source: str) -> _CycloneDx:
    if len(text) > MAX_XML_BYTES:
        raise SourceError(
            f"{source}: an XML document can have {MAX_XML_BYTES // MEBIBYTE} MiB; use CycloneDX in JSON."
        )
    parser = ET.XMLParser(target=_Builder(source))  # noqa: S314 - the builder rejects what is dangerous
    parser.feed(text)
    root = parser.close()
    if root.tag != "bom":
        raise SourceError(f"{source}: the XML document is not a CycloneDX document.")
    components = [
        _Component(purl=each.findtext("purl"), ref=each.get("bom-ref"))
        for each in root.iterfind(".//components/component")
    ]
    vulnerabilities = [
        _xml_vulnerability(each) for each in root.iterfind("vulnerabilities/vulnerability")
    ]
    return _CycloneDx(components, vulnerabilities)


def _xml_vulnerability(element: ET.Element) -> _Vulnerability:
    affects = [
        _Affects(
            ref=target.findtext("ref") or "",
            versions=[
                _AffectedVersion(
                    each.findtext("version"), each.findtext("range"), each.findtext("status")
                )
                for each in target.iterfind("versions/version")
            ],
        )
        for target in element.iterfind("affects/target")
    ]
    return _Vulnerability(
        id=element.findtext("id"),
        description=element.findtext("description"),
        ratings=[
            _Rating(each.findtext("severity"), each.findtext("vector"))
            for each in element.iterfind("ratings/rating")
        ],
        affects=affects,
        analysis=_Analysis(element.findtext("analysis/state")),
        rejected=element.findtext("rejected"),
    )

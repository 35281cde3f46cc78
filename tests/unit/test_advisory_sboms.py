"""CycloneDX and SPDX documents as sources: their vulnerabilities, or else their components."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component
from cyclonedx.model.impact_analysis import ImpactAnalysisAffectedStatus, ImpactAnalysisState
from cyclonedx.model.vulnerability import (
    BomTarget,
    BomTargetVersionRange,
    Vulnerability,
    VulnerabilityAnalysis,
    VulnerabilityRating,
    VulnerabilitySeverity,
)
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.output.xml import XmlV1Dot6
from packageurl import PackageURL

from exporter.advisories.limits import SourceError
from exporter.advisories.sources import SourceReader

if TYPE_CHECKING:
    from pathlib import Path

_LEFT_PAD, _DEMO = "pkg:npm/left-pad@1.3.0", "pkg:pypi/demo@1.0"


def read(tmp_path: Path, name: str, text: str) -> SourceReader:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    reader = SourceReader()
    reader.read(str(path))
    return reader


def found(reader: SourceReader, purl: str) -> list[tuple[str, str]]:
    return [(match.advisory.id, str(match.verdict)) for match in reader.advisories.match(purl)]


def component(purl: str) -> Component:
    parsed = PackageURL.from_string(purl)
    return Component(
        name=parsed.name, version=parsed.version, purl=parsed, bom_ref=f"ref of {purl}"
    )


def range_of(
    *, version: str | None = None, text: str | None = None, status: str = "affected"
) -> BomTargetVersionRange:
    return BomTargetVersionRange(
        version=version, range=text, status=ImpactAnalysisAffectedStatus(status)
    )


def document(*vulnerabilities: Vulnerability) -> Bom:
    bom = Bom(components=[component(_LEFT_PAD), component(_DEMO), Component(name="no purl")])
    bom.vulnerabilities.update(vulnerabilities)
    return bom


@pytest.fixture(params=["json", "xml"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(tmp_path: Path, form: str, bom: Bom) -> SourceReader:
    """Write the document with the library of the CycloneDX project, and read it."""
    output = JsonV1Dot6(bom) if form == "json" else XmlV1Dot6(bom)
    return read(tmp_path, f"a.cdx.{form}", output.output_as_string())


def test_a_document_without_vulnerabilities_is_a_list(tmp_path: Path, form: str) -> None:
    reader = written(tmp_path, form, document())
    name = f"a.cdx.{form}"
    assert found(reader, _LEFT_PAD) == found(reader, _DEMO) == [(name, "affected")]
    assert found(reader, "pkg:npm/left-pad@1.3.1") == []
    assert reader.summary.skipped == {"components without a Package URL": 1}


def test_vulnerabilities_affect_their_components(tmp_path: Path, form: str) -> None:
    plain = Vulnerability(
        id="V-1",
        description="First\nSecond",
        affects=[BomTarget(ref=f"ref of {_LEFT_PAD}")],
        ratings=[VulnerabilityRating(severity=VulnerabilitySeverity.HIGH)],
    )
    reader = written(tmp_path, form, document(plain))
    assert found(reader, _LEFT_PAD) == [("V-1", "affected")]
    assert found(reader, _DEMO) == []
    (match,) = reader.advisories.match(_LEFT_PAD)
    assert (match.advisory.summary, match.advisory.severity) == ("First", "high")


def test_versions_and_ranges_of_a_vulnerability(tmp_path: Path, form: str) -> None:
    versions = [
        range_of(version="1.1.0"),
        range_of(text="vers:npm/>2.0.0|<=2.5.0"),
        range_of(text="vers:npm/<0.5.0"),
        range_of(text="vers:npm/3.0.0|=3.0.1"),
        range_of(version="1.3.0", status="unaffected"),
    ]
    ranged = Vulnerability(
        id="V-1", affects=[BomTarget(ref=f"ref of {_LEFT_PAD}", versions=versions)]
    )
    reader = written(tmp_path, form, document(ranged))
    verdicts = {
        version: [verdict for _, verdict in found(reader, f"pkg:npm/left-pad@{version}")]
        for version in (
            "0.4.9",
            "0.5.0",
            "1.1.0",
            "1.3.0",
            "2.0.0",
            "2.0.1",
            "2.5.0",
            "2.5.1",
            "3.0.0",
            "3.0.1",
        )
    }
    affected = {version for version, each in verdicts.items() if each == ["affected"]}
    assert affected == {"0.4.9", "1.1.0", "2.0.1", "2.5.0", "3.0.0", "3.0.1"}
    assert not any(verdicts[version] for version in verdicts.keys() - affected)


def test_what_is_not_clear_is_possible(tmp_path: Path, form: str) -> None:
    for versions in (
        [range_of(version="1.3.0", status="unknown")],
        [range_of(text="vers:npm/!=1.2.0")],
        [range_of(text="before 2")],
    ):
        target = BomTarget(ref=f"ref of {_LEFT_PAD}", versions=versions)
        reader = written(tmp_path, form, document(Vulnerability(id="V-1", affects=[target])))
        assert found(reader, _LEFT_PAD) == [("V-1", "possible")]


def test_vulnerabilities_without_effect_are_counted(tmp_path: Path, form: str) -> None:
    ruled_out = Vulnerability(
        id="V-1",
        affects=[BomTarget(ref=f"ref of {_LEFT_PAD}")],
        analysis=VulnerabilityAnalysis(state=ImpactAnalysisState.NOT_AFFECTED),
    )
    reader = written(tmp_path, form, document(ruled_out, Vulnerability(id="V-2")))
    assert found(reader, _LEFT_PAD) == []
    assert reader.summary.skipped == {
        "vulnerabilities that do not affect the product": 1,
        "advisories that name no package": 1,
    }


@pytest.mark.parametrize(
    "ref", [_LEFT_PAD, f"urn:cdx:3e671687-395b-41f5-a30f-a58921a69b79/1#ref%20of%20{_LEFT_PAD}"]
)
def test_a_reference_can_be_a_package_url_or_lead_to_another_document(
    tmp_path: Path, ref: str
) -> None:
    text = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "components": [{"name": "a", "bom-ref": f"ref of {_LEFT_PAD}", "purl": _LEFT_PAD}],
        "vulnerabilities": [{"id": "V-1", "affects": [{"ref": ref}]}],
    }
    assert found(read(tmp_path, "a.json", json.dumps(text)), _LEFT_PAD) == [("V-1", "affected")]


_SPDX = {
    "spdxVersion": "SPDX-2.3",
    "packages": [
        {
            "name": "left-pad",
            "externalRefs": [
                {"referenceType": "cpe23Type", "referenceLocator": "cpe:2.3:a"},
                {"referenceType": "purl", "referenceLocator": _LEFT_PAD},
            ],
        },
        {"name": "demo", "externalRefs": [{"referenceType": "purl", "referenceLocator": _DEMO}]},
        {"name": "no purl"},
    ],
}
_SPDX_3 = {
    "@context": "https://spdx.example/context.jsonld",
    "@graph": [
        {"type": "SpdxDocument"},
        {"type": "software_Package", "software_packageUrl": _LEFT_PAD},
        {"type": "software_Package", "software_packageUrl": _DEMO},
        {"type": "software_Package", "name": "no purl"},
    ],
}
_SPDX_TAGS = f"""SPDXVersion: SPDX-2.3
PackageName: left-pad
ExternalRef: PACKAGE-MANAGER purl {_LEFT_PAD}
PackageName: demo
ExternalRef: PACKAGE_MANAGER purl {_DEMO}
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.spdx.json", json.dumps(_SPDX, indent=1)),
        ("a.spdx.yaml", yaml.safe_dump(_SPDX)),
        ("a.spdx3.json", json.dumps(_SPDX_3)),
        ("a.spdx", _SPDX_TAGS),
    ],
)
def test_spdx_documents_are_lists(tmp_path: Path, name: str, text: str) -> None:
    reader = read(tmp_path, name, text)
    assert found(reader, _LEFT_PAD) == found(reader, _DEMO) == [(name, "affected")]
    assert found(reader, "pkg:npm/left-pad@1.3.1") == []
    without_purl = {} if name == "a.spdx" else {"components without a Package URL": 1}
    assert reader.summary.skipped == without_purl


_BOMB = '<!DOCTYPE bom [<!ENTITY a "x"><!ENTITY b "&a;&a;">]><bom>&b;</bom>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_BOMB, "DOCTYPE is not allowed"),
        ("<bom>" + "<component>" * 1000, "nested too deeply"),
        ("<html></html>", "not a CycloneDX document"),
        ("<bom>", "not a valid document"),
        ("<bom>" + " " * 17_000_000 + "</bom>", "can have 16 MiB"),
    ],
    ids=["doctype", "deep", "html", "cut", "large"],
)
def test_hostile_xml_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(tmp_path, "a.xml", text)


@pytest.mark.parametrize(
    "changes",
    [
        {"components": 7},
        {"components": [{"purl": ["odd"]}]},
        {"vulnerabilities": [{"affects": "x"}]},
    ],
)
def test_a_wrong_type_is_one_clear_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="not a valid document"):
        read(tmp_path, "a.json", json.dumps({"bomFormat": "CycloneDX", **changes}))


def test_nested_components_are_listed_at_any_depth(tmp_path: Path) -> None:
    text = '{"bomFormat": "CycloneDX", "components": [%s]}'
    nested = f'{{"purl": "{_DEMO}"}}'
    for _ in range(50):
        nested = f'{{"components": [{nested}]}}'
    assert found(read(tmp_path, "a.json", text % nested), _DEMO) == [("a.json", "affected")]
    deep = '{"components": [' * 100_000
    with pytest.raises(SourceError, match="nested too deeply"):
        read(tmp_path, "b.json", text % deep)

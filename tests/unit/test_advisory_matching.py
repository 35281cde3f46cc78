"""Which versions an advisory is about: the rules of the OSV schema, and what stays undecided."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from packaging.version import Version

from exporter.advisories.matching import Advisories, Judge
from exporter.advisories.model import Advisory, AffectedPackage, Event, Range, Verdict
from exporter.advisories.osv import OsvReader

pytestmark = pytest.mark.slow

_OSV = Path(__file__).resolve().parents[3] / "shared" / "data" / "osv"
_AFFECTED, _POSSIBLE, _UNAFFECTED = Verdict.AFFECTED, Verdict.POSSIBLE, Verdict.UNAFFECTED
_ADVISORY = Advisory(id="TEST-1", source="test")


def about(
    key: str, *events: str, versions: tuple[str, ...] = (), semver: bool = False
) -> AffectedPackage:
    """What an advisory says about a package; events such as `introduced 1.0`. No events: no range."""
    pairs = (event.split(" ") for event in events)
    found = Range(tuple(Event(kind, version) for kind, version in pairs), is_semver=semver)
    return AffectedPackage(_ADVISORY, key, ranges=(found,) if events else (), versions=versions)


def verdicts(affected: AffectedPackage, *versions: str) -> list[Verdict]:
    judge = Judge(affected)
    return [judge.judge(version) for version in versions]


def test_a_range_starts_at_introduced_and_ends_before_fixed() -> None:
    affected = about("npm/a", "introduced 1.2.0", "fixed 1.4.0", semver=True)
    assert verdicts(
        affected, "1.1.9", "1.2.0-rc.1", "1.2.0", "1.3.9", "1.4.0-rc.1", "1.4.0", "2.0.0"
    ) == [*(_UNAFFECTED, _UNAFFECTED, _AFFECTED, _AFFECTED, _AFFECTED, _UNAFFECTED, _UNAFFECTED)]


def test_a_range_includes_last_affected() -> None:
    affected = about("pypi/a", "introduced 0", "last_affected 1.4")
    assert verdicts(affected, "0.0.1.dev1", "1.4.0", "1.4.post1", "1.5") == [
        *(_AFFECTED, _AFFECTED, _UNAFFECTED, _UNAFFECTED)
    ]


def test_a_range_can_have_several_parts_in_any_order() -> None:
    affected = about("npm/a", "fixed 2.1.0", "introduced 0", "introduced 2.0.0", "fixed 1.1.0")
    assert verdicts(affected, "1.0.0", "1.1.0", "1.9.9", "2.0.0", "2.1.0") == [
        *(_AFFECTED, _UNAFFECTED, _UNAFFECTED, _AFFECTED, _UNAFFECTED)
    ]


def test_a_part_of_a_range_can_begin_where_another_ends() -> None:
    events = ("introduced 1.3.0", "fixed 1.4.0", "introduced 1.2.0", "fixed 1.3.0")
    for order in (events, tuple(reversed(events))):
        affected = about("pypi/a", *order)
        assert verdicts(affected, "1.2.9", "1.3.0", "1.4.0") == [_AFFECTED, _AFFECTED, _UNAFFECTED]


def test_limits_bound_a_range() -> None:
    affected = about("npm/a", "introduced 1.0.0", "limit 2.0.0")
    assert verdicts(affected, "1.9.9", "2.0.0") == [_AFFECTED, _UNAFFECTED]
    assert verdicts(about("npm/a", "introduced 1.0.0", "limit *"), "9.0.0") == [_AFFECTED]


def test_enumerated_versions_count_beside_ranges() -> None:
    affected = about("pypi/a", "introduced 2.0", "fixed 2.1", versions=("1.0", "odd-one"))
    assert verdicts(affected, "1.0.0", "odd-one", "2.0.5", "1.1") == [
        *(_AFFECTED, _AFFECTED, _AFFECTED, _UNAFFECTED)
    ]


@pytest.mark.parametrize("end", ["fixed 2.0.0", "last_affected 2.0.0", "limit 2.0.0"])
def test_a_range_without_a_start_decides_nothing(end: str) -> None:
    assert verdicts(about("npm/a", end, semver=True), "1.0.0", "3.0.0") == [_POSSIBLE, _POSSIBLE]
    nothing = AffectedPackage(_ADVISORY, "npm/a", ranges=(Range(()),))
    assert verdicts(nothing, "1.0.0") == [_POSSIBLE]


def test_a_local_version_may_be_a_build_of_an_affected_one() -> None:
    """PEP 440, "Version matching": without a local part, 2.5.0 means 2.5.0+cpu as well."""
    for affected in (
        about("pypi/torch", versions=("2.5.0",)),
        about("pypi/torch", "introduced 0", "last_affected 2.5.0"),
    ):
        assert verdicts(affected, "2.5.0", "2.5.0+cpu", "2.5.1+cpu") == [
            *(_AFFECTED, _POSSIBLE, _UNAFFECTED)
        ]
    affected = about("pypi/torch", "introduced 0", "fixed 2.5.0+safe", versions=("2.6.0+bad",))
    assert verdicts(affected, "2.5.0+safe", "2.6.0+bad", "2.6.0+good") == [
        *(_UNAFFECTED, _AFFECTED, _UNAFFECTED)
    ]


def test_enumerated_versions_alone() -> None:
    affected = about("npm/a", versions=("1.0.1", "1.0.2"))
    assert verdicts(affected, "1.0.1", "v1.0.2", "1.0.3", "1.0.10") == [
        *(_AFFECTED, _AFFECTED, _UNAFFECTED, _UNAFFECTED)
    ]


def test_all_versions_are_affected_also_without_a_known_one() -> None:
    judge = Judge(about("npm/evil", "introduced 0"))
    assert [judge.judge(version) for version in ("1.0.0", "what", None)] == [_AFFECTED] * 3


@pytest.mark.parametrize(
    ("affected", "version"),
    [
        (about("npm/a", "introduced 0", "fixed 1.0.0"), None),  # the log does not know the version
        (about("npm/a", versions=("1.0.0",)), None),
        (about("npm/a", "introduced 0", "fixed 1.0.0"), "latest"),
        (about("npm/a", "introduced 0", "fixed next"), "1.0.0"),
        (about("npm/a", "introduced 0", "retracted 1.0.0"), "1.0.0"),
        (about("conan/a", "introduced 0", "fixed 1.0"), "0.9"),
        (about("npm/a"), "1.0.0"),  # the advisory does not say which versions
        (about("composer/a/b", "introduced 0", "fixed 1.0"), "dev-main"),
    ],
)
def test_what_cannot_be_compared_is_possible(
    affected: AffectedPackage, version: str | None
) -> None:
    assert Judge(affected).judge(version) == _POSSIBLE


def test_without_rules_versions_are_compared_as_text() -> None:
    affected = about("conan/zlib", versions=("1.2.11",))
    assert verdicts(affected, "1.2.11", "1.2.12") == [_AFFECTED, _UNAFFECTED]


@pytest.mark.parametrize("key", ["deb/debian/curl", "rpm/fedora/curl"])
def test_an_unknown_epoch_is_possible_where_it_matters(key: str) -> None:
    affected = about(key, "introduced 0", "fixed 1:2.0-1")
    # With epoch 0 every version is affected; with epoch 1 only those before 2.0-1 are.
    assert verdicts(affected, "1.5-1", "2.5-1", "0:2.5-1", "1:2.5-1", "1:1.9-1", "2:0.1-1") == [
        *(_AFFECTED, _POSSIBLE, _AFFECTED, _UNAFFECTED, _AFFECTED, _UNAFFECTED)
    ]
    assert verdicts(about(key, "introduced 0", "fixed 2.0-1"), "2.5-1") == [_UNAFFECTED]


def test_a_listed_version_without_the_epoch_of_the_row_is_possible() -> None:
    affected = about("deb/docker/docker-ce", versions=("25.0.2-1", "1:25.0.3-1"))
    assert verdicts(affected, "25.0.2-1", "5:25.0.2-1", "5:25.0.3-1", "1:25.0.3-1") == [
        *(_AFFECTED, _POSSIBLE, _UNAFFECTED, _AFFECTED)
    ]


def test_more_epochs_than_are_tried_leave_a_version_possible() -> None:
    versions = tuple(f"{epoch}:1.0-1" for epoch in range(1, 30))
    affected = about("deb/debian/curl", versions=versions)
    assert verdicts(affected, "1.0-1", "29:1.0-1", "30:1.0-1") == [
        *(_POSSIBLE, _AFFECTED, _UNAFFECTED)
    ]


def test_releases_of_a_distribution_must_agree() -> None:
    in_11 = replace(about("deb/debian/curl", "introduced 0", "fixed 7.74.0-1.3"), release="11")
    in_12 = replace(about("deb/debian/curl", "introduced 0", "fixed 7.88.1-10"), release="12")
    advisories = Advisories([in_11, in_12])
    found = {
        version: [
            match.verdict for match in advisories.match(f"pkg:deb/debian/curl@{version}?arch=amd64")
        ]
        for version in ("7.74.0-1", "7.74.0-2", "7.88.1-10")
    }
    assert found == {"7.74.0-1": [_AFFECTED], "7.74.0-2": [_POSSIBLE], "7.88.1-10": []}


def test_an_advisory_appears_once_with_its_worst_verdict() -> None:
    advisories = Advisories(
        [about("npm/a", "introduced 0", "fixed 1.0.0"), about("npm/a", "introduced 2.0.0")]
    )
    assert [match.verdict for match in advisories.match("pkg:npm/a@2.1.0")] == [_AFFECTED]
    assert advisories.match("pkg:npm/a@1.1.0") == []


def test_names_are_compared_as_their_ecosystem_does() -> None:
    advisories = Advisories(
        about(key, "introduced 0")
        for key in (
            "pypi/foo-bar",
            "npm/@scope/a",
            "nuget/newtonsoft.json",
            "maven/org.x/y",
            "gem/Abc",
        )
    )
    matching = (
        *("pkg:pypi/Foo.Bar@1", "pkg:pypi/foo_bar@1", "pkg:npm/%40scope/a@1.0.0"),
        *("pkg:nuget/Newtonsoft.Json@1", "pkg:maven/org.x/y@1?type=pom", "pkg:gem/Abc@1"),
    )
    others = (
        *(
            "pkg:npm/foo-bar@1",
            "pkg:npm/a@1.0.0",
            "pkg:npm/%40other/a@1.0.0",
            "pkg:maven/org.x.y/y@1",
        ),
        *("pkg:maven/org.X/y@1", "pkg:gem/abc@1", "pkg:pypi/foo-barr@1", "not a purl", "pkg:npm/"),
    )
    assert [bool(advisories.match(purl)) for purl in matching] == [True] * len(matching)
    assert [bool(advisories.match(purl)) for purl in others] == [False] * len(others)


# --- real advisories, which say themselves which versions they are about


@pytest.fixture(scope="module")
def enumerated() -> list[AffectedPackage]:
    """What real advisories say about packages for which they give both ranges and versions."""
    if not _OSV.exists():
        pytest.skip("the sample of OSV data is not here")
    reader = OsvReader()
    lines = (
        line for path in sorted(_OSV.glob("*.jsonl")) for line in path.read_bytes().splitlines()
    )
    found = [each for line in lines for each in reader.read_json(line, "osv")]
    return [each for each in found if each.ranges and each.versions]


# Every listed version that the ranges alone do not match, and why.
_NOT_PEP_440 = {
    "PYSEC-2019-102": 16,  # Limnoria's versions were times
    "PYSEC-2008-3": 1,  # 2.0.0-final
    "PYSEC-2021-121": 1,  # trunk
    "PYSEC-2022-166": 8,  # 0.1-bulbasaur and others
}
_LIST_CONTRADICTS_RANGES = {
    "PYSEC-2023-61": {
        "3.2a1",
        "3.2b1",
        "3.2rc1",
        "4.2a1",
        "4.2b1",
        "4.2rc1",
    }  # before introduced 3.2
}


def test_ranges_match_the_versions_that_real_advisories_list(
    enumerated: list[AffectedPackage],
) -> None:
    checked = 0
    possible: dict[str, int] = {}
    unaffected: dict[str, set[str]] = {}
    for affected in enumerated:
        judge = Judge(replace(affected, versions=()))
        for version in affected.versions:
            checked += 1
            verdict = judge.judge(version)
            if verdict == _POSSIBLE:
                possible[affected.advisory.id] = possible.get(affected.advisory.id, 0) + 1
            elif verdict == _UNAFFECTED:
                unaffected.setdefault(affected.advisory.id, set()).add(version)
    assert checked > 10_000
    assert possible == _NOT_PEP_440
    assert unaffected == _LIST_CONTRADICTS_RANGES


def test_ranges_do_not_match_the_versions_just_outside(enumerated: list[AffectedPackage]) -> None:
    """The version that fixed it, and one before it was introduced: PEP 440 puts X.dev0 before X.

    Without those that a range before that does not end, or ends between the two at a release candidate.
    """
    checked = 0
    for affected in enumerated:
        judge = Judge(replace(affected, versions=()))
        (events,) = [each.events for each in affected.ranges]
        introduced = {event.version for event in events if event.kind == "introduced"}
        for event in events:
            if event.kind == "fixed" and event.version not in introduced:
                assert judge.judge(event.version) == _UNAFFECTED, (affected.advisory.id, event)
                checked += 1
            elif event.kind == "introduced" and event.version != "0":
                before, start = Version(f"{event.version}.dev0"), Version(event.version)
                earlier = [each for each in events if Version(each.version) < start]
                last = max(earlier, key=lambda each: Version(each.version), default=None)
                if last is None or (last.kind == "fixed" and Version(last.version) <= before):
                    assert judge.judge(str(before)) == _UNAFFECTED, (affected.advisory.id, event)
                    checked += 1
    assert checked > 300


def test_listed_versions_match_with_ranges_and_list(enumerated: list[AffectedPackage]) -> None:
    for affected in enumerated:
        judge = Judge(affected)
        assert {judge.judge(version) for version in affected.versions} == {_AFFECTED}

"""Decide whether advisories are about a version. The rules: OSV schema, "Evaluation"."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from .model import ALL_VERSIONS, EVENT_KINDS, Verdict
from .names import DISTRIBUTIONS, parse_purl, search_key
from .versions import SEMVER, UncomparableError, scheme_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .model import Advisory, AffectedPackage, Range
    from .versions import Scheme

_CACHED_KEYS = 50_000
_CACHED_STARTS = 500_000  # these take 100 MB
_NOT_CACHED: list[AffectedPackage] = []
# Different epochs in one advisory that are tried. With more, a version without an epoch is possible.
_MAX_EPOCHS = 8


class Match(NamedTuple):
    """An advisory that is, or may be, about a version of a package."""

    advisory: Advisory
    verdict: Verdict


class Advisories:
    """Advisories by the packages that they name. Not thread-safe."""

    def __init__(self, affected: Iterable[AffectedPackage] = ()) -> None:
        self._by_key: dict[str, list[AffectedPackage]] = {}
        self._judges: dict[int, Judge] = {}  # by id; made when a package of this name was fetched
        self._by_start: dict[str, list[AffectedPackage] | None] = {}  # by start of a purl; a cache
        for each in affected:
            self.add(each)

    def add(self, affected: AffectedPackage) -> None:
        """Add what one advisory says about one package."""
        self._by_key.setdefault(affected.key, []).append(affected)
        self._by_start.clear()

    def __len__(self) -> int:
        """Number of different packages."""
        return len(self._by_key)

    def __iter__(self) -> Iterator[AffectedPackage]:
        """Iterate over what all advisories say about all packages."""
        return itertools.chain.from_iterable(self._by_key.values())

    def source_packages(self) -> int:
        """Number of packages of distributions that are named by release, and so by their source package."""
        named = self._by_key.values()
        return sum(any(each.release is not None for each in affected) for affected in named)

    def search_keys(self) -> set[str]:
        """Return the search keys of all packages."""
        return set(map(search_key, self._by_key))

    def columns(self) -> set[str]:
        """Return the values of the column package that rows of these packages have."""
        keys = {key.partition("/")[2] for key in self._by_key}
        return keys | {each.column for found in self._by_key.values() for each in found} - {""}

    def match(self, purl: str) -> list[Match]:
        """Return the advisories that are about a purl, or may be. Each appears once."""
        # Most of millions of purls have a start that came before, or that nothing names.
        start = purl.partition("@")[0]
        affected = self._by_start.get(start, _NOT_CACHED)
        if affected is None:
            return []
        package = parse_purl(purl)
        if affected is _NOT_CACHED:
            affected = None if package is None else self._by_key.get(package.key)
            if len(self._by_start) >= _CACHED_STARTS:
                self._by_start.clear()
            self._by_start[start] = affected
        if affected is None or package is None:
            return []
        found: dict[str, tuple[Advisory, set[Verdict]]] = {}
        for each in affected:
            _, verdicts = found.setdefault(each.advisory.id, (each.advisory, set()))
            verdicts.add(self._judge(each).judge(package.version))
        is_distribution = package.key.partition("/")[0] in DISTRIBUTIONS
        matches = (
            Match(advisory, _together(verdicts, is_distribution=is_distribution))
            for advisory, verdicts in found.values()
        )
        return [match for match in matches if match.verdict != Verdict.UNAFFECTED]

    def _judge(self, affected: AffectedPackage) -> Judge:
        judge = self._judges.get(id(affected))
        if judge is None:
            judge = self._judges[id(affected)] = Judge(affected)
        return judge


def _together(verdicts: set[Verdict], *, is_distribution: bool) -> Verdict:
    """Combine what an advisory says in several places about one version.

    For a distribution these places are its releases. The log does not know the release, so they must agree.
    """
    if len(verdicts) == 1:
        return next(iter(verdicts))
    if Verdict.AFFECTED in verdicts and not is_distribution:
        return Verdict.AFFECTED
    return Verdict.POSSIBLE


class Judge:
    """Decides about versions of one package for one advisory."""

    def __init__(self, affected: AffectedPackage) -> None:
        self._affected = affected
        self._scheme = scheme_of(affected.key.partition("/")[0])
        self._ranges = [_ParsedRange(each, self._scheme) for each in affected.ranges]
        self._texts = frozenset(affected.versions)
        keys = [_key(self._scheme, version) for version in affected.versions]
        self._has_unordered = any(key is None for key in keys)
        self._keys = sorted(key for key in keys if key is not None)
        self._epochs = self._find_epochs()
        self._ignores_local = affected.key.startswith("pypi/") and not self._names_local()

    def judge(self, version: str | None) -> Verdict:
        """Decide whether a version is affected. None: the version is not known."""
        affected = self._affected
        if affected.covers_all_versions or version in self._texts:
            return Verdict.AFFECTED
        if version is None or not (affected.ranges or affected.versions):
            return Verdict.POSSIBLE
        # A file name omits the epoch. The advisory must mean the same with every epoch that it knows.
        candidates = [version]
        if self._epochs and ":" not in version:
            if len(self._epochs) > _MAX_EPOCHS:
                return Verdict.POSSIBLE
            candidates += [f"{epoch}:{version}" for epoch in self._epochs]
        if self._ignores_local and "+" in version:
            candidates.append(version.partition("+")[0])
        verdicts = set(map(self._judge_candidate, candidates))
        if verdicts == {Verdict.UNAFFECTED} and self._scheme.has_epoch:
            # Somebody may have listed a version as the file name has it, which omits the epoch.
            _, epoch, rest = version.partition(":")
            if epoch and rest in self._texts:
                return Verdict.POSSIBLE
        return verdicts.pop() if len(verdicts) == 1 else Verdict.POSSIBLE

    def _names_local(self) -> bool:
        """Return whether the advisory tells local versions such as 2.5.0+cpu from 2.5.0.

        If not, these can be builds of the affected version (PEP 440, "Version matching", ignores the local part).
        """
        return any("+" in text for text in self._named_versions())

    def _find_epochs(self) -> list[str]:
        if not self._scheme.has_epoch:
            return []
        epochs = {text.partition(":")[0] for text in self._named_versions() if ":" in text}
        return sorted(epochs - {"0"})

    def _named_versions(self) -> Iterator[str]:
        for each in self._affected.ranges:
            yield from (event.version for event in each.events)
        yield from self._affected.versions

    def _judge_candidate(self, version: str) -> Verdict:
        verdicts = {self._judge_listed(version), *(each.judge(version) for each in self._ranges)}
        for verdict in (Verdict.AFFECTED, Verdict.POSSIBLE):
            if verdict in verdicts:
                return verdict
        return Verdict.UNAFFECTED

    def _judge_listed(self, version: str) -> Verdict:
        """Compare with the enumerated versions, which can be written otherwise: 1.0 is 1.0.0 on PyPI.

        Where an ecosystem has no known rules, the same version always has the same text.
        """
        key = _key(self._scheme, version)
        if key is None:
            is_unclear = self._has_unordered and self._scheme.has_rules
            return Verdict.POSSIBLE if is_unclear else Verdict.UNAFFECTED
        place = bisect_left(self._keys, key)
        is_listed = place < len(self._keys) and self._keys[place] == key
        return Verdict.AFFECTED if is_listed else Verdict.UNAFFECTED


class _ParsedRange:
    """A range whose events are sorted by version."""

    def __init__(self, each: Range, scheme: Scheme) -> None:
        self._scheme = SEMVER if each.is_semver else scheme
        # OSV schema, "events": a range has to start. Without a start it is not known what is meant.
        self._is_ordered = any(event.kind in {"introduced", "after"} for event in each.events)
        self._limits: list[Any] = []
        self._starts_before_all = False
        events: list[tuple[Any, str]] = []
        for event in each.events:
            if event.kind == "introduced" and event.version == ALL_VERSIONS:
                self._starts_before_all = True
            elif not (event.kind == "limit" and event.version == "*"):
                key = _key(self._scheme, event.version)
                self._is_ordered &= key is not None and event.kind in EVENT_KINDS
                if event.kind == "limit":
                    self._limits.append(key)
                else:
                    events.append((key, event.kind))
        # Where one part ends and the next begins, the version belongs to the next.
        by_version = sorted(events, key=lambda event: event[1] == "introduced")
        self._events = sorted(by_version, key=lambda event: event[0]) if self._is_ordered else []

    def judge(self, version: str) -> Verdict:
        key = _key(self._scheme, version)
        if key is None or not self._is_ordered:
            return Verdict.POSSIBLE
        if self._limits and all(key >= limit for limit in self._limits):
            return Verdict.UNAFFECTED
        is_affected = self._starts_before_all
        for place, kind in self._events:
            if kind == "introduced":
                is_affected |= key >= place
            elif kind == "after":
                is_affected |= key > place
            elif (kind == "fixed" and key >= place) or (kind == "last_affected" and key > place):
                is_affected = False
        return Verdict.AFFECTED if is_affected else Verdict.UNAFFECTED


@lru_cache(maxsize=_CACHED_KEYS)
def _key(scheme: Scheme, version: str) -> Any:
    """Return the version's place in the order, or None if it has none."""
    try:
        return scheme.key(version)
    except UncomparableError:
        return None

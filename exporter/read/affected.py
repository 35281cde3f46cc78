"""Find out which fetched packages advisories are about, and who fetched them. Formats nothing."""

from __future__ import annotations

import re
from datetime import datetime  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING

from msgspec import Struct

from ..advisories.matching import Advisories, Match
from ..advisories.model import Verdict
from ..advisories.names import package_column, parse_purl
from ..advisories.sources import SourceSummary
from .advisory_store import load_kept
from .archived import rows_loaded
from .fetched import (
    EverFetched,
    Fetches,
    Looks,
    PrunedFetches,
    count_fetched,
    ever_fetched,
    fetched_purls,
    fetches_of,
    log_start,
    looks_at,
    pruned_fetches,
    remembered_fetches,
    seen_purls,
)
from .gaps import GapSummary, gap_summary
from .kept_advisories import KeptState, kept_state
from .session import read_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from ..postgres.connection import DeadlineConnection
    from .selection import Selection

_STATEMENT_SECONDS = 600.0
_MAX_NAMED = 500  # with more packages in advisories, reading all names at once is faster
_TOP_GAPS = 10
_REPORT_EVERY = 20_000  # packages


class AboutAdvisory(Struct, frozen=True):
    """The advisory of a finding."""

    id: str
    source: str
    summary: str
    severity: str
    aliases: str
    withdrawn: str


class Hit(Struct, frozen=True, kw_only=True):
    """A fetched package that an advisory is about, or may be."""

    advisory: AboutAdvisory
    verdict: Verdict
    purl: str
    package: str
    version: str | None
    fetches: Fetches | None  # None: no rows
    pruned: PrunedFetches | None  # on days whose rows were pruned; None: not known, or none
    ever: EverFetched | None  # all fetches, if the rows of some were removed

    @property
    def has_missing_rows(self) -> bool:
        """Whether fetches are known whose rows were removed."""
        return self.pruned is not None or (
            self.ever is not None
            and (self.fetches is None or self.ever.fetches > self.fetches.requests)
        )

    @property
    def users(self) -> list[str]:
        """Who fetched it, as far as it is known and listed."""
        found = [each.users for each in (self.fetches, self.pruned) if each is not None]
        return sorted({user for users in found for user in users})

    @property
    def anonymous_clients(self) -> list[str]:
        """The addresses from which it was fetched without a login, as far as they are listed."""
        return [] if self.fetches is None else self.fetches.anonymous_clients


class LookedAt(Struct, frozen=True, kw_only=True):
    """Requests for a package that an advisory is about, which did not fetch it."""

    advisory: AboutAdvisory
    verdict: Verdict
    package: str
    version: str | None
    looks: Looks


class Affected(Struct, frozen=True, kw_only=True):
    """The answer: hits first by verdict, then by advisory."""

    since: datetime | None
    until: datetime | None
    filters: dict[str, str]
    log_start: (
        datetime | None
    )  # the oldest row; earlier fetches are known only without who made them
    files: int
    advisories: int
    packages: int
    skipped: dict[str, int]
    source_packages: int  # of distributions: binary packages with other names were not compared
    checked: int  # fetched packages that were compared
    unattributed: int  # affected packages with removed rows, which might be among the selected ones
    hits: list[Hit]
    looked_at: list[LookedAt]
    gaps: GapSummary
    kept: KeptState | None = None  # if the advisories are those that are kept

    @property
    def is_uncertain(self) -> bool:
        """Whether "no" would be too much to say."""
        return bool(
            not self.packages  # nothing was compared
            or self.gaps.gaps
            or self.unattributed
            or any(hit.verdict == Verdict.POSSIBLE for hit in self.hits)
        )

    @property
    def is_hit(self) -> bool:
        """Whether an affected version was fetched."""
        return any(hit.verdict == Verdict.AFFECTED for hit in self.hits)


class Comparison(Struct, frozen=True):
    """Which packages ever fetched the advisories are about."""

    matches: dict[str, list[Match]]  # by Package URL
    checked: int  # fetched packages that were compared
    fetched: int  # all packages ever fetched; the others have none of the names


def compare(
    connection: DeadlineConnection,
    advisories: Advisories,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare every package ever fetched with the advisories.

    Args:
        connection: To the database.
        advisories: What to look for.
        on_progress: Called with the numbers of fetched packages compared so far and in total.

    Raises:
        psycopg.Error, DeadlineExceededError: a query failed, took too long, or lost its connection.
    """
    keys = advisories.search_keys() if len(advisories) <= _MAX_NAMED else None
    matches: dict[str, list[Match]] = {}
    checked = 0
    with read_only(connection, _STATEMENT_SECONDS):
        fetched = count_fetched(connection)
        for checked, purl in enumerate(fetched_purls(connection, keys), 1):
            if found := advisories.match(purl):
                matches[purl] = found
            if on_progress is not None and checked % _REPORT_EVERY == 0:
                on_progress(checked, fetched)
    return Comparison(matches, checked, fetched)


def find_affected(
    connection: DeadlineConnection,
    advisories: Advisories,
    summary: SourceSummary,
    selection: Selection,
    comparison: Comparison,
    *,
    kept: KeptState | None = None,
    archive: Path | None = None,
) -> Affected:
    """Find out who fetched the packages that advisories are about, in one snapshot of the database.

    Args:
        connection: To the database.
        advisories: What to look for.
        summary: What was read from the sources.
        selection: Which requests count.
        comparison: What `compare` returned for these advisories.
        kept: How old they are, if they are those that are kept.
        archive: The folder of archived days to search as well.

    Raises:
        ArchiveError: the archive cannot be read, or too many of its rows are selected.
        psycopg.Error, DeadlineExceededError: a query failed, took too long, or lost its connection.
    """
    matches = comparison.matches
    with rows_loaded(connection, archive, selection), read_only(connection, _STATEMENT_SECONDS):
        start = log_start(connection)
        removed = {
            purl: ever
            for purl, ever in ever_fetched(connection, matches).items()
            if _has_removed_rows(ever, selection, start) and _may_be_selected(purl, selection)
        }
        fetches = fetches_of(connection, selection, matches)
        can_know = selection.filters().keys() <= {"user"}
        pruned = pruned_fetches(connection, selection, removed) if can_know else {}
        # Only without filters is the view artifact enough to say that somebody fetched a package.
        ever = {} if selection.filters() else removed
        sure = {purl for purl, each in ever.items() if _is_in_time(each, selection)}
        purls = fetches.keys() | pruned.keys() | sure
        hits = list(_hits(matches, purls, fetches, pruned, ever))
        unknown = {purl: each for purl, each in removed.items() if purl not in purls}
        unattributed = _unattributed(connection, selection, unknown)
        looks = list(_looks(connection, selection, advisories))
        gaps = gap_summary(connection, selection, _TOP_GAPS)
    return Affected(
        since=selection.since,
        until=selection.until,
        filters=selection.filters(),
        log_start=start,
        files=summary.files,
        advisories=summary.advisories,
        packages=summary.packages,
        skipped=summary.skipped,
        source_packages=advisories.source_packages(),
        checked=comparison.checked,
        unattributed=unattributed,
        hits=sorted(hits, key=lambda hit: (hit.verdict, hit.advisory.id, hit.purl)),
        looked_at=sorted(
            looks, key=lambda look: (look.advisory.id, look.looks.purl, look.looks.how)
        ),
        gaps=gaps,
        kept=kept,
    )


def load_advisories(connection: DeadlineConnection) -> tuple[KeptState | None, Advisories]:
    """Return the kept advisories and how old they are. Raises as `compare`."""
    with read_only(connection, _STATEMENT_SECONDS):
        state = kept_state(connection)
        return state, load_kept(connection) if state is not None else Advisories()


def stored_summary(state: KeptState) -> SourceSummary:
    """Return what sources with the kept advisories would hold."""
    return SourceSummary(0, state.advisories, state.packages, {})


def _hits(
    matches: dict[str, list[Match]],
    purls: Iterable[str],
    fetches: dict[str, Fetches],
    pruned: dict[str, PrunedFetches],
    ever: dict[str, EverFetched],
) -> Iterator[Hit]:
    for purl in purls:
        package, version = _named(purl)
        for match in matches[purl]:
            yield Hit(
                advisory=_about(match),
                verdict=match.verdict,
                purl=purl,
                package=package,
                version=version,
                fetches=fetches.get(purl),
                pruned=pruned.get(purl),
                ever=ever.get(purl),
            )


def _unattributed(
    connection: DeadlineConnection, selection: Selection, unknown: dict[str, EverFetched]
) -> int:
    """Return for how many packages it is unknown whether removed fetches are among the selected ones."""
    if selection.filters().keys() != {"user"}:
        return len(unknown)
    remembered = remembered_fetches(connection, unknown)
    return sum(ever.fetches > remembered.get(purl, 0) for purl, ever in unknown.items())


def _may_be_selected(purl: str, selection: Selection) -> bool:
    """Return whether the filter `package` can select a purl. Case is ignored, to be on the safe side."""
    if selection.package is None:
        return True
    pattern = ".*".join(map(re.escape, selection.package.split("*")))
    return re.fullmatch(pattern, package_column(purl) or "", re.IGNORECASE) is not None


def _is_in_time(ever: EverFetched, selection: Selection) -> bool:
    """Return whether one of the fetches is in the selected time for sure."""
    return any(
        (selection.since is None or at >= selection.since)
        and (selection.until is None or at < selection.until)
        for at in (ever.first_at, ever.last_at)
    )


def _has_removed_rows(ever: EverFetched, selection: Selection, start: datetime | None) -> bool:
    """Return whether some of the fetches can be in the selected time, but are not in the log any more.

    `start` is the oldest row of the log.
    """
    if start is not None and (
        ever.first_at >= start or (selection.since is not None and selection.since >= start)
    ):
        return False
    if selection.since is not None and ever.last_at < selection.since:
        return False
    return selection.until is None or ever.first_at < selection.until


def _looks(
    connection: DeadlineConnection, selection: Selection, advisories: Advisories
) -> Iterator[LookedAt]:
    packages = advisories.columns() if len(advisories) <= _MAX_NAMED else None
    matches: dict[str, list[Match]] = {}
    for purl in seen_purls(connection, selection, packages):
        if found := advisories.match(purl):
            matches[purl] = found
    for looks in looks_at(connection, selection, matches):
        package, version = _named(looks.purl)
        for match in matches[looks.purl]:
            yield LookedAt(
                advisory=_about(match),
                verdict=match.verdict,
                package=package,
                version=version,
                looks=looks,
            )


def _about(match: Match) -> AboutAdvisory:
    advisory = match.advisory
    return AboutAdvisory(
        advisory.id,
        advisory.source,
        advisory.summary,
        advisory.severity,
        advisory.aliases,
        advisory.withdrawn,
    )


def _named(purl: str) -> tuple[str, str | None]:
    found = parse_purl(purl)
    return (purl, None) if found is None else found

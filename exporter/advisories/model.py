"""What an advisory says, from whatever source: which versions of which packages it is about."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

# As in the OSV schema; and "after", which is introduced without the version itself.
EVENT_KINDS = frozenset({"introduced", "after", "fixed", "last_affected", "limit"})
ALL_VERSIONS = "0"  # OSV schema, "events": 0 stands for a version before any other


class Verdict(StrEnum):
    """Whether an advisory is about a version."""

    AFFECTED = "affected"
    POSSIBLE = "possible"  # it cannot be decided: never to be read as safe
    UNAFFECTED = "unaffected"


class Event(Struct, frozen=True, gc=False):
    """Where a range starts or ends. `kind` is one of EVENT_KINDS, or else unknown to us."""

    kind: str
    version: str


class Range(Struct, frozen=True):
    """The versions between events. `is_semver`: Semantic Versioning, not the ecosystem's own rules."""

    events: tuple[Event, ...]
    is_semver: bool = False


class Advisory(Struct, frozen=True, gc=False):
    """An advisory, or a list of packages that somebody published."""

    id: str
    source: str  # the file that it is from
    summary: str = ""
    severity: str = ""
    aliases: str = ""  # separated by ", "
    withdrawn: str = ""  # when
    modified: str = ""


class AffectedPackage(Struct, frozen=True):
    """The versions of one package that an advisory is about. Neither ranges nor versions: unknown ones."""

    advisory: Advisory
    key: str  # names.package_key
    ranges: tuple[Range, ...] = ()
    versions: tuple[str, ...] = ()
    release: str | None = None  # of a distribution, such as 12 of Debian
    column: str = ""  # the column package of its rows, if that is not the key without its type

    @property
    def covers_all_versions(self) -> bool:
        """Whether every version is affected, also those that cannot be compared."""
        return any(
            len(each.events) == 1 and each.events[0] == Event("introduced", ALL_VERSIONS)
            for each in self.ranges
        )

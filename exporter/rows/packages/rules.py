"""Define remotes and the rules of their formats, and match paths against them. Reads no files.

Patterns use RE2 instead of Python's `re`: matching takes time linear in the length of the path, so
neither a client nor an inefficient rule can block the caller. RE2 rejects what it can't match in
linear time (back-references, look-around). RE2's doc/syntax.txt describes the syntax.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import re2

from .distributions import vendor_of_repository

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .purl_template import PurlTemplate

KINDS = ("artifact", "index", "sidecar", "blob", "api")

# Values that a rule's purl can use in addition to the groups of its pattern.
CONTEXT_NAMES = frozenset({"host", "base", "folder", "vendor", "distribution", "digest"})

# Formats that have rules of all others
ANY = "any"  # for a mirror of unknown kind: the rules that allow it
CERTAIN = "certain"  # for an unknown host: the rules that no other registry's paths match

# Limits the size of one compiled pattern, and so the time per byte of path.
_PATTERN_BYTES = 512 * 1024
_SET_BYTES = 4 * 1024 * 1024
# For the rules of all formats together. With less, RE2 keeps discarding its cached states, which
# makes the paths of mirrors ten times slower.
LARGE_SET_BYTES = 16 * 1024 * 1024


def _options(max_bytes: int) -> Any:
    options = re2.Options()
    options.log_errors = False  # errors are raised as exceptions
    options.max_mem = max_bytes
    return options


class Pattern:
    """One RE2 pattern. Immutable and thread-safe.

    The methods take UTF-8 and return the values of the named groups, or None without a match.
    """

    def __init__(self, text: str) -> None:
        """Compile a pattern.

        Raises:
            ValueError: RE2 rejects the pattern; the message says why.
        """
        try:
            self._compiled = re2.compile(text.encode(), _options(_PATTERN_BYTES))
        except re2.error as e:
            raise ValueError(_decode(e)) from e
        self._text = text
        groups = self._compiled.groupindex.items()
        self._group_numbers = [(_decode(name), number) for name, number in groups]
        self.groups = tuple(sorted(name for name, _ in self._group_numbers))

    @property
    def without_names(self) -> str:
        """The pattern with all its groups unnamed, so that it can be part of another one."""
        return re.sub(r"\(\?P<\w+>", "(?:", self._text)

    def search(self, text: bytes) -> dict[str, str | None] | None:
        """Find the first match anywhere in `text`."""
        return self._group_values(self._compiled.search(text))

    def match(self, text: bytes) -> dict[str, str | None] | None:
        """Match at the start of `text`."""
        return self._group_values(self._compiled.match(text))

    def fullmatch(self, text: bytes) -> dict[str, str | None] | None:
        """Match the whole `text`."""
        return self._group_values(self._compiled.fullmatch(text))

    def _group_values(self, match: Any) -> dict[str, str | None] | None:
        if match is None:
            return None
        text = match.string
        values: dict[str, str | None] = {}
        for name, number in self._group_numbers:
            start, end = match.span(number)
            values[name] = None if start < 0 else text[start:end].decode()
        return values


class TooLargeError(Exception):
    """A set of patterns, each valid by itself, needs too much memory."""


class PatternSet:
    """Patterns that are matched together in one pass. Immutable and thread-safe."""

    def __init__(self, patterns: Iterable[str], max_bytes: int = _SET_BYTES) -> None:
        """Compile the patterns.

        Args:
            patterns: RE2 patterns that `Pattern` accepts.
            max_bytes: limit for the memory of the set, also while it matches.

        Raises:
            TooLargeError: the set needs more than `max_bytes`.
        """
        self._set = re2.Set.SearchSet(_options(max_bytes))
        try:
            for pattern in patterns:
                self._set.Add(pattern.encode())
            self._set.Compile()
        except re2.error as e:
            raise TooLargeError(_decode(e)) from e

    def matching(self, text: bytes) -> list[int]:
        """Return the indexes of the patterns that match anywhere in `text`, in ascending order."""
        return sorted(self._set.Match(text) or ())  # an empty set returns None


class Template:
    """Text with `{group}` placeholders. Immutable and thread-safe."""

    def __init__(self, template: str) -> None:
        self.text = template
        self._pieces = re.split(r"\{([a-z_][a-z0-9_]*)\}", template)
        self.names = frozenset(self._pieces[1::2])

    def fill(self, values: Mapping[str, str | None]) -> str:
        """Return the text with each placeholder replaced by its value, or by nothing."""
        if not self.names:
            return self._pieces[0]
        return "".join(
            (values.get(piece) or "") if index % 2 else piece
            for index, piece in enumerate(self._pieces)
        )


class Refinement(NamedTuple):
    """A second match, on the value of one group: the key `then` of a rule."""

    group: str
    after: Template  # what the value must start with
    pattern: Pattern  # what all of the rest must match
    ignores_case: bool  # of what `after` says


class Rule(NamedTuple):
    """How to get a package from paths of one form."""

    label: str  # format#number, counted from 1
    source: str  # the text of `pattern`
    pattern: Pattern
    refinement: Refinement | None
    kind: str
    purl: PurlTemplate | None
    required_context: frozenset[str]  # members of CONTEXT_NAMES that the purl requires

    def match(self, path: bytes) -> dict[str, str | None] | None:
        """Return the values of all groups, or None if the path does not match."""
        values = self.pattern.search(path)
        if values is None or self.refinement is None:
            return values
        value, start = values[self.refinement.group] or "", self.refinement.after.fill(values)
        found = value[: len(start)]
        if found != start and not (self.refinement.ignores_case and found.lower() == start.lower()):
            return None
        refined = self.refinement.pattern.fullmatch(value[len(start) :].encode())
        return None if refined is None else values | refined


class RuleSet:
    """The rules of a format, in order. Immutable and thread-safe."""

    def __init__(self, rules: Sequence[Rule], max_bytes: int = _SET_BYTES) -> None:
        self.rules = tuple(rules)
        self._max_bytes = max_bytes

    @cached_property
    def patterns(self) -> PatternSet:
        """The patterns of all rules. Compiled when they are first used.

        Raises:
            TooLargeError: they need too much memory.
        """
        return PatternSet((rule.source for rule in self.rules), self._max_bytes)

    def candidates(self, path: bytes) -> list[Rule]:
        """Return the rules whose pattern matches the path, in order."""
        return [self.rules[index] for index in self.patterns.matching(path)]


# Where on its host a remote begins: plain text, or a pattern with a group `folder` that is matched
# at the start of the path.
Folder = str | Pattern


class RemoteMatch(NamedTuple):
    """A path that belongs to a remote, split into the remote's folder and the rest."""

    name: str
    rules: RuleSet | None  # None: paths of this remote are not identified
    prefix: str  # the folder where the remote begins
    path: str  # the rest of the path
    vendor: str | None
    is_guess: bool
    repository: str | None = None  # the part of the folder that names it

    def distribution(self, purl_type: str) -> str | None:
        """Return the vendor of packages of this type that the repository's name tells; None: unknown."""
        return self.repository and vendor_of_repository(self.repository, purl_type)


class RuleSets(NamedTuple):
    """The compiled rules of all formats."""

    by_format: Mapping[
        str, RuleSet
    ]  # also aliases, `certain`, and `any` for a remote with a folder
    any_at_root: RuleSet  # `any` for a whole host
    # By format, for a guess: the rules for the format that the path names, and those for a format
    # that only the remote names.
    if_path_names_format: Mapping[str, RuleSet]
    distinctive: Mapping[str, RuleSet]


class Remote(NamedTuple):
    """One remote."""

    name: Template
    host: str | None  # RE2 pattern for host:port, anchored; None: any host
    folders: tuple[Folder, ...]
    format: str | None
    rule_sets: RuleSets
    vendor: str | None
    is_guess: bool  # belongs to the remote only if a rule matches
    needs_oci_response: bool  # and only if the response is a registry's

    def match(self, path: str, authority: str) -> RemoteMatch | None:
        """Match a path against the folders of this remote; the first one that matches wins.

        `authority` is the host with its port, for the name of the remote.
        """
        for folder in self.folders:
            values: Mapping[str, str | None] = {}
            if isinstance(folder, str):
                rest = path.removeprefix(folder)
                if folder and (rest == path or rest[:1] not in {"", "/"}):
                    continue
                prefix = folder
            else:
                found = folder.match(path.encode())
                if found is None:
                    continue
                values, prefix = found, found["folder"] or ""
                rest = path.removeprefix(prefix)
            return RemoteMatch(
                self.name.fill({"host": authority, **values} if self.name.names else {}),
                self._rules(values.get("format"), prefix),
                prefix,
                rest,
                values.get("vendor") or self.vendor,
                self.is_guess,
                values.get("repo"),
            )
        return None

    @property
    def path_pattern(self) -> str:
        """RE2 pattern that finds paths in the folders of this remote; it may find others."""
        alternatives = [
            f"{re.escape(folder)}(?:/|$)" if isinstance(folder, str) else folder.without_names
            for folder in self.folders
        ]
        return f"^(?:{'|'.join(alternatives)})"

    def _rules(self, format_in_path: str | None, prefix: str) -> RuleSet | None:
        sets = self.rule_sets
        by_format = sets.if_path_names_format if self.is_guess else sets.by_format
        for name in (format_in_path, (format_in_path or "").lower()):
            if name and name in by_format:
                return by_format[name]
        if self.format is None:
            return None
        if self.format == ANY and not prefix:
            return sets.any_at_root
        return (sets.distinctive if self.is_guess else sets.by_format)[self.format]


def parse_folder(text: str) -> Folder:
    """Parse the key `path` of a remote; "/" means the whole host.

    A folder matches only whole segments of a path.

    Raises:
        ValueError: RE2 rejects the pattern; the message says why.
    """
    if re.fullmatch(r"[\w/-]*", text):
        return text.rstrip("/")
    Pattern(text)  # checked alone first, so that the message quotes the user's text
    return Pattern(f"(?P<folder>{text})(?:/|$)")


def host_pattern(globs: Sequence[str]) -> str:
    """Turn globs for host names into an RE2 pattern for `host:port`.

    In a glob, * matches one label or part of one, and ** matches one or more labels. At the end, .**
    also matches nothing, because services in one network often have names without a domain. A glob
    may end in a port; otherwise it matches any port. A literal IPv6 address needs brackets before a
    port.

    Raises:
        ValueError: a glob is not valid. The message is the end of a sentence.
    """
    alternatives = []
    for glob in globs:
        parts = _HOST_GLOB.fullmatch(glob)
        if parts is None:
            raise ValueError(
                f"has the host {glob!r}, expected a lower-case name that may contain * and ** and "
                "end in a port"
            )
        port = parts["port"] or r"\d+"
        if parts["port"] and not 0 < int(parts["port"]) <= _MAX_PORT:
            raise ValueError(f"has the host {glob!r}, expected a port from 1 to {_MAX_PORT}")
        pieces = re.split(
            r"(\.\*\*$|\*\*|\*)", parts["name"] or parts["bracketed"] or parts["ipv6"]
        )
        name = "".join(_WILDCARDS.get(piece) or re.escape(piece) for piece in pieces)
        alternatives.append(f"{name}:{port}")
    return f"^(?:{'|'.join(alternatives)})$"


_MAX_PORT = 65_535
_IPV6 = r"[0-9a-f.]*(?::[0-9a-f.]*){2,}"
_HOST_GLOB = re.compile(
    rf"(?:(?P<name>[a-z0-9._*-]+)|\[(?P<bracketed>{_IPV6})\])(?::(?P<port>[0-9]{{1,5}}))?|(?P<ipv6>{_IPV6})"
)
_WILDCARDS = {"*": "[^.]+", "**": "[^.]+(?:[.][^.]+)*", ".**": "(?:[.][^.]+)*"}


def _decode(text: object) -> str:
    """Return a name or an error of re2, which uses bytes, as text."""
    if isinstance(text, re2.error):
        text = text.args[0]
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)

"""Match one path against the rules of a format and name the package; reads no file.

Patterns are RE2's, not Python's: matching takes time linear in the path whatever the pattern and
whatever the path, so that neither a client nor a careless rule can hold up who asks. What RE2 can't
do in linear time (back-references, look-around) it refuses when a pattern is compiled.

The syntax is described in RE2's own doc/syntax.txt.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import re2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .purl_template import PurlTemplate

KINDS = ("artifact", "index", "sidecar", "blob", "api")

# Values a rule's purl may use beside the groups of its own pattern.
GIVEN = frozenset({"host", "base", "vendor", "digest"})

# Bounds the program of one pattern, and with it the time a byte of path may take.
_PATTERN_MEMORY = 512 * 1024
_SET_MEMORY = 4 * 1024 * 1024
# Of a set of all formats' rules. With less, RE2 throws away what it has learnt and begins again,
# all the time: ten times slower on a mirror's paths.
LARGE_SET_MEMORY = 16 * 1024 * 1024


def _options(memory: int) -> Any:
    options = re2.Options()
    options.log_errors = False  # they are raised, and raised is enough
    options.max_mem = memory
    return options


class Pattern:
    """One RE2 pattern over bytes. Immutable; safe in any thread."""

    def __init__(self, text: str) -> None:
        """Compile.

        Raises:
            ValueError: RE2 refuses the pattern; the text says why.
        """
        try:
            self._compiled = re2.compile(text.encode(), _options(_PATTERN_MEMORY))
        except re2.error as e:
            raise ValueError(_text(e)) from e
        groups = self._compiled.groupindex.items()
        self._numbers = [(_text(name), number) for name, number in groups]
        self.groups = tuple(sorted(name for name, _ in self._numbers))

    def search(self, text: bytes) -> dict[str, str | None] | None:
        """The named groups of the first match anywhere in `text`, which must be UTF-8."""
        return self._named(self._compiled.search(text))

    def match(self, text: bytes) -> dict[str, str | None] | None:
        """The named groups if `text`, which must be UTF-8, begins with a match."""
        return self._named(self._compiled.match(text))

    def fullmatch(self, text: bytes) -> dict[str, str | None] | None:
        """The named groups if all of `text`, which must be UTF-8, matches."""
        return self._named(self._compiled.fullmatch(text))

    def _named(self, found: Any) -> dict[str, str | None] | None:
        if found is None:
            return None
        text = found.string
        values: dict[str, str | None] = {}
        for name, number in self._numbers:
            start, end = found.span(number)
            values[name] = None if start < 0 else text[start:end].decode()
        return values


class TooLargeError(Exception):
    """Patterns that are fine one by one are too large together."""


class PatternSet:
    """Several patterns, asked in one pass which of them match. Immutable; safe in any thread."""

    def __init__(self, patterns: Iterable[str], memory: int = _SET_MEMORY) -> None:
        """Compile patterns each of which `Pattern` takes.

        Args:
            patterns: RE2 patterns.
            memory: most that the set may use, now or while it is asked, bytes.

        Raises:
            TooLargeError: together they need more memory than a set may have.
        """
        self._set = re2.Set.SearchSet(_options(memory))
        try:
            for pattern in patterns:
                self._set.Add(pattern.encode())
            self._set.Compile()
        except re2.error as e:
            raise TooLargeError(_text(e)) from e

    def matching(self, text: bytes) -> list[int]:
        """The places of the patterns that match somewhere in `text`, in ascending order."""
        return sorted(self._set.Match(text) or ())  # None for a set of nothing


class Template:
    """Template with `{group}` placeholders. Immutable; safe in any thread."""

    def __init__(self, template: str) -> None:
        self._pieces = re.split(r"\{([a-z_][a-z0-9_]*)\}", template)
        self.names = frozenset(self._pieces[1::2])

    def fill(self, values: Mapping[str, str | None]) -> str:
        """The text; a placeholder without a value is empty."""
        if not self.names:
            return self._pieces[0]
        return "".join(
            (values.get(piece) or "") if index % 2 else piece
            for index, piece in enumerate(self._pieces)
        )


class Refinement(NamedTuple):
    """A second look at one group: it must begin with `after`, and what follows must match."""

    group: str
    after: Template
    pattern: Pattern


class Rule(NamedTuple):
    """How one shape of path names a package."""

    label: str  # format#number, counted from 1
    source: str  # the pattern as written
    pattern: Pattern
    then: Refinement | None
    kind: str
    purl: PurlTemplate | None
    wants: frozenset[str]  # of GIVEN, what the purl can't do without

    def match(self, path: bytes) -> dict[str, str | None] | None:
        """The values of all groups, or None if the path has another shape."""
        values = self.pattern.search(path)
        if values is None or self.then is None:
            return values
        whole, start = values[self.then.group] or "", self.then.after.fill(values)
        if not whole.startswith(start):
            return None
        more = self.then.pattern.fullmatch(whole[len(start) :].encode())
        return None if more is None else values | more


class RuleSet:
    """The rules of a format, in order. Immutable; safe in any thread."""

    def __init__(self, rules: Sequence[Rule], memory: int = _SET_MEMORY) -> None:
        self.rules = tuple(rules)
        self._patterns = PatternSet((rule.source for rule in rules), memory)

    def candidates(self, path: bytes) -> list[Rule]:
        """The rules whose pattern matches, in order."""
        return [self.rules[place] for place in self._patterns.matching(path)]


# Plain text, or a pattern with a group `folder`, to be matched at a path's begin.
Folder = str | Pattern


class RemoteMatch(NamedTuple):
    """Where in a host a remote was found."""

    name: str
    rules: RuleSet | None  # None: paths of this remote say nothing
    prefix: str  # what of the path stands before the registry's own
    path: str  # the registry's own path
    vendor: str | None


class Remote(NamedTuple):
    """One remote of the table."""

    name: Template
    host: str  # RE2 pattern, anchored
    paths: tuple[Folder, ...]
    rules: RuleSet | None
    by_name: Mapping[str, RuleSet]  # which rules a group `format` of the path may choose
    vendor: str | None

    def match(self, path: str) -> RemoteMatch | None:
        """This remote, if the path is one of its paths."""
        for folder in self.paths:
            if isinstance(folder, str):
                rest = path.removeprefix(folder)
                if not folder or (rest != path and rest[:1] in {"", "/"}):
                    return RemoteMatch(self.name.fill({}), self.rules, folder, rest, self.vendor)
                continue
            values = folder.match(path.encode())
            if values is not None:
                prefix = values["folder"] or ""
                return RemoteMatch(
                    self.name.fill(values),
                    self.by_name.get(values.get("format") or "", self.rules),
                    prefix,
                    path.removeprefix(prefix),
                    values.get("vendor") or self.vendor,
                )
        return None


def folder(text: str) -> Folder:
    """Where on a host a remote begins, from a pattern for it; a / is the whole host.

    It ends where a segment of the path ends.

    Raises:
        ValueError: RE2 refuses the pattern; the text says why.
    """
    if re.fullmatch(r"[\w/-]*", text):
        return text.rstrip("/")
    Pattern(text)  # so that a wrong one is reported as it was written
    return Pattern(f"(?P<folder>{text})(?:/|$)")


def host_pattern(globs: Sequence[str]) -> str:
    """An RE2 pattern for host names: * is one label or part of one, ** one label or more.

    Raises:
        ValueError: a glob holds what no host name holds; the text says which.
    """
    alternatives = []
    for glob in globs:
        if not re.fullmatch(r"[a-z0-9._:*-]+", glob):
            raise ValueError(f"has the host {glob!r}, expected a name in lower case, * and **")
        pieces = re.split(r"(\*\*|\*)", glob)
        alternatives.append("".join(_GLOBS.get(piece) or re.escape(piece) for piece in pieces))
    return f"^(?:{'|'.join(alternatives)})$"


_GLOBS = {"*": "[^.]+", "**": "[^.]+(?:[.][^.]+)*"}


def _text(message: object) -> str:
    if isinstance(message, re2.error):
        message = message.args[0]
    return message.decode(errors="replace") if isinstance(message, bytes) else str(message)

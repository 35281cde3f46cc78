"""Fill Package URL templates such as `pkg:npm/{namespace?}/{name}@{version}`; matches no path.

A template is a Package URL with placeholders. `{name}` must have a value, or the template can't be
filled. `{name?}` may have none: then the segment, version, qualifier or subpath it stands in is
left out. `{name|lower}` passes the value through a filter; a filter that refuses a value leaves
none. Quoting and what each type wants in lower case is `packageurl`'s job.

The rules are purl-spec's: PURL-SPECIFICATION.rst and the definition of each type.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from packageurl import normalize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _pep503(name: str) -> str:
    """PEP 503: runs of -, _ and . are one -, and case means nothing."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _dots(group: str) -> str:
    """Maven writes the group org.apache.commons as folders."""
    return group.replace("/", ".")


def _gomod(path: str) -> str | None:
    """Go modules reference, "module cache": A is written !a, and nothing else follows a !."""
    if re.search(r"![^a-z]|!$|[A-Z]", path):
        return None
    return re.sub(r"!([a-z])", lambda found: found[1].upper(), path)


def _notjar(extension: str) -> str | None:
    """purl-spec, maven: `type` is left out for a jar."""
    return None if extension == "jar" else extension


def _commit(revision: str) -> str | None:
    """purl-spec, huggingface: the version is a commit's hash, in lower case; a branch is none."""
    return revision.lower() if re.fullmatch(r"[0-9a-fA-F]{40}", revision) else None


FILTERS: dict[str, Callable[[str], str | None]] = {
    "commit": _commit,
    "dots": _dots,
    "gomod": _gomod,
    "lower": str.lower,
    "notjar": _notjar,
    "pep503": _pep503,
}


class Package(NamedTuple):
    """A filled template, normalised as the Package URL of its type is."""

    ecosystem: str  # the purl's type
    package: str  # namespace/name
    version: str | None
    purl: str


class _Placeholder(NamedTuple):
    name: str
    filters: tuple[Callable[[str], str | None], ...]
    optional: bool


# One component: literal text and placeholders, in order.
_Part = tuple[str | _Placeholder, ...]

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_PRIVATE, _PRIVATE_END = 0xE000, 0xF8FF  # Unicode's private use area
_INSIDE = re.compile(r"([a-z_][a-z0-9_]*)((?:\|[a-z0-9]+)*)(\??)")


class _UnfilledError(Exception):
    """A placeholder that must have a value has none."""


class PurlTemplate:
    """One template, parsed. Immutable; safe in any thread."""

    def __init__(self, text: str) -> None:
        """Parse a template.

        Raises:
            ValueError: it is no template; the text says why, in half a sentence.
        """
        self._placeholders: list[_Placeholder] = []
        # With each placeholder as one private character, what splits a purl splits a template.
        masked = _PLACEHOLDER.sub(self._mask, text)
        if "{" in masked or "}" in masked:
            raise ValueError("has an odd brace")
        if not masked.startswith("pkg:"):
            raise ValueError("doesn't start with pkg:")
        rest, _, subpath = masked.removeprefix("pkg:").partition("#")
        rest, _, qualifiers = rest.partition("?")
        path, _, version = rest.partition("@")
        self._type, _, name = path.partition("/")
        if not re.fullmatch(r"[a-z][a-z0-9.-]*", self._type):  # purl-spec: type, as plain text
            raise ValueError("has no type after pkg:")
        self._prefix = f"pkg:{self._type}/"
        self._segments = [self._part(segment) for segment in name.split("/")]
        self._version = self._part(version)
        pairs = [pair.partition("=") for pair in qualifiers.split("&") if pair]
        self._qualifiers = [(key, self._part(value)) for key, _, value in pairs]
        self._subpath = self._part(subpath)
        self._try()

    @property
    def required(self) -> frozenset[str]:
        """The placeholders that must have a value."""
        return frozenset(p.name for p in self._placeholders if not p.optional)

    @property
    def names(self) -> frozenset[str]:
        """All placeholders."""
        return frozenset(p.name for p in self._placeholders)

    def fill(self, values: Mapping[str, str | None]) -> Package | None:
        """The package these values name; None if a value that must be there is not.

        `values` are decoded text: no percent-encoding.
        """
        try:
            segments = [text for s in self._segments if (text := _fill(s, values))]
            version = _fill(self._version, values)
            qualifiers = {
                key: text for key, part in self._qualifiers if (text := _fill(part, values))
            }
            subpath = _fill(self._subpath, values)
        except _UnfilledError:
            return None
        namespace, _, name = "/".join(segments).rpartition("/")
        if not name.strip():
            return None
        # PackageURL(...).to_string() does this and no more, but takes twice as long.
        _, group, quoted, version, query, subpath = normalize(
            self._type, namespace, name, version, qualifiers, subpath, encode=True
        )
        package = f"{group}/{quoted}" if group else quoted
        purl = "".join(
            (
                f"{self._prefix}{package}",
                f"@{version}" if version else "",
                f"?{query}" if query else "",
                f"#{subpath}" if subpath else "",
            )
        )
        return Package(self._type, _unquoted(package), _unquoted(version or "") or None, purl)

    def _try(self) -> None:
        """Fill with stand-ins, so that a template that never works is found when it is read."""
        values = {p.name: "1" * 40 for p in self._placeholders}
        if self.fill(values) is None:
            raise ValueError("has no name")

    def _mask(self, found: re.Match[str]) -> str:
        inside = _INSIDE.fullmatch(found[1])
        if inside is None:
            raise ValueError(f"has the placeholder {found[0]}, which is no name|filter?")
        filters = inside[2].split("|")[1:]
        for name in filters:
            if name not in FILTERS:
                raise ValueError(f"has the filter {name}, expected one of {', '.join(FILTERS)}")
        placeholder = _Placeholder(inside[1], tuple(FILTERS[f] for f in filters), bool(inside[3]))
        self._placeholders.append(placeholder)
        return chr(_PRIVATE + len(self._placeholders) - 1)

    def _part(self, masked: str) -> _Part:
        pieces = re.split(f"([{chr(_PRIVATE)}-{chr(_PRIVATE_END)}])", masked)
        return tuple(
            self._placeholders[ord(piece) - _PRIVATE] if index % 2 else piece
            for index, piece in enumerate(pieces)
            if piece
        )


def _unquoted(text: str) -> str:
    return unquote(text) if "%" in text else text


def _fill(part: _Part, values: Mapping[str, str | None]) -> str | None:
    """The text of a component; None if it has none."""
    text = ""
    for piece in part:
        if isinstance(piece, str):
            text += piece
            continue
        name, filters, optional = piece
        value = values.get(name)
        for each in filters:
            if value is not None:
                value = each(value)
        if value is not None:
            text += value
        elif optional:
            return None
        else:
            raise _UnfilledError
    return text or None

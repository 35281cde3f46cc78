"""Fill Package URL templates such as `pkg:npm/{namespace?}/{name}@{version}`. Matches no paths.

`{name}` must have a value. `{name?}` may have none; then the segment, version, qualifier or subpath
that contains it is left out. `{name|lower}` applies a filter; a filter may reject a value, which is
then treated as missing. `packageurl` does the percent-encoding and the normalization of each type.

The rules are from purl-spec: PURL-SPECIFICATION.rst and the definition of each type.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from packageurl import normalize

from .distributions import vendor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _pep503(name: str) -> str:
    """Normalize a Python project name: lower case, runs of -, _ and . become one - (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


# Folders where a Maven repository begins, which belong to no group.
_MAVEN_FOLDER = (
    "(?:artifactory|content|downloads?|groups|m2|maven[12]?|mirrors?|nexus|packages|pub|public|"
    "releases|remote|repos?|repositories|repository|snapshots)"
)
# First names of groups: top-level domains, and what Java itself uses. No group is just one of them.
_MAVEN_ROOT = (
    "(?:androidx|app|at|au|be|biz|br|ca|ch|cloud|cn|com?|cz|de|dev|dk|edu|es|eu|fi|fr|gov|gr|hu|ie|"
    "il|in|info|io|it|jakarta|javax|jp|kr|me|net|nl|no|nz|org|pl|pro|pt|ro|ru|se|sg|sh|si|sk|tech|tv|"
    "tw|ua|uk|us|xyz)"
)
_NO_MAVEN_GROUP = re.compile(
    rf"{_MAVEN_FOLDER}\.(?:{_MAVEN_FOLDER}|{_MAVEN_ROOT})(?:\..*)?"
    rf"|{_MAVEN_ROOT}|(?:com|io)\.git(?:hub|lab)",
    re.IGNORECASE,
)


@lru_cache(4096)  # clients repeat most groups, and the pattern takes longer than others
def _dots(group: str) -> str | None:
    """Turn the folders of a Maven group into its name, such as org.apache.commons.

    Reject folders that are only the beginning of a group (org), and folders that begin before the
    group (maven2/org/apache).
    """
    name = group.replace("/", ".")
    return None if _NO_MAVEN_GROUP.fullmatch(name) else name


def _rooted(group: str) -> str | None:
    """Reject folders of a Maven group that may begin before it, such as de/mirror/org/apache."""
    return None if re.search(r"(?i)/(?:com|io|net|org|maven2)/", f"{group}/") else group


_NUGET_VERSION = re.compile(
    r"(\d{1,10})(?:\.(\d{1,10}))?(?:\.(\d{1,10}))?(?:\.(\d{1,10}))?(?P<label>-[0-9A-Za-z.-]+)?"
)


def _gomod(path: str) -> str | None:
    """Decode a Go module path: !a stands for A (Go modules reference, "module cache").

    A ! before anything but a lower-case letter, or a capital letter, is invalid.
    """
    if re.search(r"![^a-z]|!$|[A-Z]", path):
        return None
    return re.sub(r"!([a-z])", lambda match: match[1].upper(), path)


def _notjar(extension: str) -> str | None:
    """Reject jar, because a maven purl has no `type` for a jar (purl-spec, maven)."""
    return None if extension == "jar" else extension


def _nuget(version: str) -> str:
    """Normalize a version as NuGet does (docs, "Package versioning", "Normalized version numbers").

    Without zeros before a number, a fourth number 0 and build metadata; in lower case, as versions
    differ in more than case.
    """
    match = _NUGET_VERSION.fullmatch(version.partition("+")[0])
    if match is None:
        return version.lower()
    numbers = [int(number or 0) for number in match.groups()[:4]]
    kept = numbers if numbers[3] else numbers[:3]
    return ".".join(map(str, kept)) + (match["label"] or "").lower()


def _tap(folders: str) -> str:
    """Turn the repository of a Homebrew bottle into the name of the formula: python/3.11 is python@3.11."""
    return folders.replace("/", "@")


def _commit(revision: str) -> str | None:
    """Return a commit hash in lower case; reject branch names (purl-spec, huggingface)."""
    return revision.lower() if re.fullmatch(r"[0-9a-fA-F]{40}", revision) else None


FILTERS: dict[str, Callable[[str], str | None]] = {
    "commit": _commit,
    "dots": _dots,
    "gomod": _gomod,
    "lower": str.lower,
    "notjar": _notjar,
    "pep503": _pep503,
    "nuget": _nuget,
    "rooted": _rooted,
    "tap": _tap,
    "vendor": vendor_of,
}


class Package(NamedTuple):
    """A package, normalized like the Package URL of its type."""

    ecosystem: str  # the purl's type
    package: str  # namespace/name
    version: str | None
    purl: str


class _Placeholder(NamedTuple):
    name: str
    filters: tuple[Callable[[str], str | None], ...]
    optional: bool


# One component of a template: literal text and placeholders, in order.
_Component = tuple[str | _Placeholder, ...]

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_FIRST_MARK, _LAST_MARK = 0xE000, 0xF8FF  # Unicode's private use area
_PLACEHOLDER_CONTENT = re.compile(r"([a-z_][a-z0-9_]*)((?:\|[a-z0-9]+)*)(\??)")


class _UnfilledError(Exception):
    """A required placeholder has no value."""


class PurlTemplate:
    """A parsed template. Immutable and thread-safe."""

    def __init__(self, text: str) -> None:
        """Parse a template.

        Raises:
            ValueError: the template is not valid. The message is the end of a sentence, such as
                "has an unbalanced brace".
        """
        self._placeholders: list[_Placeholder] = []
        # Each placeholder becomes one private-use character (a mark), so that the separators of a
        # purl can't occur inside a placeholder.
        masked = _PLACEHOLDER.sub(self._add_placeholder, text)
        if "{" in masked or "}" in masked:
            raise ValueError("has an unbalanced brace")
        if not masked.startswith("pkg:"):
            raise ValueError("does not start with pkg:")
        rest, _, subpath = masked.removeprefix("pkg:").partition("#")
        rest, _, qualifiers = rest.partition("?")
        path, _, version = rest.partition("@")
        self.type, _, name = path.partition("/")
        if not re.fullmatch(r"[a-z][a-z0-9.-]*", self.type):  # not a placeholder
            raise ValueError("has no valid type after pkg:")
        self._prefix = f"pkg:{self.type}/"
        self._segments = [self._parse(segment) for segment in name.split("/")]
        self._version = self._parse(version)
        pairs = [pair.partition("=") for pair in qualifiers.split("&") if pair]
        self._qualifiers = [(key, self._parse(value)) for key, _, value in pairs]
        self._subpath = self._parse(subpath)
        self._check_name()

    @property
    def required(self) -> frozenset[str]:
        """Names of the placeholders that must have a value."""
        return frozenset(p.name for p in self._placeholders if not p.optional)

    @property
    def names(self) -> frozenset[str]:
        """Names of all placeholders."""
        return frozenset(p.name for p in self._placeholders)

    def fill(self, values: Mapping[str, str | None]) -> Package | None:
        """Return the package, or None if it has no name or a required value is missing.

        `values` are decoded text, without percent-encoding.
        """
        try:
            segments = [text for c in self._segments if (text := _fill(c, values))]
            version = _fill(self._version, values)
            qualifiers = tuple((k, text) for k, c in self._qualifiers if (text := _fill(c, values)))
            subpath = _fill(self._subpath, values)
        except _UnfilledError:
            return None
        namespace, _, name = "/".join(segments).rpartition("/")
        if not name.strip():
            return None
        # Same result as PackageURL(...).to_string() in less than half the time.
        package = _normalized_package(self.type, namespace, name)
        _, _, _, version, _, subpath = normalize(
            self.type, None, None, version, None, subpath, encode=True
        )
        query = qualifiers and _normalized_qualifiers(self.type, qualifiers)
        purl = f"{self._prefix}{package}"
        if version:
            # A / in a version, such as a Git reference, is no separator (purl-spec, "Character encoding").
            version = version.replace("/", "%2F")
            purl += f"@{version}"
        if query:
            purl += f"?{query}"
        if subpath:
            purl += f"#{subpath}"
        return Package(self.type, _unquoted(package), _unquoted(version or "") or None, purl)

    def _check_name(self) -> None:
        """Fill with sample values, to find a template that can never be filled."""
        values = {p.name: "1" * 40 for p in self._placeholders}  # also valid as a commit
        if self.fill(values) is None:
            raise ValueError("has no name")

    def _add_placeholder(self, match: re.Match[str]) -> str:
        """Record a placeholder and return its mark."""
        content = _PLACEHOLDER_CONTENT.fullmatch(match[1])
        if content is None:
            raise ValueError(
                f"has the placeholder {match[0]}, expected the form {{name}} or {{name|filter?}}"
            )
        name, filters, optional = content[1], content[2].split("|")[1:], bool(content[3])
        for each in filters:
            if each not in FILTERS:
                raise ValueError(f"has the filter {each}, expected one of {', '.join(FILTERS)}")
        functions = tuple(FILTERS[each] for each in filters)
        self._placeholders.append(_Placeholder(name, functions, optional))
        return chr(_FIRST_MARK + len(self._placeholders) - 1)

    def _parse(self, masked: str) -> _Component:
        pieces = re.split(f"([{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}])", masked)
        return tuple(
            self._placeholders[ord(piece) - _FIRST_MARK] if index % 2 else piece
            for index, piece in enumerate(pieces)
            if piece
        )


@lru_cache(4096)  # a package is requested in several versions, with indexes and sidecars
def _normalized_package(purl_type: str, namespace: str, name: str) -> str:
    """Return namespace/name, percent-encoded and normalized as its type demands."""
    _, quoted_namespace, quoted_name, *_ = normalize(
        purl_type, namespace, name, None, None, None, encode=True
    )
    return f"{quoted_namespace}/{quoted_name}" if quoted_namespace else quoted_name


@lru_cache(1024)  # few architectures and file types
def _normalized_qualifiers(purl_type: str, pairs: tuple[tuple[str, str], ...]) -> str | None:
    """Return the qualifiers, percent-encoded and sorted."""
    *_, qualifiers, _ = normalize(purl_type, None, None, None, dict(pairs), None, encode=True)
    return qualifiers


def _unquoted(text: str) -> str:
    return unquote(text) if "%" in text else text


def _fill(component: _Component, values: Mapping[str, str | None]) -> str | None:
    """Return the text of a component, or None if it is empty or an optional value is missing."""
    text = ""
    for piece in component:
        if isinstance(piece, str):
            text += piece
            continue
        name, filters, optional = piece
        value = values.get(name)
        for apply in filters:
            if value is not None:
                value = apply(value)
        if value is not None:
            text += value
        elif optional:
            return None
        else:
            raise _UnfilledError
    return text or None

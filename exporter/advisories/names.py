"""Name packages the same way in advisories, lists and Package URLs. Reads nothing.

A package key is `type/namespace/name`, decoded, with the differences removed that the ecosystem itself
ignores: PyPI's Foo_Bar is foo-bar, NuGet and Composer ignore case.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from packageurl import PackageURL

# OSV schema, "affected[].package field", the list of ecosystems. Types: purl-spec.
_TYPES = {
    "Alpine": "apk/alpine",
    "AlmaLinux": "rpm/almalinux",
    "Bioconductor": "bioconductor",
    "Bitnami": "bitnami",
    "CRAN": "cran",
    "Chainguard": "apk/chainguard",
    "ConanCenter": "conan",
    "Debian": "deb/debian",
    "GitHub Actions": "github",
    "Go": "golang",
    "Hackage": "hackage",
    "Hex": "hex",
    "Julia": "julia",
    "Mageia": "rpm/mageia",
    "Maven": "maven",
    "NuGet": "nuget",
    "Packagist": "composer",
    "Pub": "pub",
    "PyPI": "pypi",
    "Red Hat": "rpm/redhat",
    "Rocky Linux": "rpm/rocky",
    "RubyGems": "gem",
    "SUSE": "rpm/suse",
    "SwiftURL": "swift",
    "Ubuntu": "deb/ubuntu",
    "Wolfi": "apk/wolfi",
    "crates": "cargo",
    "npm": "npm",
    "openEuler": "rpm/openeuler",
    "openSUSE": "rpm/opensuse",
    "opam": "opam",
}
_TYPES_BY_LOWER_NAME = {name.lower(): purl_type for name, purl_type in _TYPES.items()}
_REGISTRY_SUFFIX = ".io"  # OSV calls Rust's ecosystem by the host name of its registry
# Names that people and other tools use for a Package URL type.
_OTHER_NAMES = {
    "go": "golang",
    "java": "maven",
    "javascript": "npm",
    "packagist": "composer",
    "php": "composer",
    "pip": "pypi",
    "python": "pypi",
    "ruby": "gem",
    "rubygems": "gem",
    "rust": "cargo",
}
# Types without an ecosystem of OSV; with those above, all that configs/remotes.yaml identifies.
_OTHER_TYPES = frozenset(
    {
        *(
            "alpm",
            "apk",
            "bazel",
            "bitbucket",
            "brew",
            "cocoapods",
            "conda",
            "cpan",
            "deb",
            "generic",
        ),
        *("gitlab", "helm", "huggingface", "jsr", "luarocks", "oci", "rpm", "terraform"),
    }
)
_KNOWN_TYPES = _OTHER_TYPES | frozenset(_TYPES.values())
# Distributions; their advisories name source packages, and different releases have different fixes.
DISTRIBUTIONS = frozenset({"apk", "deb", "rpm"})
_IGNORE_CASE = frozenset(
    {"bitbucket", "composer", "github", "gitlab", "golang", "hex", "npm", "nuget", "pub"}
)
_PURL = re.compile(
    r"pkg:/*(?P<type>[A-Za-z][A-Za-z0-9.+-]*)/(?P<path>[^@?#]+)"
    r"(?:@(?P<version>[^?#]*))?(?:\?(?P<qualifiers>[^#]*))?(?:#.*)?",
    re.DOTALL,
)
_MAX_LENGTH = 1024  # characters; a longer purl or name is not a package's
_CACHED_KEYS = 100_000


class PackageVersion(NamedTuple):
    """A package, and which version of it; None: the version is not known."""

    key: str
    version: str | None


def ecosystem_type(ecosystem: str) -> tuple[str, str | None] | None:
    """Return the start of the keys of an OSV ecosystem, and the release after the colon, such as 12.

    None: OSV's ecosystem has no packages that a proxy could see (such as Linux or OSS-Fuzz), or is new.
    """
    name, _, release = ecosystem.partition(":")
    lower = name.strip().lower().removesuffix(_REGISTRY_SUFFIX)
    start = _TYPES_BY_LOWER_NAME.get(lower) or _OTHER_NAMES.get(lower)
    if start is None:
        return None
    return start, release if release and start.split("/")[0] in DISTRIBUTIONS else None


def purl_type(name: str) -> str | None:
    """Return the Package URL type that a person means by `npm`, `PyPI`, `crates` or `rust`.

    For a distribution, its vendor is added: deb/debian. None: no packages of the log have this type.
    """
    lower = name.strip().lower().removesuffix(_REGISTRY_SUFFIX)
    known = _TYPES_BY_LOWER_NAME.get(lower) or _OTHER_NAMES.get(lower)
    return known or (lower if lower in _KNOWN_TYPES else None)


def package_key(start: str, name: str) -> str | None:
    """Return the key of a package named as its users name it, such as `@scope/name` or `group:name`.

    Args:
        start: The Package URL type, for a distribution with its vendor: deb/debian.
        name: Decoded.
    """
    name = name.strip()
    if not name or len(name) > _MAX_LENGTH:
        return None
    if start == "maven":
        name = name.replace(":", "/")
    if start == "github":  # an action can be in a folder of its repository: owner/name/folder
        name = "/".join(name.split("/")[:2])
    return f"{start}/{_normalized(start.partition('/')[0], name)}"


def column_of(start: str, name: str) -> str:
    """Return the value of the column package for a package named as in `package_key`, case included."""
    name = name.strip().replace(":", "/") if start == "maven" else name.strip()
    _, _, vendor = start.partition("/")
    return f"{vendor}/{name}" if vendor else name


def parse_purl(purl: str) -> PackageVersion | None:
    """Return the package and version of a Package URL, or None if it is not valid.

    It takes a tenth of the time of `packageurl`, because it need not check every part.
    """
    if len(purl) > _MAX_LENGTH:
        return None
    found = _PURL.fullmatch(purl)
    if found is None:
        return None
    key = _key_of_path(found["type"].lower(), found["path"])
    version = found["version"]
    if not version:
        return PackageVersion(key, None)
    if "%" in version:
        version = unquote(version)
    if found["qualifiers"] and "epoch=" in found["qualifiers"]:
        epoch = dict(parse_qsl(found["qualifiers"])).get("epoch", "")
        if epoch.isdigit() and ":" not in version:
            version = f"{epoch}:{version}"
    return PackageVersion(key, version)


@lru_cache(maxsize=_CACHED_KEYS)
def _key_of_path(purl_type: str, path: str) -> str:
    path = "/".join(filter(None, unquote(path).split("/")))
    return f"{purl_type}/{_normalized(purl_type, path)}"


def _normalized(purl_type: str, name: str) -> str:
    if purl_type == "pypi":  # PEP 503
        return re.sub(r"[-_.]+", "-", name).lower()
    if purl_type == "cargo":  # names that differ only in this cannot both be published
        return name.replace("_", "-").lower()
    if purl_type == "pub":
        return re.sub(r"[^a-z0-9/]", "_", name.lower())
    return name.lower() if purl_type in _IGNORE_CASE else name


def search_key(key: str) -> str:
    """Return what the SQL function access_log_package_key makes of every purl with this key.

    Different packages can have the same search key, so compare `package_key` as well.
    """
    purl_type, _, path = key.partition("/")
    namespace, _, name = path.rpartition("/")
    purl = PackageURL(purl_type, namespace or None, name).to_string()
    return purl.lower().replace("_", "-")


def package_column(purl: str) -> str | None:
    """Return the value of the column package of the rows with this purl; None if it is not valid."""
    found = _PURL.fullmatch(purl)
    return unquote(found["path"]) if found else None

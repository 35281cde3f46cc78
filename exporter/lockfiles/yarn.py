"""Read yarn.lock: the format of Yarn 1, and the YAML of Yarn 2 and later."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

from msgspec import Struct, field

from .documents import text_of, yaml_as
from .javascript import npm_package
from .locked import Digest, MalformedError, Unchecked, is_web

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .locked import Entry

_HEADER = re.compile(r'(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s",:][^\s",]*))(?:,\s|:?$)')
_IS_REPOSITORY = re.compile(r"\.git(?:/|\?|$)")  # not npm.pkg.github.example
_FIELD = re.compile(r'  (?P<name>"?[\w-]+"?) "?(?P<value>[^"]*)"?')


def read_yarn(data: bytes) -> Iterator[Entry]:
    """Read either format."""
    if re.search(rb"^__metadata:", data, re.MULTILINE):
        return _read_berry(data)
    return _read_classic(text_of(data))


def _read_classic(text: str) -> Iterator[Entry]:
    """Read the format of Yarn 1: a header of patterns, and indented fields below it."""
    pattern: str | None = None
    fields: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not line.startswith(" "):
            if pattern is not None:
                yield _classic_package(pattern, fields)
            found = _HEADER.match(line)
            if found is None or not line.rstrip().endswith(":"):
                raise MalformedError(f"has an unexpected line {number}")
            pattern, fields = found["quoted"] or found["plain"], {}
        elif found := _FIELD.fullmatch(line.rstrip()):
            fields.setdefault(found["name"].strip('"'), found["value"])
        elif pattern is None:
            raise MalformedError(f"has an unexpected line {number}")
    if pattern is not None:
        yield _classic_package(pattern, fields)


def _classic_package(pattern: str, fields: dict[str, str]) -> Entry:
    name, wanted = _split_pattern(pattern)
    if wanted.startswith("npm:"):  # an alias: a@npm:b@^1.0.0
        name = _split_pattern(wanted.removeprefix("npm:"))[0]
    url, _, sha1 = fields.get("resolved", "").partition("#")
    is_git = (
        wanted.startswith(("git", "ssh:"))
        or url.startswith(("git", "ssh:"))
        or _IS_REPOSITORY.search(url)
    )
    if is_git or not is_web(url) or wanted.startswith(("file:", "link:")):
        return Unchecked(name, "from a folder or from git")
    package = npm_package(name, fields.get("version", ""), url, fields.get("integrity"))
    if not package.files[0].digests and re.fullmatch(r"[0-9a-f]{40}", sha1):
        file = package.files[0]._replace(digests=(Digest("sha1", sha1),))
        package = package._replace(files=(file,))
    return package


def _split_pattern(pattern: str) -> tuple[str, str]:
    """Split name@range; the name may start with @."""
    at = pattern.find("@", 1)
    return (pattern, "") if at < 0 else (pattern[:at], pattern[at + 1 :])


class _BerryPackage(Struct):
    resolution: str = ""
    version: str = ""
    checksum: str = ""
    conditions: str = ""
    link_type: str = field(default="", name="linkType")


def _read_berry(data: bytes) -> Iterator[Entry]:
    """Read the format of Yarn 2 and later. Its checksums are of archives that Yarn makes itself."""
    for key, package in yaml_as(data, dict[str, _BerryPackage]).items():
        if key == "__metadata":
            continue
        name, place = _split_pattern(package.resolution)
        protocol, _, version = place.partition(":")
        if protocol in {"workspace", "file", "link", "portal", "patch", "exec"}:
            if protocol != "patch":  # a patched package is listed a second time, unpatched
                yield Unchecked(name, "from a folder")
            continue
        if protocol != "npm":
            yield Unchecked(name, "from git or a URL")
            continue
        version, _, archive = version.partition("::")
        url = _archive_url(archive)
        locked = npm_package(
            name, version, url, None, "only for some platforms" if package.conditions else None
        )
        digest = Digest("yarn", package.checksum.rpartition("/")[2])
        file = locked.files[0]._replace(digests=(digest,) if package.checksum else ())
        yield locked._replace(files=(file,))


def _archive_url(parameters: str) -> str:
    """Return the URL in `::__archiveUrl=...`, which Yarn writes for a file in an unusual place."""
    found = re.search(r"__archiveUrl=([^&]+)", parameters)
    if found is None:
        return ""
    return unquote(found[1])

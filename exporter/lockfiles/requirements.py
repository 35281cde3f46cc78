"""Read pip's requirements files in which each requirement has one version, with or without hashes.

The format is that of pip's "Requirements File Format". `packaging` parses the requirements. Nothing
that a file refers to is read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    parse_sdist_filename,
    parse_wheel_filename,
)

from .documents import text_of
from .locked import (
    LockedFile,
    LockedPackage,
    MalformedError,
    Unchecked,
    file_name_of,
    hosts_of,
    is_web,
    make_purl,
    parse_digest,
    url_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .locked import Digest, Entry

_INDEX_OPTIONS = ("-i", "--index-url", "--extra-index-url", "-f", "--find-links")
_OPTION = re.compile(r"(-[a-zA-Z]|--[a-z-]+)[=\s]?\s*(.*)")
_HASH = re.compile(r"\s--hash[=\s]\s*(\S+)")
_VERSION_CONTROL = ("git+", "hg+", "svn+", "bzr+")
_ARCHIVES = (".whl", ".tar.gz", ".zip")
_COMMENT = re.compile(r"(?:^|\s)#.*")
_MAX_LINE = 100_000  # characters; a package with 500 files has 50,000


def read_requirements(data: bytes) -> Iterator[Entry]:
    """Read a requirements file. Of a file it has the hash, and no name."""
    lines = list(_logical_lines(text_of(data)))
    options = [found.groups() for line in lines if (found := _OPTION.match(line))]
    registries = hosts_of(*(value for name, value in options if name in _INDEX_OPTIONS))
    for line in lines:
        found = _OPTION.match(line)
        if found is None:
            yield _requirement(line, registries)
        elif found[1] in {"-r", "--requirement"}:
            yield Unchecked(found[2], "another file; name it too")
        elif found[1] in {"-e", "--editable"}:
            yield Unchecked(_shown(found[2]), "from a folder or from git")


def _logical_lines(text: str) -> Iterator[str]:
    """Yield lines without comments; a line that ends with a backslash continues in the next."""
    pending: list[str] = []
    for line in text.splitlines():
        is_comment = line.lstrip().startswith("#")
        if line.endswith("\\") and not is_comment:
            pending.append(line.removesuffix("\\"))
            continue
        whole = _COMMENT.sub("", " ".join([*pending, line])).strip()
        pending.clear()
        if len(whole) > _MAX_LINE:
            raise MalformedError("has a line that is too long")
        if whole:
            yield whole
    if pending:
        yield _COMMENT.sub("", " ".join(pending)).strip()


def _requirement(line: str, registries: tuple[str, ...]) -> Entry:
    digests = tuple(parse_digest(text) for text in _HASH.findall(line))
    text = re.split(r"\s--", line, maxsplit=1)[0].strip()
    if is_web(text):
        return _from_url(text.partition(" ;")[0], "", digests)
    if text.startswith((*_VERSION_CONTROL, ".", "/", "file:")) or text.endswith(_ARCHIVES):
        return Unchecked(_shown(text), "from a folder or from git")
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        raise MalformedError(
            f"has the line {_shown(text)!r}, expected a form such as name==1.0"
        ) from None
    if requirement.url is not None and is_web(requirement.url):
        return _from_url(requirement.url, requirement.name, digests)
    version = _pinned_version(requirement)
    if requirement.url is not None or version is None:
        reason = "without one version" if requirement.url is None else "from a folder or from git"
        return Unchecked(requirement.name, reason)
    return LockedPackage(
        make_purl("pypi", None, requirement.name, version),
        tuple(LockedFile(digests=(digest,)) for digest in digests),
        registries,
        optional="only for some platforms" if requirement.marker is not None else None,
    )


def _pinned_version(requirement: Requirement) -> str | None:
    specifiers = list(requirement.specifier)
    if len(specifiers) != 1 or specifiers[0].operator not in {"==", "==="}:
        return None
    version = specifiers[0].version
    return None if version.endswith(".*") else version


def _from_url(url: str, name: str, digests: Iterable[Digest]) -> Entry:
    """Return the package of a file behind a URL, whose fragment may have a hash."""
    file_name = file_name_of(url) or ""
    try:
        parse = parse_wheel_filename if file_name.endswith(".whl") else parse_sdist_filename
        found_name, version = parse(file_name)[:2]
    except (InvalidWheelFilename, InvalidSdistFilename):
        return Unchecked(name or _shown(url), "from a URL, without a version")
    found = re.search(r"(?:^|&)((?:md5|sha\d+)=[0-9a-fA-F]+)", urlsplit(url).fragment)
    all_digests = (*digests, *([parse_digest(found[1])] if found else ()))
    file = url_file(url, all_digests)
    return LockedPackage(
        make_purl("pypi", None, name or found_name, str(version)), (file,), hosts_of(url)
    )


def _shown(text: str) -> str:
    """Return the start of a line without the credentials and the query of its URL."""
    text = re.sub(r"://[^/@\s]*@", "://", text)
    return re.sub(r"[?#]\S*", "", text)[:100]

"""Resolve the path of a URL as clients and servers do. Pure functions."""

from __future__ import annotations

import re

_ENCODED_DOT = re.compile(r"%2[eE]")


def resolve_path(path: str) -> str:
    """Return a path without dot segments (RFC 3986 5.2.4). An encoded dot is a dot (6.2.2.2)."""
    if "%2" in path:
        path = _ENCODED_DOT.sub(".", path)
    if "/." not in path:
        return path
    first, *segments = path.split("/")
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            kept = kept[:-1]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in {".", ".."}:
        kept.append("")  # the path of a folder ends in a slash
    return "/".join([first, *kept])


def leaves_folder(path: str) -> bool:
    """Whether a path has a `..` segment, also with encoded dots."""
    return ".." in (_ENCODED_DOT.sub(".", path) if "%2" in path else path).split("/")

"""Say on one line per URL what the table of remotes takes it for; parses no command line itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from exporter.read.human import printable_json
from exporter.rows.packages.identity import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from urllib.parse import SplitResult

    from exporter.rows.packages.identity import Identity, Remotes

_REMOTE_WIDTH, _KIND_WIDTH, _RULE_WIDTH = 20, 8, 14


def identify_urls(urls: Iterable[str], remotes: Remotes, *, as_json: bool) -> Iterator[str]:
    """One line for each URL, in order, without a line break; URLs are read as they are needed.

    A text line holds remote, kind, rule and Package URL, `-` for what isn't known. A JSON line
    holds all fields of `Identity` and the URL, without user name, password, query and fragment.
    Blank lines are passed over. What is no URL gets an empty identity, not an error.
    """
    for line in urls:
        url = line.strip()
        if url:
            parts = _parts(url)
            identity = remotes.identify(parts.hostname or "", parts.path) if parts else UNKNOWN
            yield _json(parts, identity) if as_json else _text(identity)


def _parts(url: str) -> SplitResult | None:
    """The parts of a URL; one without scheme is taken for host/path. None for what is no URL."""
    try:
        return urlsplit(url if "://" in url else f"//{url}")
    except ValueError:  # an address in brackets that is none
        return None


def _text(identity: Identity) -> str:
    return (
        f"{identity.remote or '-':<{_REMOTE_WIDTH}} "
        f"{identity.artifact_kind or '-':<{_KIND_WIDTH}} "
        f"{identity.rule or '-':<{_RULE_WIDTH}} "
        f"{identity.purl or '-'}"
    )


def _json(parts: SplitResult | None, identity: Identity) -> str:
    url = None
    if parts is not None:
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
        url = bare.geturl().removeprefix("//")
    return printable_json(json.dumps({"url": url, **identity._asdict()}, ensure_ascii=False))

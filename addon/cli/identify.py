"""Format what the remotes table recognizes in a URL, one line per URL. Does not parse the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from exporter.read.human import printable_json
from exporter.rows.packages.explain import explain
from exporter.rows.packages.identity import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from urllib.parse import SplitResult

    from exporter.rows.packages.identity import Identity, Remotes

_REMOTE_WIDTH, _KIND_WIDTH, _RULE_WIDTH = 20, 8, 14


def identify_urls(urls: Iterable[str], remotes: Remotes, *, as_json: bool) -> Iterator[str]:
    """Yield one line per URL, in order and without a newline. Reads `urls` lazily.

    A text line has the remote, artifact kind, rule and Package URL, with `-` for an unknown value.
    A JSON line has the URL and all fields of `Identity`; the URL comes without user name, password,
    query and fragment. Blank lines are skipped. An invalid URL gives an empty identity, not an error.
    """
    for line in urls:
        url = line.strip()
        if url:
            parts = _split(url)
            identity = _identify(parts, remotes) if parts else UNKNOWN
            yield _json_line(parts, identity) if as_json else _text_line(identity)


def explain_urls(urls: Iterable[str], remotes: Remotes) -> Iterator[str]:
    """Yield lines that say which remotes and rules are tried for each URL, and why each one fails.

    The last line of a URL is that of `identify_urls`.
    """
    for line in urls:
        parts = _split(line.strip()) if line.strip() else None
        if parts is not None:
            host, path, scheme = parts.hostname or "", parts.path, parts.scheme
            yield from explain(remotes, host, path, scheme=scheme, port=parts.port)
        yield from identify_urls([line], remotes, as_json=False)


def _identify(parts: SplitResult, remotes: Remotes) -> Identity:
    host, path, scheme = parts.hostname or "", parts.path, parts.scheme
    return remotes.identify(host, path, scheme=scheme, port=parts.port)


def _split(url: str) -> SplitResult | None:
    """Return the parts of a URL, or None if it is invalid. Without a scheme, read it as host/path."""
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        _ = parts.port
    except ValueError:  # an invalid IP address in brackets, or an invalid port
        return None
    return parts


def _text_line(identity: Identity) -> str:
    return (
        f"{identity.remote or '-':<{_REMOTE_WIDTH}} "
        f"{identity.artifact_kind or '-':<{_KIND_WIDTH}} "
        f"{identity.rule or '-':<{_RULE_WIDTH}} "
        f"{identity.purl or '-'}"
    )


def _json_line(parts: SplitResult | None, identity: Identity) -> str:
    url = None
    if parts is not None:
        public_parts = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
        url = public_parts.geturl().removeprefix("//")
    return printable_json(json.dumps({"url": url, **identity._asdict()}, ensure_ascii=False))

"""Pass the identity of a redirected request on to the request that follows it. Stores no URLs.

Registries often answer an artifact request with a redirect to a storage URL that does not name the
package. Limited in entries and in time. Not thread-safe: only the thread that builds rows uses it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

from .url_path import resolve_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .packages.identity import Identity

# RFC 9110 15.4: the status codes whose Location is another URL of the same resource.
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_ENTRIES = 4096
_TTL_SECONDS = 600.0
_SAFE_CHARACTERS = "%/?:@!$&'()*+,;=~-._[]|^"  # kept by `quote`
_PERCENT_ENCODED = re.compile(r"%[0-9a-f]{2}", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Redirects:
    """Identities of recently redirected requests, by the URL they were redirected to.

    Only a digest of each URL is kept, because a URL can contain a signature.
    """

    def __init__(self) -> None:
        # digest of the URL -> expiry (monotonic seconds), identity; oldest first
        self._entries: OrderedDict[bytes, tuple[float, Identity]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._entries)

    def remember(self, url: str, location: bytes, identity: Identity) -> None:
        """Record that a request for `url` was redirected to `location`.

        `location` may be relative (RFC 9110 10.2.2). An invalid URL is ignored.
        """
        for text in _readings(location):
            try:
                target = urlsplit(urljoin(url, text))
                host = target.hostname or ""
                port = target.port or _DEFAULT_PORTS.get(target.scheme, 0)
            except ValueError:  # not a URL, so no client can follow it
                continue
            query = f"?{target.query}" if target.query else ""
            request_target = f"{target.path or '/'}{query}".encode("utf-8", "surrogateescape")
            self._add(_digest(host, port, request_target), identity)

    def _add(self, key: bytes, identity: Identity) -> None:
        self._entries.pop(key, None)  # so that the new entry goes to the end
        self._entries[key] = (time.monotonic() + _TTL_SECONDS, identity)
        if len(self._entries) > _MAX_ENTRIES:
            self._entries.popitem(last=False)

    def find(self, host: str, port: int, target: bytes) -> Identity | None:
        """Return the identity recorded for this URL, or None if there is none or it expired."""
        entry = self._entries.get(_digest(host, port, target))
        if entry is None:
            return None
        expires_at, identity = entry
        return identity if time.monotonic() <= expires_at else None


def _readings(location: bytes) -> Iterator[str]:
    """Yield a Location as clients read it: most as UTF-8, some (Node.js) as Latin-1 (RFC 9110 5.5)."""
    yield location.decode("utf-8", "surrogateescape")
    if not location.isascii():
        yield location.decode("latin-1")


def _digest(host: str, port: int, target: bytes) -> bytes:
    """Hash a URL in the form that all clients send it in.

    Percent-encoded (RFC 3986 2.1), hexadecimal digits in upper case (6.2.2.1), without dot segments
    (5.2.4).
    """
    path, mark, query = quote(target, safe=_SAFE_CHARACTERS).partition("?")
    text = f"{host.rstrip('.')}:{port}{resolve_path(path)}{mark}{query}"
    text = _PERCENT_ENCODED.sub(lambda match: match[0].upper(), text)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()

"""Hand the identity of a redirected request to the one that follows it; stores no Location.

Registries answer for an artifact with a redirect, and its bytes come from a storage whose URL says
nothing. Bounded in entries and in time. Used by the writer's thread alone.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

if TYPE_CHECKING:
    from .packages.identity import Identity

# RFC 9110 15.4: those whose Location is where the same thing is to be had.
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_ENTRIES = 4096
_SECONDS = 600.0
_AS_IT_IS = "%/?:@!$&'()*+,;=~-._[]|^"
_PORTS = {"http": 80, "https": 443}


class Redirects:
    """Where identified requests were sent to. What is kept of a URL is a digest: it may hold a signature."""

    def __init__(self) -> None:
        self._identities: OrderedDict[bytes, tuple[float, Identity]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._identities)

    def remember(self, url: str, location: bytes, identity: Identity) -> None:
        """A request for `url` was sent on to `location` (RFC 9110 10.2.2: it may be relative)."""
        try:
            target = urlsplit(urljoin(url, location.decode("utf-8", "surrogateescape")))
            host = target.hostname or ""
            port = target.port or _PORTS.get(target.scheme, 0)
        except ValueError:  # no URL: nobody will follow it
            return
        query = f"?{target.query}" if target.query else ""
        asked = f"{target.path or '/'}{query}".encode("utf-8", "surrogateescape")
        key = _key(host, port, asked)
        self._identities.pop(key, None)
        self._identities[key] = (time.monotonic() + _SECONDS, identity)
        if len(self._identities) > _MAX_ENTRIES:
            self._identities.popitem(last=False)

    def find(self, host: str, port: int, target: bytes) -> Identity | None:
        """What a request for this stands for, if somebody was sent there of late."""
        found = self._identities.get(_key(host, port, target))
        if found is None or found[0] < time.monotonic():
            return None
        return found[1]


def _key(host: str, port: int, target: bytes) -> bytes:
    """Of all of the URL. Clients encode what it may not hold (RFC 3986 2.1) before they ask for it."""
    text = f"{host.rstrip('.')}:{port}{quote(target, safe=_AS_IT_IS)}"
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()

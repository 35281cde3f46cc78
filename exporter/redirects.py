"""Hand the identity of a redirected request to the one that follows it; stores no Location.

Registries answer for an artifact with a redirect, and its bytes come from a storage whose URL says
nothing. Bounded in entries and in time. Used by the writer's thread alone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

    from .identity import Identity

# RFC 9110 15.4: those whose Location is where the same thing is to be had.
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_ENTRIES = 4096
_SECONDS = 600.0
_AS_IT_IS = "%/:@!$&'()*+,;=~-._[]|^"


class Redirects:
    """Where identified requests were sent to, by host and path of the target as their rows have them."""

    def __init__(self, row_path: Callable[[str, bytes], str | None]) -> None:
        """`row_path` makes of a host and a target the path that a row of it would have."""
        self._row_path = row_path
        self._identities: OrderedDict[tuple[str, str | None], tuple[float, Identity]] = (
            OrderedDict()
        )

    def __bool__(self) -> bool:
        return bool(self._identities)

    def remember(self, url: str, location: bytes, identity: Identity) -> None:
        """A request for `url` was sent on to `location` (RFC 9110 10.2.2: it may be relative)."""
        try:
            target = urlsplit(urljoin(url, location.decode("utf-8", "surrogateescape")))
            host = (target.hostname or "").rstrip(".")
        except ValueError:  # no URL: nobody will follow it
            return
        # Clients encode what a URL may not hold (RFC 3986 2.1) before they ask for it.
        path = quote(target.path or "/", safe=_AS_IT_IS, encoding="utf-8", errors="surrogateescape")
        key = (host, self._row_path(host, path.encode("ascii")))
        self._identities.pop(key, None)
        self._identities[key] = (time.monotonic() + _SECONDS, identity)
        if len(self._identities) > _MAX_ENTRIES:
            self._identities.popitem(last=False)

    def find(self, host: str, path: str) -> Identity | None:
        """What a request for this stands for, if somebody was sent there of late."""
        found = self._identities.get((host.rstrip("."), path))
        if found is None or found[0] < time.monotonic():
            return None
        return found[1]

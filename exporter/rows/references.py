"""Count bytes from a shared store for the repository that the client asked before. Stores no URLs.

Git LFS and the Xet storage of Hugging Face name objects by their digest, on hosts that serve many
repositories. Only an earlier request of the same client tells the repository: the batch request of Git LFS
("Git LFS Batch API"), or the response that has X-Xet-Hash or gives the token ("Xet protocol").

Bounded in clients, repositories and time. Not thread-safe: only the thread that builds rows uses it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .packages.identity import Identity

_MAX_CLIENTS = 4096
_TTL_SECONDS = 600.0  # since the last request of the client to the store or for a repository in it

# Names of formats in configs/remotes.yaml whose paths have no repository.
GIT_LFS, XET = "gitlfs", "xet"
# Part of a path, the format of the request, and where its objects are. Hugging Face has one store for both protocols.
_ASKS = (
    ("/info/lfs/objects/batch", "github", GIT_LFS),
    ("/info/lfs/objects/batch", "huggingface", XET),
    ("/xet-read-token/", "huggingface", XET),
)
_ASKING_FORMATS = frozenset(name for _, name, _ in _ASKS)

type Client = tuple[str | None, str | None]  # address and proxy user


class References:
    """Repositories whose objects each client recently asked for."""

    def __init__(self) -> None:
        # client and store -> expiry (monotonic seconds), repository; no repository if there are several
        self._entries: OrderedDict[tuple[Client, str], tuple[float, Identity | None]] = (
            OrderedDict()
        )

    def link(
        self, client: Client, path: str, identity: Identity, *, has_xet_hash: bool
    ) -> Identity:
        """Return the identity of a request, with the repository if it went to a shared store.

        If the client asked for objects of several repositories, it stays as it is.

        Args:
            client: who asked.
            path: percent-encoded or not.
            identity: what the URL identifies.
            has_xet_hash: whether the response has X-Xet-Hash.
        """
        format_name = (identity.rule or "").partition("#")[0]
        if format_name in {GIT_LFS, XET}:
            return self._of_object((client, format_name), identity)
        asked = XET if has_xet_hash else None
        if asked is None and format_name in _ASKING_FORMATS:
            asked = _store(path, format_name)
        if asked is not None:
            self._remember((client, asked), identity)
        return identity

    def _remember(self, key: tuple[Client, str], identity: Identity) -> None:
        """Record what the client asked for. Data sets have no package, so that nothing counts for one."""
        now = time.monotonic()
        expires_at, known = self._entries.pop(key, (0.0, identity))
        is_other = known is None or known.package != identity.package
        if identity.purl is None or (expires_at >= now and is_other):
            self._entries[key] = (now + _TTL_SECONDS, None)
        else:
            self._entries[key] = (now + _TTL_SECONDS, identity)
        if len(self._entries) > _MAX_CLIENTS:
            self._entries.popitem(last=False)

    def _of_object(self, key: tuple[Client, str], identity: Identity) -> Identity:
        expires_at, repository = self._entries.get(key, (0.0, None))
        now = time.monotonic()
        if repository is None or expires_at < now:
            return identity
        self._entries[key] = (now + _TTL_SECONDS, repository)
        name = (repository.purl or "").partition("?")[0].partition("#")[0]
        purl = name if repository.version is None else name.rpartition("@")[0]
        return identity._replace(
            ecosystem=repository.ecosystem, package=repository.package, purl=purl
        )


def _store(path: str, format_name: str) -> str | None:
    """Where the objects are that a request asks for; None if it asks for none."""
    return next(
        (store for part, name, store in _ASKS if name == format_name and part in path), None
    )

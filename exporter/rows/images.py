"""Link the requests of one image pull: by tag, by digest, and for layers. Stores no URLs.

A client asks for a tag, gets its digest, and then requests everything else by digest (OCI distribution
spec, "Pulling manifests"). An index lists one manifest for each platform, and the client requests the
one of its own.

Bounded in pulls, images and time. Not thread-safe: only the thread that builds rows uses it.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .packages.identity import Identity

_MAX_PULLS = 4096  # a client and a repository each
_MAX_IMAGES = 16  # of one pull; a client that requests more is not pulling one of them
_TTL_SECONDS = 600.0  # since the last request of the pull

_PATH = re.compile(r"(.*/v2/.+)/(manifests|blobs)/([^/]+)")
# OCI image spec, "Media types", and their Docker equivalents: a list of manifests.
_INDEX_TYPES = (
    "application/vnd.oci.image.index.",
    "application/vnd.docker.distribution.manifest.list.",
)
_HAS_MANIFEST = frozenset({200, 304})

type Client = tuple[str | None, str | None]  # address and proxy user


class _Image(NamedTuple):
    identity: Identity
    is_index: bool


class _Pull:
    """What one client requested from one repository. The parts are bounded by _MAX_IMAGES."""

    def __init__(self) -> None:
        self.images: dict[str, _Image] = {}  # by digest
        self.platforms: set[str] = set()  # digests of manifests that an index seems to list
        self.tags: dict[str, str] = {}  # by digest
        self.expires_at = 0.0

    @property
    def has_one_image(self) -> bool:
        """Whether all blobs belong to one image, as far as the requests tell."""
        return len(self.images) == 1 and len(self.platforms) <= 1

    def add(self, digest: str, identity: Identity, *, is_index: bool) -> None:
        known = self.images.get(digest)
        has_index = any(image.is_index for image in self.images.values())
        if known is None and has_index and not is_index and digest not in self.tags:
            if len(self.platforms) < _MAX_IMAGES:
                self.platforms.add(digest)
        elif known is not None or len(self.images) < _MAX_IMAGES:
            is_index = is_index or (known is not None and known.is_index)
            self.images[digest] = _Image(identity, is_index)


class Images:
    """Recent image pulls."""

    def __init__(self) -> None:
        self._pulls: OrderedDict[tuple[Client, str, str], _Pull] = OrderedDict()

    def link(
        self,
        client: Client,
        authority: str,
        path: str,
        identity: Identity,
        *,
        status_code: int | None,
        content_type: str | None,
    ) -> Identity:
        """Return the identity of a request to an OCI registry, with what its pull adds.

        A manifest gets the tag that the client asked for. A blob gets the package of the image, or
        only its name if the client recently pulled several images of this repository. On an unknown
        host, the manifest shows that it is a registry; responses with blobs often do not.

        Args:
            client: who asked.
            authority: host and port.
            path: percent-decoded.
            identity: what the URL and its response identify.
            status_code: of the response.
            content_type: of the response.
        """
        match = _PATH.fullmatch(path)
        if match is None:
            return identity
        repository, kind, reference = match.groups()
        key = (client, authority, repository)
        if kind == "blobs":
            return self._of_blob(key, identity)
        is_manifest = identity.artifact_kind == "artifact" and identity.version is not None
        if not is_manifest or status_code not in _HAS_MANIFEST:
            return identity
        is_index = (content_type or "").startswith(_INDEX_TYPES)
        return self._of_manifest(key, identity, reference, is_index=is_index)

    def _of_manifest(
        self, key: tuple[Client, str, str], identity: Identity, reference: str, *, is_index: bool
    ) -> Identity:
        pull = self._pulls.pop(key, None)
        now = time.monotonic()
        if pull is None or pull.expires_at < now:
            pull = _Pull()
        pull.expires_at = now + _TTL_SECONDS
        self._pulls[key] = pull
        if len(self._pulls) > _MAX_PULLS:
            self._pulls.popitem(last=False)
        digest = identity.version or ""
        if reference != digest and len(pull.tags) < _MAX_IMAGES:
            pull.tags[digest] = reference
        elif reference == digest and digest in pull.tags:
            identity = identity._replace(purl=f"{identity.purl}&tag={pull.tags[digest]}")
        pull.add(digest, identity, is_index=is_index)
        return identity

    def _of_blob(self, key: tuple[Client, str, str], identity: Identity) -> Identity:
        pull = self._pulls.get(key)
        now = time.monotonic()
        if pull is None or pull.expires_at < now or identity.artifact_kind not in {None, "blob"}:
            return identity
        pull.expires_at = now + _TTL_SECONDS
        first = next(iter(pull.images.values())).identity
        linked = identity._replace(
            remote=first.remote,
            artifact_kind="blob",
            ecosystem=first.ecosystem,
            package=first.package,
            version=first.version,
            purl=first.purl,
        )
        if pull.has_one_image:
            return linked
        name, _, qualifiers = (first.purl or "").partition("?")
        qualifiers = "&".join(q for q in qualifiers.split("&") if not q.startswith("tag="))
        return linked._replace(version=None, purl=f"{name.partition('@')[0]}?{qualifiers}")

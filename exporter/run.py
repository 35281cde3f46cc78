"""Identify one run of a proxy: from the start of its log to the end of its process. Does no I/O."""

from __future__ import annotations

import time
import uuid
from importlib import metadata

import msgspec

_DISTRIBUTION = "artifactapi"


class Run(msgspec.Struct, frozen=True):
    """One proxy process. A hot reload of the script continues the run."""

    run_id: str  # a random UUID (RFC 9562, version 4)
    node: str  # the proxy's name at the start; a reload may give later rows another one
    version: str | None  # of artifactapi; None: it is not installed as a package
    started_at: float  # epoch seconds, by this machine's clock

    @classmethod
    def start(cls, node: str) -> Run:
        """Return a run that starts now, with an id that no other run has."""
        return cls(str(uuid.uuid4()), node, _version(), time.time())


def _version() -> str | None:
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:  # the script of a checkout, in another environment
        return None

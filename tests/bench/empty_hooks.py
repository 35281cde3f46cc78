"""A mitmproxy script with the same flow hooks as artifactapi, but empty: the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mitmproxy.flow import Flow
    from mitmproxy.http import HTTPFlow


class EmptyHooks:
    """An addon whose hooks do nothing."""

    def requestheaders(self, flow: HTTPFlow) -> None:
        """Do nothing."""

    def request(self, flow: HTTPFlow) -> None:
        """Do nothing."""

    def responseheaders(self, flow: HTTPFlow) -> None:
        """Do nothing."""

    def response(self, flow: HTTPFlow) -> None:
        """Do nothing."""

    def update(self, flows: Sequence[Flow]) -> None:
        """Do nothing."""


addons = [EmptyHooks()]

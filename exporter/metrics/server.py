"""The metrics of a proxy, while `metrics.listen` is set. Thread-safe."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from .endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class MetricsServer:
    """At most one endpoint at a time, each with a thread of its own. No method waits, except `stop`."""

    def __init__(self, listen: str, status: Callable[[], Mapping[str, Any]]) -> None:
        """`listen`: as `metrics.listen`; `status`: see `Exporter.status`."""
        self._status = status
        self._lock = threading.Lock()  # of the next three; held for no I/O
        self._listen = ""
        self._endpoint: Endpoint | None = None
        self._is_stopped = False
        self.reconfigure(listen)

    def reconfigure(self, listen: str) -> None:
        """Use another address; empty: none."""
        with self._lock:
            if self._is_stopped or listen == self._listen:
                return
            self._listen, former = listen, self._endpoint
            if former is not None:
                former.request_stop()
            self._endpoint = Endpoint(listen, self._status, former) if listen else None

    def stop(self) -> None:
        """Close everything, for at most a second. Idempotent."""
        with self._lock:
            self._is_stopped = True
            endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.request_stop()
            endpoint.join()

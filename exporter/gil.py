"""Let the event loop run while another thread computes.

A thread that computes keeps Python's global interpreter lock (GIL) for up to 5 ms
(sys.getswitchinterval) while another thread waits for it. The proxy's event loop needs the lock back
after each system call, so a long computation here would slow down every request.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_HOLD_SECONDS = 0.000_5
_SLEEP_SECONDS = 0.000_05  # long enough for a waiting thread to take the lock


def yielding_gil[T](items: Iterable[T]) -> Iterator[T]:
    """Iterate over `items` and release the GIL between two of them every 0.5 ms."""
    if threading.active_count() == 1:
        yield from items
        return
    release_at = time.perf_counter() + _HOLD_SECONDS
    for item in items:
        yield item
        if time.perf_counter() > release_at:
            time.sleep(_SLEEP_SECONDS)  # noqa: TID251 - to release the GIL, not to wait for an event
            release_at = time.perf_counter() + _HOLD_SECONDS

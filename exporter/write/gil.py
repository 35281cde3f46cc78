"""Let other threads have their turn while one computes for long; does no work itself.

A thread that computes holds Python's global lock for up to 5 ms (sys.getswitchinterval) once
another wants it. That other is the proxy's event loop: it wants it back after each system call.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TURN_SECONDS = 0.000_5
_PAUSE_SECONDS = 0.000_05  # a thread that waits for the lock wakes in less


def yielding_gil[T](items: Iterable[T]) -> Iterator[T]:
    """The items; between two of them the global lock is given up whenever 0.5 ms have passed."""
    if threading.active_count() == 1:
        yield from items
        return
    until = time.perf_counter() + _TURN_SECONDS
    for item in items:
        yield item
        if time.perf_counter() > until:
            time.sleep(_PAUSE_SECONDS)  # noqa: TID251 - so that others run, not for something to happen
            until = time.perf_counter() + _TURN_SECONDS

"""Wait for a condition instead of sleeping."""

import threading
import time
from collections.abc import Callable

_PAUSE = 0.01


def eventually[Value](check: Callable[[], Value], timeout: float = 10.0) -> Value:
    """Call `check` until it returns a truthy value, and return that value.

    Args:
        check: Called every 10 ms; must not raise.
        timeout: In seconds.

    Raises:
        AssertionError: Every value was falsy until the timeout. The message holds the last one.
    """
    deadline = time.monotonic() + timeout
    while not (value := check()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"after {timeout} s still {value!r}")
        threading.Event().wait(_PAUSE)
    return value

"""Wait for what a test expects, and no longer."""

import threading
import time
from collections.abc import Callable

_PAUSE = 0.01


def eventually[Value](check: Callable[[], Value], timeout: float = 10.0) -> Value:
    """Return the first truthy value of `check`, or fail with the last one it gave.

    Args:
        check: Asked again and again; may not raise.
        timeout: Seconds, on the monotonic clock.

    Raises:
        AssertionError: Nothing truthy came in time.
    """
    deadline = time.monotonic() + timeout
    while not (value := check()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"after {timeout} s still {value!r}")
        threading.Event().wait(_PAUSE)
    return value

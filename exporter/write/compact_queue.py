"""A queue that keeps exchanges pickled in anonymous memory maps.

Python does not return the memory of small objects to the operating system, so after an outage the
proxy would stay as large as its fullest buffer. A memory map is returned as soon as it is read.
"""

from __future__ import annotations

import mmap
import pickle
import random
from collections import deque
from typing import TYPE_CHECKING

from msgspec.structs import replace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..exchange import Exchange


class CompactQueue:
    """A queue of batches of exchanges. One thread uses it."""

    def __init__(self) -> None:
        self._batches: deque[tuple[mmap.mmap, list[bytes | None]]] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, exchanges: Sequence[Exchange]) -> None:
        """Add a batch, at least one exchange. Bodies stay as they are: they are large objects already.

        Raises whatever pickling raises, and OSError if there is no memory.
        """
        bodies = [x.body for x in exchanges]
        pickled = pickle.dumps([x if x.body is None else replace(x, body=None) for x in exchanges])
        memory = mmap.mmap(-1, len(pickled))
        memory.write(pickled)
        self._batches.append((memory, bodies))

    def sample(self, count: int) -> list[Exchange]:
        """At most `count` of the newest exchanges, and of a batch at random, without their bodies."""
        if not self._batches:
            return []
        newest = _load(self._batches[-1][0])[-count:]
        others = _load(random.choice(self._batches)[0])  # noqa: S311 - not a secret
        return [*newest, *random.sample(others, min(count, len(others)))]

    def popleft(self) -> list[Exchange]:
        """Remove and return the oldest batch. Raises IndexError if there is none."""
        memory, bodies = self._batches.popleft()
        with memory:
            exchanges = _load(memory)
        pairs = zip(exchanges, bodies, strict=True)
        return [x if body is None else replace(x, body=body) for x, body in pairs]


def _load(memory: mmap.mmap) -> list[Exchange]:
    exchanges: list[Exchange] = pickle.loads(memory)  # noqa: S301 - pickled by `append`
    return exchanges

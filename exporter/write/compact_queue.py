"""A queue that keeps exchanges in anonymous memory maps.

Python does not return the memory of small objects to the operating system, so after an outage the
proxy would stay as large as its fullest buffer. A memory map is returned as soon as it is read.
"""

from __future__ import annotations

import mmap
import random
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .encoding import Encoded


class _Batch(NamedTuple):
    memory: mmap.mmap
    lengths: list[int]  # of the exchanges, which follow each other
    bodies: list[bytes | None]  # these are large objects already

    def exchanges(self) -> list[Encoded]:
        self.memory.seek(0)
        return [
            (self.memory.read(n), body) for n, body in zip(self.lengths, self.bodies, strict=True)
        ]


class CompactQueue:
    """A queue of batches of exchanges. One thread uses it."""

    def __init__(self) -> None:
        self._batches: deque[_Batch] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, exchanges: Sequence[Encoded]) -> None:
        """Add a batch, at least one exchange. Raises OSError if there is no memory."""
        payloads, bodies = zip(*exchanges, strict=True)
        memory = mmap.mmap(-1, sum(map(len, payloads)))
        for payload in payloads:
            memory.write(payload)
        self._batches.append(_Batch(memory, [*map(len, payloads)], [*bodies]))

    def sample(self, count: int) -> list[Encoded]:
        """At most `count` of the newest exchanges, and of a batch at random, without their bodies."""
        if not self._batches:
            return []
        newest = self._batches[-1].exchanges()[-count:]
        others = random.choice(self._batches).exchanges()  # noqa: S311 - not a secret
        found = [*newest, *random.sample(others, min(count, len(others)))]
        return [(payload, None) for payload, _ in found]

    def popleft(self) -> list[Encoded]:
        """Remove and return the oldest batch. Raises IndexError if there is none."""
        batch = self._batches.popleft()
        with batch.memory:
            return batch.exchanges()

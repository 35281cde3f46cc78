"""Exchanges in memory of their own, which the system has back as soon as they are taken; no bounds here.

Python keeps what its small objects lay in for small objects to come. So does a full buffer, once empty.
"""

from __future__ import annotations

import mmap
import pickle
from collections import deque
from typing import TYPE_CHECKING

from msgspec.structs import replace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..exchange import Exchange


class CompactQueue:
    """A queue of packs of exchanges. One thread uses it."""

    def __init__(self) -> None:
        self._packs: deque[tuple[mmap.mmap, list[bytes | None]]] = deque()

    def __len__(self) -> int:
        return len(self._packs)

    def append(self, exchanges: Sequence[Exchange]) -> None:
        """Pack these, at least one, but for their bodies, which are large and need no such thing.

        Raises what pickling raises, and OSError where there is no memory.
        """
        bodies = [x.body for x in exchanges]
        packed = pickle.dumps([x if x.body is None else replace(x, body=None) for x in exchanges])
        pack = mmap.mmap(-1, len(packed))
        pack.write(packed)
        self._packs.append((pack, bodies))

    def popleft(self) -> list[Exchange]:
        """Those of the oldest pack. Raises IndexError if there is none."""
        pack, bodies = self._packs.popleft()
        with pack:
            exchanges = pickle.loads(pack)  # noqa: S301 - we have pickled it ourselves
        pairs = zip(exchanges, bodies, strict=True)
        return [x if body is None else replace(x, body=body) for x, body in pairs]

"""Exchanges in memory of their own, which the system has back as soon as they are taken; no bounds here.

Python keeps what its small objects lay in for small objects to come. So does a full buffer, once empty.
"""

from __future__ import annotations

import mmap
import pickle
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .exchange import Exchange


class Packs:
    """A queue of packs of exchanges. One thread uses it."""

    def __init__(self) -> None:
        self._packs: deque[mmap.mmap] = deque()

    def __len__(self) -> int:
        return len(self._packs)

    def append(self, exchanges: Sequence[Exchange]) -> None:
        """Pack these, at least one. Raises what pickling raises, and OSError where there is no memory."""
        packed = pickle.dumps(exchanges)
        pack = mmap.mmap(-1, len(packed))
        pack.write(packed)
        self._packs.append(pack)

    def popleft(self) -> list[Exchange]:
        """Those of the oldest pack. Raises IndexError if there is none."""
        with self._packs.popleft() as pack:
            exchanges: list[Exchange] = pickle.loads(pack)  # noqa: S301 - we have pickled it ourselves
        return exchanges

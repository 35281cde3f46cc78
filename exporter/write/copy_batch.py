"""Rows in the form that PostgreSQL receives: COPY text plus a statement that counts artifacts. Runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import batched
from typing import TYPE_CHECKING, Self, overload

import msgspec

from ..gil import yielding_gil
from ..rows.entry import AccessLogEntry
from .artifacts import fetches, record
from .ledger import RowCounts, row_counts

if TYPE_CHECKING:
    from collections.abc import Iterable

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_TABS = len(AccessLogEntry._fields) - 1
_ROWS_PER_STEP = 32  # formatted in about 0.1 ms


class CopyBatch(Sequence[AccessLogEntry]):
    """A sequence of entries together with what is sent to PostgreSQL. Immutable; can be pickled."""

    def __init__(
        self, size: int, row_counts: RowCounts, text: bytes, statement: bytes, encoded: bytes
    ) -> None:
        self._size = size
        self.row_counts = row_counts  # by node and day, for the ledger of runs
        self.text = text  # for COPY; see `copy_text`
        self.statement = statement  # counts the fetched artifacts; empty if there are none
        self.encoded = encoded  # see `encode_rows`

    @classmethod
    def of(cls, entries: Sequence[AccessLogEntry]) -> Self:
        """Prepare these entries. Raises UnicodeError for text that is not valid UTF-8."""
        parts = yielding_gil(batched(entries, _ROWS_PER_STEP))
        text = "".join([copy_text(part) for part in parts]).encode()
        fetched = fetches(entries)
        statement = record(fetched) if fetched else b""
        return cls(len(entries), row_counts(entries), text, statement, encode_rows(entries))

    @property
    def days(self) -> frozenset[str]:
        """See `days_of`."""
        return frozenset([day for _, day in self.row_counts])

    def without_artifacts(self) -> Self:
        """The same batch, but it counts no artifacts."""
        return type(self)(self._size, self.row_counts, self.text, b"", self.encoded)

    @cached_property
    def _entries(self) -> list[AccessLogEntry]:
        # Decoded on demand: only errors and the spool need the entries.
        return decode_rows(self.encoded)

    @overload
    def __getitem__(self, index: int) -> AccessLogEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[AccessLogEntry]: ...
    def __getitem__(self, index: int | slice) -> AccessLogEntry | list[AccessLogEntry]:
        return self._entries[index]

    def __len__(self) -> int:
        return self._size


def encode_rows(entries: Sequence[AccessLogEntry]) -> bytes:
    """Entries as MessagePack. A CopyBatch holds that already."""
    return entries.encoded if isinstance(entries, CopyBatch) else msgspec.msgpack.encode(entries)


def decode_rows(encoded: bytes) -> list[AccessLogEntry]:
    """Inverse of `encode_rows`. Raises msgspec.MsgspecError or TypeError for other input."""
    return [*map(AccessLogEntry._make, msgspec.msgpack.decode(encoded))]


def days_of(entries: Iterable[AccessLogEntry]) -> frozenset[str]:
    """The days (UTC, YYYY-MM-DD) of the entries, which are their partitions."""
    return frozenset([entry.started_at[:10] for entry in entries])


def copy_text(entries: Sequence[AccessLogEntry]) -> str:
    """Entries in COPY's text format (PostgreSQL docs, COPY, "Text Format"). NULL is an empty field."""
    lines = [
        "\t".join([v if type(v) is str else "" if v is None else repr(v) for v in entry])
        for entry in entries
    ]
    text = "\n".join(lines) + "\n"
    # Hardly any value needs escaping. Four scans of the whole text are cheaper than a look at each value.
    if (
        "\\" in text
        or "\r" in text
        or text.count("\n") != len(lines)
        or text.count("\t") != _TABS * len(lines)
    ):
        lines = [
            "\t".join(["" if v is None else str(v).translate(_ESCAPES) for v in entry])
            for entry in entries
        ]
        text = "\n".join(lines) + "\n"
    return text

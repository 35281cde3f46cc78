"""Rows in the form Postgres takes them: COPY text and a statement that counts artifacts; runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import batched
from typing import TYPE_CHECKING, Self, overload

import msgspec

from ..rows.entry import AccessLogEntry
from .artifacts import fetches, record
from .gil import yielding_gil

if TYPE_CHECKING:
    from collections.abc import Iterable

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_TABS = len(AccessLogEntry._fields) - 1
_FORMATTED_AT_ONCE = 32  # rows, in some 0.1 ms


class CopyBatch(Sequence[AccessLogEntry]):
    """Entries, and what Postgres gets of them, ready to be sent. Immutable; can be pickled."""

    def __init__(
        self, size: int, days: frozenset[str], text: bytes, statement: bytes, encoded: bytes
    ) -> None:
        self._size = size
        self.days = days  # as of `days_of`
        self.text = text  # for COPY, see `copy_text`
        self.statement = statement  # counts the artifacts they fetched; empty if they fetched none
        self.encoded = encoded  # as of `pack`

    @classmethod
    def of(cls, entries: Sequence[AccessLogEntry]) -> Self:
        """Make these ready. Raises UnicodeError for a text that has no UTF-8."""
        parts = yielding_gil(batched(entries, _FORMATTED_AT_ONCE))
        text = "".join([copy_text(part) for part in parts]).encode()
        fetched = fetches(entries)
        statement = record(fetched).as_bytes() if fetched else b""
        return cls(len(entries), days_of(entries), text, statement, encode_rows(entries))

    @cached_property
    def _entries(self) -> list[AccessLogEntry]:
        # Nobody asks for them but when something is wrong with the database.
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
    """Entries as MessagePack; a CopyBatch has them so already."""
    return entries.encoded if isinstance(entries, CopyBatch) else msgspec.msgpack.encode(entries)


def decode_rows(encoded: bytes) -> list[AccessLogEntry]:
    """What `pack` encoded. Raises msgspec.MsgspecError or TypeError for anything else."""
    return [*map(AccessLogEntry._make, msgspec.msgpack.decode(encoded))]


def days_of(entries: Iterable[AccessLogEntry]) -> frozenset[str]:
    """The days on which they started, in UTC, as YYYY-MM-DD."""
    return frozenset([entry.started_at[:10] for entry in entries])


def copy_text(entries: Sequence[AccessLogEntry]) -> str:
    """Entries in COPY's text format (PostgreSQL docs, COPY, "Text Format"), NULL as nothing at all."""
    lines = [
        "\t".join([v if type(v) is str else "" if v is None else repr(v) for v in entry])
        for entry in entries
    ]
    text = "\n".join(lines) + "\n"
    # Almost no value holds a character that COPY reads: four scans of the whole cost less than
    # looking at each value.
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

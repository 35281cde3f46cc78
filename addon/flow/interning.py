"""Keep short texts that repeat once, however many exchanges hold them; bounded, and used by one thread.

A look-up takes no longer than asking a text for its length, and a full buffer takes half the memory.
"""

from __future__ import annotations

from exporter import RESPONSE_FIELDS

CHARACTER_BYTES = 4  # of a str, at most
TEXT_BYTES = 64  # what a text takes beside its characters

Field = tuple[bytes, bytes]


class _Shared[K, V](dict[K, V]):
    """`bytes` grows by what values take that were not there yet."""

    MAX_ENTRIES = 4096
    MAX_BYTES = 256  # of one value

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def _keep(self, key: K, value: V, size: int) -> V:
        self.bytes += size
        if size <= self.MAX_BYTES:
            if len(self) >= self.MAX_ENTRIES:
                self.clear()
            self[key] = value
        return value


class InternedTexts[T: (bytes, str)](_Shared[T, T]):
    """`shared[text]` is equal to the text, and the same object whenever it can be."""

    def __missing__(self, text: T) -> T:
        width = CHARACTER_BYTES if isinstance(text, str) else 1
        return self._keep(text, text, TEXT_BYTES + width * len(text))


class InternedFields(_Shared[Field, Field | None]):
    """`shared[field]` is a header field with its name in lower case; None if no column is read from it.

    The names of those, as they were spelt, are in `others`, and need not be asked for: names repeat,
    and lowering each costs more than all the rest of a capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.others: set[bytes] = set()

    def __missing__(self, field: Field) -> Field | None:
        name, value = field
        lower = name.lower()
        if lower in RESPONSE_FIELDS:
            return self._keep(field, (lower, value), 3 * TEXT_BYTES + len(name) + len(value))
        if len(self.others) >= self.MAX_ENTRIES:
            self.others.clear()
        if len(name) <= self.MAX_BYTES:
            self.others.add(name)
        return None

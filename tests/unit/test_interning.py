"""Interning keeps repeated values once, and its memory stays bounded."""

from __future__ import annotations

from addon.flow.interning import MAX_VALUES, Interner


def copy_of(text: bytes) -> bytes:
    """Return an equal value that is another object."""
    return bytes(bytearray(text))


def test_equal_values_become_one_object_and_count_once() -> None:
    interner: Interner[bytes] = Interner(lambda value: 64 + len(value))
    first = interner[copy_of(b"pip/25.0")]
    assert interner.new_bytes == 72
    assert interner[copy_of(b"pip/25.0")] is first
    assert interner.new_bytes == 72


def test_long_and_unrepeated_values_count_but_are_not_kept() -> None:
    interner: Interner[str] = Interner(lambda value: 4 * len(value))
    long = "h" * 10_000
    assert interner[long] is long
    assert len(interner) == 0
    assert interner.new_bytes == 40_000
    for number in range(20_000):
        assert interner[f"host-{number:011}"] == f"host-{number:011}"
        assert 1 <= len(interner) <= MAX_VALUES
    assert interner.new_bytes == 40_000 + 20_000 * 64

"""Values that repeat are kept once, and values that do not repeat cannot fill the memory."""

from __future__ import annotations

from addon.flow.interning import MAX_VALUES, Interner


def fresh(text: bytes) -> bytes:
    """An equal value that is not the same object."""
    return bytes(bytearray(text))


def test_equal_values_become_one_and_are_counted_once() -> None:
    interner: Interner[bytes] = Interner()
    first = interner.intern(fresh(b"pip/25.0"), 72)
    assert interner.new_bytes == 72
    assert interner.intern(fresh(b"pip/25.0"), 72) is first
    assert interner.new_bytes == 72


def test_values_that_are_long_or_never_repeat_are_counted_and_not_kept_forever() -> None:
    interner: Interner[str] = Interner()
    long = "h" * 10_000
    assert interner.intern(long, 40_000) is long
    assert len(interner) == 0
    assert interner.new_bytes == 40_000
    for number in range(20_000):
        assert interner.intern(f"host-{number}", 64) == f"host-{number}"
        assert 1 <= len(interner) <= MAX_VALUES
    assert interner.new_bytes == 40_000 + 20_000 * 64

"""Texts that repeat are kept once, whoever repeats them, and nobody can fill the memory with those that don't."""

from __future__ import annotations

from addon.flow.interning import InternedFields, InternedTexts


def fresh(text: bytes) -> bytes:
    """Equal, but not the same object."""
    return bytes(bytearray(text))


def test_equal_texts_become_one_and_are_counted_once() -> None:
    texts: InternedTexts[bytes] = InternedTexts()
    first = texts[fresh(b"pip/25.0")]
    counted = texts.bytes
    assert counted > len(first)
    assert texts[fresh(b"pip/25.0")] is first
    assert texts.bytes == counted


def test_text_that_never_repeats_or_is_long_is_counted_and_not_kept_for_ever() -> None:
    texts: InternedTexts[str] = InternedTexts()
    long = "h" * 10_000
    assert texts[long] is long
    assert long not in texts
    assert texts.bytes >= 40_000
    for number in range(20_000):
        assert texts[f"host-{number}"] == f"host-{number}"
        assert len(texts) <= texts.MAX_ENTRIES
    assert texts.bytes >= 40_000 + 20_000 * 64


def test_fields_are_found_however_their_names_are_spelt() -> None:
    fields = InternedFields()
    for name in (b"X-Cache", b"x-cache", b"X-CACHE"):
        for _ in range(2):
            assert fields[fresh(name), b"HIT"] == (b"x-cache", b"HIT")
    assert fields[b"X-Cache", b"MISS"] == (b"x-cache", b"MISS")
    for number in range(20_000):
        assert fields[b"X-Other-%d" % number, b"HIT"] is None
        assert len(fields.others) <= fields.MAX_ENTRIES
    assert b"X-Other-19999" in fields.others
    assert fields[b"X" * 10_000, b"1"] is None
    assert b"X" * 10_000 not in fields.others

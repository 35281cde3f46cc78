"""Epochs of Debian packages from indexes: where they are, damaged and huge indexes, bounds."""

from __future__ import annotations

import gzip
import lzma
import time
from typing import TYPE_CHECKING

import pytest

from exporter.rows import epochs as module
from exporter.rows.epochs import Epochs, repository_of

if TYPE_CHECKING:
    from collections.abc import Callable

HOST = "deb.example:80"
INDEX = b"/debian/dists/sid/main/binary-amd64/Packages.xz"
BY_HASH = b"/debian/dists/sid/main/binary-amd64/by-hash/SHA256/" + b"0a" * 32
STANZAS = b"""\
Package: curl
Version: 8.5.0-1
Filename: pool/main/c/curl/curl_8.5.0-1_amd64.deb

Package: g++
Filename: pool/main/g/gcc/g++_13.2.0-1_amd64.deb
Version: 4:13.2.0-1
Description: mentions
 Version: 9:1

Package: vim
Version: 2:9.1.0-1
Filename: ./pool/main/v/vim/vim_9.1.0-1_amd64.deb
"""
VIM, GPP, CURL = (
    b"/debian/pool/main/v/vim/vim_9.1.0-1_amd64.deb",
    b"/debian/pool/main/g/gcc/g%2b%2b_13.2.0-1_amd64.deb",
    b"/debian/pool/main/c/curl/curl_8.5.0-1_amd64.deb",
)


def read(target: bytes, body: bytes) -> Epochs:
    epochs = Epochs()
    epochs.add(HOST, target, body)
    while epochs.has_work:
        epochs.step()
    return epochs


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize("target", [INDEX, BY_HASH, INDEX + b"?x=1"])
def test_index_gives_the_epochs_of_its_files(
    target: bytes, compress: Callable[[bytes], bytes]
) -> None:
    epochs = read(target, compress(STANZAS))

    assert [epochs.find(HOST, file) for file in (VIM, GPP, CURL)] == ["2", "4", None]
    assert epochs.find("other.example:80", VIM) is None
    assert epochs.find(HOST, VIM.removeprefix(b"/debian")) is None


def test_stanzas_may_be_cut_by_the_parts_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in range(100, 300, 7):
        monkeypatch.setattr(module, "_STEP_BYTES", size)
        epochs = read(INDEX, lzma.compress(STANZAS))
        assert [epochs.find(HOST, file) for file in (VIM, GPP, CURL)] == ["2", "4", None]


@pytest.mark.parametrize(
    ("target", "root"),
    [
        (INDEX, b"/debian"),
        (BY_HASH, b"/debian"),
        (b"/dists/stable/main/binary-all/Packages", b""),
        (b"/flat/repo/Packages.gz", b"/flat/repo"),
        (b"/debian/dists/sid/main/i18n/by-hash/SHA256/00", None),
        (b"/debian/dists/sid/InRelease", None),
        (b"/src/contrib/PACKAGES.gz", None),
        (b"/x/by-hash/SHA256/00", None),
    ],
)
def test_paths_of_indexes(target: bytes, root: bytes | None) -> None:
    assert repository_of(target) == root


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        lzma.compress(STANZAS)[:-20],
        gzip.compress(STANZAS)[:40] + b"\0" * 40,
        b"\xfd7zXZ\x00 but not really",
        b"\xff" * 5000,
    ],
    ids=["empty", "page", "cut xz", "damaged gzip", "no xz", "no text"],
)
def test_damaged_index_is_no_error(body: bytes) -> None:
    epochs = read(INDEX, body)

    assert epochs.find(HOST, CURL) is None


def test_an_index_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = read(INDEX, STANZAS)
    epochs.add(HOST, BY_HASH, STANZAS)
    assert not epochs.has_work

    monkeypatch.setattr(module, "_MAX_FILES", 1)
    epochs.add(HOST, INDEX, STANZAS + b"\n")
    epochs.step()
    epochs.step()
    assert epochs.find(HOST, GPP) is None  # forgotten, so it must be read again
    epochs.add(HOST, INDEX, STANZAS)
    assert epochs.has_work


def test_find_reads_waiting_indexes_within_its_time() -> None:
    epochs = Epochs()
    epochs.add(HOST, INDEX, STANZAS)
    assert epochs.find(HOST, VIM) is None

    epochs.allow(seconds=60)
    assert epochs.find(HOST, VIM) == "2"


def test_waiting_indexes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING_BYTES", len(STANZAS) + 10)
    epochs = Epochs()
    epochs.add(HOST, INDEX, STANZAS)
    epochs.add("other.example:80", INDEX, STANZAS)
    epochs.allow(seconds=60)

    assert epochs.find(HOST, VIM) == "2"
    assert epochs.find("other.example:80", VIM) is None


def test_no_text_takes_more_than_linear_time() -> None:
    """The worker would not answer meanwhile, and any server can send such a text."""
    started = time.process_time()
    epochs = read(INDEX, b"Package: x" + b"\nVersion: 1:1" * 70_000 + b"\n\n" + STANZAS)
    assert time.process_time() - started < 2  # 0.02 s; in quadratic time, minutes
    assert [epochs.find(HOST, file) for file in (VIM, GPP, CURL)] == ["2", "4", None]


def test_text_that_is_no_index_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed text can be a thousand times as large."""
    monkeypatch.setattr(module, "_STEP_BYTES", 1000)
    monkeypatch.setattr(module, "_MAX_TEXT_BYTES", 20_000)
    endless_line = read(INDEX, lzma.compress(b"a" * 1_000_000 + b"\n\n" + STANZAS))
    assert endless_line.find(HOST, VIM) is None

    many_stanzas = read(INDEX, gzip.compress(STANZAS + b"\n\n" + b"a\n\n" * 100_000 + STANZAS))
    assert many_stanzas.find(HOST, VIM) == "2"

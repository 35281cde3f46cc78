"""Epochs of Debian packages, read from the indexes that clients fetched. No I/O, no threads.

The name of a package's file omits the epoch of its version (Debian policy 5.6.12). The index of its
repository has both, with the path of the file below the repository's root (Debian wiki,
"DebianRepository/Format").

An index may have 60 MB, so it is read in steps. Bounded in indexes, files, bytes and time. Use it in
one thread only.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import time
import zlib
from collections import OrderedDict, deque
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

# As transferred. The largest of Debian and Ubuntu have 9 and 15 MB.
MAX_INDEX_BYTES = 20 * 1024 * 1024
_MAX_WAITING_BYTES = 3 * MAX_INDEX_BYTES
_MAX_TEXT_BYTES = 512 * 1024 * 1024  # of one index, decompressed
_MAX_STANZA_BYTES = 1024 * 1024
_STEP_BYTES = 1024 * 1024  # of text: 10 to 20 ms
_LZMA_BYTES = 80 * 1024 * 1024  # what `xz -9` needs
_MAX_INDEXES = 1024  # whose digests are kept, so that each is read once
_MAX_FILES = 200_000  # with an epoch, 100 bytes each; an eighth of all packages of Debian has one

_NAMES = frozenset({b"Packages", b"Packages.gz", b"Packages.xz"})
_EPOCH = re.compile(rb"\nVersion: ([1-9]\d*):")
_FILE = re.compile(rb"\nFilename: (?:\./)?(\S+)")
_XZ, _GZIP = b"\xfd7zXZ\x00", b"\x1f\x8b"


def repository_of(target: bytes) -> bytes | None:
    """The root of the repository if this path, with or without a query, is that of a package index.

    apt requests an index by its digest (by-hash) where it can. In the folder of an architecture,
    nothing else that is large has such a name.
    """
    path = target.partition(b"?")[0]
    root, dists, below = path.partition(b"/dists/")
    folder, _, name = path.rpartition(b"/")
    if name in _NAMES:
        return root if dists else folder
    return root if dists and b"/binary-" in below and b"/by-hash/" in below else None


def is_package_index(target: bytes) -> bool:
    """Whether this path, with or without a query, may be that of a package index."""
    return (b"/Packages" in target or b"/by-hash/" in target) and repository_of(target) is not None


class Epochs:
    """Which files have a version with an epoch."""

    def __init__(self) -> None:
        self._epochs: dict[int, str] = {}  # by hash of the URL; oldest first
        self._read: OrderedDict[tuple[str, bytes], None] = OrderedDict()  # root and digest
        self._waiting: deque[tuple[int, Iterator[None]]] = deque()  # with the size of the index
        self._waiting_bytes = 0
        self._work_until = 0.0  # monotonic seconds

    @property
    def has_work(self) -> bool:
        """Whether an index waits to be read."""
        return bool(self._waiting)

    def allow(self, seconds: float) -> None:
        """From now on, `find` may read waiting indexes for so long."""
        self._work_until = time.monotonic() + seconds

    def add(self, authority: str, target: bytes, body: bytes) -> None:
        """Remember to read an index, unless it was read before or too much waits.

        Args:
            authority: host and port.
            target: the path of the index, as requested.
            body: of the response, as transferred.
        """
        folder = repository_of(target)
        if folder is None or self._waiting_bytes + len(body) > _MAX_WAITING_BYTES:
            return
        root = f"{authority}{_decoded(folder)}"
        key = root, hashlib.sha256(body).digest()
        if key in self._read:
            self._read.move_to_end(key)
            return
        self._read[key] = None
        if len(self._read) > _MAX_INDEXES:
            self._read.popitem(last=False)
        self._waiting.append((len(body), self._reader(root, body)))
        self._waiting_bytes += len(body)

    def step(self) -> None:
        """Read a part of a waiting index, which takes some milliseconds."""
        size, reader = self._waiting[0]
        for _ in reader:
            return
        self._waiting.popleft()
        self._waiting_bytes -= size

    def find(self, authority: str, target: bytes) -> str | None:
        """The epoch of the version in this file; None: it has none, or no index says so."""
        while self._waiting and time.monotonic() < self._work_until:
            self.step()
        if not self._epochs:
            return None
        path = _decoded(target.partition(b"?")[0])
        return self._epochs.get(hash(f"{authority}{path}"))

    def _reader(self, root: str, body: bytes) -> Iterator[None]:
        """Read an index, one step at a time. What is damaged or too large counts only as far as it was read."""
        rest, size = b"\n", 0
        try:
            for part in _decompressed(body):
                text = rest + part
                size += len(part)
                end = text.rfind(b"\n\n") + 1
                self._read_stanzas(root, text[:end])
                rest = text[end:]
                if size > _MAX_TEXT_BYTES or len(rest) > _MAX_STANZA_BYTES:
                    return
                yield
        except (lzma.LZMAError, zlib.error, EOFError):
            return
        self._read_stanzas(root, rest + b"\n")

    def _read_stanzas(self, root: str, text: bytes) -> None:
        end = 0  # of the last stanza: each is looked at once, whatever a server sends
        while found := _EPOCH.search(text, end):
            start = max(text.rfind(b"\n\n", end, found.start() + 1) + 1, end)
            end = text.find(b"\n\n", found.end())
            end = len(text) if end < 0 else end
            file = _FILE.search(text, start, end)
            if file is not None:
                name = file[1].decode("utf-8", "surrogateescape")
                self._epochs[hash(f"{root}/{name}")] = found[1].decode()
        while len(self._epochs) > _MAX_FILES:
            del self._epochs[next(iter(self._epochs))]
            self._read.clear()  # the indexes of the deleted files would have to be read again


def _decoded(path: bytes) -> str:
    return unquote_to_bytes(path).decode("utf-8", "surrogateescape")


def _decompressed(body: bytes) -> Iterator[bytes]:
    """The text of an index in parts. Raises the errors of the decompressors."""
    if body.startswith(_XZ):
        xz = lzma.LZMADecompressor(memlimit=_LZMA_BYTES)
        yield xz.decompress(body, _STEP_BYTES)
        while not xz.eof:
            if xz.needs_input:
                return
            yield xz.decompress(b"", _STEP_BYTES)
    elif body.startswith(_GZIP):
        gzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
        yield gzip.decompress(body, _STEP_BYTES)
        while not gzip.eof and gzip.unconsumed_tail:
            yield gzip.decompress(gzip.unconsumed_tail, _STEP_BYTES)
    else:
        for start in range(0, len(body), _STEP_BYTES):
            yield body[start : start + _STEP_BYTES]

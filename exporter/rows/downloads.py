"""Whether a client has an artifact completely, also if it fetched the file in parts. No I/O.

Package managers read parts of files: pip and uv fetch the metadata at the end of a wheel with range
requests (RFC 9110 14). Such a read is not a download. A file is downloaded when all of its bytes arrived.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from typing import NamedTuple

_OK, _PARTIAL_CONTENT, _NOT_MODIFIED = 200, 206, 304
# RFC 9110 14.4; the unit ignores case (14.1)
_CONTENT_RANGE = re.compile(rb"(?i:bytes) (\d{1,18})-(\d{1,18})/(\d{1,18})")

# Bounds of what is remembered about unfinished files.
_MAX_FILES = 4096
_MAX_PARTS = 64  # separate parts of one file; a client that leaves more gaps is not downloading it
_MAX_AGE_SECONDS = 3600.0  # since the last part


class Download(NamedTuple):
    """One response to a GET for an artifact."""

    client: tuple[str | None, str | None]  # address and proxy user
    file: tuple[str | None, str | None]  # purl and file name
    status_code: int | None
    failed: bool  # with an error: the body may be incomplete
    response_bytes: int | None
    content_range: bytes | None


class _File:
    """The parts of one file that one client has: [start, end) intervals, sorted and disjoint."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, int]] = []
        self.size: int | None = None
        self.expires_at = 0.0

    def add(self, start: int, end: int) -> None:
        before = [part for part in self.parts if part[1] < start]
        after = [part for part in self.parts if part[0] > end]
        touching = self.parts[len(before) : len(self.parts) - len(after)]
        start = min([start, *(part[0] for part in touching)])
        end = max([end, *(part[1] for part in touching)])
        self.parts = [*before, (start, end), *after]

    @property
    def is_complete(self) -> bool:
        return self.size is not None and self.parts == [(0, self.size)]


class Downloads:
    """Remembers unfinished files. Bounded in files, parts and time. Use it in one thread only."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[object, object], _File] = OrderedDict()

    def completes(self, download: Download) -> bool | None:
        """Whether the client now has the whole file; None if the response delivered nothing of it."""
        if download.status_code == _NOT_MODIFIED and not download.failed:
            return True  # it has the file already: RFC 9110 15.4.5
        if download.status_code == _OK and not download.failed:
            self._files.pop((download.client, download.file), None)
            return True
        part = _part(download)
        if part is None:
            return None
        return self._add(download, *part)

    def _add(self, download: Download, start: int, end: int, size: int | None) -> bool:
        key = (download.client, download.file)
        now = time.monotonic()
        file = self._files.pop(key, None)
        is_other_file = file is not None and None not in (size, file.size) and size != file.size
        if file is None or is_other_file or file.expires_at < now:
            file = _File()
        file.size = size or file.size
        file.expires_at = now + _MAX_AGE_SECONDS
        file.add(start, end)
        if file.is_complete:
            return True
        if len(file.parts) <= _MAX_PARTS:
            self._files[key] = file
            if len(self._files) > _MAX_FILES:
                self._files.popitem(last=False)
        return False


def _part(download: Download) -> tuple[int, int, int | None] | None:
    """Start, end and size of the file, as far as they arrived; None if nothing did."""
    count = download.response_bytes
    if download.status_code == _OK and count:  # cut off
        return 0, count, None
    if download.status_code != _PARTIAL_CONTENT or not count:
        return None
    found = _CONTENT_RANGE.fullmatch(download.content_range or b"")
    if found is None:  # several ranges in one response, or an unknown size: not followed
        return 0, 0, None
    start, last, size = map(int, found.groups())
    return start, min(start + count, last + 1, size), size

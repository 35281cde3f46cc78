"""Count the bytes of a body that mitmproxy streams; never switches streaming on, never keeps a byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from mitmproxy import http

StreamFunction = Callable[[bytes], Iterable[bytes] | bytes]
Stream = StreamFunction | bool


class ByteCounter:
    """A stream function that lets through what the one before it made, and counts it."""

    def __init__(self, inner: Stream, *, digest: bool = False) -> None:
        self.inner = inner
        self.count = 0
        self.sha256 = hashlib.sha256() if digest else None

    def __call__(self, data: bytes) -> Iterable[bytes] | bytes:
        """As http.Message.stream: a chunk in, chunks out."""
        chunks = self.inner(data) if callable(self.inner) else data
        if isinstance(chunks, bytes):
            self._add(chunks)
            return chunks
        return self._tally(chunks)

    def _add(self, chunk: bytes) -> None:
        self.count += len(chunk)
        if self.sha256 is not None:
            self.sha256.update(chunk)

    def _tally(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._add(chunk)
            yield chunk


class _CountedStream:
    """A `stream` attribute that counts whatever is switched on, whenever that happens."""

    @property
    def stream(self) -> Stream:
        stream: Stream = self.__dict__.get("_stream", False)
        return stream

    @stream.setter
    def stream(self, value: Stream) -> None:
        if value and not isinstance(value, ByteCounter):
            value = ByteCounter(value, digest=self.__dict__.get("_digest", False))
        self.__dict__["_stream"] = value


class _CountedRequest(_CountedStream, http.Request):
    pass


class _CountedResponse(_CountedStream, http.Response):
    pass


_COUNTED: dict[type, type] = {http.Request: _CountedRequest, http.Response: _CountedResponse}


class Streaming(NamedTuple):
    """What may happen to bodies that are streamed."""

    may_begin_late: bool = False  # in the middle of a body, see stream_large_bodies
    digests: bool = False  # their SHA-256 is wanted


def count_stream(message: http.Message, streaming: Streaming) -> None:
    """See to it that the body of this message is counted if it is streamed.

    Call it when the head is there and all addons have had their say. With `may_begin_late` also a
    body is counted that mitmproxy begins to stream in the middle, when it has grown beyond
    stream_large_bodies: no hook lies there, but the attribute is set.
    """
    if isinstance(message, _CountedStream):
        return
    stream = message.stream
    if stream:
        if not isinstance(stream, ByteCounter):
            message.stream = ByteCounter(stream, digest=streaming.digests)
    elif streaming.may_begin_late and type(message) in _COUNTED:
        message.__class__ = _COUNTED[type(message)]
        message.__dict__["_digest"] = streaming.digests


def body_digest(message: http.Message) -> bytes | None:
    """SHA-256 of a body that was streamed whole; None if it was not, or is not wanted."""
    stream = message.stream
    if isinstance(stream, ByteCounter) and stream.sha256 is not None:
        return stream.sha256.digest()
    return None


def body_bytes(message: http.Message) -> int | None:
    """Size of the body as transferred; None if it is not known."""
    stream = message.stream
    if isinstance(stream, ByteCounter):
        return stream.count
    content = message.data.content
    return len(content) if content is not None else None

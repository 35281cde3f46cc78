"""Count the bytes of a body that mitmproxy streams. Never turns streaming on, never keeps a byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from mitmproxy import http

StreamFunction = Callable[[bytes], Iterable[bytes] | bytes]
Stream = StreamFunction | bool


class ByteCounter:
    """A stream function that wraps another one and counts what it returns."""

    def __init__(self, inner: Stream, *, digest: bool = False) -> None:
        self.inner = inner
        self.count = 0
        self.sha256 = hashlib.sha256() if digest else None

    def __call__(self, data: bytes) -> Iterable[bytes] | bytes:
        """Like http.Message.stream: takes a chunk, returns chunks."""
        chunks = self.inner(data) if callable(self.inner) else data
        if isinstance(chunks, bytes):
            self._add(chunks)
            return chunks
        return self._count_each(chunks)

    def _add(self, chunk: bytes) -> None:
        self.count += len(chunk)
        if self.sha256 is not None:
            self.sha256.update(chunk)

    def _count_each(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._add(chunk)
            yield chunk


class _CountedStream:
    """A message whose `stream` is counted no matter when streaming is turned on."""

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
    """How bodies may be streamed."""

    may_begin_late: bool = False  # in the middle of a body; see the option stream_large_bodies
    digests: bool = False  # compute their SHA-256


def count_stream(message: http.Message, streaming: Streaming) -> None:
    """Count the body of this message if it is streamed.

    Call it after all addons have seen the head. With `may_begin_late`, mitmproxy may also start to
    stream in the middle of a body, once it exceeds stream_large_bodies. It calls no hook then, but it
    sets the `stream` attribute.
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
    """SHA-256 of a body that was streamed completely; None if it was not, or was not requested."""
    stream = message.stream
    if isinstance(stream, ByteCounter) and stream.sha256 is not None:
        return stream.sha256.digest()
    return None


def body_bytes(message: http.Message) -> int | None:
    """Size of the body as transferred, bytes; None if unknown."""
    stream = message.stream
    if isinstance(stream, ByteCounter):
        return stream.count
    content = message.data.content
    return len(content) if content is not None else None

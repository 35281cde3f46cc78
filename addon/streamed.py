"""Count the bytes of a body that mitmproxy streams; never switches streaming on, never keeps a byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mitmproxy import http

StreamFunction = Callable[[bytes], Iterable[bytes] | bytes]
Stream = StreamFunction | bool


class ByteCounter:
    """A stream function that lets through what the one before it made, and counts it."""

    def __init__(self, inner: Stream) -> None:
        self.inner = inner
        self.count = 0

    def __call__(self, data: bytes) -> Iterable[bytes] | bytes:
        """As http.Message.stream: a chunk in, chunks out."""
        chunks = self.inner(data) if callable(self.inner) else data
        if isinstance(chunks, bytes):
            self.count += len(chunks)
            return chunks
        return self._tally(chunks)

    def _tally(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.count += len(chunk)
            yield chunk


class _CountedStream:
    """A `stream` attribute that counts whatever is switched on, whenever that happens."""

    @property
    def stream(self) -> Stream:
        stream: Stream = self.__dict__.get("_stream", False)
        return stream

    @stream.setter
    def stream(self, value: Stream) -> None:
        counted = ByteCounter(value) if value and not isinstance(value, ByteCounter) else value
        self.__dict__["_stream"] = counted


class _CountedRequest(_CountedStream, http.Request):
    pass


class _CountedResponse(_CountedStream, http.Response):
    pass


_COUNTED: dict[type, type] = {http.Request: _CountedRequest, http.Response: _CountedResponse}


def count_stream(message: http.Message, *, may_stream_late: bool) -> None:
    """See to it that the body of this message is counted if it is streamed.

    Call it when the head is there and all addons have had their say. With `may_stream_late` also a
    body is counted that mitmproxy begins to stream in the middle, when it has grown beyond
    stream_large_bodies: no hook lies there, but the attribute is set.
    """
    if isinstance(message, _CountedStream):
        return
    stream = message.stream
    if stream:
        if not isinstance(stream, ByteCounter):
            message.stream = ByteCounter(stream)
    elif may_stream_late and type(message) in _COUNTED:
        message.__class__ = _COUNTED[type(message)]


def body_bytes(message: http.Message) -> int | None:
    """Size of the body as transferred; None if it is not known."""
    stream = message.stream
    if isinstance(stream, ByteCounter):
        return stream.count
    content = message.data.content
    return len(content) if content is not None else None

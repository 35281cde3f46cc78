"""The worker process: receives exchanges, sends back batches that are ready for COPY.

It knows nothing of Postgres. It ends when the proxy's end of the socket is closed, for whatever reason.
"""

from __future__ import annotations

import gc
import hashlib
import pickle
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ..gil import yielding_gil
from ..rows.entry_builder import EntryBuilder
from ..rows.epochs import Epochs
from .channel import Channel
from .copy_batch import CopyBatch
from .encoding import decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..rows.entry import AccessLogEntry
    from .encoding import Encoded

_PORTION_BYTES = 1024 * 1024  # of exchanges; copied in about 0.2 ms. A usual batch is smaller.
# For indexes of Debian packages, in each batch: the proxy waits 2 s for its rows.
_INDEX_SECONDS = 1.2
_MAX_CACHED_BYTES = 1024  # a usual exchange has 400
_GC_THRESHOLD = 100_000  # rows hold no reference cycles, so frequent collections find nothing

_encode = msgspec.msgpack.Encoder().encode
# The number of all exchanges of a batch, and of this portion: the exchanges, and whether each has a body.
_decode_portion = msgspec.msgpack.Decoder(tuple[int, list[bytes], list[bool]]).decode


class BuildFailure(NamedTuple):
    """An exchange that could not be turned into a row. That is a bug of ours."""

    kind: str  # name of the exception
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> BuildFailure:
        """The exception and its traceback as text."""
        # Without the chain of causes, whose texts may hold a row's values.
        lines = traceback.format_exception(error, chain=False)
        return cls(type(error).__name__, "".join(lines).rstrip())


class BuildResult(NamedTuple):
    """Rows, and one failure for each exchange that has none."""

    entries: Sequence[AccessLogEntry]
    unreadable: list[BuildFailure]


def build_rows(builder: EntryBuilder, exchanges: Iterable[Encoded]) -> BuildResult:
    """Build the rows of these exchanges. A bad exchange does not affect the others."""
    entries, unreadable = [], []
    for encoded in yielding_gil(exchanges):
        try:
            is_small = len(encoded[0]) <= _MAX_CACHED_BYTES
            entries.append(builder.build(decode(encoded), cacheable=is_small))
        except Exception as e:  # noqa: BLE001 - any bug in our code
            unreadable.append(BuildFailure.of(e))
    return BuildResult(entries, unreadable)


def send_exchanges(channel: Channel, exchanges: Sequence[Encoded]) -> None:
    """Send exchanges for `receive_exchanges`.

    In portions, because joining them holds the GIL; and bodies separately, because they need not be copied.
    """
    for portion in _portions(exchanges):
        payloads = [payload for payload, _ in portion]
        with_body = [body is not None for _, body in portion]
        channel.send(_encode((len(exchanges), payloads, with_body)))
        for _, body in portion:
            if body is not None:
                channel.send(body)


def receive_exchanges(channel: Channel) -> list[Encoded]:
    """Receive what `send_exchanges` sent. Raises EOFError if the other end is closed."""
    exchanges: list[Encoded] = []
    expected = 1
    while len(exchanges) < expected:
        expected, payloads, with_body = _decode_portion(channel.receive())
        for payload, has_body in zip(payloads, with_body, strict=True):
            exchanges.append((payload, bytes(channel.receive()) if has_body else None))
    return exchanges


def _portions(exchanges: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    portion, size = [], 0
    for encoded in exchanges:
        portion.append(encoded)
        size += len(encoded[0])
        if size >= _PORTION_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def code_digest() -> str:
    """Digest of this package's files on disk, which may be newer than the code a process has loaded."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("[!.]*.py")):
        with suppress(OSError):  # no process has loaded code from an unreadable file
            digest.update(file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Serve the socket that is our standard input until it is closed."""
    # A terminal or a service manager signals all processes. The proxy still needs us to build its last rows.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=0) as end, suppress(EOFError, OSError):
        channel = Channel(end)
        digest, settings = pickle.loads(channel.receive())  # noqa: S301 - from the proxy that started us
        if digest != code_digest():
            sys.exit("the code on disk is not what the proxy has loaded; restart the proxy")
        epochs = Epochs()
        builder = EntryBuilder(settings, epochs if settings.artifact.debian_epochs else None)
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        while True:
            exchanges = receive_exchanges(channel)
            epochs.allow(_INDEX_SECONDS)
            entries, unreadable = build_rows(builder, exchanges)
            channel.send(pickle.dumps(BuildResult(CopyBatch.of(entries), unreadable)))
            while epochs.has_work and not channel.has_message:
                epochs.step()

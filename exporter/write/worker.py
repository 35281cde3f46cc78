"""The worker process: receives exchanges, sends back batches that are ready for COPY.

It knows nothing of Postgres. It ends when the proxy's end of the socket is closed, for whatever reason.
"""

from __future__ import annotations

import gc
import hashlib
import pickle
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import astuple, replace

from ..exchange import Exchange
from ..gil import yielding_gil
from ..rows.entry_builder import EntryBuilder
from .copy_batch import CopyBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..rows.entry import AccessLogEntry

_PORTION_BYTES = 256 * 1024  # of exchanges; pickled in about 0.2 ms. A usual batch is smaller.
_GC_THRESHOLD = 100_000  # rows hold no reference cycles, so frequent collections find nothing


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


def build_rows(builder: EntryBuilder, exchanges: Sequence[Exchange]) -> BuildResult:
    """Build the rows of these exchanges. A bad exchange does not affect the others."""
    entries, unreadable = [], []
    for exchange in yielding_gil(exchanges):
        try:
            entries.append(builder.build(exchange))
        except Exception as e:  # noqa: BLE001 - any bug in our code
            unreadable.append(BuildFailure.of(e))
    return BuildResult(entries, unreadable)


def send(connection: Connection, message: object) -> None:
    """Send for `recv`. Connection.send would print a traceback if the other end is gone."""
    connection.send_bytes(pickle.dumps(message))


def send_exchanges(connection: Connection, exchanges: Sequence[Exchange]) -> None:
    """Send exchanges for `receive_exchanges`.

    In portions, and bodies separately: pickling copies its input while it holds the GIL.
    """
    for portion in _portions(exchanges):
        without_body = [x if x.body is None else replace(x, body=b"") for x in portion]
        # Tuples pickle faster and smaller than structs.
        send(connection, (len(exchanges), [*map(astuple, without_body)]))
        for exchange in portion:
            if exchange.body is not None:
                connection.send_bytes(exchange.body)


def receive_exchanges(connection: Connection) -> list[Exchange]:
    """Receive what `send_exchanges` sent. Raises EOFError if the other end is closed."""
    exchanges: list[Exchange] = []
    expected = 1
    while len(exchanges) < expected:
        expected, portion = connection.recv()
        for fields in portion:
            x = Exchange(*fields)
            exchanges.append(x if x.body is None else replace(x, body=connection.recv_bytes()))
    return exchanges


def _portions(exchanges: Iterable[Exchange]) -> Iterator[list[Exchange]]:
    portion, size = [], 0
    for exchange in exchanges:
        portion.append(exchange)
        size += exchange.bare_size
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
    with Connection(0) as connection, suppress(EOFError, OSError):
        digest, settings = connection.recv()
        if digest != code_digest():
            sys.exit("the code on disk is not what the proxy has loaded; restart the proxy")
        builder = EntryBuilder(settings)
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        while True:
            entries, unreadable = build_rows(builder, receive_exchanges(connection))
            send(connection, BuildResult(CopyBatch.of(entries), unreadable))

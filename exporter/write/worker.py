"""The process that builds batches, so that the proxy's Python need not: exchanges come in, batches go out.

It knows nothing of Postgres, and ends when the proxy's side of its socket is closed, however that came.
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
from ..rows.entry import EntryBuilder
from .copy_batch import CopyBatch
from .gil import yielding_gil

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..rows.entry import AccessLogEntry

_PORTION_BYTES = 256 * 1024  # of exchanges, pickled in some 0.2 ms; a usual batch is less
_GC_OBJECTS = 100_000  # rows make no cycles: what is looked for at the usual 2,000 is not there


class BuildFailure(NamedTuple):
    """A bug of ours that an exception brought to light."""

    kind: str  # the exception's name
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> BuildFailure:
        """The exception with its traceback, as text."""
        # Without what came before it, which may tell of a row.
        lines = traceback.format_exception(error, chain=False)
        return cls(type(error).__name__, "".join(lines).rstrip())


class BuildResult(NamedTuple):
    """What became of some exchanges."""

    entries: Sequence[AccessLogEntry]
    unreadable: list[BuildFailure]  # one for each exchange that is no entry


def build(builder: EntryBuilder, exchanges: Sequence[Exchange]) -> BuildResult:
    """Make entries of them; a bad exchange costs itself alone."""
    entries, unreadable = [], []
    for exchange in yielding_gil(exchanges):
        try:
            entries.append(builder.build(exchange))
        except Exception as e:  # noqa: BLE001 - whatever it was
            unreadable.append(BuildFailure.of(e))
    return BuildResult(entries, unreadable)


def send(connection: Connection, what: object) -> None:
    """For `recv` at the other end. Connection's own leaves a complaint on stderr where that is gone."""
    connection.send_bytes(pickle.dumps(what))


def send_exchanges(connection: Connection, exchanges: Sequence[Exchange]) -> None:
    """Send them for `receive_exchanges`.

    Not all in one piece, and bodies by themselves: what is pickled is copied, with Python's lock held.
    """
    for portion in _portions(exchanges):
        bare = [x if x.body is None else replace(x, body=b"") for x in portion]
        # As tuples: pickled they take less time and room.
        send(connection, (len(exchanges), [*map(astuple, bare)]))
        for exchange in portion:
            if exchange.body is not None:
                connection.send_bytes(exchange.body)


def receive_exchanges(connection: Connection) -> list[Exchange]:
    """What `send_exchanges` sent. Raises EOFError when nothing comes any more."""
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


def digest_of_code() -> str:
    """Of this package as it is on disk now, which need not be what a process has loaded."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("[!.]*.py")):
        with suppress(OSError):  # of what can't be read nothing was loaded
            digest.update(file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Answer the socket that is our standard input, until it is closed."""
    # They reach all of a terminal's or a service's processes; the proxy still has to write what waits.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with Connection(0) as connection, suppress(EOFError, OSError):
        digest, settings = connection.recv()
        if digest != digest_of_code():
            sys.exit("the code on disk is not what the proxy has loaded; start the proxy anew")
        builder = EntryBuilder(settings)
        gc.freeze()
        gc.set_threshold(_GC_OBJECTS)
        while True:
            entries, unreadable = build(builder, receive_exchanges(connection))
            send(connection, BuildResult(CopyBatch.of(entries), unreadable))

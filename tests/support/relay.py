"""A TCP relay between a client and a server that simulates network faults."""

import asyncio
import contextlib
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from typing import Literal

from .postgres_protocol import Handshake, Splitter, without_cause
from .socket_server import SocketServer, reset

type Direction = Literal["to_server", "to_client"]
type Target = tuple[str, int] | Path

_MAX_HELD_BYTES = 1024 * 1024  # per pipe, except in a black hole
_READ = 65536
_UNSENT = 0x894B  # SIOCOUTQNSD: bytes in the kernel's buffer that were not sent yet


class CutError(Exception):
    """The relay cuts the connection here."""


@dataclass
class _Fault:
    """A fault that happens once, at a position that each connection counts from the arming on."""

    direction: Direction
    action: Literal["cut", "swallow"]
    unit: Literal["bytes", "messages"]
    at: int
    inside: bool = False
    passed: Counter["_Pipe"] = field(default_factory=Counter)


@dataclass(eq=False)
class _Pipe:
    """One direction of one connection. Bytes wait in `held` until they may be sent."""

    relay: "Relay"
    direction: Direction
    source: socket.socket
    sink: socket.socket
    splitter: Splitter | None
    held: deque[tuple[float, bytes | None]] = field(default_factory=deque)
    size: int = 0
    swallows: bool = False
    copies: bool = False  # from CopyInResponse to ReadyForQuery

    async def read(self) -> None:
        """Read until the end. In `held`, None stands for a cut and b"" for the end."""
        loop = asyncio.get_running_loop()
        data = b"?"
        try:
            while data:
                await self.relay.until(lambda: self.relay.reads and self._has_room())
                data = await loop.sock_recv(self.source, _READ)
                await self.relay.until(lambda: self.relay.reads)
                self._take(data)
        except OSError:
            self._hold(None)

    async def write(self) -> None:
        """Send the held bytes when they are due, until the end or a cut."""
        loop = asyncio.get_running_loop()
        data: bytes | None = b"?"
        while data:
            await self.relay.until(lambda: bool(self.held) and self.relay.delivers)
            due, data = self.held.popleft()
            await asyncio.sleep(max(0.0, due - loop.time()))
            await self.relay.until(lambda: self.relay.delivers)
            if data is None:
                await self._wait_sent()
                raise CutError
            await self._send(data)
            self.size -= len(data)
            self.relay.changed()
        with contextlib.suppress(OSError):
            self.sink.shutdown(socket.SHUT_WR)

    def _has_room(self) -> bool:
        return self.size < _MAX_HELD_BYTES or not self.relay.delivers

    def _hold(self, data: bytes | None) -> None:
        due = asyncio.get_running_loop().time() + self.relay.latency
        self.held.append((due, data))
        self.size += len(data or b"")
        self.relay.changed()

    def _take(self, data: bytes) -> None:
        if not data:
            self._pass_rest()
        elif self.splitter is None:
            self._pass_bytes(data)
        else:
            for letter, message in self.splitter.feed(data):
                self._pass_message(letter, message)

    def _pass_rest(self) -> None:
        rest = self.splitter.rest() if self.splitter else b""
        if rest and not self.swallows:
            self._hold(rest)
        self._hold(b"")

    def _pass_bytes(self, data: bytes) -> None:
        fault = self.relay.fault_for(self.direction, "bytes")
        if fault and fault.passed[self] + len(data) >= fault.at:
            self._hold(data[: fault.at - fault.passed[self]] or None)
            self._hold(None)
            self.relay.strike()
        elif not self.swallows:
            self._hold(data)
        if fault:
            fault.passed[self] += len(data)

    def _pass_message(self, letter: str, message: bytes) -> None:
        self.relay.seen[self.direction].append(letter)
        fault = self.relay.fault_for(self.direction, "messages")
        if fault and fault.passed[self] == fault.at:
            self._strike(fault, message)
        if fault:
            fault.passed[self] += 1
        if self.direction == "to_client" and letter in "GZ":
            self.copies = letter == "G"
        if self.copies and letter == "E" and self.relay.hides_copy_errors:
            message = without_cause(message)
            self.relay.hidden += 1
        self._pass_bytes(message)

    def _strike(self, fault: _Fault, message: bytes) -> None:
        if fault.action == "swallow":
            self.swallows = True
        else:
            if fault.inside:
                self._hold(message[: len(message) // 2])
            self._hold(None)
        self.relay.strike()

    async def _send(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        while data:
            size = 1 if self.relay.trickles else len(data)
            await loop.sock_sendall(self.sink, data[:size])
            data = data[size:]
            await asyncio.sleep(self.relay.pause)
            await self.relay.until(lambda: self.relay.delivers)

    async def _wait_sent(self) -> None:
        """Wait until the kernel has sent its buffer: a RST would discard it."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                while struct.unpack("i", ioctl(self.sink, _UNSENT, b"\0" * 4))[0]:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)


class Relay(SocketServer):
    """Listens on loopback inside its `with` block and relays to `target`.

    All methods are thread-safe and have taken effect when they return. The counted faults
    (`cut_after`, `cut_at_message`, `swallow_from_message`) count per connection, from the call on.
    They happen once: then `struck` is true and later traffic passes.

    Args:
        target: The address or the path of the Unix socket to connect to.
        postgres: Whether to parse PostgreSQL's protocol, which faults at messages need.
        hides_copy_errors: Whether errors during COPY lose their state and context, as on Citus.
            Needs `postgres`.

    Attributes:
        hidden: The number of errors that lost their state.
        seen: The type letters of the messages read so far, by direction.
        struck: Whether the counted fault has happened.
    """

    def __init__(
        self, target: Target, *, postgres: bool = False, hides_copy_errors: bool = False
    ) -> None:
        super().__init__()
        self.hides_copy_errors = hides_copy_errors
        self.hidden = 0
        self.seen: dict[Direction, list[str]] = {"to_server": [], "to_client": []}
        self.struck = False
        self.latency = self.pause = 0.0
        self.delivers = self.reads = True
        self.trickles = False
        self._target = target
        self._postgres = postgres
        self._fault: _Fault | None = None
        self._change = asyncio.Event()

    def cut(self) -> None:
        """Reset every connection and refuse new ones, until `mend`."""
        self.call(self._refuse())

    def blackhole(self) -> None:
        """Accept connections and bytes but forward nothing; `mend` forwards the held bytes."""
        self.call(self._set(delivers=False))

    def zero_window(self) -> None:
        """Stop reading, so that the TCP windows of both sides close, until `mend`."""
        self.call(self._stop_reading())

    def delay(self, seconds: float) -> None:
        """Delay every byte."""
        self.call(self._set(latency=seconds))

    def trickle(self, pause: float = 0.0) -> None:
        """Forward one byte at a time, with a pause in seconds after each."""
        self.call(self._set(trickles=True, pause=pause))

    def mend(self) -> None:
        """End all faults; cut or swallowed bytes stay lost."""
        self.call(self._mend())

    def cut_after(self, direction: Direction, size: int) -> None:
        """Reset the connection after `size` bytes."""
        self.call(self._arm(_Fault(direction, "cut", "bytes", size)))

    def cut_at_message(self, direction: Direction, index: int, *, inside: bool = False) -> None:
        """Reset the connection before the message with this index, or in its middle."""
        self.call(self._arm(_Fault(direction, "cut", "messages", index, inside)))

    def swallow_from_message(self, direction: Direction, index: int) -> None:
        """Drop the message with this index and all later ones on the connection."""
        self.call(self._arm(_Fault(direction, "swallow", "messages", index)))

    async def until(self, check: Callable[[], bool]) -> None:
        """Wait until `check` is true. Only pipes call this."""
        while not check():
            await self._change.wait()

    def changed(self) -> None:
        """Make the waiting pipes check again. Only pipes call this."""
        self._change.set()
        self._change = asyncio.Event()

    def fault_for(self, direction: Direction, unit: str) -> _Fault | None:
        """Return the armed fault for this direction and unit. Only pipes call this."""
        fault = self._fault
        return fault if fault and (fault.direction, fault.unit) == (direction, unit) else None

    def strike(self) -> None:
        """Record that the armed fault has happened. Only pipes call this."""
        self._fault = None
        self.struck = True

    async def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX if isinstance(self._target, Path) else socket.AF_INET)
        server.setblocking(False)
        clean = False
        try:
            await self.until(lambda: self.delivers)
            target = str(self._target) if isinstance(self._target, Path) else self._target
            await self._loop.sock_connect(server, target)
            await self._pump(client, server)
            clean = True
        except* (OSError, CutError):
            pass  # the RST tells the other side
        finally:
            for sock in (client, server):
                sock.close() if clean else reset(sock)

    async def _pump(self, client: socket.socket, server: socket.socket) -> None:
        handshake = Handshake()
        to_server = Splitter(frontend=True, handshake=handshake) if self._postgres else None
        to_client = Splitter(frontend=False, handshake=handshake) if self._postgres else None
        async with asyncio.TaskGroup() as group:
            for pipe in (
                _Pipe(self, "to_server", client, server, to_server),
                _Pipe(self, "to_client", server, client, to_client),
            ):
                _send_immediately(pipe.sink)
                group.create_task(pipe.read())
                group.create_task(pipe.write())

    async def _set(self, **values: float) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        self.changed()

    async def _stop_reading(self) -> None:
        self._resize(1)
        await self._set(reads=False)

    async def _mend(self) -> None:
        self._resize(_MAX_HELD_BYTES)
        self._fault = None
        await self._set(delivers=True, reads=True, trickles=False, latency=0.0, pause=0.0)
        self._listen()

    def _resize(self, size: int) -> None:
        for client in self._tasks.values():
            with contextlib.suppress(OSError):  # it may just have closed
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    async def _arm(self, fault: _Fault) -> None:
        self._fault = fault
        self.struck = False


class Relays:
    """Relays to the servers of one database, which fail at the same time; see `Relay`."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self._relays = relays

    @property
    def struck(self) -> bool:
        """Whether the counted fault has happened in one of them."""
        return any(relay.struck for relay in self._relays)

    def cut(self) -> None:
        """Reset every connection and refuse new ones, until `mend`."""
        for relay in self._relays:
            relay.cut()

    def blackhole(self) -> None:
        """See `Relay.blackhole`."""
        for relay in self._relays:
            relay.blackhole()

    def zero_window(self) -> None:
        """See `Relay.zero_window`."""
        for relay in self._relays:
            relay.zero_window()

    def delay(self, seconds: float) -> None:
        """See `Relay.delay`."""
        for relay in self._relays:
            relay.delay(seconds)

    def trickle(self) -> None:
        """See `Relay.trickle`."""
        for relay in self._relays:
            relay.trickle()

    def mend(self) -> None:
        """End all faults."""
        for relay in self._relays:
            relay.mend()

    def cut_at_message(self, direction: Direction, index: int) -> None:
        """See `Relay.cut_at_message`."""
        for relay in self._relays:
            relay.cut_at_message(direction, index)

    def swallow_from_message(self, direction: Direction, index: int) -> None:
        """See `Relay.swallow_from_message`."""
        for relay in self._relays:
            relay.swallow_from_message(direction, index)


def _send_immediately(sink: socket.socket) -> None:
    if sink.family != socket.AF_UNIX:
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

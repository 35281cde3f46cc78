"""The file of a journal: where it is, how it is laid out, who may use it. journal.py fills it.

The file holds what has not been redacted yet, so it only ever exists in memory (tmpfs), and only its
owner can read it. A running proxy holds a lock on its file; the operating system releases the lock of a
killed process, and with it whatever the process had written into the mapping.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
import struct
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from ..exchange import Exchange
from ..run import Run  # noqa: TC001 - msgspec reads the annotations

if TYPE_CHECKING:
    from collections.abc import Iterator

# Layout: two copies of the identity, the counters, the ring.
_SLOT_BYTES = 4096
COUNTERS_AT = 2 * _SLOT_BYTES
RING_AT = COUNTERS_AT + 4096

_MAGIC = b"ARTAJRN1"  # the digit is the version of the layout
_SLOT = struct.Struct("<8sII")  # magic, CRC-32 and length of the identity
_MODE = 0o600
_MAX_FILE_BYTES = 1 << 31  # a larger file is not ours

RECORD = struct.Struct("<8sIIQ")  # key, checksum and length of the exchange, its number
CHECK = 65_521  # a prime: a counter is stored as a multiple of it, so a changed byte shows

# Counters: 64-bit words. The event loop writes the first line, the writer's thread the second.
BEGUN, SKIPPED, DROPPED, LAST_BEGUN_AT = range(4)
RELEASED, DROPS_RECORDED, REJECTED, SPOOLED, LOST, ELSEWHERE, ELSEWHERE_LOST = range(8, 15)
OLDEST_OPEN_AT, ALIVE_AT = range(16, 18)
COUNTERS = 24

_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - each file is checked
_SUFFIX = ".journal"


class JournalError(Exception):
    """A journal cannot be created or used. The text is the reason, without a subject."""


class Identity(msgspec.Struct, frozen=True):
    """Whose journal it is."""

    run: Run  # as it is now: it has another name after a hot reload, or another id in another database
    database: str  # that the rows are for; see `journal_database`
    pid: int
    capacity: int  # bytes of the ring
    # Stands before each exchange. It is random, so that no client can forge an exchange in a URL.
    key: bytes = msgspec.field(default_factory=lambda: secrets.token_bytes(8))
    fields: tuple[str, ...] = Exchange.__struct_fields__
    generation: int = 0  # of this identity; the highest one counts


class JournalFile:
    """The mapped and locked file of this run."""

    def __init__(self, identity: Identity) -> None:
        """Create the file with all of its memory. Raises JournalError."""
        self.identity = identity
        reasons: list[str] = []
        for folder in _folders():
            try:
                self._create(folder)
            except (OSError, JournalError) as e:
                reasons.append(f"{folder}: {getattr(e, 'strerror', None) or e}")
            else:
                return
        raise JournalError("; ".join(reasons) or _no_folder())

    def _create(self, folder: Path) -> None:
        self.path = folder / f"{_prefix()}{self.identity.run.run_id}{_SUFFIX}"
        size = RING_AT + self.identity.capacity
        # It gets its name once it is complete and locked, so nobody ever finds half a file.
        file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, _MODE)
        try:
            os.fchmod(file, _MODE)  # whatever the umask is
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Now, because a store into memory that tmpfs cannot provide would be a SIGBUS.
            os.posix_fallocate(file, 0, size)
            # The mapping keeps its own descriptor of the file, and with it the lock.
            self.memory = mmap.mmap(file, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            for slot in (0, 1):
                self._write_identity(slot)
            # With a descriptor, os.link calls linkat(2), which can name a file of O_TMPFILE (open(2)).
            os.link(f"/proc/self/fd/{file}", self.path, src_dir_fd=file, follow_symlinks=True)
        finally:
            os.close(file)

    def set_identity(self, run: Run, database: str) -> None:
        """Change whose rows these are. A kill in between leaves the old identity or the new one.

        Raises JournalError if it does not fit; then the old one stays.
        """
        generation = self.identity.generation + 1
        self.identity = replace(self.identity, run=run, database=database, generation=generation)
        for slot in (0, 1):
            self._write_identity(slot)

    def _write_identity(self, slot: int) -> None:
        encoded = msgspec.msgpack.encode(self.identity)
        content = _SLOT.pack(_MAGIC, zlib.crc32(encoded), len(encoded)) + encoded
        if len(content) > _SLOT_BYTES:
            raise JournalError("the name of the node or of the database is too long")
        start = slot * _SLOT_BYTES
        self.memory[start : start + len(content)] = content

    def remove(self) -> None:
        """Delete the file. The mapping stays valid, so a late write does no harm."""
        with suppress(OSError):
            self.path.unlink()


class DeadJournalFile:
    """The file of a run whose process is gone, locked so that only one process recovers it."""

    def __init__(self, path: Path) -> None:
        """Open, lock and read it.

        Raises:
            BlockingIOError: A running process uses it.
            FileNotFoundError: Another process has just recovered it.
            JournalError: It is not ours.
            OSError: It cannot be read.
        """
        self.path = path
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        self._file = os.open(path, flags)
        try:
            _check(os.fstat(self._file))
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had the lock before may have removed the file.
            if not os.path.samestat(os.fstat(self._file), path.lstat()):
                raise FileNotFoundError(path)  # noqa: TRY301
        except BaseException:
            os.close(self._file)
            raise

    def read(self) -> bytes:
        """Its content. Not mapped, so that nobody who truncates the file can kill this process."""
        size = os.fstat(self._file).st_size
        parts, at = [], 0
        while at < size and (part := os.pread(self._file, size - at, at)):
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def remove(self) -> None:
        """Delete and unlock it: everything in it is safe elsewhere."""
        with suppress(OSError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Unlock it. Idempotent."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def read_identity(content: bytes) -> Identity | None:
    """The newest valid identity in the content of a journal; None if there is none."""
    found = [it for slot in (0, 1) if (it := _identity_in_slot(content, slot * _SLOT_BYTES))]
    return max(found, key=lambda it: it.generation, default=None)


def _identity_in_slot(content: bytes, start: int) -> Identity | None:
    try:
        magic, checksum, length = _SLOT.unpack_from(content, start)
        encoded = content[start + _SLOT.size : start + _SLOT.size + length]
        if magic != _MAGIC or length > _SLOT_BYTES or zlib.crc32(encoded) != checksum:
            return None
        return msgspec.msgpack.decode(encoded, type=Identity)
    except (struct.error, msgspec.MsgspecError):
        return None


def is_other_version(content: bytes) -> bool:
    """Whether the content is of a journal with another layout, which this version cannot read."""
    heads = {content[start : start + len(_MAGIC)] for start in (0, _SLOT_BYTES)}
    return any(it[:-1] == _MAGIC[:-1] and it[-1:].isdigit() and it != _MAGIC for it in heads)


def journal_paths(own: Path | None) -> list[Path]:
    """The journals of this user, without our own."""
    paths = (path for folder in _folders() for path in folder.glob(f"{_prefix()}*{_SUFFIX}"))
    return sorted(path for path in paths if path != own)


def _prefix() -> str:
    return f"artifactapi-{os.geteuid()}-"


def _check(status: os.stat_result) -> None:
    """Raises JournalError unless this is a private file of this user."""
    if not stat.S_ISREG(status.st_mode):
        raise JournalError("it is not a regular file")
    if status.st_uid != os.geteuid():
        raise JournalError(f"it belongs to another user ({status.st_uid})")
    if stat.S_IMODE(status.st_mode) != _MODE:
        raise JournalError(f"its mode is {stat.S_IMODE(status.st_mode):o}, not {_MODE:o}")
    if status.st_size > _MAX_FILE_BYTES:
        raise JournalError(f"it is too large ({status.st_size} bytes)")


def _folders() -> list[Path]:
    """Memory-backed folders, the private one first."""
    if sys.platform != "linux":
        return []
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    candidates = [Path(runtime)] if Path(runtime).is_absolute() else []
    candidates = list(dict.fromkeys([*candidates, _SHARED_MEMORY]))
    return [folder for folder in candidates if _is_in_memory(folder)]


def _no_folder() -> str:
    if sys.platform != "linux":
        return "only Linux has a file system in memory"
    return "neither XDG_RUNTIME_DIR nor /dev/shm is a tmpfs"


def _is_in_memory(folder: Path) -> bool:
    """Whether the folder is on tmpfs or ramfs (proc(5), /proc/pid/mountinfo)."""
    try:
        device = folder.stat().st_dev
        return any(_mounts(f"{os.major(device)}:{os.minor(device)}"))
    except OSError:
        return False


def _mounts(device: str) -> Iterator[bool]:
    """For each mount of this device, whether it is in memory."""
    with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="replace") as mounts:
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            if before.split()[2] == device:
                yield after.split()[0] in _MEMORY_FILE_SYSTEMS

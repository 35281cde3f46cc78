"""Decide which uid runs the embedded server, and make sure that it can reach its files.

PostgreSQL refuses to run as root. If the proxy is root, the server runs under a uid that has no account.
An ordinary user runs the server as itself and needs nothing of this. This module creates no
account, and changes no folder that artifactapi did not create.
"""

from __future__ import annotations

import errno
import grp
import hashlib
import os
import pwd
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from ..settings import create_data_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

# systemd's UIDS-GIDS document lists these as unused. Each is used as a uid and as a gid. They are below
# 65536, so that containers with a user namespace usually have them.
SERVER_UIDS = range(60_706, 61_184)

_INITDB_ACCOUNT = "nobody"
_PROGRAMS = ("initdb", "pg_ctl", "postgres")  # the ones that the embedded server needs
_COPIES = "postgres-programs"
_PROBE_SECONDS = 10.0
_REFUSED = "PostgreSQL refuses to run as root"
_ALTERNATIVES = (
    "run the proxy as an ordinary user, set ARTIFACTAPI_HOME to a folder that every user can reach, "
    "such as /var/lib/artifactapi, or set a DSN"
)
# Prints the first argument that cannot be entered.
_FIND_CLOSED_FOLDER = (
    'for folder; do cd -- "$folder" 2>/dev/null || { printf %s "$folder"; exit 1; }; done'
)


class ServerUser(NamedTuple):
    """The uid and gid of a process. It has no other groups."""

    uid: int
    gid: int


def server_user(data: Path) -> ServerUser | None:
    """Return the user that runs the server of the data folder `data`; None: our own.

    An existing data folder decides. Otherwise it is the first of `SERVER_UIDS` without an account.

    Raises:
        OSError: the data folder belongs to someone else.
    """
    if os.geteuid() != 0:
        return None
    try:
        owner = data.stat().st_uid
    except FileNotFoundError:
        for uid in SERVER_UIDS:
            if not _has_account(uid):
                return ServerUser(uid, uid)
        raise OSError(
            f"{_REFUSED}, and the uids {SERVER_UIDS[0]} to {SERVER_UIDS[-1]} all have accounts; "
            "run the proxy as an ordinary user or set a DSN"
        ) from None
    if owner not in SERVER_UIDS or _has_account(owner):
        raise OSError(
            f"{data} belongs to {_owner_name(owner)}, not to an embedded server of root; "
            "move it away or set ARTIFACTAPI_HOME to another folder"
        )
    return ServerUser(owner, owner)


def initdb_user(server: ServerUser) -> ServerUser:
    """Return the user that runs initdb, which refuses a uid without an account.

    Its gid is the server's, so that other processes of the same account have no access.

    Raises:
        OSError: the account does not exist.
    """
    try:
        return ServerUser(pwd.getpwnam(_INITDB_ACCOUNT).pw_uid, server.gid)
    except KeyError:
        raise OSError(
            f"{_REFUSED}, and this system has no account {_INITDB_ACCOUNT} to run initdb; "
            "run the proxy as an ordinary user or set a DSN"
        ) from None


def run_as(
    user: ServerUser | None,
    command: Sequence[str | Path],
    timeout_seconds: float,
    pass_fds: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a program without our environment variables; `stdout` of the result includes its errors.

    Raises:
        OSError: it cannot be started, or we may not switch to this user.
        subprocess.TimeoutExpired: it took too long and was killed.
    """
    with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open in the server
        try:
            done = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                timeout=timeout_seconds,
                user=user.uid if user else None,
                group=user.gid if user else None,
                extra_groups=[] if user else None,
                env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
                pass_fds=pass_fds,
            )
        except OSError as e:
            if user and e.errno in {errno.EPERM, errno.EINVAL}:
                raise _cannot_switch(e) from None
            raise
        output.seek(0)
        return subprocess.CompletedProcess(done.args, done.returncode, output.read())


def change_owner(path: Path, user: ServerUser) -> None:
    """Make `user` the owner of `path` and of all that it contains.

    Raises:
        OSError: we may not.
    """
    try:
        for folder, folders, files in os.walk(path):
            for name in (*folders, *files):
                os.chown(os.path.join(folder, name), *user, follow_symlinks=False)  # noqa: PTH118
        os.chown(path, *user)
    except OSError as e:
        raise _cannot_switch(e) from None


def create_folder(folder: Path, user: ServerUser | None) -> None:
    """Create the data folder and its parents where they are missing.

    If we are root, the folder must belong to root, and `user` must be able to reach it.

    Raises:
        OSError: the folder cannot be created, cannot be reached, or belongs to someone else.
    """
    if user is not None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        if not missing and (owner := folder.stat().st_uid) != 0:
            raise OSError(
                f"{folder} belongs to {_owner_name(owner)}, but the proxy runs as root; "
                "run it as the owner, set ARTIFACTAPI_HOME to a folder of root, or set a DSN"
            )
        check_reachable(missing[-1].parent if missing else folder, user)
    create_data_folder(folder)


def check_reachable(folder: Path, user: ServerUser) -> None:
    """Check that `user` can enter the folder.

    Raises:
        OSError: it cannot; names the topmost closed folder.
    """
    real = folder.resolve()
    steps = [*reversed(real.parents), real, folder]
    done = run_as(user, ["/bin/sh", "-c", _FIND_CLOSED_FOLDER, "sh", *steps], _PROBE_SECONDS)
    if done.returncode:
        raise OSError(
            f"{_REFUSED}, and uid {user.uid}, which runs it instead, cannot enter "
            f"{done.stdout}; {_ALTERNATIVES}"
        )


def runnable_programs(programs: Path, user: ServerUser | None, folder: Path) -> Path:
    """Return a folder of PostgreSQL's programs that `user` can run: `programs`, or a copy.

    The copy takes about 22 MB in `folder`. A copy that was interrupted is never used. Not thread-safe.

    Raises:
        OSError: the programs cannot be copied, or the copy cannot be run.
    """
    if user is None or not _why_not_runnable(programs, user):
        return programs
    root = programs.parents[2]  # holds the package, and the folder of its shared libraries
    files = sorted(_program_files(programs))
    copy = folder / _COPIES / _digest(root, files)
    if not copy.exists():
        _copy(root, files, copy)
    copied_programs = copy / programs.relative_to(root)
    if reason := _why_not_runnable(copied_programs, user):
        raise OSError(
            f"{_REFUSED}, and uid {user.uid}, which runs it instead, cannot run the programs "
            f"in {copied_programs} ({reason}); {_ALTERNATIVES}"
        )
    return copied_programs


def remove_other_copies(programs: Path, folder: Path) -> None:
    """Remove the copies in `folder` except the one that has `programs`. No server may be using them."""
    for copy in (folder / _COPIES).glob("*"):
        if copy not in programs.parents:
            shutil.rmtree(copy, ignore_errors=True)


def _why_not_runnable(programs: Path, user: ServerUser) -> str:
    """Return why `user` cannot run the programs in this folder; empty if it can."""
    for name in _PROGRAMS:
        try:
            done = run_as(user, [programs / name, "--version"], _PROBE_SECONDS)
        except (FileNotFoundError, PermissionError) as e:
            return e.strerror or str(e)
        if done.returncode:
            return done.stdout.strip() or f"{name} --version: status {done.returncode}"
    return ""


def _program_files(programs: Path) -> Iterator[Path]:
    """Yield the files that the server needs: programs, libraries and shared data."""
    installation, package = programs.parents[0], programs.parents[1]
    yield from (programs / name for name in _PROGRAMS)
    # A wheel has its shared libraries in ".libs" beside the package on Linux, in ".dylibs" on macOS.
    libraries = (installation / "lib", package.with_suffix(".libs"), package / ".dylibs")
    for folder in (*libraries, installation / "share"):
        yield from (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".a")


def _digest(root: Path, files: list[Path]) -> str:
    """Return a name for this installation. Reading the files would take too long at each start."""
    digest = hashlib.sha256()
    for path in files:
        found = path.stat()
        digest.update(f"{path.relative_to(root)}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _copy(root: Path, files: list[Path], target: Path) -> None:
    """Copy the files, readable for everyone, to a temporary name, and rename it at the end."""
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for path in files:
        copy = unfinished / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    for folder in (target.parent, unfinished, *unfinished.rglob("*/")):
        folder.chmod(0o755)
    os.sync()  # a power failure must not leave a complete name with incomplete files
    unfinished.rename(target)


def _has_account(number: int) -> bool:
    for lookup in (pwd.getpwuid, grp.getgrgid):
        try:
            lookup(number)
        except KeyError:
            continue
        return True
    return False


def _owner_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _cannot_switch(error: OSError) -> OSError:
    return OSError(
        f"{_REFUSED}, and this root user may not change the owner of files or switch to another uid "
        f"({error.strerror}); run the proxy as an ordinary user or set a DSN"
    )

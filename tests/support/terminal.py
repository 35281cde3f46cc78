"""Run the `artifactapi` command on a terminal, with colors, a width and progress bars."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
from typing import IO

from .command import COMMAND

_TIMEOUT_SECONDS = 60


def on_terminal(width: int, *arguments: str, output: IO[bytes] | None = None, **env: str) -> str:
    """Return what `artifactapi` writes to a terminal.

    Args:
        width: the width of the terminal in cells.
        arguments: the arguments of the command.
        output: redirects standard output. Standard error always goes to the terminal.
        env: environment variables in addition to the test's own.

    Raises:
        AssertionError: the command failed.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", **env}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [COMMAND, *arguments],
        stdin=slave,
        stdout=output or slave,
        stderr=slave,
        env=environment,
    )
    os.close(slave)
    written = b""
    with contextlib.suppress(OSError):  # Linux: EIO once the process has closed its end
        while select.select([master], [], [], _TIMEOUT_SECONDS)[0] and (
            data := os.read(master, 65536)
        ):
            written += data
    os.close(master)
    text = written.decode()
    assert process.wait(_TIMEOUT_SECONDS) == 0, text
    return text

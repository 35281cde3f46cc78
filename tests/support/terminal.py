"""Run the command `artifactapi` on a terminal, with its colours, width and bars."""

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

_SECONDS = 60


def on_terminal(width: int, *arguments: str, output: IO[bytes] | None = None, **env: str) -> str:
    """What `artifactapi` writes to a terminal of this width, in cells.

    Args:
        width: In cells.
        arguments: Of the command.
        output: Where its standard output goes, if not to the terminal as its standard error does.
        env: Variables of the environment beside the test's own.

    Raises:
        AssertionError: it failed.
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
    shown = b""
    with contextlib.suppress(OSError):  # the other end was closed
        while select.select([master], [], [], _SECONDS)[0] and (data := os.read(master, 65536)):
            shown += data
    os.close(master)
    text = shown.decode()
    assert process.wait(_SECONDS) == 0, text
    return text

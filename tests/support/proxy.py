"""A real mitmdump or mitmweb in a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, Self

from mitmproxy.certs import CertStore

from .wait import eventually

_LISTENING = re.compile(r"proxy.* listening at (\S+):(\d+)\.?\s*$", re.MULTILINE)
_WEB = re.compile(r"Web server listening at (\S+)")


def free_port() -> int:
    """Return a port nothing listens on now, for what can't be told to choose one itself."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@cache
def _authority() -> dict[str, bytes]:
    """The files of one authority that all proxies of a test run share: each takes long to make."""
    with tempfile.TemporaryDirectory() as folder:
        CertStore.create_store(Path(folder), "mitmproxy", 2048)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class Mitm:
    """Runs the proxy while its `with` lasts, on a free port of this machine.

    Args:
        folder: Where the configuration (`confdir`) and the output go.
        arguments: More of the command line; with a `--mode` of their own, they name its port.
        scripts: Each becomes a `-s`.
        env: Variables on top of those of this process.
        program: Which of mitmproxy's programs to run.
        listens: Whether to wait until it listens; not with `-n`, nor where start-up shall fail.
        timeout: Seconds to wait for that, and for the end.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        scripts: Sequence[Path] = (),
        env: Mapping[str, str] | None = None,
        program: Literal["mitmdump", "mitmweb"] = "mitmdump",
        listens: bool = True,
        timeout: float = 20.0,
    ) -> None:
        self.folder = folder
        self.port = 0
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._listens = listens
        self._timeout = timeout
        self._log = folder / f"{program}.log"
        self._command = [str(Path(sys.executable).with_name(program))]
        self._command += ["--set", f"confdir={folder / 'confdir'}"]
        self._command += ["--listen-host", "127.0.0.1"]
        if "--mode" not in arguments:
            self._command += ["--listen-port", "0"]
        if program == "mitmweb":
            self._command += ["--no-web-open-browser", "--set", f"web_port={free_port()}"]
        self._command += [part for script in scripts for part in ("-s", str(script))]
        self._command += arguments

    def __enter__(self) -> Self:
        confdir = self.folder / "confdir"
        confdir.mkdir(parents=True, exist_ok=True)
        for name, content in _authority().items():
            (confdir / name).write_bytes(content)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self.folder,
            )
        if self._listens:
            try:
                self._await_port()
            except BaseException:
                self.kill()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.terminate()
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def url(self) -> str:
        """Where it listens, as the value of a proxy variable."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, as a socket wants it."""
        return "127.0.0.1", self.port

    @property
    def web_url(self) -> str:
        """The page of mitmweb, with its token."""
        found = eventually(lambda: _WEB.search(self.output()), self._timeout)
        assert found
        return found[1]

    @property
    def ca_path(self) -> Path:
        """The authority its certificates are signed by."""
        return self.folder / "confdir" / "mitmproxy-ca-cert.pem"

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self.process.pid

    def output(self) -> str:
        """Return all it has written so far, on both streams."""
        return self._log.read_text(errors="replace")

    def wait(self, timeout: float | None = None) -> int:
        """Wait for it to end by itself; return its exit code."""
        return self.process.wait(timeout or self._timeout)

    def terminate(self, timeout: float | None = None) -> int:
        """Ask it to end, once, and wait; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def _await_port(self) -> None:
        found = eventually(self._port_or_end, self._timeout)
        if found is True:
            raise RuntimeError(f"the proxy ended at once:\n{self.output()}")
        self.port = int(found)

    def _port_or_end(self) -> str | bool:
        """Return the port, True once the process is gone, False before either."""
        ended = self.process.poll() is not None
        found = _LISTENING.search(self.output())
        return found[2] if found and not ended else ended

"""Run a real mitmdump or mitmweb in a child process."""

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
    """Return a free port, for programs that cannot choose one themselves."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@cache
def _authority() -> dict[str, bytes]:
    """Return the files of the authority that all proxies of a test run share; creating one is slow."""
    with tempfile.TemporaryDirectory() as folder:
        CertStore.create_store(Path(folder), "mitmproxy", 2048)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class Mitm:
    """Runs the proxy inside its `with` block, on a free loopback port.

    Args:
        folder: The folder for the configuration (`confdir`) and the output.
        arguments: More command-line arguments. A `--mode` among them must set its own port.
        scripts: Scripts to load with `-s`.
        env: Environment variables to add to those of this process.
        program: The mitmproxy program to run.
        listens: Whether to wait until it listens. Use False with `-n` or if startup must fail.
        timeout: Seconds to wait until it listens, and until it ends.
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
                self._wait_port()
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
        """The proxy URL, as for `http_proxy`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        """The listening address and port."""
        return "127.0.0.1", self.port

    @property
    def web_url(self) -> str:
        """The URL of mitmweb's page, with its token."""
        found = eventually(lambda: _WEB.search(self.output()), self._timeout)
        assert found
        return found[1]

    @property
    def ca_path(self) -> Path:
        """The certificate of the authority that signs its certificates."""
        return self.folder / "confdir" / "mitmproxy-ca-cert.pem"

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def output(self) -> str:
        """Return its output so far, stdout and stderr."""
        return self._log.read_text(errors="replace")

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends by itself; return its exit code."""
        return self.process.wait(timeout or self._timeout)

    def terminate(self, timeout: float | None = None) -> int:
        """Send one SIGTERM, wait until it ends, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        """Kill it, as a crash would."""
        self.process.kill()
        self.process.wait()

    def _wait_port(self) -> None:
        port = eventually(self._port_or_ended, self._timeout)
        if port is True:
            raise RuntimeError(f"the proxy ended during startup:\n{self.output()}")
        self.port = int(port)

    def _port_or_ended(self) -> str | bool:
        """Return the port, or True if the process has ended, or False if neither yet."""
        ended = self.process.poll() is not None
        found = _LISTENING.search(self.output())
        return found[2] if found and not ended else ended

"""Test log messages in the proxy's output when it is a file or a pipe, which Python buffers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from typing import IO, TYPE_CHECKING, Any

import pytest

from tests.support.command import COMMAND
from tests.support.http1_client import fetch
from tests.support.proxy import free_port
from tests.support.relay import Relay
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres

_UNAVAILABLE = "artifactapi: PostgreSQL unavailable; buffering rows"


@contextlib.contextmanager
def _mitmdump(
    folder: Path, stdout: int | IO[bytes], dsn: str, *arguments: str, program: str = "mitmdump"
) -> Iterator[tuple[subprocess.Popen[bytes], tuple[str, int]]]:
    """Run a proxy without PYTHONUNBUFFERED, which other tests set. Yield its process and address."""
    address = ("127.0.0.1", free_port())
    config = folder / "settings.yaml"
    config.write_text("batch: {max_seconds: 0.1}\ndatabase: {retry_max_seconds: 0.2}\n")
    command = [COMMAND, "--config", str(config), "run"]
    if program == "mitmweb":
        command += ["--web", "--no-web-open-browser", "--set", f"web_port={free_port()}"]
    command += ["--listen-host", address[0], "-p", str(address[1]), "--set", f"confdir={folder}"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        env={**env, "ARTIFACTAPI_DSN": dsn},
    )
    try:
        yield process, address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _fetches(address: tuple[str, int], url: str) -> bool:
    """Return whether the proxy serves a request."""
    try:
        return bool(fetch(address, url, "User-Agent: output"))
    except OSError:
        return False


@pytest.mark.parametrize("program", ["mitmdump", "mitmweb"])
def test_messages_reach_a_file_at_once(
    dsn: str, postgres: Postgres, tmp_path: Path, program: str
) -> None:
    output = tmp_path / "output"
    with (
        RawUpstream() as upstream,
        Relay(("127.0.0.1", postgres.port)) as relay,
        output.open("wb") as file,
        _mitmdump(
            tmp_path,
            file,
            dsn.replace(f"port={postgres.port}", f"port={relay.address[1]}"),
            program=program,
        ) as (_, address),
    ):
        eventually(lambda: "artifactapi: logging to" in output.read_text(), 20)
        relay.cut()
        assert eventually(lambda: _fetches(address, f"{upstream.url}/ok"))
        eventually(lambda: _UNAVAILABLE in output.read_text())
        relay.mend()
        eventually(lambda: "artifactapi: PostgreSQL available again" in output.read_text())


def test_full_output_pipe_does_not_delay_the_proxy(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    filled_bytes = _fill(write_end)
    unavailable_dsn = f"host=127.0.0.1 port={free_port()} user=me"
    # mitmproxy itself blocks on a full pipe after 16 kB of output, so it must not print flows.
    quiet = ("--set", "flow_detail=0", "--set", "termlog_verbosity=warn")
    with (
        RawUpstream() as upstream,
        open(read_end, "rb", buffering=0) as pipe,  # noqa: PTH123 - a file descriptor
        _mitmdump(tmp_path, write_end, unavailable_dsn, *quiet) as (process, address),
    ):
        os.close(write_end)
        url = f"{upstream.url}/ok"
        eventually(lambda: _fetches(address, url), 20)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            started = time.monotonic()
            assert _fetches(address, url)
            assert time.monotonic() - started < 1
        assert _UNAVAILABLE in _read(pipe, filled_bytes + 1, _UNAVAILABLE)
        process.send_signal(signal.SIGTERM)
        _read(pipe, 1 << 30, "")
        assert process.wait(20) == 0


def test_proxy_keeps_running_when_its_output_pipe_is_closed(tmp_path: Path) -> None:
    unavailable_dsn = f"host=127.0.0.1 port={free_port()} user=me"
    read_end, write_end = os.pipe()
    with (
        RawUpstream() as upstream,
        _mitmdump(tmp_path, write_end, unavailable_dsn) as (process, address),
    ):
        os.close(write_end)
        os.close(read_end)
        assert eventually(lambda: _fetches(address, f"{upstream.url}/ok"), 20)
        assert _fetches(address, f"{upstream.url}/ok")
        assert process.poll() is None


def _fill(pipe: int) -> int:
    """Write to a pipe until it is full. Return the number of bytes."""
    os.set_blocking(pipe, False)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            written += os.write(pipe, b"x" * 4096)
    os.set_blocking(pipe, True)
    return written


def _read(pipe: Any, count: int, text: str) -> str:
    """Read until there are at least `count` bytes that contain `text`, or until the pipe ends."""
    found = b""
    while len(found) < count or text.encode() not in found:
        readable, _, _ = select.select([pipe], [], [], 20)
        data = pipe.read(65_536) if readable else b""
        if not data:
            break
        found += data
    return found.decode()

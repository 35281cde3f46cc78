"""Inject faults between a proxy under load and PostgreSQL, then check that the log is complete.

    python -m tests.chaos --minutes 10 --seed 1

The seed determines the schedule. The command prints a report and exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.support.chaos_checks import Report
from tests.support.chaos_environment import PASSWORD, ROLE, Bounds, ChaosEnvironment, Step
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _restart_postgres(environment: ChaosEnvironment, seconds: float) -> None:
    processes = environment.server_processes()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    environment.wait(seconds)
    environment.postgres.start()


def _cut_connection(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.cut()
    environment.wait(seconds)
    environment.relay.mend()


def _blackhole(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.blackhole()
    environment.wait(seconds)
    environment.relay.mend()


def _cut_commit_reply(environment: ChaosEnvironment, _seconds: float) -> None:
    """Lose the second reply to the COPY: the rows are committed, but the proxy gets a broken connection."""
    environment.relay.cut_at_message("to_client", 1)
    eventually(lambda: environment.relay.struck)


def _swallow_commit_reply(environment: ChaosEnvironment, _seconds: float) -> None:
    """Lose the same reply without closing the connection: the proxy waits until its deadline."""
    environment.relay.swallow_from_message("to_client", 1)
    eventually(lambda: environment.relay.struck)


def _zero_window(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.zero_window()
    environment.wait(seconds)
    environment.relay.mend()


def _delay(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.delay(0.2)
    environment.wait(seconds)
    environment.relay.mend()


def _trickle(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.trickle()
    environment.wait(seconds)
    environment.relay.mend()


def _freeze_server(environment: ChaosEnvironment, seconds: float) -> None:
    processes = environment.server_processes()
    try:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        environment.wait(seconds)
    finally:  # a stopped server could not be shut down
        for process in reversed(processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def _lock_table(environment: ChaosEnvironment, seconds: float) -> None:
    with environment.admin() as connection, connection.transaction():
        connection.execute("LOCK TABLE access_log IN ACCESS EXCLUSIVE MODE")
        environment.wait(seconds)


def _change_password(environment: ChaosEnvironment, seconds: float) -> None:
    """Change the role's password, and end its sessions, because open ones do not authenticate again."""
    with environment.admin() as connection:
        connection.execute(f"ALTER ROLE {ROLE} PASSWORD 'another'".encode())
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (ROLE,)
        )
        environment.wait(seconds)
        connection.execute(f"ALTER ROLE {ROLE} PASSWORD '{PASSWORD}'".encode())


def _fill_disk(environment: ChaosEnvironment, seconds: float) -> str:
    """Fill the disk of the tables. A full WAL disk would crash the server, which is another fault."""
    if environment.disk is None:
        return "skipped: needs root to mount a small disk"
    ballast = environment.disk / "ballast"
    with ballast.open("wb") as file:
        size = 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            disk = os.statvfs(environment.disk)
            free_bytes = disk.f_bavail * disk.f_frsize
            if free_bytes:
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), size, free_bytes)
                    size += free_bytes
            environment.wait(0.2)
    ballast.unlink()
    return ""


def _detach_partition(environment: ChaosEnvironment, seconds: float) -> None:
    environment.detach_partition()
    environment.wait(seconds)


def _rename_table(environment: ChaosEnvironment, seconds: float) -> None:
    with environment.admin() as connection:
        connection.execute("ALTER TABLE access_log RENAME TO access_log_renamed")
        environment.wait(seconds)
        connection.execute("ALTER TABLE access_log_renamed RENAME TO access_log")


def _restart_proxy(environment: ChaosEnvironment, seconds: float) -> str:
    stop_seconds = environment.stop_proxy()
    environment.wait(seconds)
    environment.start_proxy()
    return f"stopped in {stop_seconds:.2f} s"


def _restart_proxy_in_blackhole(environment: ChaosEnvironment, seconds: float) -> str:
    environment.relay.blackhole()
    environment.wait(seconds)
    stop_seconds = environment.terminate()
    environment.start_proxy()
    environment.wait(seconds)
    environment.relay.mend()
    return f"stopped in {stop_seconds:.2f} s"


def _reload_script(environment: ChaosEnvironment, _seconds: float) -> None:
    environment.reload_script()


def _reload_script_while_cut(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.cut()
    environment.wait(seconds)
    environment.reload_script()
    environment.wait(seconds)
    environment.relay.mend()


def _kill_proxy(environment: ChaosEnvironment, _seconds: float) -> None:
    environment.kill_proxy()
    environment.start_proxy()


def _kill_proxy_while_cut(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.cut()
    environment.wait(seconds)
    environment.kill_proxy()
    environment.start_proxy()
    environment.wait(seconds)
    environment.relay.mend()


def _kill_proxy_in_blackhole(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.blackhole()
    environment.wait(seconds)
    environment.kill_proxy(unanswered=True)
    environment.relay.mend()
    environment.start_proxy()


FAULTS: dict[str, Callable[[ChaosEnvironment, float], str | None]] = {
    "postgres kill -9, restart": _restart_postgres,
    "connection cut": _cut_connection,
    "commit reply cut off": _cut_commit_reply,
    "commit reply swallowed": _swallow_commit_reply,
    "black hole": _blackhole,
    "zero window": _zero_window,
    "200 ms latency": _delay,
    "one byte at a time": _trickle,
    "server SIGSTOP": _freeze_server,
    "ACCESS EXCLUSIVE lock": _lock_table,
    "password changed, restored": _change_password,
    "disk full": _fill_disk,
    "partition detached": _detach_partition,
    "table renamed, restored": _rename_table,
    "proxy SIGTERM, restart": _restart_proxy,
    "proxy SIGTERM in black hole": _restart_proxy_in_blackhole,
    "hot reload": _reload_script,
    "hot reload, connection cut": _reload_script_while_cut,
    "proxy kill -9": _kill_proxy,
    "proxy kill -9, connection cut": _kill_proxy_while_cut,
    "proxy kill -9, black hole": _kill_proxy_in_blackhole,
}


# A deck lasts about five minutes: how often each fault occurs in it, and its shortest and longest
# duration in seconds. Ten entries kill PostgreSQL with SIGKILL.
_DECK = {
    "postgres kill -9, restart": (10, 0.5, 4.0),
    "connection cut": (2, 2.0, 8.0),
    "commit reply cut off": (3, 0.0, 0.0),
    "commit reply swallowed": (1, 0.0, 0.0),
    "black hole": (1, 15.0, 15.0),
    "zero window": (1, 10.0, 10.0),
    "200 ms latency": (1, 10.0, 10.0),
    "one byte at a time": (1, 10.0, 10.0),
    "server SIGSTOP": (1, 10.0, 10.0),
    "ACCESS EXCLUSIVE lock": (1, 10.0, 10.0),
    "password changed, restored": (1, 6.0, 6.0),
    "disk full": (1, 10.0, 10.0),
    "partition detached": (1, 1.0, 1.0),
    "table renamed, restored": (1, 6.0, 6.0),
    "proxy SIGTERM, restart": (1, 0.0, 1.0),
    "proxy SIGTERM in black hole": (1, 1.0, 4.0),
    "hot reload": (2, 0.0, 0.0),
    "hot reload, connection cut": (1, 1.0, 3.0),
    "proxy kill -9": (1, 0.0, 0.0),
    "proxy kill -9, connection cut": (1, 2.0, 6.0),
    "proxy kill -9, black hole": (1, 1.0, 6.0),
}


def random_schedule(seed: int) -> Iterator[Step]:
    """Yield faults forever: every fault of the deck in a random order, then the next deck."""
    rng = random.Random(seed)
    while True:
        deck = [name for name, (count, _, _) in _DECK.items() for _ in range(count)]
        rng.shuffle(deck)
        for name in deck:
            _, shortest, longest = _DECK[name]
            yield Step(name, rng.uniform(shortest, longest), rng.uniform(0.5, 3.0))


def run(folder: Path, steps: Iterator[Step], bounds: Bounds, seconds: float) -> Report:
    """Inject faults until the steps or the seconds run out; then return the report on the log."""
    with ChaosEnvironment(folder, bounds) as environment:
        environment.measure_baseline()
        deadline = time.monotonic() + seconds
        for step in steps:
            if time.monotonic() >= deadline:
                break
            environment.inject(step, FAULTS[step.fault])
        environment.finish()
        return Report(environment)


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="artifactapi-chaos-") as folder:
        bounds = Bounds()
        report = run(Path(folder), random_schedule(options.seed), bounds, options.minutes * 60)
    sys.stdout.write(
        f"seed {options.seed}, {options.minutes:g} minutes, {bounds}\n{report.text()}\n"
    )
    return bool(report.complaints)


if __name__ == "__main__":
    sys.exit(main())

"""Break everything between a proxy under load and its Postgres, by a seeded schedule, and prove the log whole.

    python -m tests.chaos --minutes 10 --seed 1

It prints its figures and ends with 1 if the log is not what it must be.
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


def _cut(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.cut()
    environment.wait(seconds)
    environment.relay.mend()


def _blackhole(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.blackhole()
    environment.wait(seconds)
    environment.relay.mend()


def _cut_answer(environment: ChaosEnvironment, _seconds: float) -> None:
    """The rows are in the table, and the word of it is not: the COPY's second message is lost."""
    environment.relay.cut_at_message("to_client", 1)
    eventually(lambda: environment.relay.struck)


def _swallow_answer(environment: ChaosEnvironment, _seconds: float) -> None:
    """As before, but the proxy hears nothing at all until its deadline ends."""
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


def _freeze(environment: ChaosEnvironment, seconds: float) -> None:
    processes = environment.server_processes()
    try:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        environment.wait(seconds)
    finally:  # nobody can stop a server that is frozen
        for process in reversed(processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def _lock(environment: ChaosEnvironment, seconds: float) -> None:
    with environment.admin() as connection, connection.transaction():
        connection.execute("LOCK TABLE access_log IN ACCESS EXCLUSIVE MODE")
        environment.wait(seconds)


def _change_password(environment: ChaosEnvironment, seconds: float) -> None:
    """Also ends the role's sessions: one that is open is never asked again."""
    with environment.admin() as connection:
        connection.execute(f"ALTER ROLE {ROLE} PASSWORD 'another'".encode())
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (ROLE,)
        )
        environment.wait(seconds)
        connection.execute(f"ALTER ROLE {ROLE} PASSWORD '{PASSWORD}'".encode())


def _fill_disk(environment: ChaosEnvironment, seconds: float) -> str:
    """The tables' disk, not that of the WAL, whose end is a crash, which is a fault of its own."""
    if environment.disk is None:
        return "left out: needs root to mount a small disk"
    ballast = environment.disk / "ballast"
    with ballast.open("wb") as file:
        size = 0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            free = os.statvfs(environment.disk)
            room = free.f_bavail * free.f_frsize
            if room:
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), size, room)
                    size += room
            environment.wait(0.2)
    ballast.unlink()
    return ""


def _take_partition(environment: ChaosEnvironment, seconds: float) -> None:
    environment.take_partition_away()
    environment.wait(seconds)


def _take_table(environment: ChaosEnvironment, seconds: float) -> None:
    with environment.admin() as connection:
        connection.execute("ALTER TABLE access_log RENAME TO access_log_gone")
        environment.wait(seconds)
        connection.execute("ALTER TABLE access_log_gone RENAME TO access_log")


def _restart_proxy(environment: ChaosEnvironment, seconds: float) -> str:
    took = environment.stop_proxy()
    environment.wait(seconds)
    environment.start_proxy()
    return f"stopped in {took:.2f} s"


def _restart_deaf(environment: ChaosEnvironment, seconds: float) -> str:
    environment.relay.blackhole()
    environment.wait(seconds)
    took = environment.terminate()
    environment.start_proxy()
    environment.wait(seconds)
    environment.relay.mend()
    return f"stopped in {took:.2f} s"


def _reload(environment: ChaosEnvironment, _seconds: float) -> None:
    environment.reload_script()


def _reload_cut(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.cut()
    environment.wait(seconds)
    environment.reload_script()
    environment.wait(seconds)
    environment.relay.mend()


def _kill_proxy(environment: ChaosEnvironment, _seconds: float) -> None:
    environment.kill_proxy()
    environment.start_proxy()


def _kill_proxy_cut(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.cut()
    environment.wait(seconds)
    environment.kill_proxy()
    environment.start_proxy()
    environment.wait(seconds)
    environment.relay.mend()


def _kill_proxy_deaf(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.blackhole()
    environment.wait(seconds)
    environment.kill_proxy(deaf=True)
    environment.relay.mend()
    environment.start_proxy()


FAULTS: dict[str, Callable[[ChaosEnvironment, float], str | None]] = {
    "postgres kill -9, restart": _restart_postgres,
    "wire cut": _cut,
    "commit's answer cut off": _cut_answer,
    "commit's answer swallowed": _swallow_answer,
    "black hole": _blackhole,
    "zero window": _zero_window,
    "200 ms latency": _delay,
    "byte by byte": _trickle,
    "server SIGSTOP": _freeze,
    "ACCESS EXCLUSIVE lock": _lock,
    "password changed, back": _change_password,
    "disk full": _fill_disk,
    "partition gone": _take_partition,
    "table gone, restored": _take_table,
    "proxy SIGTERM, restart": _restart_proxy,
    "proxy SIGTERM in black hole": _restart_deaf,
    "hot reload": _reload,
    "hot reload, wire cut": _reload_cut,
    "proxy kill -9": _kill_proxy,
    "proxy kill -9, wire cut": _kill_proxy_cut,
    "proxy kill -9, black hole": _kill_proxy_deaf,
}


# Some five minutes; ten of them kill -9, hence twenty in ten minutes.
_DECK = {
    "postgres kill -9, restart": (10, 0.5, 4.0),
    "wire cut": (2, 2.0, 8.0),
    "commit's answer cut off": (3, 0.0, 0.0),
    "commit's answer swallowed": (1, 0.0, 0.0),
    "black hole": (1, 15.0, 15.0),
    "zero window": (1, 10.0, 10.0),
    "200 ms latency": (1, 10.0, 10.0),
    "byte by byte": (1, 10.0, 10.0),
    "server SIGSTOP": (1, 10.0, 10.0),
    "ACCESS EXCLUSIVE lock": (1, 10.0, 10.0),
    "password changed, back": (1, 6.0, 6.0),
    "disk full": (1, 10.0, 10.0),
    "partition gone": (1, 1.0, 1.0),
    "table gone, restored": (1, 6.0, 6.0),
    "proxy SIGTERM, restart": (1, 0.0, 1.0),
    "proxy SIGTERM in black hole": (1, 1.0, 4.0),
    "hot reload": (2, 0.0, 0.0),
    "hot reload, wire cut": (1, 1.0, 3.0),
    "proxy kill -9": (1, 0.0, 0.0),
    "proxy kill -9, wire cut": (1, 2.0, 6.0),
    "proxy kill -9, black hole": (1, 1.0, 6.0),
}


def shuffled(seed: int) -> Iterator[Step]:
    """Faults without end: one deck after the other, each in an order of its own."""
    chance = random.Random(seed)
    while True:
        deck = [name for name, (count, _, _) in _DECK.items() for _ in range(count)]
        chance.shuffle(deck)
        for name in deck:
            _, least, most = _DECK[name]
            yield Step(name, chance.uniform(least, most), chance.uniform(0.5, 3.0))


def run(folder: Path, steps: Iterator[Step], bounds: Bounds, seconds: float) -> Report:
    """Play faults until they or the time are at an end; then look at the log."""
    with ChaosEnvironment(folder, bounds) as environment:
        environment.take_bearings()
        until = time.monotonic() + seconds
        for step in steps:
            if time.monotonic() >= until:
                break
            environment.play(step, FAULTS[step.fault])
        environment.finish()
        return Report(environment)


def main() -> int:
    """The long form."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="artifactapi-chaos-") as folder:
        bounds = Bounds()
        report = run(Path(folder), shuffled(options.seed), bounds, options.minutes * 60)
    sys.stdout.write(
        f"seed {options.seed}, {options.minutes:g} minutes, {bounds}\n{report.text()}\n"
    )
    return bool(report.complaints)


if __name__ == "__main__":
    sys.exit(main())

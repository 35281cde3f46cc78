"""Inject faults between a proxy under load and PostgreSQL, then check that the log is complete.

    python -m tests.chaos --minutes 10 --seed 1
    python -m tests.chaos --minutes 60 --seed 1 --kills 70
    python -m tests.chaos --minutes 3 --proxies 20
    python -m tests.chaos --minutes 3 --proxies 20 --dsn "host=db.example dbname=scratch"
    python -m tests.chaos --archive-faults 120

The first one also injects faults into the archive at the end: tests/support/chaos_archive.py.
The seed determines the schedule. The command prints a report and exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import signal
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from exporter.write.journal_file import RING_AT
from tests.support import chaos_archive
from tests.support.chaos_checks import Report
from tests.support.chaos_environment import PASSWORD, ROLE, Bounds, ChaosEnvironment, Step
from tests.support.chaos_fleet import FleetEnvironment
from tests.support.chaos_server import Outage, ServerFleet, interrupt
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


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


def _kill_worker(environment: ChaosEnvironment, seconds: float) -> None:
    environment.kill_worker()
    environment.wait(seconds)


def _kill_both(environment: ChaosEnvironment, _seconds: float) -> None:
    environment.kill_proxy(worker_first=True)
    environment.start_proxy()


def _kill_while_cut(
    environment: ChaosEnvironment, seconds: float, kill: Callable[[], None]
) -> None:
    environment.relay.cut()
    environment.wait(seconds)
    kill()
    if environment.proxy.killed_at is not None:
        environment.start_proxy()
    environment.wait(seconds)
    environment.relay.mend()


def _kill_proxy_while_cut(environment: ChaosEnvironment, seconds: float) -> None:
    _kill_while_cut(environment, seconds, environment.kill_proxy)


def _kill_worker_while_cut(environment: ChaosEnvironment, seconds: float) -> None:
    _kill_while_cut(environment, seconds, environment.kill_worker)


def _kill_both_while_cut(environment: ChaosEnvironment, seconds: float) -> None:
    _kill_while_cut(environment, seconds, lambda: environment.kill_proxy(worker_first=True))


def _kill_proxy_in_blackhole(environment: ChaosEnvironment, seconds: float) -> None:
    environment.relay.blackhole()
    environment.wait(seconds)
    environment.kill_proxy()
    environment.relay.mend()
    environment.start_proxy()


def _kill_twice(environment: ChaosEnvironment, seconds: float) -> None:
    """Kill the next proxy as well, while it recovers the journal of the first."""
    environment.relay.blackhole()
    environment.kill_proxy()
    environment.start_proxy()
    environment.wait(seconds)
    environment.kill_proxy()
    environment.relay.mend()
    environment.start_proxy()


def _recover_twice(environment: ChaosEnvironment, _seconds: float) -> None:
    """Two proxies find the same journal."""
    environment.kill_proxy()
    with environment.other_proxy():
        environment.start_proxy()


def _damage_journal(environment: ChaosEnvironment, seconds: float) -> str:
    """Kill the proxy, and flip a bit, zero a part or cut off the end of its journal."""
    environment.kill_proxy()
    (path,) = environment.journals()
    content = bytearray(path.read_bytes())
    rng = random.Random(seconds)
    used = content.rindex(b"/n/") + 200  # where the last exchange may be
    at = rng.randrange(RING_AT, used)
    kind = rng.choice(["bit flipped", "part zeroed", "end cut off"])
    if kind == "bit flipped":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "part zeroed":
        content[at : at + 4096] = bytes(4096)
    else:
        del content[at:]
    path.write_bytes(content)
    environment.proxy.is_damaged = True
    environment.start_proxy()
    return kind


def _fill_memory(environment: ChaosEnvironment, seconds: float) -> str:
    """Fill the tmpfs: the running proxy goes on, and the next one recovers it, but has no journal in it."""
    if environment.memory is None or not os.path.ismount(environment.memory):
        return "skipped: needs root to mount a small tmpfs"
    ballast = environment.memory / "ballast"
    disk = os.statvfs(environment.memory)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize)
    environment.wait(seconds)
    environment.kill_proxy()
    environment.start_proxy()
    environment.wait(seconds)
    ballast.unlink()
    environment.settle()
    has_none = "artifactapi: no journal" in environment.proxy.mitm.output()
    environment.stop_proxy()
    environment.start_proxy()
    return "no journal meanwhile" if has_none else "a journal in /dev/shm meanwhile"


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
    "worker kill -9": _kill_worker,
    "worker kill -9, connection cut": _kill_worker_while_cut,
    "both kill -9": _kill_both,
    "both kill -9, connection cut": _kill_both_while_cut,
    "proxy kill -9 twice": _kill_twice,
    "kill -9, two recover": _recover_twice,
    "kill -9, journal damaged": _damage_journal,
    "kill -9, tmpfs full": _fill_memory,
}


# A deck lasts about six minutes: how often each fault occurs in it, and its shortest and longest
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
    "worker kill -9": (1, 1.0, 3.0),
    "worker kill -9, connection cut": (1, 1.0, 3.0),
    "both kill -9": (1, 0.0, 0.0),
    "both kill -9, connection cut": (1, 1.0, 4.0),
    "proxy kill -9 twice": (1, 0.1, 1.0),
    "kill -9, two recover": (1, 0.0, 0.0),
    "kill -9, journal damaged": (2, 0.0, 1.0),
    "kill -9, tmpfs full": (1, 1.0, 3.0),
}
# The same for `--proxies`: faults of the database that all of them see.
_FLEET_DECK = {
    "postgres kill -9, restart": (2, 0.5, 4.0),
    "connection cut": (2, 2.0, 8.0),
    "commit reply cut off": (2, 0.0, 0.0),
    "commit reply swallowed": (1, 0.0, 0.0),
    "black hole": (1, 10.0, 15.0),
    "200 ms latency": (1, 5.0, 10.0),
    "server SIGSTOP": (1, 5.0, 10.0),
    "ACCESS EXCLUSIVE lock": (1, 5.0, 10.0),
    "password changed, restored": (1, 3.0, 6.0),
}
# The same for `--dsn`: faults on the way to a server, and a lock, which need no rights on its machine.
_SERVER_DECK = {
    "connection cut": (2, 2.0, 8.0),
    "commit reply cut off": (2, 0.0, 0.0),
    "commit reply swallowed": (1, 0.0, 0.0),
    "black hole": (1, 10.0, 15.0),
    "zero window": (1, 5.0, 10.0),
    "200 ms latency": (1, 5.0, 10.0),
    "ACCESS EXCLUSIVE lock": (1, 5.0, 10.0),
}
_OUTAGE = (1, 5.0, 15.0)  # each of `--outage`
_PROXIES = 4  # with `--dsn`
# The same for `--kills`: only kills, in quick succession.
_KILL_DECK = {
    "proxy kill -9": (4, 0.0, 0.0),
    "proxy kill -9, connection cut": (2, 0.1, 2.5),
    "proxy kill -9, black hole": (1, 0.5, 4.0),
    "worker kill -9": (1, 0.1, 1.0),
    "both kill -9": (2, 0.0, 0.0),
    "both kill -9, connection cut": (2, 0.1, 2.5),
    "proxy kill -9 twice": (1, 0.0, 1.0),
    "kill -9, two recover": (2, 0.0, 0.0),
    "kill -9, journal damaged": (3, 0.0, 1.0),
    "kill -9, tmpfs full": (1, 0.1, 1.0),
}


_ARCHIVE_FAULTS = 120  # injected into the archive after the others


def random_schedule(
    seed: int, deck: dict[str, tuple[int, float, float]], longest_pause: float
) -> Iterator[Step]:
    """Yield faults forever: every fault of the deck in a random order, then the next deck."""
    rng = random.Random(seed)
    while True:
        names = [name for name, (count, _, _) in deck.items() for _ in range(count)]
        rng.shuffle(names)
        for name in names:
            _, shortest, longest = deck[name]
            pause = rng.uniform(longest_pause / 6, longest_pause)
            yield Step(name, rng.uniform(shortest, longest), pause)


def run(
    folder: Path,
    steps: Iterator[Step],
    bounds: Bounds,
    seconds: float,
    kills: int | None = None,
    tamper: Callable[[ChaosEnvironment], None] = lambda _: None,
) -> Report:
    """Inject faults until the steps, the seconds or the kills run out; then return the report on the log.

    `tamper` is called before the report, to test that the report notices it.
    """
    with ChaosEnvironment(folder, bounds) as environment:
        environment.measure_baseline()
        deadline = time.monotonic() + seconds
        for step in steps:
            killed = sum(1 for g in environment.generations if g.killed_at is not None)
            if time.monotonic() >= deadline or (kills is not None and killed >= kills):
                break
            environment.inject(step, FAULTS[step.fault])
        environment.finish()
        tamper(environment)
        return Report(environment)


def run_fleet(
    environment: FleetEnvironment,
    steps: Iterator[Step],
    seconds: float,
    outages: Sequence[Outage] = (),
) -> FleetEnvironment:
    """Inject faults into the database of several proxies; `check` of the result says what was lost.

    `outages`: of servers that we did not start, for the faults of `outage_name`.
    """
    faults = FAULTS | {
        outage_name(number): functools.partial(interrupt, outage=outage)
        for number, outage in enumerate(outages)
    }
    with environment:
        environment.settle()
        deadline = time.monotonic() + seconds
        for step in steps:
            if time.monotonic() >= deadline:
                break
            environment.inject(step, faults[step.fault])
        environment.finish()
        sys.stdout.write(f"{environment.check()}\n")
        return environment


def outage_name(number: int) -> str:
    """The name of the fault that this outage is, counted from 0."""
    return f"server stopped ({number + 1})"


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, help="kill so many proxies, and inject no other fault")
    parser.add_argument(
        "--archive-faults", type=int, help="inject so many faults into the archive, and no others"
    )
    parser.add_argument(
        "--proxies",
        type=int,
        help="run so many proxies, and inject faults into their database only",
    )
    parser.add_argument(
        "--dsn",
        help="a server that runs already, or the coordinator of a Citus cluster, instead of one of our own; the log"
        " is in a new schema, which is dropped at the end",
    )
    parser.add_argument(
        "--outage",
        nargs=2,
        action="append",
        default=[],
        metavar=("STOP", "START"),
        help="with --dsn: two shell commands, which stop a server of the log and start it again; may be repeated",
    )
    options = parser.parse_args()
    if options.outage and options.dsn is None:
        parser.error("--outage needs --dsn")
    if options.proxies is not None or options.dsn is not None:
        return _run_fleet(options)
    if options.archive_faults is not None:
        return _run_archive(options.seed, options.archive_faults)
    deck, pause = (_DECK, 3.0) if options.kills is None else (_KILL_DECK, 1.0)
    schedule = random_schedule(options.seed, deck, pause)
    with tempfile.TemporaryDirectory(prefix="artifactapi-chaos-") as folder:
        bounds = Bounds()
        report = run(Path(folder), schedule, bounds, options.minutes * 60, options.kills)
    sys.stdout.write(
        f"seed {options.seed}, {options.minutes:g} minutes, {bounds}\n{report.text()}\n"
    )
    if options.kills is not None:
        return bool(report.complaints)
    return bool(report.complaints) | _run_archive(options.seed, _ARCHIVE_FAULTS)


def _run_fleet(options: argparse.Namespace) -> int:
    proxies = _PROXIES if options.proxies is None else options.proxies
    outages = [Outage(*commands) for commands in options.outage]
    deck = _FLEET_DECK
    if options.dsn is not None:
        deck = _SERVER_DECK | {outage_name(number): _OUTAGE for number in range(len(outages))}
    steps = random_schedule(options.seed, deck, 3.0)
    with tempfile.TemporaryDirectory(prefix="artifactapi-chaos-") as folder:
        fleet = (
            FleetEnvironment(Path(folder), proxies)
            if options.dsn is None
            else ServerFleet(Path(folder), proxies, options.dsn)
        )
        run_fleet(fleet, steps, options.minutes * 60, outages)
    return bool(fleet.complaints)


def _run_archive(seed: int, faults: int) -> int:
    chaos = chaos_archive.run(islice(chaos_archive.schedule(seed), faults), seed)
    sys.stdout.write(f"{chaos.report()}\n")
    return bool(chaos.complaints)


if __name__ == "__main__":
    sys.exit(main())

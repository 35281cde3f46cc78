"""Break everything between a proxy under load and its Postgres, by a seeded schedule, and prove the log whole.

    python -m tests.chaos --minutes 10 --seed 1

A real mitmdump, steady traffic from a process of its own, a real Postgres behind a relay, a role
that may only INSERT. It prints its figures and ends with 1 if the log is not what it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import psutil
import psycopg

from exporter.schema import ensure_schema, grants
from tests.support.postgres import Postgres, available
from tests.support.proxy import Mitm
from tests.support.relay import Relay
from tests.support.traffic import Request, Traffic
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_ROOT = Path(__file__).parents[1]
_ROLE, _PASSWORD = "chaos_proxy", "first"
_CONNECTIONS = 6
_BATCH_ENTRIES, _BATCH_SECONDS = 128, 2.0  # the defaults
_DRAIN_SECONDS = 5.0
_SPOOL_BYTES = 64 * 1024 * 1024
_RSS_GROWTH_BYTES = 96 * 1024 * 1024  # buffer.max_bytes and half as much again
_DISK = "384m"
_WARM_SECONDS = 3.0  # a young proxy is slow by itself
_CONFIGURATION_SECONDS = 15.0  # between attempts when only the user can mend it
_SLACK_SECONDS = 1.0
_GOODBYE = re.compile(r"Access log: (\d+) entries written")


class Bounds(NamedTuple):
    """What of the settings a run changes, so that a fault of seconds is long."""

    call_seconds: float = 8.0
    connect_seconds: float = 5.0
    retry_max_seconds: float = 5.0
    rate: float = 150.0


class Step(NamedTuple):
    """One fault, how long it lasts, and how long the calm before it is."""

    fault: str
    seconds: float
    calm: float = 1.0


@dataclass
class Episode:
    """A fault that took place; times are monotonic seconds."""

    step: Step
    began: float
    ended: float = 0.0
    recovered: float = 0.0
    spooled: int = 0  # the most
    waiting: int = 0  # the most
    note: str = ""


@dataclass
class Generation:
    """One process of the proxy."""

    number: int
    mitm: Mitm
    status_file: Path
    handles: dict[str, int] = field(default_factory=dict)  # at its end
    killed_at: float | None = None
    deaf: bool = False  # killed while a call was unanswered
    warm: bool = False  # it has written rows
    peak_rss: int = 0
    first_rss: int = 0

    def statuses(self) -> list[dict[str, Any]]:
        """All counters it told."""
        if not self.status_file.exists():
            return []
        lines = self.status_file.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def status(self) -> dict[str, Any]:
        """The last counters it told; empty before the first."""
        try:
            with self.status_file.open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return {}
        return dict(json.loads(lines[-2])) if len(lines) > 1 else {}

    def handles_now(self) -> dict[str, int]:
        """Its threads, sockets and files."""
        process = psutil.Process(self.mitm.pid)
        sockets = len(process.net_connections("all"))
        return {
            "threads": process.num_threads(),
            "sockets": sockets,
            "files": process.num_fds() - sockets,
        }


class Stage:
    """Everything a run needs, from Postgres to the traffic, while its `with` lasts."""

    def __init__(self, folder: Path, bounds: Bounds) -> None:
        self.bounds = bounds
        self.generations: list[Generation] = []
        self.episodes: list[Episode] = []
        self.stops: list[float] = []  # how long each orderly end of the proxy took
        self.peak_spool = 0
        self.handles: dict[str, int] = {}  # of the first proxy, before anything befell it
        self.complaints: list[str] = []
        self._folder = folder
        self._home = folder / "home"
        self._product = folder / "product"
        self._aside: list[str] = []  # partitions that were taken away, with what is in them
        self._pause = threading.Event()  # never set: for the pace of the schedule
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._sample, name="chaos-watch")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            for name in ("addon", "exporter"):  # a copy, whose script may be touched
                shutil.copytree(_ROOT / name, self._product / name)
            self.postgres = self._stack.enter_context(Postgres(available()["18"]))
            self.disk = self._stack.enter_context(_small_disk(self.postgres))
            self._prepare()
            self.relay = self._stack.enter_context(Relay(("127.0.0.1", self.postgres.port)))
            self.traffic = self._stack.enter_context(
                Traffic(self._folder / "requests", self.bounds.rate, _CONNECTIONS)
            )
            self._watch.start()
            self._stack.callback(self._end_watch)
            self.start_proxy()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def proxy(self) -> Generation:
        """The one that runs, or ran last."""
        return self.generations[-1]

    def wait(self, seconds: float) -> None:
        """Let time pass; the schedule's own pace."""
        self._pause.wait(seconds)

    def admin(self) -> psycopg.Connection[Any]:
        """A superuser's connection, past the relay."""
        return psycopg.connect(self.postgres.dsn(), autocommit=True)

    def play(self, step: Step) -> None:
        """Let one fault happen, and wait until the log has recovered from it."""
        self.wait(step.calm)
        before = self.proxy
        episode = Episode(step, time.monotonic())
        self.episodes.append(episode)
        note = FAULTS[step.fault](self, step.seconds)
        episode.note = note or ""
        episode.ended = time.monotonic()
        self.settle()
        episode.recovered = time.monotonic()
        ticks = [s for g in {id(g): g for g in (before, self.proxy)}.values() for s in g.statuses()]
        during = [s for s in ticks if s["at"] >= episode.began]
        episode.spooled = max((s["spooled"] for s in during), default=0)
        episode.waiting = max((s["waiting"] for s in during), default=0)
        sys.stderr.write(
            f"{step.fault}: {episode.ended - episode.began:.1f} s,"
            f" recovered after {episode.recovered - episode.ended:.1f} s {episode.note}\n"
        )

    def settle(self) -> None:
        """Wait until rows are written again and nothing but the latest waits."""
        since, start = time.monotonic(), self.proxy.status()
        few = self.bounds.rate * (_BATCH_SECONDS + _SLACK_SECONDS) + _BATCH_ENTRIES
        bounds = self.bounds
        patience = 4 * (bounds.call_seconds + bounds.connect_seconds + bounds.retry_max_seconds) + (
            _CONFIGURATION_SECONDS
        )

        def settled() -> bool:
            now = self.proxy.status()
            return bool(
                now
                and now["at"] > since
                and now["written"] > (start.get("written", 0) if start else 0)
                and now["spooled"] == 0
                and now["waiting"] <= few
            )

        try:
            eventually(settled, timeout=patience)
        except AssertionError:
            fault = self.episodes[-1].step.fault if self.episodes else "the start"
            self.complaints.append(f"not recovered {patience:.0f} s after: {fault}")
        self.proxy.warm = True

    def start_proxy(self) -> None:
        """A new process of the proxy, which the traffic goes to from now on."""
        number = len(self.generations)
        status_file = self._folder / f"status-{number}"
        mitm = Mitm(
            self._folder / f"proxy-{number}",
            *("--set", f"artifactapi_config={self._configuration(number)}"),
            *("--set", f"status_file={status_file}"),
            *("--set", "flow_detail=0"),
            scripts=[
                self._product / "addon" / "artifactapi.py",
                _ROOT / "tests" / "support" / "statusfile.py",
            ],
            env={
                "ARTIFACTAPI_HOME": str(self._home),
                "ARTIFACTAPI_DSN": (
                    f"host=127.0.0.1 port={self.relay.address[1]} user={_ROLE} dbname=postgres"
                ),
                "PGPASSWORD": _PASSWORD,
            },
        )
        if number:  # making an authority anew takes seconds
            shutil.copytree(self.generations[0].mitm.folder / "confdir", mitm.folder / "confdir")
        generation = Generation(number, self._stack.enter_context(mitm), status_file)
        self.generations.append(generation)
        self.traffic.go_to(number, mitm.port)

    def stop_proxy(self) -> float:
        """One SIGTERM; seconds until the process was gone."""
        self._check_handles()
        return self.terminate()

    def terminate(self) -> float:
        """As `stop_proxy`, in the middle of a fault."""
        began = time.monotonic()
        self.proxy.mitm.terminate()
        self.stops.append(time.monotonic() - began)
        return self.stops[-1]

    def kill_proxy(self, *, deaf: bool = False) -> None:
        """End the proxy as the machine's out-of-memory killer would."""
        self.proxy.deaf = deaf
        self.proxy.killed_at = time.monotonic()
        self.proxy.mitm.kill()

    def reload_script(self) -> None:
        """Let mitmproxy load the script anew, and wait until it has."""
        script = self._product / "addon" / "artifactapi.py"
        goodbyes = self._goodbyes()
        script.touch()
        eventually(lambda: self._goodbyes() > goodbyes, timeout=20)
        since = time.monotonic()
        eventually(lambda: self.proxy.status()["at"] > since, timeout=20)

    def finish(self) -> None:
        """End the traffic, let the last rows arrive, compare what the proxy holds, and stop it."""
        self.settle()
        self._check_handles()
        self.traffic.stop()
        since = time.monotonic()

        def all_in() -> bool:
            now = self.proxy.status()
            parts = ("written", "dropped", "rejected")
            return bool(
                now["at"] > since
                and not now["waiting"]
                and not now["spooled"]
                and now["seen"] == sum(now[part] for part in parts)
            )

        try:
            eventually(all_in, timeout=20)
        except AssertionError:
            self.complaints.append(f"the counters do not meet: {self.proxy.status()}")
        self.terminate()

    def rows(self) -> Iterator[tuple[int, int]]:
        """Generation and number of each row, also of those in partitions that were taken away."""
        tables = ["access_log", *self._aside]
        union = " UNION ALL ".join(f"SELECT node, path FROM {table}" for table in tables)
        with self.admin() as connection:
            for node, path in connection.execute(union.encode()):
                yield int(node.removeprefix("proxy-")), int(path.removeprefix("/n/"))

    def gaps(self) -> dict[int, Counter[str]]:
        """Entries that the log itself says are missing, by generation and reason."""
        found: dict[int, Counter[str]] = defaultdict(Counter)
        with self.admin() as connection:
            for node, reason, entries in connection.execute(
                "SELECT node, reason, entries FROM access_log_gap"
            ):
                found[int(node.removeprefix("proxy-"))][reason] += entries
        return found

    def take_partition_away(self) -> None:
        """Today's partition leaves the table, with the rows that are in it."""
        with self.admin() as connection, connection.transaction():
            row = connection.execute(
                "SELECT max(inhrelid::regclass::text) FROM pg_inherits"
                " WHERE inhparent = 'access_log'::regclass"
            ).fetchone()
            assert row
            aside = f"aside_{len(self._aside)}"
            connection.execute(f"ALTER TABLE access_log DETACH PARTITION {row[0]}".encode())
            connection.execute(f"ALTER TABLE {row[0]} RENAME TO {aside}".encode())
            self._aside.append(aside)

    def server_processes(self) -> list[psutil.Process]:
        """The postmaster and its children."""
        postmaster = psutil.Process(self.postgres.pid)
        return [postmaster, *postmaster.children(recursive=True)]

    def _configuration(self, number: int) -> Path:
        file = self._folder / f"settings-{number}.yaml"
        file.write_text(
            f"node: proxy-{number}\n"
            "database:\n"
            f"  call_seconds: {self.bounds.call_seconds}\n"
            f"  connect_seconds: {self.bounds.connect_seconds}\n"
            f"  retry_max_seconds: {self.bounds.retry_max_seconds}\n"
            f"spool: {{max_bytes: {_SPOOL_BYTES}}}\n"
        )
        return file

    def _prepare(self) -> None:
        """The schema, on the small disk where there is one, and a role with a password that may INSERT."""
        rules = self.postgres.data / "pg_hba.conf"
        rule = f"host all {_ROLE} 127.0.0.1/32 scram-sha-256\n"
        rules.write_text(rule + rules.read_text())
        self.postgres.run("pg_ctl", "reload", "-D", self.postgres.data)
        with self.admin() as connection:
            if self.disk:
                connection.execute(f"CREATE TABLESPACE small LOCATION '{self.disk}'".encode())
                connection.execute("ALTER DATABASE postgres SET default_tablespace = small")
            connection.execute(f"CREATE ROLE {_ROLE} LOGIN PASSWORD '{_PASSWORD}'".encode())
            connection.execute("CREATE ROLE chaos_reader")
        with self.admin() as connection:
            ensure_schema(connection)
            connection.execute(grants("public", _ROLE, "chaos_reader").encode())

    def _goodbyes(self) -> int:
        return len(_GOODBYE.findall(self.proxy.mitm.output()))

    def _check_handles(self) -> None:
        """The proxy holds no more than the first did; what is to be closed gets its time."""
        grown: dict[str, int] = {}

        def same() -> bool:
            self.proxy.handles = now = self.proxy.handles_now()
            grown.clear()
            grown.update({name: now[name] - n for name, n in self.handles.items() if now[name] > n})
            return not grown

        try:
            eventually(same, timeout=15)
        except AssertionError:
            self.complaints.append(f"proxy {self.proxy.number} holds more than the first: {grown}")

    def _sample(self) -> None:
        while not self._over.wait(0.25):
            files = [*(self._home / "spool").glob("*")]
            with contextlib.suppress(OSError):
                self.peak_spool = max(self.peak_spool, sum(file.stat().st_size for file in files))
            with contextlib.suppress(psutil.Error, IndexError):
                generation = self.proxy
                rss = psutil.Process(generation.mitm.pid).memory_info().rss
                generation.peak_rss = max(generation.peak_rss, rss)
                if generation.warm and not generation.first_rss:
                    generation.first_rss = rss

    def _end_watch(self) -> None:
        self._over.set()
        self._watch.join()

    def take_bearings(self) -> None:
        """Remember what the proxy holds, once it is warm and before anything befalls it."""
        self.settle()
        self.wait(_WARM_SECONDS)
        self.handles = self.proxy.handles_now()


@contextlib.contextmanager
def _small_disk(postgres: Postgres) -> Iterator[Path | None]:
    """A file system of its own for the tables, which can be full; None where we may not mount one."""
    folder = postgres.folder / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        shutil.chown(folder, "nobody")
        folder.chmod(0o700)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _restart_postgres(stage: Stage, seconds: float) -> None:
    processes = stage.server_processes()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    stage.wait(seconds)
    stage.postgres.start()


def _cut(stage: Stage, seconds: float) -> None:
    stage.relay.cut()
    stage.wait(seconds)
    stage.relay.mend()


def _blackhole(stage: Stage, seconds: float) -> None:
    stage.relay.blackhole()
    stage.wait(seconds)
    stage.relay.mend()


def _zero_window(stage: Stage, seconds: float) -> None:
    stage.relay.zero_window()
    stage.wait(seconds)
    stage.relay.mend()


def _delay(stage: Stage, seconds: float) -> None:
    stage.relay.delay(0.2)
    stage.wait(seconds)
    stage.relay.mend()


def _trickle(stage: Stage, seconds: float) -> None:
    stage.relay.trickle()
    stage.wait(seconds)
    stage.relay.mend()


def _freeze(stage: Stage, seconds: float) -> None:
    processes = stage.server_processes()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
    stage.wait(seconds)
    for process in reversed(processes):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def _lock(stage: Stage, seconds: float) -> None:
    with stage.admin() as connection, connection.transaction():
        connection.execute("LOCK TABLE access_log IN ACCESS EXCLUSIVE MODE")
        stage.wait(seconds)


def _change_password(stage: Stage, seconds: float) -> None:
    """Also ends the role's sessions: one that is open is never asked again."""
    with stage.admin() as connection:
        connection.execute(f"ALTER ROLE {_ROLE} PASSWORD 'another'".encode())
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (_ROLE,)
        )
        stage.wait(seconds)
        connection.execute(f"ALTER ROLE {_ROLE} PASSWORD '{_PASSWORD}'".encode())


def _fill_disk(stage: Stage, seconds: float) -> str:
    """The tables' disk, not that of the WAL, whose end is a crash, which is a fault of its own."""
    if stage.disk is None:
        return "left out: needs root to mount a small disk"
    ballast = stage.disk / "ballast"
    with ballast.open("wb") as file:
        size = 0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            free = os.statvfs(stage.disk)
            room = free.f_bavail * free.f_frsize
            if room:
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), size, room)
                    size += room
            stage.wait(0.2)
    ballast.unlink()
    return ""


def _take_partition(stage: Stage, seconds: float) -> None:
    stage.take_partition_away()
    stage.wait(seconds)


def _take_table(stage: Stage, seconds: float) -> None:
    with stage.admin() as connection:
        connection.execute("ALTER TABLE access_log RENAME TO access_log_gone")
        stage.wait(seconds)
        connection.execute("ALTER TABLE access_log_gone RENAME TO access_log")


def _restart_proxy(stage: Stage, seconds: float) -> str:
    took = stage.stop_proxy()
    stage.wait(seconds)
    stage.start_proxy()
    return f"stopped in {took:.2f} s"


def _restart_deaf(stage: Stage, seconds: float) -> str:
    stage.relay.blackhole()
    stage.wait(seconds)
    took = stage.terminate()
    stage.start_proxy()
    stage.wait(seconds)
    stage.relay.mend()
    return f"stopped in {took:.2f} s"


def _reload(stage: Stage, _seconds: float) -> None:
    stage.reload_script()


def _reload_cut(stage: Stage, seconds: float) -> None:
    stage.relay.cut()
    stage.wait(seconds)
    stage.reload_script()
    stage.wait(seconds)
    stage.relay.mend()


def _kill_proxy(stage: Stage, _seconds: float) -> None:
    stage.kill_proxy()
    stage.start_proxy()


def _kill_proxy_cut(stage: Stage, seconds: float) -> None:
    stage.relay.cut()
    stage.wait(seconds)
    stage.kill_proxy()
    stage.start_proxy()
    stage.wait(seconds)
    stage.relay.mend()


def _kill_proxy_deaf(stage: Stage, seconds: float) -> None:
    stage.relay.blackhole()
    stage.wait(seconds)
    stage.kill_proxy(deaf=True)
    stage.relay.mend()
    stage.start_proxy()


FAULTS: dict[str, Callable[[Stage, float], str | None]] = {
    "postgres kill -9, restart": _restart_postgres,
    "wire cut": _cut,
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

_LIFE_CYCLE = "proxy", "hot reload"  # faults of these say nothing of the proxy's own latency

# Half of them kill -9: ten of these in each deck, hence twenty in ten minutes.
_DECK = {
    "postgres kill -9, restart": (10, 0.5, 4.0),
    "wire cut": (2, 2.0, 8.0),
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


class Report:
    """Hold the table against what the clients saw; `complaints` is empty if the log is whole."""

    def __init__(self, stage: Stage) -> None:
        self.lines: list[str] = []
        self.complaints = list(stage.complaints)
        self._stage = stage
        self._requests = stage.traffic.requests()
        self._rows = [*stage.rows()]
        self._episodes()
        self._generations()
        self._totals()
        self._counters()
        self._latency()
        self._bounds()
        self._logs()

    def text(self) -> str:
        """The whole report."""
        verdict = [f"WRONG: {complaint}" for complaint in self.complaints] or ["The log is whole."]
        return "\n".join([*self.lines, *verdict])

    def _say(self, line: str = "") -> None:
        self.lines.append(line)

    def _expect(self, condition: object, complaint: str) -> None:
        if not condition:
            self.complaints.append(complaint)

    def _episodes(self) -> None:
        self._say(
            f"{'fault':28} {'times':>5} {'s each':>7} {'recovered after s':>18} "
            f"{'most spooled':>12} {'most waiting':>12} {'p99 ms':>7}"
        )
        by_fault: dict[str, list[Episode]] = defaultdict(list)
        for episode in self._stage.episodes:
            by_fault[episode.step.fault].append(episode)
        for fault, episodes in by_fault.items():
            lasted = statistics.mean(e.ended - e.began for e in episodes)
            recovery = max(e.recovered - e.ended for e in episodes)
            latencies = [
                r.ended_at - r.sent_at
                for e in episodes
                for r in self._requests
                if r.answered and e.began <= r.sent_at <= e.recovered
            ]
            notes = sorted({e.note for e in episodes if e.note})
            self._say(
                f"{fault:28} {len(episodes):5} {lasted:7.1f} {'at most':>11} {recovery:6.1f} "
                f"{max(e.spooled for e in episodes):12} {max(e.waiting for e in episodes):12} "
                f"{_p99(latencies):7.1f}  {'; '.join(notes)}"
            )
        self._say()

    def _generations(self) -> None:
        """Each process of the proxy for itself: only one that was killed may owe a row."""
        rows: dict[int, Counter[int]] = defaultdict(Counter)
        for owner, number in self._rows:
            rows[owner][number] += 1
        sent: dict[int, list[Request]] = defaultdict(list)
        for request in self._requests:
            sent[request.generation].append(request)
        gaps = self._stage.gaps()
        self._say(
            f"{'proxy':7} {'end':8} {'sent':>7} {'answered':>8} {'rows':>7} {'unanswered, seen':>16} "
            f"{'in gaps':>7} {'missing':>7} {'double':>6}"
        )
        for generation in self._stage.generations:
            mine, found = sent[generation.number], rows[generation.number]
            answered = {r.number: r for r in mine if r.answered}
            others = {r.number for r in mine if not r.answered}
            missing = [r for number, r in answered.items() if number not in found]
            doubles = sum(1 for n in found.values() if n > 1)
            strangers = [n for n in found if n not in answered and n not in others]
            told = gaps[generation.number].total()
            unanswered_seen = sum(1 for n in found if n in others)
            self._say(
                f"{generation.number:<7} {'killed' if generation.killed_at else 'orderly':8} "
                f"{len(mine):7} {len(answered):8} {len(found):7} {unanswered_seen:16} "
                f"{told:7} {len(missing):7} {doubles:6}"
            )
            name = f"proxy {generation.number}"
            self._expect(not doubles, f"{name}: {doubles} numbers are there more than once")
            self._expect(not strangers, f"{name}: rows nobody asked for: {strangers[:5]}")
            if generation.killed_at is None:
                silent = len(others) - unanswered_seen
                self._expect(
                    len(missing) <= told <= len(missing) + silent,
                    f"{name}: {len(missing)} answered numbers are missing, the gaps say {told}",
                )
            else:
                self._weigh_loss(generation, missing)

    def _weigh_loss(self, generation: Generation, missing: Sequence[Request]) -> None:
        """At most what had not been flushed: a batch in the making and one in an unanswered call."""
        killed_at = generation.killed_at or 0.0
        oldest = killed_at - min((r.ended_at for r in missing), default=killed_at)
        seconds = _BATCH_SECONDS + _SLACK_SECONDS
        if generation.deaf:
            # Meanwhile the call that will never be answered keeps the writer.
            seconds += self._stage.bounds.call_seconds + self._stage.bounds.connect_seconds
        most = max(_BATCH_ENTRIES, seconds * self._stage.bounds.rate) + _BATCH_ENTRIES
        self._say(f"        lost by kill -9: {len(missing)}, the oldest {oldest:.2f} s old")
        self._expect(
            len(missing) <= most and oldest <= seconds,
            f"proxy {generation.number}: kill -9 lost {len(missing)} rows, the oldest {oldest:.2f} s old; "
            f"allowed {most:.0f} and {seconds:.1f} s",
        )

    def _totals(self) -> None:
        answered = sum(1 for r in self._requests if r.answered)
        numbers = {number for _, number in self._rows}
        self._say()
        self._say(
            f"sent {len(self._requests)}, answered {answered}, rows {len(self._rows)}, "
            f"double {len(self._rows) - len(numbers)}, "
            f"answered and missing {sum(1 for r in self._requests if r.answered and r.number not in numbers)}"
        )
        self._expect(answered > 0, "nothing was answered")
        self._expect(len(self._rows) == len(numbers), "a number is there more than once")

    def _counters(self) -> None:
        """What the writer says of itself, over all its lives, is what the table says."""
        written = recovered = failures = retries = 0
        killed = False
        for generation in self._stage.generations:
            lives = _lives(generation.statuses())
            goodbyes = [int(n) for n in _GOODBYE.findall(generation.mitm.output())]
            written += sum(goodbyes)
            if generation.killed_at is not None:
                killed = True
                written += lives[-1][-1]["written"] if lives else 0
            for life in lives:
                last = life[-1]
                recovered += last["recovered"]
                retries += last["retries"]
                failures += last["failures"]
                self._check_life(generation, life)
        self._say(
            f"counters: written {written}, recovered from spools {recovered}, together "
            f"{written + recovered}; retries {retries}, failures {failures}"
        )
        rows = len(self._rows)
        if killed:  # what it wrote after its last word is in the table and in no counter
            self._expect(written <= rows, f"{written} are said to be written, {rows} are there")
        else:
            self._expect(
                written + recovered == rows,
                f"{written} written and {recovered} recovered make not the {rows} rows",
            )
        self._expect(not failures, f"the writer failed {failures} times")

    def _check_life(self, generation: Generation, life: Sequence[dict[str, Any]]) -> None:
        parts = ("written", "dropped", "rejected", "waiting", "spooled")
        before: dict[str, Any] = {}
        for status in life:
            whole = status["seen"] == sum(status[part] for part in parts)
            sound = min(status[part] for part in parts) >= 0
            grows = all(
                status[name] >= before.get(name, 0) for name in ("seen", "written", "recovered")
            )
            if not (whole and sound and grows):
                self._expect(None, f"proxy {generation.number}: counters {before}, then {status}")
                return
            before = status

    def _latency(self) -> None:
        """Where only Postgres was in trouble, against the calm; young proxies left out of both."""
        births = [
            min((s["at"] for s in g.statuses()), default=0.0) for g in self._stage.generations
        ]
        young = [(at, at + _WARM_SECONDS) for at in births]
        troubled: list[tuple[float, float]] = []
        life_cycle: list[tuple[float, float]] = []
        for e in self._stage.episodes:
            span = (e.began, e.recovered)
            (life_cycle if e.step.fault.startswith(_LIFE_CYCLE) else troubled).append(span)
        calm_times: list[float] = []
        fault_times: list[float] = []
        for r in self._requests:
            if not r.answered or _within(r.sent_at, young) or _within(r.sent_at, life_cycle):
                continue
            times = fault_times if _within(r.sent_at, troubled) else calm_times
            times.append(r.ended_at - r.sent_at)
        calm, fault = _p99(calm_times), _p99(fault_times)
        self._say(
            f"latency through the proxy: p50 {_p(50, calm_times):.1f} ms calm, "
            f"{_p(50, fault_times):.1f} ms in faults; p99 {calm:.1f} ms calm, {fault:.1f} ms in faults, "
            f"ratio {fault / calm if calm else 0:.2f} ({len(calm_times)} and {len(fault_times)} requests)"
        )

    def _bounds(self) -> None:
        stage = self._stage
        grown = [g.peak_rss - g.first_rss for g in stage.generations if g.first_rss]
        peak = max(g.peak_rss for g in stage.generations)
        self._say(
            f"memory: peak {peak / 2**20:.0f} MiB, grown by at most {max(grown, default=0) / 2**20:.0f} MiB; "
            f"spool: peak {stage.peak_spool / 2**20:.2f} MiB of {_SPOOL_BYTES / 2**20:.0f}"
        )
        self._expect(max(grown, default=0) <= _RSS_GROWTH_BYTES, "the proxy's memory has grown")
        self._expect(stage.peak_spool <= _SPOOL_BYTES + 2**21, "the spool is over its bound")
        ends = "; ".join(
            f"proxy {g.number} {_shown(g.handles)}" for g in stage.generations if g.handles
        )
        self._say(f"held at first: {_shown(stage.handles)}; at the end: {ends}")
        longest = max(stage.stops, default=0.0)
        self._say(f"stop: {len(stage.stops)} orderly ends, the longest {longest:.2f} s")
        self._expect(longest <= _DRAIN_SECONDS + 2.0, f"a stop took {longest:.2f} s")

    def _logs(self) -> None:
        """What the proxies said, numbers left out."""
        kinds: Counter[str] = Counter()
        for generation in self._stage.generations:
            for line in generation.mitm.output().splitlines():
                text = re.sub(r"^\[[\d:.]+\]\s*", "", line)
                if "Traceback" in text or "failed and goes on" in text:
                    self.complaints.append(f"proxy {generation.number} said: {text[:200]}")
                if "ostgres" in text or "pool" in text or "rror" in text:
                    kinds[re.sub(r"\d+(\.\d+)?", "#", text)[:200]] += 1
        self._say()
        for text, count in kinds.most_common(40):
            self._say(f"{count:5} x {text}")


def _lives(statuses: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The counters of one process, cut where they begin anew because the script was loaded anew."""
    lives: list[list[dict[str, Any]]] = []
    for status in statuses:
        if not lives or status["seen"] < lives[-1][-1]["seen"]:
            lives.append([])
        lives[-1].append(status)
    return lives


def _shown(handles: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in handles.items())


def _within(at: float, spans: Sequence[tuple[float, float]]) -> bool:
    return any(began <= at <= ended for began, ended in spans)


def _p(percent: int, seconds: Sequence[float]) -> float:
    """Percentile in milliseconds; 0 of nothing."""
    return (
        sorted(seconds)[min(len(seconds) * percent // 100, len(seconds) - 1)] * 1000
        if seconds
        else 0.0
    )


def _p99(seconds: Sequence[float]) -> float:
    return _p(99, seconds)


def run(folder: Path, steps: Iterator[Step], bounds: Bounds, seconds: float) -> Report:
    """Play faults until they or the time are at an end; then look at the log."""
    with Stage(folder, bounds) as stage:
        stage.take_bearings()
        until = time.monotonic() + seconds
        for step in steps:
            if time.monotonic() >= until:
                break
            stage.play(step)
        stage.finish()
        return Report(stage)


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

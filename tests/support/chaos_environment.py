"""A proxy under load, a real Postgres behind a relay, and what may befall them; judges nothing.

The proxy's role may only INSERT, and each process of the proxy writes under a node name of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import psutil
import psycopg

from exporter.postgres.schema import ensure_schema, grants

from .postgres import Postgres, available
from .proxy import Mitm
from .relay import Relay
from .traffic import Traffic
from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROLE, PASSWORD = "chaos_proxy", "first"
BATCH_ENTRIES, BATCH_SECONDS = 128, 2.0  # the defaults
DRAIN_SECONDS = 5.0  # as well
SPOOL_BYTES = 64 * 1024 * 1024
WARM_SECONDS = 3.0  # a young proxy is slow by itself
SLACK_SECONDS = 1.0
GOODBYE = re.compile(r"artifactapi: stopped; (\d+) rows written")
_ROOT = Path(__file__).parents[2]
_CONNECTIONS = 6
_DISK = "384m"
_CONFIGURATION_SECONDS = 15.0  # between attempts when only the user can mend it


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


class ChaosEnvironment:
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
            for name in ("addon", "configs", "exporter"):  # a copy, whose script may be touched
                shutil.copytree(_ROOT / name, self._product / name)
            self.postgres = self._stack.enter_context(Postgres(available()["18"]))
            self.disk = self._stack.enter_context(_small_disk(self.postgres))
            self._prepare()
            self.relay = self._stack.enter_context(
                Relay(("127.0.0.1", self.postgres.port), postgres=True)
            )
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

    def play(self, step: Step, fault: Callable[[ChaosEnvironment, float], str | None]) -> None:
        """Let one fault happen, and wait until the log has recovered from it."""
        self.wait(step.calm)
        before = self.proxy
        episode = Episode(step, time.monotonic())
        self.episodes.append(episode)
        note = fault(self, step.seconds)
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
        few = self.bounds.rate * (BATCH_SECONDS + SLACK_SECONDS) + BATCH_ENTRIES
        bounds = self.bounds
        deadline = 4 * (bounds.call_seconds + bounds.connect_seconds + bounds.retry_max_seconds) + (
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
            eventually(settled, timeout=deadline)
        except AssertionError:
            fault = self.episodes[-1].step.fault if self.episodes else "the start"
            self.complaints.append(f"not recovered {deadline:.0f} s after: {fault}")
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
                _ROOT / "tests" / "support" / "status_file.py",
            ],
            env={
                "ARTIFACTAPI_HOME": str(self._home),
                "ARTIFACTAPI_DSN": (
                    f"host=127.0.0.1 port={self.relay.address[1]} user={ROLE} dbname=postgres"
                ),
                "PGPASSWORD": PASSWORD,
            },
            timeout=60,  # on a busy machine its imports take long
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
        starts = self._starts()
        script.touch()
        eventually(lambda: self._starts() > starts, timeout=20)
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
            f"spool: {{max_bytes: {SPOOL_BYTES}}}\n"
        )
        return file

    def _prepare(self) -> None:
        """The schema, on the small disk where there is one, and a role with a password that may INSERT."""
        rules = self.postgres.data / "pg_hba.conf"
        rule = f"host all {ROLE} 127.0.0.1/32 scram-sha-256\n"
        rules.write_text(rule + rules.read_text())
        self.postgres.run("pg_ctl", "reload", "-D", self.postgres.data)
        with self.admin() as connection:
            if self.disk:
                connection.execute(f"CREATE TABLESPACE small LOCATION '{self.disk}'".encode())
                connection.execute("ALTER DATABASE postgres SET default_tablespace = small")
            connection.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'".encode())
            connection.execute("CREATE ROLE chaos_reader")
        with self.admin() as connection:
            ensure_schema(connection)
            connection.execute(grants("public", ROLE, "chaos_reader").encode())

    def _starts(self) -> int:
        return self.proxy.mitm.output().count("artifactapi: logging to")

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
        self.wait(WARM_SECONDS)
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

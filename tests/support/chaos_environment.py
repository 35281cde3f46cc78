"""Run a proxy under load with PostgreSQL behind a relay, and inject faults; `chaos_checks` judges the result.

The proxy's role may only INSERT, and each process of the proxy writes under its own node name.
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

from .environment import temporary_runtime
from .postgres import Postgres, available
from .proxy import Mitm
from .relay import Relay, Relays
from .traffic import Traffic
from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROLE, PASSWORD = "chaos_proxy", "first"
BATCH_ENTRIES, BATCH_SECONDS = 128, 2.0  # defaults of artifactapi
DRAIN_SECONDS = 5.0  # default of artifactapi
SPOOL_BYTES = 64 * 1024 * 1024
WARM_SECONDS = 3.0  # a proxy is slow right after its start
SLACK_SECONDS = 1.0
STOPPED_LINE = re.compile(r"artifactapi: stopped; (\d+) rows? written")
_ROOT = Path(__file__).parents[2]
_CONNECTIONS = 6
_DISK = "384m"
_MEMORY = "64m"  # Docker's default for /dev/shm
_CONFIGURATION_SECONDS = 15.0  # the retry interval after errors that only a user can fix


class Bounds(NamedTuple):
    """The settings that a run changes, so that faults of a few seconds exceed the timeouts.

    Attributes:
        rate: Requests per second.
    """

    call_seconds: float = 8.0
    connect_seconds: float = 5.0
    retry_max_seconds: float = 5.0
    rate: float = 150.0


class Step(NamedTuple):
    """One fault, its duration, and the pause before it."""

    fault: str
    seconds: float
    pause: float = 1.0


@dataclass
class Episode:
    """A fault that was injected; times are monotonic seconds."""

    step: Step
    began: float
    ended: float = 0.0
    recovered: float = 0.0
    spooled: int = 0  # the maximum
    waiting: int = 0  # the maximum
    note: str = ""


@dataclass
class Generation:
    """One process of the proxy."""

    number: int
    mitm: Mitm
    status_file: Path
    handles: dict[str, int] = field(default_factory=dict)  # just before it stopped
    killed_at: float | None = None
    is_damaged: bool = False  # so was its journal, after the kill
    warm: bool = False  # has written rows
    peak_rss: int = 0
    first_rss: int = 0

    def statuses(self) -> list[dict[str, Any]]:
        """Return all counters that it reported."""
        if not self.status_file.exists():
            return []
        lines = self.status_file.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def status(self) -> dict[str, Any]:
        """Return the counters that it reported last; empty before the first report."""
        try:
            with self.status_file.open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return {}
        return dict(json.loads(lines[-2])) if len(lines) > 1 else {}

    def count_handles(self) -> dict[str, int]:
        """Count its threads, sockets and files."""
        process = psutil.Process(self.mitm.pid)
        sockets = len(process.net_connections("all"))
        return {
            "threads": process.num_threads(),
            "sockets": sockets,
            "files": process.num_fds() - sockets,
        }


class ChaosEnvironment:
    """Runs PostgreSQL, the relay, the proxy and the traffic inside its `with` block."""

    def __init__(self, folder: Path, bounds: Bounds) -> None:
        self.bounds = bounds
        self.generations: list[Generation] = []
        self.episodes: list[Episode] = []
        self.stops: list[float] = []  # seconds that each SIGTERM took to stop the proxy
        self.peak_spool = 0
        self.handles: dict[str, int] = {}  # of the first proxy, before the first fault
        self.complaints: list[str] = []
        self.worker_kills = 0
        self._folder = folder
        self._home = folder / "home"
        self._product = folder / "product"
        self._detached: list[str] = []  # detached partitions, which still hold rows
        self._never = threading.Event()  # never set; `wait` uses its timeout
        self._finished = threading.Event()
        self._watch = threading.Thread(target=self._sample, name="chaos-watch")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            for name in ("addon", "configs", "exporter"):  # a copy, because a reload touches a file
                shutil.copytree(_ROOT / name, self._product / name)
            self._start_server()
            self.memory = self._stack.enter_context(_memory(self._folder / "memory"))
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

    def _start_server(self) -> None:
        """Start a server with a log, and a relay to it."""
        self.postgres = self._stack.enter_context(Postgres(available()["18"]))
        self.disk = self._stack.enter_context(_small_disk(self.postgres))
        self._prepare()
        relay = self._stack.enter_context(Relay(("127.0.0.1", self.postgres.port), postgres=True))
        self._port = relay.address[1]
        self.relay = Relays([relay])

    @property
    def owner_dsn(self) -> str:
        """A connection string for the owner of the log, not through the relay."""
        return self.postgres.dsn()

    @property
    def proxy(self) -> Generation:
        """The proxy that runs now, or ran last."""
        return self.generations[-1]

    def wait(self, seconds: float) -> None:
        """Sleep."""
        self._never.wait(seconds)

    def admin(self) -> psycopg.Connection[Any]:
        """Connect as the owner of the log, not through the relay."""
        return psycopg.connect(self.owner_dsn, autocommit=True)

    def inject(self, step: Step, fault: Callable[[ChaosEnvironment, float], str | None]) -> None:
        """Inject one fault, and wait until the log has recovered from it."""
        self.wait(step.pause)
        before = self.proxy
        episode = Episode(step, time.monotonic())
        self.episodes.append(episode)
        note = fault(self, step.seconds)
        episode.note = note or ""
        episode.ended = time.monotonic()
        self.settle()
        episode.recovered = time.monotonic()
        statuses = [
            s for g in {id(g): g for g in (before, self.proxy)}.values() for s in g.statuses()
        ]
        during = [s for s in statuses if s["at"] >= episode.began]
        episode.spooled = max((s["spooled"] for s in during), default=0)
        episode.waiting = max((s["waiting"] for s in during), default=0)
        sys.stderr.write(
            f"{step.fault}: {episode.ended - episode.began:.1f} s,"
            f" recovered after {episode.recovered - episode.ended:.1f} s {episode.note}\n"
        )

    def settle(self) -> None:
        """Wait until rows are written again and only recent ones are buffered."""
        since, start = time.monotonic(), self.proxy.status()
        max_waiting = self.bounds.rate * (BATCH_SECONDS + SLACK_SECONDS) + BATCH_ENTRIES
        bounds = self.bounds
        deadline = 4 * (bounds.call_seconds + bounds.connect_seconds + bounds.retry_max_seconds) + (
            _CONFIGURATION_SECONDS
        )

        def settled() -> bool:
            status = self.proxy.status()
            return bool(
                status
                and status["at"] > since
                and status["written"] > (start.get("written", 0) if start else 0)
                and status["spooled"] == 0
                and status["waiting"] <= max_waiting
            )

        try:
            eventually(settled, timeout=deadline)
        except AssertionError:
            fault = self.episodes[-1].step.fault if self.episodes else "startup"
            self.complaints.append(f"no recovery within {deadline:.0f} s after {fault}")
        self.proxy.warm = True

    def start_proxy(self) -> None:
        """Start a new proxy and send the traffic to it."""
        number = len(self.generations)
        status_file = self._folder / f"status-{number}"
        mitm = Mitm(
            self._folder / f"proxy-{number}",
            *("--set", f"artifactapi_config={self._configuration(f'proxy-{number}')}"),
            *("--set", f"status_file={status_file}"),
            *("--set", "flow_detail=0"),
            scripts=[
                self._product / "addon" / "artifactapi.py",
                _ROOT / "tests" / "support" / "status_file.py",
            ],
            env=self._environment(),
            timeout=60,  # imports take long on a busy machine
        )
        if number:  # creating another certificate authority takes seconds
            shutil.copytree(self.generations[0].mitm.folder / "confdir", mitm.folder / "confdir")
        generation = Generation(number, self._stack.enter_context(mitm), status_file)
        self.generations.append(generation)
        self.traffic.set_target(number, mitm.port)

    @contextlib.contextmanager
    def other_proxy(self) -> Iterator[Mitm]:
        """Start another proxy, without waiting for it. It gets no traffic, and is stopped afterwards."""
        mitm = Mitm(
            self._folder / f"other-{len(self.generations)}",
            *("--set", f"artifactapi_config={self._configuration('other')}"),
            scripts=[self._product / "addon" / "artifactapi.py"],
            env=self._environment(),
            listens=False,
            timeout=60,
        )
        with mitm:
            yield mitm
            eventually(lambda: "artifactapi: logging to" in mitm.output(), timeout=60)

    def _environment(self) -> dict[str, str]:
        return {
            "ARTIFACTAPI_HOME": str(self._home),
            **self._login(len(self.generations)),
            **({"XDG_RUNTIME_DIR": str(self.memory)} if self.memory else {}),
        }

    def _login(self, _number: int) -> dict[str, str]:
        """Where and as whom the proxy with this number connects."""
        dsn = f"host=127.0.0.1 port={self._port} user={ROLE} dbname=postgres"
        return {"ARTIFACTAPI_DSN": dsn, "PGPASSWORD": PASSWORD}

    def stop_proxy(self) -> float:
        """Check the handles and stop the proxy; return the seconds that it took."""
        self._check_handles()
        return self.terminate()

    def terminate(self) -> float:
        """Send SIGTERM to the proxy and wait; return the seconds until the process ended."""
        began = time.monotonic()
        self.proxy.mitm.terminate()
        self.stops.append(time.monotonic() - began)
        return self.stops[-1]

    def kill_proxy(self, *, worker_first: bool = False) -> None:
        """Kill the proxy with SIGKILL, as the out-of-memory killer would."""
        if worker_first:
            self.kill_worker()
        self.proxy.killed_at = time.monotonic()
        self.proxy.mitm.kill()

    def kill_worker(self) -> None:
        """Kill the proxy's second process."""
        for process in psutil.Process(self.proxy.mitm.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                self.worker_kills += 1

    def journals(self) -> list[Path]:
        """The journals of all proxies."""
        return [*self.memory.glob("*.journal")] if self.memory else []

    def reload_script(self) -> None:
        """Make mitmproxy reload the script, and wait until it has."""
        script = self._product / "addon" / "artifactapi.py"
        starts = self._starts()
        script.touch()
        eventually(lambda: self._starts() > starts, timeout=20)
        since = time.monotonic()
        eventually(lambda: self.proxy.status()["at"] > since, timeout=20)

    def finish(self) -> None:
        """Stop the traffic, wait for the last rows, check the handles, and stop the proxy."""
        self.settle()
        self._check_handles()
        self.traffic.stop()
        since = time.monotonic()

        def all_written() -> bool:
            status = self.proxy.status()
            parts = ("written", "dropped", "rejected")
            return bool(
                status["at"] > since
                and not status["waiting"]
                and not status["spooled"]
                and status["seen"] == sum(status[part] for part in parts)
            )

        try:
            eventually(all_written, timeout=20)
        except AssertionError:
            self.complaints.append(f"the counters do not add up: {self.proxy.status()}")
        self.terminate()

    def rows(self) -> Iterator[tuple[int, int]]:
        """Yield the generation and the number of each row, also from detached partitions."""
        tables = ["access_log", *self._detached]
        union = " UNION ALL ".join(f"SELECT node, path FROM {table}" for table in tables)
        with self.admin() as connection:
            for node, path in connection.execute(union.encode()):
                yield int(node.removeprefix("proxy-")), int(path.removeprefix("/n/"))

    def gaps(self) -> dict[int, Counter[str]]:
        """Count the lost entries in `access_log_gap`, by generation and reason."""
        found: dict[int, Counter[str]] = defaultdict(Counter)
        with self.admin() as connection:
            for node, reason, entries in connection.execute(
                "SELECT node, reason, entries FROM access_log_gap"
            ):
                found[int(node.removeprefix("proxy-"))][reason] += entries
        return found

    def detach_partition(self) -> None:
        """Detach and rename the newest partition, with its rows."""
        with self.admin() as connection, connection.transaction():
            row = connection.execute(
                "SELECT max(inhrelid::regclass::text) FROM pg_inherits"
                " WHERE inhparent = 'access_log'::regclass"
            ).fetchone()
            assert row
            detached = f"detached_{len(self._detached)}"
            connection.execute(f"ALTER TABLE access_log DETACH PARTITION {row[0]}".encode())
            connection.execute(f"ALTER TABLE {row[0]} RENAME TO {detached}".encode())
            self._detached.append(detached)

    def server_processes(self) -> list[psutil.Process]:
        """Return the postmaster and its children."""
        postmaster = psutil.Process(self.postgres.pid)
        return [postmaster, *postmaster.children(recursive=True)]

    def runs(self) -> list[tuple[str, str | None, int, int]]:
        """Node and end of each run, how many requests it saw, and how many of those are rows or gaps."""
        sql = """
            SELECT node, end_reason, seen, (SELECT coalesce(sum(rows + lost), 0) FROM access_log_run_day
                                            WHERE origin_run_id = access_log_run.run_id)
            FROM access_log_run ORDER BY started_at
        """
        with self.admin() as connection:
            return [(node, end, seen, int(n)) for node, end, seen, n in connection.execute(sql)]

    def audit(self) -> dict[str, Any]:
        """What `artifactapi audit` finds."""
        script = self._product / "addon" / "cli" / "main.py"
        done = subprocess.run(
            [sys.executable, str(script), "--dsn", self.owner_dsn, "audit", "--json"],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.stdout, done.stderr
        return dict(json.loads(done.stdout))

    def count_detached_rows(self) -> int:
        """Count the rows of the detached partitions."""
        with self.admin() as connection:
            counts = [
                connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() or (0,)
                for table in self._detached
            ]
        return sum(count for (count,) in counts)

    def _configuration(self, node: str) -> Path:
        file = self._folder / f"settings-{node}.yaml"
        file.write_text(
            f"node: {node}\n"
            "database:\n"
            f"  call_seconds: {self.bounds.call_seconds}\n"
            f"  connect_seconds: {self.bounds.connect_seconds}\n"
            f"  retry_max_seconds: {self.bounds.retry_max_seconds}\n"
            f"spool: {{max_bytes: {SPOOL_BYTES}}}\n"
        )
        return file

    def _prepare(self) -> None:
        """Create the schema, on the small disk if there is one, and the proxy's role."""
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
        """Complain if the proxy has more handles than the first one had; allow time to close some."""
        grown: dict[str, int] = {}

        def has_no_extra() -> bool:
            self.proxy.handles = handles = self.proxy.count_handles()
            grown.clear()
            grown.update(
                {name: handles[name] - n for name, n in self.handles.items() if handles[name] > n}
            )
            return not grown

        try:
            eventually(has_no_extra, timeout=15)
        except AssertionError:
            self.complaints.append(
                f"proxy {self.proxy.number} has more handles than the first: {grown}"
            )

    def _sample(self) -> None:
        while not self._finished.wait(0.25):
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
        self._finished.set()
        self._watch.join()

    def measure_baseline(self) -> None:
        """Record the handles of the warm proxy before the first fault."""
        self.settle()
        self.wait(WARM_SECONDS)
        self.handles = self.proxy.count_handles()


@contextlib.contextmanager
def _small_disk(postgres: Postgres) -> Iterator[Path | None]:
    """Mount a small file system that a fault can fill; yield None without the right to mount."""
    folder = postgres.folder / "disk"
    with _mounted_tmpfs(folder, _DISK) as is_mounted:
        if is_mounted:
            shutil.chown(folder, "nobody")
            folder.chmod(0o700)
        yield folder if is_mounted else None


@contextlib.contextmanager
def _memory(folder: Path) -> Iterator[Path | None]:
    """A folder for journals: a small tmpfs of its own, or a part of a large one; None: there is none."""
    with _mounted_tmpfs(folder, _MEMORY) as is_mounted:
        if is_mounted:
            yield folder
            return
        with temporary_runtime() as shared:
            yield shared


@contextlib.contextmanager
def _mounted_tmpfs(folder: Path, size: str) -> Iterator[bool]:
    """Mount a tmpfs at this new folder; False without the right to mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)

"""Prune a log into an archive under faults, and check after each fault that every row is somewhere, and in one file.

Each step adds an old day to the log and lets `artifactapi prune --archive` remove it, while something goes wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import duckdb
import psycopg

from exporter.archive.files import archived_days, verify_day
from exporter.archive.parquet import ArchiveError
from exporter.postgres.schema import ensure_schema

from .command import COMMAND
from .environment import clean_environment
from .postgres import Postgres, available
from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ROOT = Path(__file__).resolve().parents[2]
_ROWS_PER_DAY = 300
_KEEP_DAYS = 5
_DISK = "48m"
_TIMEOUT_SECONDS = 600
_INSERT = """
    INSERT INTO access_log (started_at, flow_id, node, method, host, path, status_code, response_bytes, duration_ms)
    SELECT * FROM unnest(%s::timestamptz[], %s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[], %s::smallint[],
                         %s::bigint[], %s::real[])
    ON CONFLICT DO NOTHING
"""
_DETACHED = """
    SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'
    AND relname ~ '^access_log_[0-9]{8}' AND relname NOT IN
      (SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
       WHERE inhparent = 'access_log'::regclass AND NOT inhdetachpending)
"""

type Rows = dict[str, str]  # path by flow_id


class Outcome(NamedTuple):
    """How a prune ended."""

    code: int
    text: str

    @property
    def word(self) -> str:
        """In one word, for the report."""
        return "killed" if self.code < 0 else "failed" if self.code else "done"


class ArchiveChaos:
    """A PostgreSQL server with a log, and a folder on a small disk for its archive."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.complaints: list[str] = []
        self.steps: list[tuple[str, list[Outcome], str]] = []
        self.expected: Rows = {}
        self.days: list[date] = []
        self._written: dict[str, tuple[Any, ...]] = {}
        self.rng = random.Random(seed)
        self.disk = folder / "disk"
        self.disk.mkdir()
        self._folder = folder
        self._lines: dict[str, int] = {}
        self._cleanup = contextlib.ExitStack()

    @property
    def archive(self) -> Path:
        """The folder of the archive."""
        return self.disk / "archive"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as cleanup:
            self.has_disk = _mount(self.disk)
            if self.has_disk:
                cleanup.callback(_umount, self.disk)
            self.postgres = cleanup.enter_context(Postgres(available()["18"]))
            with self.connect() as connection:
                ensure_schema(connection)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """Open a connection, also while the server restarts."""
        return psycopg.connect(self.postgres.dsn(), autocommit=True)

    def add_day(self) -> None:
        """Write a day that is older than all others."""
        today = datetime.now(UTC).date()
        day = today - timedelta(days=_KEEP_DAYS + 1 + len(self.days))
        self.days.append(day)
        self.insert(day, _ROWS_PER_DAY)

    def add_late_rows(self) -> None:
        """Write rows for three days that may have left the log, and rows of them that were written before."""
        days = self.rng.sample(self.days, min(3, len(self.days)))
        for day in days:
            self.insert(day, self.rng.randrange(1, 40))
        written = [row for row in self._written.values() if row[0].date() in days]
        self._write(self.rng.sample(written, min(20, len(written))))

    def insert(self, day: date, count: int) -> None:
        """Write new rows of a day."""
        rows = []
        for _ in range(count):
            flow_id = str(uuid.UUID(int=self.rng.getrandbits(128)))
            at = datetime(day.year, day.month, day.day, tzinfo=UTC)
            at += timedelta(seconds=self.rng.random() * 86_399)
            path = f"/{self.rng.getrandbits(64):x}"
            size, duration = self.rng.randrange(10**9), self.rng.random() * 1e4
            node = f"node-{self.rng.randrange(3)}"
            rows.append((at, flow_id, node, "GET", "host.example", path, 200, size, duration))
        self._write(rows)

    def _write(self, rows: list[tuple[Any, ...]]) -> None:
        """Insert rows as a proxy does: again, if their day has no partition because it is just being detached."""
        columns = [list(column) for column in zip(*rows, strict=True)]
        days = {row[0].date() for row in rows}

        def insert() -> bool:
            with self.connect() as connection, contextlib.suppress(psycopg.errors.CheckViolation):
                for day in days:
                    connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
                connection.execute(_INSERT, columns)
                return True
            return False

        eventually(insert, timeout=60)
        self._written |= {row[1]: row for row in rows}
        self.expected |= {row[1]: row[5] for row in rows}

    def prune(
        self, *, kill_at: tuple[str, int] | None = None, max_file_bytes: int | None = None
    ) -> subprocess.Popen[str]:
        """Start `artifactapi prune --archive`."""
        arguments = ["--dsn", self.postgres.dsn(), "prune", "--keep", f"{_KEEP_DAYS}d"]
        arguments += ["--archive", str(self.archive)]
        command = [COMMAND]
        if kill_at is not None:
            line, hit = kill_at
            command = [sys.executable, "-m", "tests.support.kill_at_line", line, str(hit)]
        if max_file_bytes is not None:
            command = ["prlimit", f"--fsize={max_file_bytes}", *command]
        return self._start([*command, *arguments])

    def finish(self, process: subprocess.Popen[str]) -> Outcome:
        """Wait for a command."""
        text, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
        if "Traceback" in text:
            self.complaints.append(f"a traceback: {text[-500:]}")
        return Outcome(process.returncode, text.strip())

    def export(self) -> subprocess.Popen[str]:
        """Start an export of the table and the archive."""
        arguments = [
            "--dsn",
            self.postgres.dsn(),
            "export",
            "jsonl",
            "--archive",
            str(self.archive),
        ]
        return self._start([COMMAND, *arguments])

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=_ROOT,
            env={
                **clean_environment(),
                "ARTIFACTAPI_HOME": str(self._folder / "home"),
                "PYTHONDONTWRITEBYTECODE": "1",  # a limit of the file size would truncate them
            },
        )

    def lines(self) -> dict[str, int]:
        """Return the lines that a prune of one day with an archived day runs, with how often. Measured once."""
        if not self._lines:
            self.add_day()
            counts = self._folder / "lines"
            arguments = ["--dsn", self.postgres.dsn(), "prune", "--keep", f"{_KEEP_DAYS}d"]
            command = [sys.executable, "-m", "tests.support.kill_at_line", "count", str(counts)]
            outcome = self.finish(
                self._start([*command, *arguments, "--archive", str(self.archive)])
            )
            assert outcome.code == 0, outcome
            self._lines = json.loads(counts.read_text(encoding="utf-8"))
        return self._lines

    def inject(self, fault: str) -> None:
        """Run one step, and check that no row is lost."""
        self.add_day()
        note = ""
        try:
            outcomes = FAULTS[fault](self)
        except Skipped as e:
            outcomes, note = [], str(e)
        self.steps.append((fault, outcomes, note))
        self.check(f"step {len(self.steps)}, {fault}")

    def check(self, where: str, *, is_over: bool = False) -> None:
        """Compare what the table, detached tables and files hold with what was written."""
        with self.connect() as connection:
            table = _rows(connection, "access_log")
            detached: Rows = {}
            for (name,) in connection.execute(_DETACHED).fetchall():
                detached |= _rows(connection, name)
        files, duplicates = self._in_files()
        found = files | detached | table
        missing = self.expected.keys() - found.keys()
        self._expect(not missing, f"{where}: {len(missing)} rows are nowhere")
        self._expect(found.items() <= self.expected.items(), f"{where}: rows that nobody wrote")
        self._expect(not duplicates, f"{where}: {duplicates} rows are in two files")
        if is_over:
            self._expect(not detached, f"{where}: {len(detached)} rows are in detached tables")
            self._expect(
                not table.keys() & files.keys(), f"{where}: rows in the table and in files"
            )
            self._expect(len(files) == len(self.expected), f"{where}: files have {len(files)} rows")

    def _in_files(self) -> tuple[Rows, int]:
        paths = sorted(str(path) for path in self.archive.glob("day=*/*.parquet"))
        if not paths:
            return {}, 0
        with duckdb.connect(config={"threads": 1}) as reader:
            query = "SELECT flow_id::VARCHAR, path FROM read_parquet(?, hive_partitioning = false)"
            rows = reader.execute(query, [paths]).fetchall()
        return dict(rows), len(rows) - len(dict(rows))

    def end(self) -> None:
        """Prune without a fault, and check the end state: files, totals, nothing left over."""
        outcome = self.finish(self.prune())
        self._expect(outcome.code == 0, f"the last prune failed: {outcome.text}")
        self.check("at the end", is_over=True)
        for day in archived_days(self.archive):
            try:
                verify_day(self.archive, day)
            except ArchiveError as e:
                self.complaints.append(str(e))
        left = [path for path in self.archive.rglob("*") if path.suffix == ".partial"]
        self._expect(not left, f"left over: {left}")
        query = "SELECT coalesce(sum(requests), 0) FROM access_log_pruned"
        with self.connect() as connection:
            ((total,),) = connection.execute(query).fetchall()
        # A row that was written again after it had left the log counts once.
        self._expect(
            total == len(self.expected), f"{len(self.expected)} rows written, {total} pruned"
        )

    def _expect(self, condition: object, complaint: str) -> None:
        if not condition:
            self.complaints.append(complaint)

    def report(self) -> str:
        """Return what happened as text."""
        outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        notes: dict[str, str] = {}
        for fault, ends, note in self.steps:
            outcomes[fault]["times"] += 1
            outcomes[fault].update(end.word for end in ends)
            notes[fault] = note
        lines = [
            f"{'fault in the archive':34} {'times':>5} {'killed':>6} {'failed':>6} {'done':>6}"
        ]
        lines += [
            f"{fault:34} {found['times']:5} {found['killed']:6} {found['failed']:6} {found['done']:6}"
            f"  {notes[fault]}".rstrip()
            for fault, found in outcomes.items()
        ]
        kinds = Counter(
            re.sub(r"[0-9a-f-]*\d[0-9a-f-]*", "#", end.text.splitlines()[-1])[:150]
            for _, ends, _ in self.steps
            for end in ends
            if end.code > 0 and end.text
        )
        lines += ["", *(f"{count:5} x {text}" for text, count in kinds.most_common(20))]
        lines.append(f"{len(self.expected)} rows, {len(self.days)} days, {len(self.steps)} faults")
        lines += [f"FAILED: {complaint}" for complaint in self.complaints]
        return "\n".join(
            lines if self.complaints else [*lines, "No row is lost, none is in two files."]
        )


class Skipped(Exception):  # noqa: N818 - not an error
    """A fault needs a right that this process does not have."""


def _rows(connection: psycopg.Connection[Any], table: str) -> Rows:
    return dict(connection.execute(f"SELECT flow_id::text, path FROM {table}".encode()).fetchall())


def _mount(folder: Path) -> bool:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    return (
        not os.geteuid() and not subprocess.run(mount, check=False, capture_output=True).returncode
    )


def _umount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


# --- the faults


def _kill(chaos: ArchiveChaos) -> list[Outcome]:
    """Kill the prune at a line, each with the same probability, and at one of the times that it runs."""
    lines = chaos.lines()
    line = chaos.rng.choice(sorted(lines))
    hit = chaos.rng.randrange(1, lines[line] + 1)
    return [chaos.finish(chaos.prune(kill_at=(line, hit)))]


def _kill_twice(chaos: ArchiveChaos) -> list[Outcome]:
    return [*_kill(chaos), *_kill(chaos)]


def _late_rows(chaos: ArchiveChaos) -> list[Outcome]:
    chaos.add_late_rows()
    return [chaos.finish(chaos.prune())]


def _late_rows_meanwhile(chaos: ArchiveChaos) -> list[Outcome]:
    process = chaos.prune()
    while process.poll() is None:
        chaos.add_late_rows()
    return [chaos.finish(process)]


def _kill_with_late_rows(chaos: ArchiveChaos) -> list[Outcome]:
    chaos.add_late_rows()
    return _kill(chaos)


def _two_prunes(chaos: ArchiveChaos) -> list[Outcome]:
    chaos.add_late_rows()
    processes = [chaos.prune(), chaos.prune()]
    return [chaos.finish(process) for process in processes]


def _kill_one_of_two(chaos: ArchiveChaos) -> list[Outcome]:
    lines = chaos.lines()
    line = chaos.rng.choice(sorted(lines))
    processes = [chaos.prune(kill_at=(line, 1)), chaos.prune()]
    return [chaos.finish(process) for process in processes]


def _disk_full(chaos: ArchiveChaos) -> list[Outcome]:
    if not chaos.has_disk:
        raise Skipped("needs root to mount a small disk")
    chaos.archive.mkdir(exist_ok=True)
    ballast = chaos.disk / "ballast"
    disk = os.statvfs(chaos.disk)
    free = disk.f_bavail * disk.f_frsize
    size = max(0, free - chaos.rng.randrange(0, 24_000))
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    try:
        return [chaos.finish(chaos.prune())]
    finally:
        ballast.unlink()


def _read_only_disk(chaos: ArchiveChaos) -> list[Outcome]:
    if not chaos.has_disk:
        raise Skipped("needs root to mount a small disk")
    remount = ["mount", "-o", "remount,{}", str(chaos.disk)]
    subprocess.run([word.format("ro") for word in remount], check=True)
    try:
        return [chaos.finish(chaos.prune())]
    finally:
        subprocess.run([word.format("rw") for word in remount], check=True)


def _folder_is_a_file(chaos: ArchiveChaos) -> list[Outcome]:
    aside = chaos.disk / "aside"
    chaos.archive.mkdir(exist_ok=True)
    chaos.archive.rename(aside)
    chaos.archive.write_bytes(b"")
    try:
        return [chaos.finish(chaos.prune())]
    finally:
        chaos.archive.unlink()
        aside.rename(chaos.archive)


def _file_size_limit(chaos: ArchiveChaos) -> list[Outcome]:
    if shutil.which("prlimit") is None or resource.getrlimit(resource.RLIMIT_FSIZE)[1] >= 0:
        raise Skipped("needs the program prlimit")
    return [chaos.finish(chaos.prune(max_file_bytes=chaos.rng.randrange(1, 12_000)))]


def _kill_postgres(chaos: ArchiveChaos) -> list[Outcome]:
    process = chaos.prune()
    lock = chaos.archive / ".lock"
    with contextlib.suppress(AssertionError):  # the prune may be over before
        eventually(lambda: process.poll() is not None or _is_locked(lock), timeout=10)
    chaos.postgres.kill()
    outcome = chaos.finish(process)
    chaos.postgres.start()
    return [outcome]


def _is_locked(lock: Path) -> bool:
    """Whether a prune has the lock, without taking it."""
    if not lock.exists():
        return False
    inode = lock.stat().st_ino
    return any(f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines())


def _reader(chaos: ArchiveChaos) -> list[Outcome]:
    """Each row is in an export exactly once, while its day moves from the table to a file."""
    first = chaos.finish(chaos.prune())  # nothing of earlier faults is left
    chaos.add_day()
    processes = [chaos.prune(), chaos.export()]
    done, export = [chaos.finish(process) for process in processes]
    if export.code:
        chaos.complaints.append(f"the export failed: {export.text[-300:]}")
        return [first, done]
    rows = Counter(json.loads(line)["flow_id"] for line in export.text.splitlines())
    if first.code == 0 and (rows.keys() != chaos.expected.keys() or max(rows.values()) > 1):
        chaos.complaints.append(
            f"an export during a prune has {rows.total()} rows, of which {len(rows)} differ;"
            f" {len(chaos.expected)} were written"
        )
    return [first, done]


FAULTS: dict[str, Callable[[ArchiveChaos], list[Outcome]]] = {
    "prune kill -9 at a line": _kill,
    "prune kill -9, and again": _kill_twice,
    "late rows, prune kill -9": _kill_with_late_rows,
    "late rows": _late_rows,
    "late rows during a prune": _late_rows_meanwhile,
    "two prunes": _two_prunes,
    "two prunes, one kill -9": _kill_one_of_two,
    "disk full": _disk_full,
    "disk read-only": _read_only_disk,
    "folder is a file": _folder_is_a_file,
    "file size limit": _file_size_limit,
    "postgres kill -9": _kill_postgres,
    "reader during a prune": _reader,
}
_DECK = {
    "prune kill -9 at a line": 20,
    "prune kill -9, and again": 4,
    "late rows, prune kill -9": 8,
    "late rows": 2,
    "late rows during a prune": 3,
    "two prunes": 4,
    "two prunes, one kill -9": 4,
    "disk full": 6,
    "disk read-only": 1,
    "folder is a file": 1,
    "file size limit": 3,
    "postgres kill -9": 3,
    "reader during a prune": 4,
}


def schedule(seed: int) -> Iterator[str]:
    """Yield faults forever, in decks of 63 in a random order."""
    rng = random.Random(seed)
    while True:
        deck = [name for name, count in _DECK.items() for _ in range(count)]
        rng.shuffle(deck)
        yield from deck


def run(faults: Iterator[str], seed: int, seconds: float = float("inf")) -> ArchiveChaos:
    """Inject the faults, or as many as fit in the time; prune once more, and return what was found."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="artifactapi-chaos-") as folder:
        chaos = ArchiveChaos(Path(folder), seed)
        with chaos:
            for fault in faults:
                if time.monotonic() > deadline:
                    break
                chaos.inject(fault)
            chaos.end()
        return chaos

"""Kill a process that logs requests again and again, and compare the log with what it answered.

The process does what the hooks of a proxy do, much faster: begin a request, log it, answer it. At most one
request is in flight, so the log must have a row for every answer, and a gap for at most one more.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psycopg
from msgspec.structs import replace

from exporter import Exporter, Settings, waiting_rows
from exporter.settings import BatchSettings, DatabaseSettings
from exporter.write.journal_file import RING_AT

from .relay import Relay
from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .postgres import Postgres

_ROOT = Path(__file__).parents[2]
_NUMBER = struct.Struct("<I")
_ANSWER = """
import os, struct, sys, time
from tests.support.repeated_kills import settings
from exporter import Exporter
from tests.support.samples import make_exchange

dsn, node, first, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
exporter = Exporter(settings(dsn, node))
number = first
while True:
    exporter.begin(time.time())
    exporter.log_access(make_exchange(number, port=number % 60_000 + 1))
    os.write(1, struct.pack("<I", number))
    number += 1
    if number % 16 == 0:
        time.sleep(pause)
"""
_FATES = """
    SELECT node, end_reason, seen, (SELECT coalesce(sum(rows), 0)::int FROM access_log_run_day AS counted
                                    WHERE counted.origin_run_id = access_log_run.run_id),
           (SELECT coalesce(sum(entries), 0)::int FROM access_log_gap AS gap
            WHERE gap.run_id = access_log_run.run_id)
    FROM access_log_run WHERE node <> 'last' ORDER BY started_at
"""


class Killed(NamedTuple):
    """One process that was killed."""

    node: str
    answered: list[int]
    is_damaged: bool


def settings(dsn: str, node: str) -> Settings:
    """Return settings under which a kill hits everything: batches, retries, the spool."""
    return replace(
        Settings(node=node),
        batch=BatchSettings(max_entries=64, max_seconds=0.3),
        database=DatabaseSettings(
            dsn=dsn, call_seconds=1.0, connect_seconds=2.0, retry_max_seconds=0.3
        ),
    )


def kill_repeatedly(
    postgres: Postgres, dsn: str, runtime: Path, seed: int, kills: int
) -> tuple[str, list[str]]:
    """Kill so many processes; return a summary, and every difference found.

    Args:
        postgres: The server of `dsn`.
        dsn: A connection string to an empty schema.
        runtime: The folder of the journals, with nothing else in it.
        seed: Determines when to kill, and what to do meanwhile.
        kills: How often.
    """
    rng = random.Random(seed)
    with Relay(("127.0.0.1", postgres.port), postgres=True) as relay:
        relayed = dsn.replace(f"port={postgres.port}", f"port={relay.address[1]}")
        killed: list[Killed] = []
        first = 0
        for number in range(kills):
            one = _run_until_killed(relay, relayed, f"proxy-{number}", first, rng)
            is_damaged = rng.random() < 0.15 and _damage(runtime, rng)
            killed.append(one._replace(is_damaged=is_damaged))
            first = (one.answered[-1] if one.answered else first) + 100
        relay.mend()
        last_settings = settings(relayed, "last")
        is_left = True
        while is_left:  # on disk, if a stop was out of time
            last = Exporter(last_settings)
            try:
                eventually(lambda: len(list(runtime.iterdir())) == 1, timeout=120)
            finally:
                last.stop()
            is_left = bool(waiting_rows(last_settings))
    return _compare(dsn, runtime, killed)


def _run_until_killed(relay: Relay, dsn: str, node: str, first: int, rng: random.Random) -> Killed:
    command = [sys.executable, "-c", _ANSWER, dsn, node, str(first), str(rng.choice([0.01, 0.03]))]
    answers = bytearray()

    def read() -> None:
        assert process.stdout
        while data := os.read(process.stdout.fileno(), 65536):
            answers.extend(data)

    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_ROOT) as process:
        reader = threading.Thread(target=read)
        reader.start()
        eventually(lambda: answers or process.poll() is not None, timeout=60)
        with _fault(relay, rng):
            threading.Event().wait(rng.choice([0.0, 0.05, 0.5]) + rng.random())
            process.kill()
        reader.join()
    numbers = [number for (number,) in _NUMBER.iter_unpack(answers[: len(answers) // 4 * 4])]
    return Killed(node, numbers, is_damaged=False)


@contextlib.contextmanager
def _fault(relay: Relay, rng: random.Random) -> Iterator[None]:
    """Perhaps make PostgreSQL unavailable; the next process may find it unavailable as well."""
    fault = rng.choice(["", "", "cut", "blackhole", "mend"])
    if fault:
        getattr(relay, fault)()
    yield
    if rng.random() < 0.7:
        relay.mend()


def _damage(runtime: Path, rng: random.Random) -> bool:
    """Flip a bit, zero a part or cut off the end of the newest journal; False if there is none."""
    paths = sorted(runtime.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    if not paths:
        return False
    content = bytearray(paths[-1].read_bytes())
    used = max(content.rfind(b"/simple/demo"), RING_AT) + 200
    at = rng.randrange(RING_AT, used)
    kind = rng.choice(["flip", "zero", "cut"])
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        content[at : at + 2000] = bytes(2000)
    else:
        del content[at:]
    paths[-1].write_bytes(content)
    return True


def _compare(dsn: str, runtime: Path, killed: list[Killed]) -> tuple[str, list[str]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        fates = {str(row[0]): row[1:] for row in connection.execute(_FATES.encode())}
        rows: dict[str, set[int]] = {}
        count = 0
        for node, flow_id in connection.execute(b"SELECT node, flow_id::text FROM access_log"):
            rows.setdefault(str(node), set()).add(int(flow_id[:8], 16))
            count += 1
    complaints = [f"{path} is left over" for path in runtime.iterdir()]
    if count != sum(map(len, rows.values())):
        complaints.append("a request has more than one row")
    all_lost = 0
    for one in killed:
        found = rows.get(one.node, set())
        end, seen, counted, lost = fates.get(one.node, (None, 0, 0, 0))
        missing = set(one.answered) - found
        all_lost += lost
        if (missing and not one.is_damaged) or len(missing) > lost:
            complaints.append(f"{one.node}: {len(missing)} answered without a row, {lost} in gaps")
        if len(found) + lost - len(one.answered) not in {0, 1}:  # one was in flight, perhaps
            complaints.append(
                f"{one.node}: {len(one.answered)} answered, but {len(found)} rows and {lost} in gaps"
            )
        if (end, seen, counted) != ("killed", len(found) + lost, len(found)):
            complaints.append(
                f"{one.node}: the ledger says {end}, {seen} seen, {counted} rows;"
                f" the tables have {len(found)} rows and {lost} lost"
            )
    answered = sum(len(one.answered) for one in killed)
    damaged = sum(one.is_damaged for one in killed)
    return (
        f"{len(killed)} kills, {damaged} journals damaged; {answered} answered, {count} rows, {all_lost} in gaps",
        complaints,
    )

"""Measure the CPU time per request of the whole mitmdump process, with and without the access log."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import psycopg

from tests.bench.figures import Figure, Workspace
from tests.bench.load import Load, settings_file
from tests.bench.machine import cpu_seconds
from tests.support.access_log import SCRIPT
from tests.support.proxy import Mitm
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTION = "mitmdump"
EXPLANATION = """\
The CPU time of the mitmdump process, with all its threads, for one small request over plain HTTP, as
measured by the kernel. All proxies run in parallel. They take turns of 1,000 requests over eight persistent
connections, as fast as they respond. Every second URL is new, and all URLs are recognized as packages.
artifactapi and the empty hooks run in four processes each, because identical processes differ by a few per
cent; the next section compares the two more exactly. Work after the last response counts. The worker
process, which builds the rows, is listed separately, because no request waits for it. `hardump`
does not include the write at the end."""
_UNIT = "us of CPU per request"
_HERE = Path(__file__).parent
_EMPTY, _ARTIFACTAPI = "an addon with empty hooks", "artifactapi"
_WORKER = "artifactapi's worker process"
_TURNS = 5
_SETTLE_SECONDS = 30.0


class Candidate(NamedTuple):
    """One way to run mitmdump, with its number of processes and of turns."""

    name: str
    turns: int
    arguments: tuple[str, ...] = ()
    script: Path | None = None
    processes: int = 1


def measure(workspace: Workspace) -> list[Figure]:
    """Return the CPU time per request of each candidate."""
    requests = workspace.choose(1000, 200)
    with contextlib.ExitStack() as stack:
        proxies = list(_start_proxies(workspace, stack))
        load = stack.enter_context(Load())
        for _, proxy in proxies:
            load.run(proxy.port, requests)
        _wait_for_rows(workspace)
        workers = [
            psutil.Process(proxy.pid).children()[0].pid
            for candidate, proxy in proxies
            if candidate.name == _ARTIFACTAPI
        ]
        before = [*map(cpu_seconds, workers)]
        costs = _take_turns(proxies, load, requests, workspace)
        worker_cpu = [cpu_seconds(pid) - cpu for pid, cpu in zip(workers, before, strict=True)]
        costs[_WORKER] = [seconds / (_TURNS * requests) * 1e6 for seconds in worker_cpu]
    return [Figure(SECTION, name, _UNIT, tuple(values)) for name, values in costs.items()]


def _candidates(workspace: Workspace) -> list[Candidate]:
    config = settings_file(workspace.folder)
    options = ("--set", f"artifactapi_dsn={workspace.dsn}", "--set", f"artifactapi_config={config}")
    candidates = [
        Candidate(_EMPTY, _TURNS, (), _HERE / "empty_hooks.py", workspace.choose(4, 1)),
        Candidate(_ARTIFACTAPI, _TURNS, options, SCRIPT, workspace.choose(4, 1)),
    ]
    if not workspace.quick:
        candidates += [
            Candidate("no addon", 4),
            Candidate("artifactapi's hooks alone", 4, script=_HERE / "hook_alone.py"),
            Candidate("mitmproxy -w", 3, ("-w", str(workspace.folder / "flows"))),
            Candidate("hardump", 3, ("--set", f"hardump={workspace.folder / 'flows.har'}")),
            Candidate(
                "a thread and an INSERT for each request", 3, script=_HERE / "thread_per_request.py"
            ),
        ]
    return candidates


def _start_proxies(
    workspace: Workspace, stack: contextlib.ExitStack
) -> Iterator[tuple[Candidate, Mitm]]:
    candidates = [c for c in _candidates(workspace) for _ in range(c.processes)]
    for number, candidate in enumerate(candidates):
        folder = workspace.folder / f"mitm-{number}"
        folder.mkdir()
        proxy = Mitm(
            folder,
            *("--set", "flow_detail=0", *candidate.arguments),
            scripts=[candidate.script] if candidate.script else [],
            env={"ARTIFACTAPI_DSN": workspace.dsn},
        )
        yield candidate, stack.enter_context(proxy)


def _take_turns(
    proxies: list[tuple[Candidate, Mitm]], load: Load, requests: int, workspace: Workspace
) -> dict[str, list[float]]:
    """Return the microseconds per request of each turn, by candidate.

    A turn lasts until the next turn of the same process, so that its later work counts.
    """
    readings: dict[int, list[float]] = {proxy.pid: [] for _, proxy in proxies}
    rounds = max(candidate.turns for candidate, _ in proxies)
    for turn in range(rounds):
        in_order = proxies if turn % 2 else proxies[::-1]
        for candidate, proxy in in_order:
            if turn < candidate.turns:
                readings[proxy.pid].append(cpu_seconds(proxy.pid))
                load.run(proxy.port, requests)
            elif turn == candidate.turns:
                readings[proxy.pid].append(cpu_seconds(proxy.pid))
    _wait_for_rows(workspace)
    costs: dict[str, list[float]] = {}
    for candidate, proxy in proxies:
        if candidate.turns == rounds:
            readings[proxy.pid].append(cpu_seconds(proxy.pid))
        turns = itertools.pairwise(readings[proxy.pid])
        costs.setdefault(candidate.name, []).extend((b - a) / requests * 1e6 for a, b in turns)
    return costs


def _wait_for_rows(workspace: Workspace) -> None:
    """Wait until no more rows arrive."""
    with psycopg.connect(workspace.dsn, autocommit=True) as connection:
        count = -1

        def has_stopped_growing() -> bool:
            nonlocal count
            # A batch waits for up to two seconds.
            row = connection.execute("SELECT count(*), pg_sleep(2.2) FROM access_log").fetchone()
            before, count = count, int(row[0]) if row else 0
            return before == count

        eventually(has_stopped_growing, _SETTLE_SECONDS)

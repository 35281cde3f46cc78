"""What a request costs mitmdump as a whole, with the log and without: CPU of the process, threads and all."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import psycopg

from tests.bench.figures import Figure, Place, Target
from tests.bench.load import Load
from tests.bench.machine import cpu_seconds
from tests.support.access_log import SCRIPT
from tests.support.proxy import Mitm
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTION = "mitmdump"
ABOUT = """\
What one small request over plain HTTP costs the mitmdump process, all its threads together, measured
by the kernel. All proxies run side by side and get 1,000 requests in turn over eight kept connections,
as fast as they answer; every second URL is new, all are recognised as packages. Of ours and of empty
hooks there are four processes each, since one process differs from the next by some per cent whatever
it does; the ratio is taken pair by pair and turn by turn. What a proxy still does after its last answer
counts. What our second process takes, which builds the rows, stands by itself: no request waits for it.
`hardump` is without the writing at the end."""
_UNIT = "us of CPU a request"
_HERE = Path(__file__).parent
_EMPTY, _OURS = "an addon with empty hooks", "artifactapi"
_BESIDE = "artifactapi's second process"
_TURNS = 5
_SETTLE_SECONDS = 30.0
_REMOTES = "remotes:\n  - {name: bench, host: 127.0.0.1, path: /pypi, format: pypi}\n"


class Contender(NamedTuple):
    """One way to run mitmdump, in how many processes, and how often each has its turn."""

    name: str
    turns: int
    arguments: tuple[str, ...] = ()
    script: Path | None = None
    processes: int = 1


def measure(place: Place) -> list[Figure]:
    """CPU a request of each way, and the ratio of ours to empty hooks."""
    requests = place.choose(1000, 200)
    with contextlib.ExitStack() as stack:
        proxies = list(_started(place, stack))
        load = stack.enter_context(Load())
        for _, proxy in proxies:
            load.run(proxy.port, requests)
        _settle(place)
        workers = [
            psutil.Process(it.pid).children()[0].pid for by, it in proxies if by.name == _OURS
        ]
        before = [*map(cpu_seconds, workers)]
        costs = _take_turns(proxies, load, requests, place)
        beside = [cpu_seconds(pid) - cpu for pid, cpu in zip(workers, before, strict=True)]
        costs[_BESIDE] = [seconds / (_TURNS * requests) * 1e6 for seconds in beside]
    ratios = tuple(o / e for o, e in zip(costs[_OURS], costs[_EMPTY], strict=True))
    return [
        Figure(SECTION, "artifactapi, in times of empty hooks", "x", ratios, Target("<=", 1.02)),
        *(Figure(SECTION, name, _UNIT, tuple(values)) for name, values in costs.items()),
    ]


def _contenders(place: Place) -> list[Contender]:
    remotes, config = place.folder / "remotes.yaml", place.folder / "settings.yaml"
    remotes.write_text(_REMOTES)
    config.write_text(f"remotes: {{file: '{remotes}'}}\n")
    ours = ("--set", f"artifactapi_dsn={place.dsn}", "--set", f"artifactapi_config={config}")
    found = [
        Contender(_EMPTY, _TURNS, (), _HERE / "empty_hooks.py", place.choose(4, 1)),
        Contender(_OURS, _TURNS, ours, SCRIPT, place.choose(4, 1)),
    ]
    if not place.quick:
        found += [
            Contender("no addon", 4),
            Contender("artifactapi's hook alone", 4, script=_HERE / "hook_alone.py"),
            Contender("mitmproxy -w", 3, ("-w", str(place.folder / "flows"))),
            Contender("hardump", 3, ("--set", f"hardump={place.folder / 'flows.har'}")),
            Contender("a thread and an INSERT for each request", 3, script=_HERE / "threaded.py"),
        ]
    return found


def _started(place: Place, stack: contextlib.ExitStack) -> Iterator[tuple[Contender, Mitm]]:
    every = [it for it in _contenders(place) for _ in range(it.processes)]
    for number, contender in enumerate(every):
        folder = place.folder / f"mitm-{number}"
        folder.mkdir()
        proxy = Mitm(
            folder,
            *("--set", "flow_detail=0", *contender.arguments),
            scripts=[contender.script] if contender.script else [],
            env={"ARTIFACTAPI_DSN": place.dsn},
        )
        yield contender, stack.enter_context(proxy)


def _take_turns(
    proxies: list[tuple[Contender, Mitm]], load: Load, requests: int, place: Place
) -> dict[str, list[float]]:
    """Microseconds a request of each turn: from its begin to that of the next, all others between."""
    readings: dict[int, list[float]] = {proxy.pid: [] for _, proxy in proxies}
    rounds = max(contender.turns for contender, _ in proxies)
    for turn in range(rounds):
        in_order = proxies if turn % 2 else proxies[::-1]
        for contender, proxy in in_order:
            if turn < contender.turns:
                readings[proxy.pid].append(cpu_seconds(proxy.pid))
                load.run(proxy.port, requests)
            elif turn == contender.turns:
                readings[proxy.pid].append(cpu_seconds(proxy.pid))
    _settle(place)
    costs: dict[str, list[float]] = {}
    for contender, proxy in proxies:
        if contender.turns == rounds:
            readings[proxy.pid].append(cpu_seconds(proxy.pid))
        turns = itertools.pairwise(readings[proxy.pid])
        costs.setdefault(contender.name, []).extend((b - a) / requests * 1e6 for a, b in turns)
    return costs


def _settle(place: Place) -> None:
    """Wait until no more rows come."""
    with psycopg.connect(place.dsn, autocommit=True) as connection:
        count = -1

        def is_still() -> bool:
            nonlocal count
            # A batch may wait for two seconds.
            row = connection.execute("SELECT count(*), pg_sleep(2.2) FROM access_log").fetchone()
            before, count = count, int(row[0]) if row else 0
            return before == count

        eventually(is_still, _SETTLE_SECONDS)

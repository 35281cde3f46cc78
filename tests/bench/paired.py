"""Measure what the access log adds to the CPU time of mitmdump, next to two groups with empty hooks as a control."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.bench.figures import Figure, Target, Workspace
from tests.bench.load import Load, paths, settings_file
from tests.bench.machine import cpu_seconds
from tests.support.access_log import SCRIPT
from tests.support.http2_client import Http2Client
from tests.support.proxy import Mitm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SECTION = "mitmdump, paired"
EXPLANATION = """\
How much CPU time of mitmdump the access log adds, as a ratio to an addon with empty hooks. Equal processes
differ by a few per cent, because their memory is laid out differently. So new processes start again and again:
two for each variant, which take turns of 96 requests. One ratio is that of the sums of such a set. More sets
follow until half the width of the 95 % interval of each ratio is at most 0.5 %, or time is up. "control" compares
empty hooks with empty hooks, and shows what a ratio of 1 looks like here. New connections carry 12 requests each;
of the kept ones there are eight, or two with HTTP/2. Work after the last response counts; that of the worker
process does not."""
_HERE = Path(__file__).parent
_EMPTY = "empty hooks"
_REQUESTS = 96  # of a turn
_HALF_WIDTH = 0.005
_MIN_SETS = 6
_NORMAL_QUANTILE = 1.96  # 97.5 %
_SECONDS = 1500.0
_SETTLE_SECONDS = 2.5  # a batch waits for up to two seconds
_HTTP2_CONNECTIONS = 2

type _Send = Callable[[Mitm], None]  # one turn


class Variant(NamedTuple):
    """One way to run mitmdump."""

    name: str
    script: Path
    arguments: tuple[str, ...] = ()
    limit: float | None = None  # of its ratio


class _Process(NamedTuple):
    variant: str
    proxy: Mitm


def measure(workspace: Workspace) -> list[Figure]:
    """Return the ratios of each variant and kind of connection, and half the width of their intervals."""
    variants = _variants(workspace)
    ratios: dict[tuple[str, str], list[float]] = {}
    until = time.monotonic() + workspace.choose(_SECONDS, 0.0)
    with Load() as load:
        while True:
            folder = workspace.folder / f"set-{random.getrandbits(32):x}"
            for key, ratio in _run_set(workspace, folder, variants, load).items():
                ratios.setdefault(key, []).append(ratio)
            if time.monotonic() > until or _are_narrow(ratios):
                break
    limits = {variant.name: variant.limit for variant in variants}
    figures = []
    for (name, kind), values in ratios.items():
        limit = limits.get(name)
        target = Target("<=", limit) if limit else None
        figures.append(Figure(SECTION, f"{name}, {kind}", "x", tuple(values), target))
        if len(values) > 1:
            half = 100 * _half_width(values)
            figures.append(Figure(SECTION, "  half of its 95 % interval", "%", (half,)))
    return figures


def _variants(workspace: Workspace) -> list[Variant]:
    config = settings_file(workspace.folder)
    without_journal = workspace.folder / "without_journal.yaml"
    without_journal.write_text(config.read_text() + "journal: {max_bytes: 0}\n")
    return [
        Variant(_EMPTY, _HERE / "empty_hooks.py"),
        Variant("control", _HERE / "empty_hooks.py"),
        Variant("artifactapi's hooks alone", _HERE / "hook_alone.py", limit=1.01),
        Variant("artifactapi", SCRIPT, ("--set", f"artifactapi_config={config}"), 1.02),
        Variant(
            "artifactapi without journal",
            SCRIPT,
            ("--set", f"artifactapi_config={without_journal}"),
        ),
    ]


def _run_set(
    workspace: Workspace, folder: Path, variants: list[Variant], load: Load
) -> dict[tuple[str, str], float]:
    """Start new processes, and return the ratio of each variant and kind of connection."""
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(workspace.choose(2, 1)):
            for variant in random.sample(variants, len(variants)):
                home = folder / f"{number}-{variant.name}"
                home.mkdir(parents=True)
                # A lazy connection, or clients get HTTP/2 only if the origin has it, too.
                settings = ("flow_detail=0", "ssl_insecure=true", "connection_strategy=lazy")
                options = [part for setting in settings for part in ("--set", setting)]
                environment = {"ARTIFACTAPI_DSN": workspace.dsn, "ARTIFACTAPI_HOME": str(home)}
                proxy = Mitm(
                    home, *options, *variant.arguments, scripts=[variant.script], env=environment
                )
                processes.append(_Process(variant.name, stack.enter_context(proxy)))
        ratios = {}
        for kind, send in _kinds(load, processes, stack).items():
            costs = _costs(processes, send, workspace.choose(25, 2))
            for variant in variants[1:]:
                ratios[variant.name, kind] = costs[variant.name] / costs[_EMPTY]
    return ratios


def _kinds(
    load: Load, processes: list[_Process], stack: contextlib.ExitStack
) -> Mapping[str, _Send]:
    clients = {
        process.proxy.pid: [
            stack.enter_context(
                Http2Client.through(
                    process.proxy.address, "127.0.0.1", load.tls_port, process.proxy.ca_path
                )
            )
            for _ in range(_HTTP2_CONNECTIONS)
        ]
        for process in processes
    }

    urls = paths()

    def send_http2(proxy: Mitm) -> None:
        for client in clients[proxy.pid]:
            streams = [
                client.request(path)
                for path in itertools.islice(urls, _REQUESTS // _HTTP2_CONNECTIONS)
            ]
            assert all(stream.status == 200 for stream in client.wait(*streams))

    return {
        "HTTP/1, new connections": lambda proxy: _discard(load.run(proxy.port, _REQUESTS)),
        "HTTP/1, kept connections": lambda proxy: _discard(
            load.run(proxy.port, _REQUESTS, keep=True)
        ),
        "HTTP/2 over TLS": send_http2,
    }


def _discard(_seconds: float) -> None:
    pass


def _costs(processes: list[_Process], send: _Send, turns: int) -> dict[str, float]:
    """Return the CPU time of each variant, in seconds, with all work that follows."""
    for process in processes * 3:  # warm up
        send(process.proxy)
    time.sleep(_SETTLE_SECONDS)
    before = [cpu_seconds(process.proxy.pid) for process in processes]
    for _ in range(turns):
        for process in random.sample(processes, len(processes)):
            send(process.proxy)
    time.sleep(_SETTLE_SECONDS)
    costs: dict[str, float] = {}
    for process, seconds in zip(processes, before, strict=True):
        used = cpu_seconds(process.proxy.pid) - seconds
        costs[process.variant] = costs.get(process.variant, 0.0) + used
    return costs


def _are_narrow(ratios: Mapping[tuple[str, str], list[float]]) -> bool:
    return all(
        len(values) >= _MIN_SETS and _half_width(values) <= _HALF_WIDTH
        for values in ratios.values()
    )


def _half_width(values: list[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean, by Student's t.

    Its quantile is that of the normal distribution with the first term of the Cornish-Fisher expansion.
    """
    z, freedom = _NORMAL_QUANTILE, len(values) - 1
    error = statistics.stdev(values) / math.sqrt(len(values))
    return (z + (z**3 + z) / (4 * freedom)) * error

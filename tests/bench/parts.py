"""Measure where the access log spends CPU time in mitmdump: in its hooks, its threads and garbage collections."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.figures import Figure, Workspace
from tests.bench.load import Load, settings_file
from tests.support.access_log import SCRIPT
from tests.support.proxy import Mitm
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping

SECTION = "mitmdump, by part"
EXPLANATION = """\
Where the CPU time of one small request goes, measured inside mitmdump: in our hooks (minus the time of empty
ones), in our threads, and in full garbage collections, which look at everything that is loaded; and, to compare,
in hooks that read, encode and keep the bare facts and decide nothing, which no log can undercut in Python, and in
mitmproxy's AddonManager, which asks each of its 36 addons at each of the 8 events of a request. Hooks and
collections are timed by the clock, since reading the CPU time takes as long as a short hook. Other load on the
machine disturbs these figures less than a ratio of whole processes, but they leave out what they cannot see: that
our code and data push those of mitmproxy out of the CPU's caches."""
_HERE = Path(__file__).parent
_EMPTY, _LEAST, _OURS = "empty hooks", "bare facts", "artifactapi"
_SCRIPTS = {
    _EMPTY: _HERE / "empty_hooks.py",
    _LEAST: _HERE / "least_hooks.py",
    _OURS: SCRIPT,
}
_REQUESTS = 256  # of a turn: two batches
_SETTLE_SECONDS = 2.5  # a batch waits for up to two seconds
_UNIT = "us of CPU per request"


class _Process(NamedTuple):
    proxy: Mitm
    sums: Path


def measure(workspace: Workspace) -> list[Figure]:
    """Return the time of each part, with new and with kept connections."""
    figures = []
    with Load() as load, contextlib.ExitStack() as stack:
        processes = {
            name: _Process(
                stack.enter_context(_start(workspace, name, script)), _sums(workspace, name)
            )
            for name, script in _SCRIPTS.items()
        }
        for keep in (False, True):
            kind = f"{'kept' if keep else 'new'} connections"
            rounds = [
                _round(load, processes, workspace.choose(8, 1), keep=keep)
                for _ in range(workspace.choose(5, 1) + 1)
            ][1:]  # the first one warms up
            figures += [
                Figure(SECTION, f"{part}, {kind}", _UNIT, tuple(parts[part] for parts in rounds))
                for part in rounds[0]
            ]
    return figures


def _round(
    load: Load, processes: Mapping[str, _Process], turns: int, *, keep: bool
) -> Mapping[str, float]:
    before = {name: _read(process) for name, process in processes.items()}
    for _ in range(turns):
        for process in processes.values():
            load.run(process.proxy.port, _REQUESTS, keep=keep)
    time.sleep(_SETTLE_SECONDS)
    used = {name: _difference(_read(process), before[name]) for name, process in processes.items()}
    us = 1e6 / (turns * _REQUESTS)
    threads = used[_OURS]["threads"]
    return {
        "the whole request with empty hooks": us * used[_EMPTY]["threads"]["MainThread"],
        "of it, mitmproxy's AddonManager with all addons": us * used[_EMPTY]["all addons"],
        "our hooks": us * (used[_OURS]["hooks"] - used[_EMPTY]["hooks"]),
        "hooks that keep the bare facts": us * (used[_LEAST]["hooks"] - used[_EMPTY]["hooks"]),
        "our writer thread": us * threads["artifactapi-writer"],
        "our other threads": us
        * sum(
            seconds
            for name, seconds in threads.items()
            if name.startswith("artifactapi-") and name != "artifactapi-writer"
        ),
        "full collections with empty hooks": us * used[_EMPTY]["full collections"],
        "full collections with artifactapi": us * used[_OURS]["full collections"],
    }


def _difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _difference(value, before.get(key, {}))
        if isinstance(value, dict)
        else value - before.get(key, 0.0)
        for key, value in after.items()
    }


def _read(process: _Process) -> Mapping[str, Any]:
    process.sums.unlink(missing_ok=True)
    os.kill(process.proxy.pid, signal.SIGUSR1)
    eventually(process.sums.exists)
    sums: Mapping[str, Any] = json.loads(process.sums.read_text())
    return sums


def _sums(workspace: Workspace, name: str) -> Path:
    return workspace.folder / f"{name}.json"


def _start(workspace: Workspace, name: str, script: Path) -> Mitm:
    home = workspace.folder / name
    home.mkdir()
    environment = {
        "ARTIFACTAPI_DSN": workspace.dsn,
        "ARTIFACTAPI_HOME": str(home),
        "BENCH_SCRIPT": str(script),
        "BENCH_SUMS": str(_sums(workspace, name)),
    }
    options = ["--set", "flow_detail=0"]
    if name == _OURS:
        options += ["--set", f"artifactapi_config={settings_file(workspace.folder)}"]
    return Mitm(home, *options, scripts=[_HERE / "timed_hooks.py"], env=environment)

"""A mitmproxy script that measures the addon of BENCH_SCRIPT from inside. SIGUSR1 writes the sums to BENCH_SUMS."""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitmproxy import hooks
from mitmproxy.addonmanager import AddonManager

if TYPE_CHECKING:
    from collections.abc import Callable

_LIFE_CYCLE = frozenset({"load", "configure", "running", "done"})
_OLDEST_GENERATION = 2

hook_seconds = collection_seconds = event_seconds = _collection_began = 0.0
_trigger_event = AddonManager.trigger_event


def _timed(hook: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        global hook_seconds  # noqa: PLW0603
        began = time.perf_counter()
        hook(*arguments)
        hook_seconds += time.perf_counter() - began

    return call


async def _timed_event(manager: AddonManager, event: hooks.Hook) -> None:
    global event_seconds  # noqa: PLW0603
    began = time.thread_time()
    await _trigger_event(manager, event)
    event_seconds += time.thread_time() - began


def _collected(phase: str, info: dict[str, int]) -> None:
    global collection_seconds, _collection_began  # noqa: PLW0603
    if info["generation"] != _OLDEST_GENERATION:
        return
    if phase == "start":
        _collection_began = time.perf_counter()
    else:
        collection_seconds += time.perf_counter() - _collection_began


def _write_sums(*_: object) -> None:
    threads = {
        thread.name: time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.ident is not None
    }
    sums = {
        "hooks": hook_seconds,
        "all addons": event_seconds,
        "full collections": collection_seconds,
        "threads": threads,
    }
    file = Path(os.environ["BENCH_SUMS"])
    file.with_suffix(".new").write_text(json.dumps(sums))
    file.with_suffix(".new").rename(file)


def _measured(addon: Any) -> Any:
    for name in hooks.all_hooks.keys() - _LIFE_CYCLE:
        if hasattr(addon, name):
            setattr(addon, name, _timed(getattr(addon, name)))
    return addon


AddonManager.trigger_event = _timed_event  # type: ignore[assignment,method-assign]
gc.callbacks.append(_collected)
signal.signal(signal.SIGUSR1, _write_sums)
addons = [_measured(runpy.run_path(os.environ["BENCH_SCRIPT"])["addons"][0])]

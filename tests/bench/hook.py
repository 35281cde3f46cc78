"""Measure the time per flow on mitmproxy's event loop, in excess of an addon with empty hooks.

Each round is compared with the rounds of empty hooks before and after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import statistics
import time
from typing import TYPE_CHECKING, Any

import msgspec
from mitmproxy import ctx, hooks
from mitmproxy.addons import core, save, savehar

from addon.artifactapi import ArtifactApi
from addon.flow.tracker import FlowTracker
from exporter import Settings, load_settings
from tests.bench.empty_hooks import EmptyHooks
from tests.bench.figures import Figure, Target, Workspace
from tests.bench.log_writers import (
    InsertInHookWriter,
    LoggingWriter,
    LogWriter,
    OpenTelemetryWriter,
    ThreadPerRequestWriter,
)
from tests.bench.synthetic_flows import make_flows, make_master, run_flows
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


SECTION = "Hook"
EXPLANATION = """\
The time that each flow adds to mitmproxy's event loop, compared with an addon with empty hooks. Real flows
pass through mitmproxy's own AddonManager: requestheaders, request, responseheaders and response, each
followed by `update`. The time is CPU time of the loop's thread, or wall time where the loop waits (for a
thread to start, for PostgreSQL). The alternatives use the same capture and the same rows, and differ only
in how they write them. `-w` and `hardump` are mitmproxy's own recorders; `hardump` includes its share of
the write at the end. With a filter, mitmproxy evaluates the filter expression for each flow."""
_UNIT = "us per flow"
_LIMIT = Target("<=", 2.0)
_FLOWS = 200  # per round
_FLOWS_OF_SLOW_WRITERS = 20

_CONFIG = "batch: {max_entries: 10000, max_seconds: 60}\n"
_ALL_FEATURES = _CONFIG + (
    "artifact: {sha256: true}\n"
    "redact: {query: signed, paths: ['/private/([^/]+)']}\n"
    "remotes: {file: REMOTES}\n"
)
_REMOTES = (
    "remotes:\n  - {name: bench, host: mirror.bench.example, path: /packages, format: pypi}\n"
)


class Candidate:
    """An addon in its own mitmproxy master, with an event loop that the benchmark drives."""

    # CPU time of the loop's thread, so that other load on the machine does not count.
    clock = staticmethod(time.thread_time)
    flows = _FLOWS

    def __init__(self, name: str, addon: Any, target: Target | None, **options: Any) -> None:
        self.name = name
        self.target = target
        self._loop = asyncio.new_event_loop()
        self.master = make_master(self._loop)
        self.master.addons.add(core.Core())
        # mitmproxy's Proxyserver defines this option; it is not loaded here.
        self.master.options.add_option("stream_large_bodies", str | None, None, "")
        self.master.addons.add(addon)
        self.addon = addon
        self.master.options.update(**options)
        self.master.addons.trigger(hooks.RunningHook())
        self.master.addons.chain = [addon]  # without the hooks of Core

    def run(self) -> float:
        """Run one round; return the seconds per flow."""
        ctx.master, ctx.options = self.master, self.master.options
        flows = make_flows(self.flows, new_urls=True)
        gc.collect()
        start = self.clock()
        self._loop.run_until_complete(run_flows(self.master.addons, flows))
        seconds = self.clock() - start
        self.flush()
        return (seconds + self.finish()) / self.flows

    def flush(self) -> None:
        """Wait for background work, so that it does not affect the next round."""

    def finish(self) -> float:
        """Do the work that the addon postponed; return its seconds."""
        return 0.0

    def close(self) -> None:
        """Shut the addon down as mitmproxy does."""
        ctx.master, ctx.options = self.master, self.master.options
        self.master.should_exit.set()
        self.master.addons.trigger(hooks.DoneHook())
        self._loop.close()


class _WithExporter(Candidate):
    addon: ArtifactApi

    def flush(self) -> None:
        exporter = self.addon._exporter
        assert exporter is not None
        exporter.reconfigure(exporter._settings)  # wakes its thread
        eventually(lambda: not exporter.status()["waiting"], 60)


class _WithLogWriter(Candidate):
    def __init__(self, writer: LogWriter) -> None:
        addon = FlowTracker()
        addon.log_access = writer.log_access
        self._writer = writer
        if isinstance(writer, (InsertInHookWriter, ThreadPerRequestWriter)):
            self.clock = staticmethod(time.perf_counter)  # includes the time that the loop waits
            self.flows = _FLOWS_OF_SLOW_WRITERS
        super().__init__(writer.name, addon, None)

    def flush(self) -> None:
        self._writer.flush()


class _Har(Candidate):
    addon: savehar.SaveHar

    def finish(self) -> float:
        """Write the HAR file: `hardump` keeps all flows and writes them in `done`, on the event loop."""
        start = self.clock()
        self.addon.done()
        self.addon.flows.clear()
        return self.clock() - start


def measure(workspace: Workspace) -> list[Figure]:
    """Return one figure for each candidate."""
    with _candidates(workspace) as candidates:
        empty, *others = candidates
        for candidate in candidates:
            candidate.run()
        gc.freeze()  # keeps the collection before each round short
        base: list[float] = []
        costs: dict[str, list[float]] = {candidate.name: [] for candidate in others}
        for _ in range(workspace.choose(30, 5)):
            before = empty.run()
            for candidate in others:
                cost, after = candidate.run(), empty.run()
                costs[candidate.name].append((cost - (before + after) / 2) * 1e6)
                base.append(after)
                before = after
    hooks_alone = statistics.median(base) * 1e6
    return [Figure(SECTION, c.name, _UNIT, tuple(costs[c.name]), c.target) for c in others] + [
        Figure(SECTION, "empty hooks alone", _UNIT, (hooks_alone,))
    ]


@contextlib.contextmanager
def _candidates(workspace: Workspace) -> Iterator[list[Candidate]]:
    plain, full = _configure(workspace)
    settings = _settings(plain, workspace.dsn)
    candidates: list[Candidate] = [Candidate("empty hooks", EmptyHooks(), None)]
    with contextlib.ExitStack() as stack:
        for name, target, config, options in (
            ("artifactapi", _LIMIT, plain, {}),
            (
                "artifactapi, all features on",
                _LIMIT,
                full,
                {"stream_large_bodies": "1m"},
            ),
            ("artifactapi with a filter", None, plain, {"artifactapi_filter": "!~u /health$"}),
        ):
            candidates.append(
                _WithExporter(
                    name,
                    ArtifactApi(),
                    target,
                    artifactapi_config=str(config),
                    artifactapi_dsn=workspace.dsn,
                    **options,
                )
            )
        for kind in (
            OpenTelemetryWriter,
            LoggingWriter,
            ThreadPerRequestWriter,
            InsertInHookWriter,
        ):
            writer: LogWriter = kind(settings)
            candidates.append(_WithLogWriter(stack.enter_context(writer)))
        flows_file, har_file = workspace.folder / "flows", workspace.folder / "flows.har"
        candidates.append(
            Candidate("mitmproxy -w", save.Save(), None, save_stream_file=str(flows_file))
        )
        candidates.append(
            _Har("mitmproxy's hardump", savehar.SaveHar(), None, hardump=str(har_file))
        )
        try:
            yield candidates
        finally:
            for candidate in candidates:
                candidate.close()


def _configure(workspace: Workspace) -> tuple[Path, Path]:
    remotes = workspace.folder / "remotes.yaml"
    remotes.write_text(_REMOTES)
    plain, full = workspace.folder / "plain.yaml", workspace.folder / "full.yaml"
    plain.write_text(_CONFIG)
    full.write_text(_ALL_FEATURES.replace("REMOTES", str(remotes)))
    return plain, full


def _settings(config: Path, dsn: str) -> Settings:
    settings = load_settings(config)
    return msgspec.structs.replace(settings.with_dsn(dsn), node="bench")

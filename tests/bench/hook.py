"""What one flow costs on mitmproxy's event loop, over an addon with empty hooks.

Real flows go through mitmproxy's own AddonManager, all hooks and the update after each. Rounds of
each kind of addon alternate, and each is compared with the round of empty hooks next to it.
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
from tests.bench.figures import Figure, Place, Target
from tests.bench.sample import drive, make_flows, make_master
from tests.bench.sinks import InsertInHook, Logging, OpenTelemetry, Sink, ThreadPerRequest
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


SECTION = "Hook"
ABOUT = """\
What one flow costs on mitmproxy's event loop, on top of an addon with empty hooks. Real flows go
through mitmproxy's own AddonManager: requestheaders, request, responseheaders and response, each
with the `update` that follows. CPU time of the loop's thread; where the loop waits for something (a
thread to start, Postgres), wall time. The alternatives share our capture and our rows and differ in
the handing over; `-w` and `hardump` are mitmproxy's own, the latter with its share of the writing at
the end. A filter is mitmproxy's to evaluate, and comes on top."""
_UNIT = "us a flow"
_LIMIT = Target("<=", 2.0)
_FLOWS = 200  # a round
_FLOWS_THAT_WAIT = 20

_CONFIG = "batch: {max_entries: 10000, max_seconds: 60}\n"
_EVERY_FEATURE = _CONFIG + (
    "artifact: {sha256: true}\n"
    "redact: {query: signed, paths: ['/private/([^/]+)']}\n"
    "remotes: {file: REMOTES}\n"
)
_REMOTES = (
    "remotes:\n  - {name: bench, host: mirror.bench.example, path: /packages, format: pypi}\n"
)


class Candidate:
    """An addon in a mitmproxy of its own, whose event loop is ours."""

    # CPU time of the loop's thread: what others do on this machine does not count.
    clock = staticmethod(time.thread_time)
    flows = _FLOWS

    def __init__(self, name: str, addon: Any, target: Target | None, **chosen: Any) -> None:
        self.name = name
        self.target = target
        self._loop = asyncio.new_event_loop()
        self.master = make_master(self._loop)
        self.master.addons.add(core.Core())
        # As mitmproxy's Proxyserver has it.
        self.master.options.add_option("stream_large_bodies", str | None, None, "")
        self.master.addons.add(addon)
        self.addon = addon
        self.master.options.update(**chosen)
        self.master.addons.trigger(hooks.RunningHook())
        self.master.addons.chain = [addon]  # the core's own hooks would come on top

    def run(self) -> float:
        """Seconds a flow, of one round."""
        ctx.master, ctx.options = self.master, self.master.options
        flows = make_flows(self.flows, new_urls=True)
        gc.collect()
        start = self.clock()
        self._loop.run_until_complete(drive(self.master.addons, flows))
        seconds = self.clock() - start
        self.settle()
        return (seconds + self.afterwards()) / self.flows

    def settle(self) -> None:
        """Let what goes on in the background end, so that the next round is alone."""

    def afterwards(self) -> float:
        """Seconds that were only put off."""
        return 0.0

    def close(self) -> None:
        """End it as mitmproxy would."""
        ctx.master, ctx.options = self.master, self.master.options
        self.master.should_exit.set()
        self.master.addons.trigger(hooks.DoneHook())
        self._loop.close()


class _WithExporter(Candidate):
    addon: ArtifactApi

    def settle(self) -> None:
        exporter = self.addon._exporter
        assert exporter is not None
        exporter.reconfigure(exporter._settings)  # wakes its thread
        eventually(lambda: not exporter.status()["waiting"], 60)


class _WithSink(Candidate):
    def __init__(self, sink: Sink) -> None:
        addon = FlowTracker()
        addon.log_access = sink.log_access
        self._sink = sink
        if isinstance(sink, (InsertInHook, ThreadPerRequest)):
            self.clock = staticmethod(time.perf_counter)  # the loop waits for something
            self.flows = _FLOWS_THAT_WAIT
        super().__init__(sink.name, addon, None)

    def settle(self) -> None:
        self._sink.settle()


class _Har(Candidate):
    addon: savehar.SaveHar

    def afterwards(self) -> float:
        """It keeps all flows and writes them at the end, with mitmproxy's loop blocked."""
        start = self.clock()
        self.addon.done()
        self.addon.flows.clear()
        return self.clock() - start


def measure(place: Place) -> list[Figure]:
    """A figure for each kind of addon."""
    with _candidates(place) as candidates:
        empty, *others = candidates
        for candidate in candidates:
            candidate.run()
        gc.freeze()  # what is there by now needs not be looked through before each round
        base: list[float] = []
        costs: dict[str, list[float]] = {candidate.name: [] for candidate in others}
        for _ in range(place.choose(30, 5)):
            before = empty.run()
            for candidate in others:
                cost, after = candidate.run(), empty.run()
                costs[candidate.name].append((cost - (before + after) / 2) * 1e6)
                base.append(after)
                before = after
    hooks_alone = statistics.median(base) * 1e6
    return [Figure(SECTION, c.name, _UNIT, tuple(costs[c.name]), c.target) for c in others] + [
        Figure(SECTION, "empty hooks, for themselves", _UNIT, (hooks_alone,))
    ]


@contextlib.contextmanager
def _candidates(place: Place) -> Iterator[list[Candidate]]:
    plain, full = _configure(place)
    settings = _settings(plain, place.dsn)
    found: list[Candidate] = [Candidate("empty hooks", EmptyHooks(), None)]
    with contextlib.ExitStack() as stack:
        for name, target, config, chosen in (
            ("artifactapi", _LIMIT, plain, {}),
            (
                "artifactapi, every feature on",
                _LIMIT,
                full,
                {"stream_large_bodies": "1m"},
            ),
            ("artifactapi with a filter", None, plain, {"artifactapi_filter": "!~u /health$"}),
        ):
            found.append(
                _WithExporter(
                    name,
                    ArtifactApi(),
                    target,
                    artifactapi_config=str(config),
                    artifactapi_dsn=place.dsn,
                    **chosen,
                )
            )
        for kind in (OpenTelemetry, Logging, ThreadPerRequest, InsertInHook):
            sink: Sink = kind(settings)
            found.append(_WithSink(stack.enter_context(sink)))
        flows_file, har_file = place.folder / "flows", place.folder / "flows.har"
        found.append(Candidate("mitmproxy -w", save.Save(), None, save_stream_file=str(flows_file)))
        found.append(_Har("mitmproxy's hardump", savehar.SaveHar(), None, hardump=str(har_file)))
        try:
            yield found
        finally:
            for candidate in found:
                candidate.close()


def _configure(place: Place) -> tuple[Path, Path]:
    remotes = place.folder / "remotes.yaml"
    remotes.write_text(_REMOTES)
    plain, full = place.folder / "plain.yaml", place.folder / "full.yaml"
    plain.write_text(_CONFIG)
    full.write_text(_EVERY_FEATURE.replace("REMOTES", str(remotes)))
    return plain, full


def _settings(config: Path, dsn: str) -> Settings:
    settings = load_settings(config)
    return msgspec.structs.replace(settings.with_dsn(dsn), node="bench")

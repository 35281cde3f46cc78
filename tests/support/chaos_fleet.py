"""Run many proxies under load on one database, inject faults into the database, and check that no row is missing.

Each proxy is a mitmdump process with traffic of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from .chaos_environment import Bounds, ChaosEnvironment, Generation
from .environment import temporary_runtime
from .proxy import Mitm
from .traffic import Traffic
from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .traffic import Request

_STARTS_AT_ONCE = 4
_RATE = 10.0  # requests per second of each proxy
_SETTLE_SECONDS = 120.0


class FleetEnvironment(ChaosEnvironment):
    """Like its base, with several proxies at the same time. No fault may stop a proxy."""

    def __init__(self, folder: Path, proxies: int) -> None:
        super().__init__(folder, Bounds(rate=_RATE))
        self._proxies = proxies
        self.traffics: list[Traffic] = []
        self.rss_bytes = 0  # of all proxies and their workers, when the traffic ends

    def start_proxy(self) -> None:
        """Start all proxies, and the traffic through each of them."""
        runtime = self._stack.enter_context(temporary_runtime())
        if runtime is not None:
            self.memory = runtime  # the small one of the base has no room for all journals
        with ThreadPoolExecutor(_STARTS_AT_ONCE) as pool:
            fleet = list(pool.map(self._start, range(self._proxies)))
        for generation in fleet:
            self._stack.push(generation.mitm.__exit__)
            self.generations.append(generation)
        self.traffics = [self.traffic] + [
            self._stack.enter_context(Traffic(self._folder / f"requests-{number}", _RATE, 1))
            for number in range(1, self._proxies)
        ]
        for generation, traffic in zip(fleet, self.traffics, strict=True):
            traffic.set_target(generation.number, generation.mitm.port)

    def settle(self) -> None:
        """Wait until each proxy writes rows again and has none on disk."""
        since = time.monotonic()
        before = [generation.status().get("written", 0) for generation in self.generations]

        def behind() -> list[int]:
            statuses = [generation.status() for generation in self.generations]
            return [
                number
                for number, (status, written) in enumerate(zip(statuses, before, strict=True))
                if not status
                or status["at"] <= since
                or status["written"] <= written
                or status["spooled"]
            ]

        with contextlib.suppress(AssertionError):
            eventually(lambda: not behind(), timeout=_SETTLE_SECONDS)
            return
        self.complaints.append(f"proxies {behind()} have not recovered")

    def finish(self) -> None:
        """Stop the traffic, wait for the last rows, and stop the proxies."""
        self.settle()
        self.rss_bytes = sum(self._rss(generation) for generation in self.generations)
        with ThreadPoolExecutor(_STARTS_AT_ONCE) as pool:
            list(pool.map(Traffic.stop, self.traffics))
            list(pool.map(lambda generation: generation.mitm.terminate(), self.generations))

    def check(self) -> str:
        """Compare rows, requests and the audit; add to `complaints`, and return a report."""
        requests = [request for traffic in self.traffics for request in traffic.requests()]
        rows = Counter(self.rows())
        answered = {(it.generation, it.number) for it in requests if it.answered}
        sent = {(it.generation, it.number) for it in requests}
        duplicates = sum(count - 1 for count in rows.values())
        missing = answered - rows.keys()
        audit = self.audit()
        gaps = sum(gap.total() for gap in self.gaps().values())
        self._expect(not missing, f"answered requests have no row: {sorted(missing)[:5]}")
        self._expect(not duplicates, f"{duplicates} requests have more than one row")
        self._expect(not rows.keys() - sent, "there are rows without a request")
        self._expect(not gaps, f"the gaps count {gaps} requests")
        self._expect(audit["verdict"] == "complete", f"the audit says {audit['verdict']}")
        outputs = [generation.mitm.output() for generation in self.generations]
        self._expect(not any("Traceback" in text for text in outputs), "a proxy logged a traceback")
        faults = "".join(
            f"{it.step.fault:28} {it.ended - it.began:6.1f} s, recovered after {it.recovered - it.ended:.1f} s\n"
            for it in self.episodes
        )
        spooled = max(it["spooled"] for each in self.generations for it in each.statuses())
        verdict = "".join(f"FAILED: {complaint}\n" for complaint in self.complaints)
        return (
            f"{faults}"
            f"{len(self.generations)} proxies: sent {len(requests)}, answered {len(answered)}, rows {len(rows)}, "
            f"missing {len(missing)}, duplicates {duplicates}, in gaps {gaps}; the audit says {audit['verdict']}\n"
            f"memory of all proxies and workers: {self.rss_bytes / 2**20:.0f} MiB; rows of a proxy on disk: at "
            f"most {spooled}; latency p99 {_p99_ms(requests):.1f} ms\n"
            f"{verdict or 'The log is complete.'}"
        )

    def _start(self, number: int) -> Generation:
        status_file = self._folder / f"status-{number}"
        node = f"proxy-{number}"
        home = str(self._folder / f"home-{number}")
        environment = self._environment() | {"ARTIFACTAPI_HOME": home} | self._login(number)
        mitm = Mitm(
            self._folder / node,
            *("--set", f"artifactapi_config={self._configuration(node)}"),
            *("--set", f"status_file={status_file}"),
            *("--set", "flow_detail=0"),
            scripts=[
                self._product / "addon" / "artifactapi.py",
                Path(__file__).with_name("status_file.py"),
            ],
            env=environment,
            timeout=120,
        )
        return Generation(number, mitm.__enter__(), status_file)

    def _expect(self, condition: object, complaint: str) -> None:
        if not condition:
            self.complaints.append(complaint)

    @staticmethod
    def _rss(generation: Generation) -> int:
        process = psutil.Process(generation.mitm.pid)
        return sum(it.memory_info().rss for it in (process, *process.children()))


def _p99_ms(requests: Sequence[Request]) -> float:
    seconds = sorted(_seconds(requests))
    return 1000 * seconds[len(seconds) * 99 // 100] if seconds else 0.0


def _seconds(requests: Sequence[Request]) -> Iterator[float]:
    return (it.ended_at - it.sent_at for it in requests if it.answered)

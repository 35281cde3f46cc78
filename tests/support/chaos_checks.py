"""Compare the log with what the clients received after a run of faults, and report every difference."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from .chaos_environment import DRAIN_SECONDS, SPOOL_BYTES, STOPPED_LINE, WARM_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .chaos_environment import ChaosEnvironment, Episode, Generation
    from .traffic import Request

_MAX_RSS_GROWTH_BYTES = 96 * 1024 * 1024  # 1.5 times buffer.max_bytes
# Faults whose names start with these restart the addon, so they are left out of the latencies.
_LIFE_CYCLE = "proxy", "hot reload"


class Report:
    """The checks of one run and their figures; `complaints` is empty if the log is complete."""

    def __init__(self, environment: ChaosEnvironment) -> None:
        self.lines: list[str] = []
        self.complaints = list(environment.complaints)
        self._environment = environment
        self._requests = environment.traffic.requests()
        self._rows = [*environment.rows()]
        self._episodes()
        self._generations()
        self._runs()
        self._audit()
        self._totals()
        self._counters()
        self._latency()
        self._bounds()
        self._logs()

    def text(self) -> str:
        """Return the report as text."""
        verdict = [f"FAILED: {complaint}" for complaint in self.complaints]
        verdict = verdict or ["The log is complete."]
        return "\n".join([*self.lines, *verdict])

    def _say(self, line: str = "") -> None:
        self.lines.append(line)

    def _expect(self, condition: object, complaint: str) -> None:
        if not condition:
            self.complaints.append(complaint)

    def _episodes(self) -> None:
        self._say(
            f"{'fault':28} {'times':>5} {'s each':>7} {'recovered after s':>18} "
            f"{'max spooled':>12} {'max waiting':>12} {'p99 ms':>7}"
        )
        by_fault: dict[str, list[Episode]] = defaultdict(list)
        for episode in self._environment.episodes:
            by_fault[episode.step.fault].append(episode)
        for fault, episodes in by_fault.items():
            duration = statistics.mean(e.ended - e.began for e in episodes)
            recovery = max(e.recovered - e.ended for e in episodes)
            latencies = [
                r.ended_at - r.sent_at
                for e in episodes
                for r in self._requests
                if r.answered and e.began <= r.sent_at <= e.recovered
            ]
            notes = sorted({e.note for e in episodes if e.note})
            self._say(
                f"{fault:28} {len(episodes):5} {duration:7.1f} {'at most':>11} {recovery:6.1f} "
                f"{max(e.spooled for e in episodes):12} {max(e.waiting for e in episodes):12} "
                f"{_p99(latencies):7.1f}  {'; '.join(notes)}"
            )
        self._say()

    def _generations(self) -> None:
        """Check each process of the proxy: each request has a row or is in a gap, also after a kill."""
        rows: dict[int, Counter[int]] = defaultdict(Counter)
        for owner, number in self._rows:
            rows[owner][number] += 1
        sent: dict[int, list[Request]] = defaultdict(list)
        for request in self._requests:
            sent[request.generation].append(request)
        gaps = self._environment.gaps()
        self._say(
            f"{'proxy':7} {'end':8} {'sent':>7} {'answered':>8} {'rows':>7} {'unanswered, seen':>16} "
            f"{'in gaps':>7} {'missing':>7} {'duplicates':>10}"
        )
        for generation in self._environment.generations:
            requests, found = sent[generation.number], rows[generation.number]
            answered = {r.number: r for r in requests if r.answered}
            unanswered = {r.number for r in requests if not r.answered}
            missing = [r for number, r in answered.items() if number not in found]
            duplicates = sum(1 for n in found.values() if n > 1)
            unknown = [n for n in found if n not in answered and n not in unanswered]
            in_gaps = gaps[generation.number].total()
            unanswered_seen = sum(1 for n in found if n in unanswered)
            self._say(
                f"{generation.number:<7} {'killed' if generation.killed_at else 'orderly':8} "
                f"{len(requests):7} {len(answered):8} {len(found):7} {unanswered_seen:16} "
                f"{in_gaps:7} {len(missing):7} {duplicates:10}"
            )
            name = f"proxy {generation.number}"
            self._expect(not duplicates, f"{name}: {duplicates} requests have more than one row")
            self._expect(not unknown, f"{name}: rows without a request: {unknown[:5]}")
            # A gap counts requests, and does not say which ones. The client does not know which of the
            # unanswered ones the proxy has seen.
            unanswered_missing = len(unanswered) - unanswered_seen
            self._expect(
                len(missing) <= in_gaps <= len(missing) + unanswered_missing,
                f"{name}: {len(missing)} answered requests have no row, but the gaps count {in_gaps}",
            )
            if not generation.is_damaged:
                self._expect(not missing, f"{name}: answered requests have no row: {missing[:3]}")

    def _runs(self) -> None:
        """Check the ledger: each run has ended as it did, and each request that it saw is a row or a gap."""
        runs = self._environment.runs()
        killed = sum(1 for _, end, _, _ in runs if end == "killed")
        lost = sum(1 for g in self._environment.generations if g.killed_at is not None)
        self._say(f"runs: {len(runs)}, of which killed {killed}")
        self._expect(killed == lost, f"{lost} proxies were killed, the ledger says {killed}")
        for node, end, seen, found in runs:
            self._expect(end, f"{node}: the ledger does not know how it ended")
            self._expect(seen == found, f"{node}: saw {seen} requests, {found} are rows or gaps")
        self._expect(not self._environment.journals(), "journals are left over")

    def _audit(self) -> None:
        """Check that `artifactapi audit` finds every row, every gap, and nothing unknown."""
        nodes = self._environment.audit()["nodes"]
        sums = {
            name: sum(day["count"] for node in nodes for day in node[name])
            for name in ("missing_rows", "missing_gaps", "uncounted_rows")
        }
        undelivered = sum(node["undelivered"] + node["waiting"] for node in nodes)
        seen, lost = sum(node["seen"] for node in nodes), Counter[str]()
        for node in nodes:
            lost.update(node["lost"])
        self._say(f"audit: saw {seen}, lost {dict(lost)}, {sums}, undelivered {undelivered}")
        expected = {"missing_rows": self._environment.count_detached_rows()}
        for name, count in sums.items():
            self._expect(count == expected.get(name, 0), f"audit: {name} {count}")
        self._expect(not undelivered, f"audit: {undelivered} requests are not delivered")
        unknown = [node["node"] for node in nodes if node["unknown"]]
        self._expect(not unknown, f"audit: unknown times of {unknown}")
        self._expect(
            seen == len(self._rows) + lost.total(),
            f"audit: saw {seen} requests, {len(self._rows)} rows and {lost.total()} lost",
        )

    def _totals(self) -> None:
        answered = sum(1 for r in self._requests if r.answered)
        numbers = {number for _, number in self._rows}
        self._say()
        self._say(
            f"sent {len(self._requests)}, answered {answered}, rows {len(self._rows)}, "
            f"duplicates {len(self._rows) - len(numbers)}, "
            f"answered but missing {sum(1 for r in self._requests if r.answered and r.number not in numbers)}"
        )
        self._expect(answered > 0, "no request was answered")
        self._expect(len(self._rows) == len(numbers), "a request has more than one row")

    def _counters(self) -> None:
        """Check that the writer's counters, over all of its runs, agree with the table."""
        written = recovered = failures = retries = 0
        killed = False
        for generation in self._environment.generations:
            runs = _split_runs(generation.statuses())
            written += sum(int(n) for n in STOPPED_LINE.findall(generation.mitm.output()))
            if generation.killed_at is not None:
                killed = True
                written += runs[-1][-1]["written"] if runs else 0
            for statuses in runs:
                last = statuses[-1]
                recovered += last["recovered"]
                retries += last["retries"]
                failures += last["failures"]
                self._check_run(generation, statuses)
        self._say(
            f"counters: written {written}, recovered from spools {recovered}, together "
            f"{written + recovered}; retries {retries}, failures {failures}"
        )
        rows = len(self._rows)
        if killed:  # rows written after the last report are in the table, but in no counter
            self._expect(written <= rows, f"the counters say {written} rows, the table has {rows}")
        else:
            self._expect(
                written + recovered == rows,
                f"{written} written and {recovered} recovered rows, but the table has {rows}",
            )
        expected = (
            self._environment.worker_kills
        )  # each worker that is gone counts once, if noticed
        self._expect(failures <= expected, f"the writer failed {failures} times, {expected} by us")

    def _check_run(self, generation: Generation, statuses: Sequence[dict[str, Any]]) -> None:
        """Check that the counters of each report add up, and that none decreases."""
        parts = ("written", "dropped", "rejected", "waiting", "spooled")
        before: dict[str, Any] = {}
        for status in statuses:
            adds_up = status["seen"] == sum(status[part] for part in parts)
            adds_up = adds_up and status["in_flight"] == status["open"]
            none_negative = min(status[part] for part in parts) >= 0
            none_decreased = all(
                status[name] >= before.get(name, 0) for name in ("seen", "written", "recovered")
            )
            if not (adds_up and none_negative and none_decreased):
                self._expect(None, f"proxy {generation.number}: counters {before}, then {status}")
                return
            before = status

    def _latency(self) -> None:
        """Report the latency with and without PostgreSQL faults; leave out proxies that just started."""
        starts = [
            min((s["at"] for s in g.statuses()), default=0.0) for g in self._environment.generations
        ]
        warm_ups = [(at, at + WARM_SECONDS) for at in starts]
        faults: list[tuple[float, float]] = []
        life_cycle: list[tuple[float, float]] = []
        for e in self._environment.episodes:
            span = (e.began, e.recovered)
            (life_cycle if e.step.fault.startswith(_LIFE_CYCLE) else faults).append(span)
        normal_times: list[float] = []
        fault_times: list[float] = []
        for r in self._requests:
            if not r.answered or _within(r.sent_at, warm_ups) or _within(r.sent_at, life_cycle):
                continue
            times = fault_times if _within(r.sent_at, faults) else normal_times
            times.append(r.ended_at - r.sent_at)
        normal, fault = _p99(normal_times), _p99(fault_times)
        self._say(
            f"latency through the proxy: p50 {_percentile_ms(50, normal_times):.1f} ms normally, "
            f"{_percentile_ms(50, fault_times):.1f} ms during faults; "
            f"p99 {normal:.1f} ms normally, {fault:.1f} ms during faults, "
            f"ratio {fault / normal if normal else 0:.2f} "
            f"({len(normal_times)} and {len(fault_times)} requests)"
        )

    def _bounds(self) -> None:
        environment = self._environment
        grown = [g.peak_rss - g.first_rss for g in environment.generations if g.first_rss]
        peak = max(g.peak_rss for g in environment.generations)
        self._say(
            f"memory: peak {peak / 2**20:.0f} MiB, growth at most {max(grown, default=0) / 2**20:.0f} MiB; "
            f"spool: peak {environment.peak_spool / 2**20:.2f} MiB of {SPOOL_BYTES / 2**20:.0f}"
        )
        self._expect(max(grown, default=0) <= _MAX_RSS_GROWTH_BYTES, "the proxy's memory grew")
        self._expect(environment.peak_spool <= SPOOL_BYTES + 2**21, "the spool exceeded its limit")
        ends = "; ".join(
            f"proxy {g.number} {_format_handles(g.handles)}"
            for g in environment.generations
            if g.handles
        )
        self._say(f"handles at first: {_format_handles(environment.handles)}; at the end: {ends}")
        longest = max(environment.stops, default=0.0)
        self._say(f"shutdown: {len(environment.stops)} times, the longest {longest:.2f} s")
        self._expect(longest <= DRAIN_SECONDS + 2.0, f"a shutdown took {longest:.2f} s")

    def _logs(self) -> None:
        """Count the proxies' log lines, with numbers replaced by #; fail on a traceback."""
        kinds: Counter[str] = Counter()
        for generation in self._environment.generations:
            for line in generation.mitm.output().splitlines():
                text = re.sub(r"^\[[\d:.]+\]\s*", "", line)
                if "Traceback" in text or "internal error" in text:
                    self.complaints.append(f"proxy {generation.number} logged: {text[:200]}")
                if "ostgre" in text or "pool" in text or "rror" in text:
                    kinds[re.sub(r"\d+(\.\d+)?", "#", text)[:200]] += 1
        self._say()
        for text, count in kinds.most_common(40):
            self._say(f"{count:5} x {text}")


def _split_runs(statuses: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split the counters of one process at each reload of the script, which resets them."""
    runs: list[list[dict[str, Any]]] = []
    for status in statuses:
        if not runs or status["seen"] < runs[-1][-1]["seen"]:
            runs.append([])
        runs[-1].append(status)
    return runs


def _format_handles(handles: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in handles.items())


def _within(at: float, spans: Sequence[tuple[float, float]]) -> bool:
    return any(began <= at <= ended for began, ended in spans)


def _percentile_ms(percent: int, seconds: Sequence[float]) -> float:
    """Return a percentile in milliseconds; 0 for an empty sequence."""
    return (
        sorted(seconds)[min(len(seconds) * percent // 100, len(seconds) - 1)] * 1000
        if seconds
        else 0.0
    )


def _p99(seconds: Sequence[float]) -> float:
    return _percentile_ms(99, seconds)

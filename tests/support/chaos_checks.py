"""Hold the log against what the clients saw, after a run of faults, and say what is wrong with it."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from .chaos_environment import (
    BATCH_ENTRIES,
    BATCH_SECONDS,
    DRAIN_SECONDS,
    GOODBYE,
    SLACK_SECONDS,
    SPOOL_BYTES,
    WARM_SECONDS,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .chaos_environment import ChaosEnvironment, Episode, Generation
    from .traffic import Request

_RSS_GROWTH_BYTES = 96 * 1024 * 1024  # buffer.max_bytes and half as much again
_LIFE_CYCLE = "proxy", "hot reload"  # faults of these say nothing of the proxy's own latency


class Report:
    """Hold the table against what the clients saw; `complaints` is empty if the log is whole."""

    def __init__(self, environment: ChaosEnvironment) -> None:
        self.lines: list[str] = []
        self.complaints = list(environment.complaints)
        self._stage = environment
        self._requests = environment.traffic.requests()
        self._rows = [*environment.rows()]
        self._episodes()
        self._generations()
        self._totals()
        self._counters()
        self._latency()
        self._bounds()
        self._logs()

    def text(self) -> str:
        """The whole report."""
        verdict = [f"WRONG: {complaint}" for complaint in self.complaints] or ["The log is whole."]
        return "\n".join([*self.lines, *verdict])

    def _say(self, line: str = "") -> None:
        self.lines.append(line)

    def _expect(self, condition: object, complaint: str) -> None:
        if not condition:
            self.complaints.append(complaint)

    def _episodes(self) -> None:
        self._say(
            f"{'fault':28} {'times':>5} {'s each':>7} {'recovered after s':>18} "
            f"{'most spooled':>12} {'most waiting':>12} {'p99 ms':>7}"
        )
        by_fault: dict[str, list[Episode]] = defaultdict(list)
        for episode in self._stage.episodes:
            by_fault[episode.step.fault].append(episode)
        for fault, episodes in by_fault.items():
            lasted = statistics.mean(e.ended - e.began for e in episodes)
            recovery = max(e.recovered - e.ended for e in episodes)
            latencies = [
                r.ended_at - r.sent_at
                for e in episodes
                for r in self._requests
                if r.answered and e.began <= r.sent_at <= e.recovered
            ]
            notes = sorted({e.note for e in episodes if e.note})
            self._say(
                f"{fault:28} {len(episodes):5} {lasted:7.1f} {'at most':>11} {recovery:6.1f} "
                f"{max(e.spooled for e in episodes):12} {max(e.waiting for e in episodes):12} "
                f"{_p99(latencies):7.1f}  {'; '.join(notes)}"
            )
        self._say()

    def _generations(self) -> None:
        """Each process of the proxy for itself: only one that was killed may owe a row."""
        rows: dict[int, Counter[int]] = defaultdict(Counter)
        for owner, number in self._rows:
            rows[owner][number] += 1
        sent: dict[int, list[Request]] = defaultdict(list)
        for request in self._requests:
            sent[request.generation].append(request)
        gaps = self._stage.gaps()
        self._say(
            f"{'proxy':7} {'end':8} {'sent':>7} {'answered':>8} {'rows':>7} {'unanswered, seen':>16} "
            f"{'in gaps':>7} {'missing':>7} {'double':>6}"
        )
        for generation in self._stage.generations:
            mine, found = sent[generation.number], rows[generation.number]
            answered = {r.number: r for r in mine if r.answered}
            others = {r.number for r in mine if not r.answered}
            missing = [r for number, r in answered.items() if number not in found]
            doubles = sum(1 for n in found.values() if n > 1)
            strangers = [n for n in found if n not in answered and n not in others]
            told = gaps[generation.number].total()
            unanswered_seen = sum(1 for n in found if n in others)
            self._say(
                f"{generation.number:<7} {'killed' if generation.killed_at else 'orderly':8} "
                f"{len(mine):7} {len(answered):8} {len(found):7} {unanswered_seen:16} "
                f"{told:7} {len(missing):7} {doubles:6}"
            )
            name = f"proxy {generation.number}"
            self._expect(not doubles, f"{name}: {doubles} numbers are there more than once")
            self._expect(not strangers, f"{name}: rows nobody asked for: {strangers[:5]}")
            if generation.killed_at is None:
                silent = len(others) - unanswered_seen
                self._expect(
                    len(missing) <= told <= len(missing) + silent,
                    f"{name}: {len(missing)} answered numbers are missing, the gaps say {told}",
                )
            else:
                self._weigh_loss(generation, missing)

    def _weigh_loss(self, generation: Generation, missing: Sequence[Request]) -> None:
        """At most what had not been flushed: a batch in the making and one in an unanswered call."""
        killed_at = generation.killed_at or 0.0
        oldest = killed_at - min((r.ended_at for r in missing), default=killed_at)
        seconds = BATCH_SECONDS + SLACK_SECONDS
        if generation.deaf:
            # Meanwhile the call that will never be answered keeps the writer.
            seconds += self._stage.bounds.call_seconds + self._stage.bounds.connect_seconds
        most = max(BATCH_ENTRIES, seconds * self._stage.bounds.rate) + BATCH_ENTRIES
        self._say(f"        lost by kill -9: {len(missing)}, the oldest {oldest:.2f} s old")
        self._expect(
            len(missing) <= most and oldest <= seconds,
            f"proxy {generation.number}: kill -9 lost {len(missing)} rows, the oldest {oldest:.2f} s old; "
            f"allowed {most:.0f} and {seconds:.1f} s",
        )

    def _totals(self) -> None:
        answered = sum(1 for r in self._requests if r.answered)
        numbers = {number for _, number in self._rows}
        self._say()
        self._say(
            f"sent {len(self._requests)}, answered {answered}, rows {len(self._rows)}, "
            f"double {len(self._rows) - len(numbers)}, "
            f"answered and missing {sum(1 for r in self._requests if r.answered and r.number not in numbers)}"
        )
        self._expect(answered > 0, "nothing was answered")
        self._expect(len(self._rows) == len(numbers), "a number is there more than once")

    def _counters(self) -> None:
        """What the writer says of itself, over all its lives, is what the table says."""
        written = recovered = failures = retries = 0
        killed = False
        for generation in self._stage.generations:
            lives = _lives(generation.statuses())
            goodbyes = [int(n) for n in GOODBYE.findall(generation.mitm.output())]
            written += sum(goodbyes)
            if generation.killed_at is not None:
                killed = True
                written += lives[-1][-1]["written"] if lives else 0
            for life in lives:
                last = life[-1]
                recovered += last["recovered"]
                retries += last["retries"]
                failures += last["failures"]
                self._check_life(generation, life)
        self._say(
            f"counters: written {written}, recovered from spools {recovered}, together "
            f"{written + recovered}; retries {retries}, failures {failures}"
        )
        rows = len(self._rows)
        if killed:  # what it wrote after its last word is in the table and in no counter
            self._expect(written <= rows, f"{written} are said to be written, {rows} are there")
        else:
            self._expect(
                written + recovered == rows,
                f"{written} written and {recovered} recovered make not the {rows} rows",
            )
        self._expect(not failures, f"the writer failed {failures} times")

    def _check_life(self, generation: Generation, life: Sequence[dict[str, Any]]) -> None:
        parts = ("written", "dropped", "rejected", "waiting", "spooled")
        before: dict[str, Any] = {}
        for status in life:
            whole = status["seen"] == sum(status[part] for part in parts)
            sound = min(status[part] for part in parts) >= 0
            grows = all(
                status[name] >= before.get(name, 0) for name in ("seen", "written", "recovered")
            )
            if not (whole and sound and grows):
                self._expect(None, f"proxy {generation.number}: counters {before}, then {status}")
                return
            before = status

    def _latency(self) -> None:
        """Where only Postgres was in trouble, against the calm; young proxies left out of both."""
        births = [
            min((s["at"] for s in g.statuses()), default=0.0) for g in self._stage.generations
        ]
        young = [(at, at + WARM_SECONDS) for at in births]
        troubled: list[tuple[float, float]] = []
        life_cycle: list[tuple[float, float]] = []
        for e in self._stage.episodes:
            span = (e.began, e.recovered)
            (life_cycle if e.step.fault.startswith(_LIFE_CYCLE) else troubled).append(span)
        calm_times: list[float] = []
        fault_times: list[float] = []
        for r in self._requests:
            if not r.answered or _within(r.sent_at, young) or _within(r.sent_at, life_cycle):
                continue
            times = fault_times if _within(r.sent_at, troubled) else calm_times
            times.append(r.ended_at - r.sent_at)
        calm, fault = _p99(calm_times), _p99(fault_times)
        self._say(
            f"latency through the proxy: p50 {_p(50, calm_times):.1f} ms calm, "
            f"{_p(50, fault_times):.1f} ms in faults; p99 {calm:.1f} ms calm, {fault:.1f} ms in faults, "
            f"ratio {fault / calm if calm else 0:.2f} ({len(calm_times)} and {len(fault_times)} requests)"
        )

    def _bounds(self) -> None:
        environment = self._stage
        grown = [g.peak_rss - g.first_rss for g in environment.generations if g.first_rss]
        peak = max(g.peak_rss for g in environment.generations)
        self._say(
            f"memory: peak {peak / 2**20:.0f} MiB, grown by at most {max(grown, default=0) / 2**20:.0f} MiB; "
            f"spool: peak {environment.peak_spool / 2**20:.2f} MiB of {SPOOL_BYTES / 2**20:.0f}"
        )
        self._expect(max(grown, default=0) <= _RSS_GROWTH_BYTES, "the proxy's memory has grown")
        self._expect(environment.peak_spool <= SPOOL_BYTES + 2**21, "the spool is over its bound")
        ends = "; ".join(
            f"proxy {g.number} {_shown(g.handles)}" for g in environment.generations if g.handles
        )
        self._say(f"held at first: {_shown(environment.handles)}; at the end: {ends}")
        longest = max(environment.stops, default=0.0)
        self._say(f"stop: {len(environment.stops)} orderly ends, the longest {longest:.2f} s")
        self._expect(longest <= DRAIN_SECONDS + 2.0, f"a stop took {longest:.2f} s")

    def _logs(self) -> None:
        """What the proxies said, numbers left out."""
        kinds: Counter[str] = Counter()
        for generation in self._stage.generations:
            for line in generation.mitm.output().splitlines():
                text = re.sub(r"^\[[\d:.]+\]\s*", "", line)
                if "Traceback" in text or "internal error" in text:
                    self.complaints.append(f"proxy {generation.number} said: {text[:200]}")
                if "ostgres" in text or "pool" in text or "rror" in text:
                    kinds[re.sub(r"\d+(\.\d+)?", "#", text)[:200]] += 1
        self._say()
        for text, count in kinds.most_common(40):
            self._say(f"{count:5} x {text}")


def _lives(statuses: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The counters of one process, cut where they begin anew because the script was loaded anew."""
    lives: list[list[dict[str, Any]]] = []
    for status in statuses:
        if not lives or status["seen"] < lives[-1][-1]["seen"]:
            lives.append([])
        lives[-1].append(status)
    return lives


def _shown(handles: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in handles.items())


def _within(at: float, spans: Sequence[tuple[float, float]]) -> bool:
    return any(began <= at <= ended for began, ended in spans)


def _p(percent: int, seconds: Sequence[float]) -> float:
    """Percentile in milliseconds; 0 of nothing."""
    return (
        sorted(seconds)[min(len(seconds) * percent // 100, len(seconds) - 1)] * 1000
        if seconds
        else 0.0
    )


def _p99(seconds: Sequence[float]) -> float:
    return _p(99, seconds)

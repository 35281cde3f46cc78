"""The figures as a table on the terminal and as docs/benchmarks.md; measures nothing."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.table import Table

from tests.bench.figures import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tests.bench.figures import Figure

_STYLES = {"met": "green", "MISSED": "bold red", "": ""}
_INTRODUCTION = """\
# Benchmarks

What the access log costs, beside what else one could do. `just bench` measures all of it again in
some ten minutes, prints the same tables and writes this file; `just bench --quick` takes about a
minute and writes nothing.

Every figure is the median of several rounds, and `spread` is where the middle half of the rounds lie.
What is compared takes turns, round by round, in the same process or in processes side by side, so
that what else happens on the machine happens to all. A target says what was promised before
anything was measured.
"""
_HEAD = "| what | median | unit | spread | rounds | target | |\n|---|--:|---|--:|--:|--:|---|\n"


class Report(NamedTuple):
    """All there is to tell."""

    machine: str
    abouts: Mapping[str, str]  # how each section was measured
    figures: Sequence[Figure]
    seconds: float
    day: str


def table(figures: Iterable[Figure]) -> Table:
    """All figures for the terminal."""
    found = Table(box=box.SIMPLE_HEAD)
    found.add_column("what", overflow="fold")
    for name in ("median", "spread", "target"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("unit", no_wrap=True)
    found.add_column("", no_wrap=True)
    for section, group in groupby(figures, lambda f: f.section):
        found.add_row(f"[bold]{section}")
        for figure in group:
            target = str(figure.target) if figure.target else ""
            verdict = f"[{_STYLES[figure.verdict]}]{figure.verdict}" if figure.verdict else ""
            median = shown(figure.median)
            found.add_row(f"  {figure.name}", median, _spread(figure), target, figure.unit, verdict)
        found.add_section()
    return found


def write_markdown(path: Path, report: Report, plot_name: str) -> None:
    """Replace the file by this report."""
    path.write_text("\n".join(_markdown(report, plot_name)), encoding="utf-8")


def _markdown(report: Report, plot_name: str) -> Iterator[str]:
    yield _INTRODUCTION
    yield f"![The figures as bars]({plot_name})\n"
    missed = [f for f in report.figures if f.verdict == "MISSED"]
    met = sum(f.verdict == "met" for f in report.figures)
    yield f"This run: {report.day}, {report.seconds / 60:.0f} minutes, on {report.machine}.\n"
    yield f"{met} targets met, {len(missed)} missed{':' if missed else '.'}\n"
    if missed:
        yield "\n".join(
            f"- {f.section}, {f.name}: {shown(f.median)} {f.unit}, target {f.target}"
            for f in missed
        )
        yield ""
    for section, group in groupby(report.figures, lambda f: f.section):
        yield f"## {section}\n"
        yield f"{report.abouts[section]}\n"
        yield _HEAD + "".join(map(_row, group))


def _row(figure: Figure) -> str:
    name = figure.name.replace("|", r"\|")
    cells = (
        name,
        shown(figure.median),
        figure.unit,
        _spread(figure),
        str(len(figure.values)),
        str(figure.target or ""),
        figure.verdict,
    )
    return f"| {' | '.join(cells)} |\n"


def _spread(figure: Figure) -> str:
    if len(figure.values) == 1:
        return ""
    low, high = figure.spread
    return f"{shown(low)} to {shown(high)}"

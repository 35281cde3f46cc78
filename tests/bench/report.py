"""Format the figures as a table for the terminal and as docs/benchmarks.md; measures nothing."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.table import Table

from tests.bench.figures import format_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tests.bench.figures import Figure

_STYLES = {"met": "green", "MISSED": "bold red", "": ""}
_INTRODUCTION = """\
# Benchmarks

The cost of the access log, compared with alternatives. `just bench` repeats all measurements in about
an hour, prints the same tables and writes this file. `just bench --quick` takes a few minutes and writes no
files; `just bench --only hook` measures one section.

Each value is the median of several rounds. `spread` is the range of the middle half of the rounds.
Candidates that are compared run in alternating rounds, in the same process or in parallel processes, so
that other load on the machine affects all of them. The targets were set before the first measurement.
"""
_HEAD = (
    "| measurement | median | unit | spread | rounds | target | |\n|---|--:|---|--:|--:|--:|---|\n"
)


class Report(NamedTuple):
    """The content of docs/benchmarks.md."""

    machine: str
    explanations: Mapping[str, str]  # how each section is measured, by section
    figures: Sequence[Figure]
    seconds: float
    day: str


def table(figures: Iterable[Figure]) -> Table:
    """Return a table of all figures for the terminal."""
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("measurement", overflow="fold")
    for name in ("median", "spread", "target"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("unit", no_wrap=True)
    result.add_column("", no_wrap=True)
    for section, group in groupby(figures, lambda f: f.section):
        result.add_row(f"[bold]{section}")
        for figure in group:
            target = str(figure.target) if figure.target else ""
            verdict = f"[{_STYLES[figure.verdict]}]{figure.verdict}" if figure.verdict else ""
            median = format_value(figure.median)
            result.add_row(
                f"  {figure.name}", median, _spread(figure), target, figure.unit, verdict
            )
        result.add_section()
    return result


def write_markdown(path: Path, report: Report, plot_name: str) -> None:
    """Write the report as Markdown, and replace the file."""
    path.write_text("\n".join(_markdown(report, plot_name)), encoding="utf-8")


def _markdown(report: Report, plot_name: str) -> Iterator[str]:
    yield _INTRODUCTION
    yield f"![Bar charts of the results]({plot_name})\n"
    missed = [f for f in report.figures if f.verdict == "MISSED"]
    met = sum(f.verdict == "met" for f in report.figures)
    yield f"This run: {report.day}, {report.seconds / 60:.0f} minutes, {report.machine}.\n"
    yield f"{met} targets met, {len(missed)} missed{':' if missed else '.'}\n"
    if missed:
        yield "\n".join(
            f"- {f.section}, {f.name}: {format_value(f.median)} {f.unit}, target {f.target}"
            for f in missed
        )
        yield ""
    for section, group in groupby(report.figures, lambda f: f.section):
        yield f"## {section}\n"
        yield f"{report.explanations[section]}\n"
        yield _HEAD + "".join(map(_row, group))


def _row(figure: Figure) -> str:
    name = figure.name.replace("|", r"\|")
    cells = (
        name,
        format_value(figure.median),
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
    return f"{format_value(low)} to {format_value(high)}"

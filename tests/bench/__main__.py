"""Measure what the log costs, beside what else one could do: `just bench`.

Each section runs in a process of its own, with a schema and a folder that are gone afterwards.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from tests.bench.apart import measure_apart
from tests.bench.machine import describe_machine
from tests.bench.plot import Panel, draw
from tests.bench.report import Report, table, write_markdown
from tests.support.environment import personal_variables
from tests.support.postgres import Postgres, available

if TYPE_CHECKING:
    from tests.bench.figures import Figure

_ROOT = Path(__file__).resolve().parents[2]
_SECTIONS = ("hook", "writer", "proxy", "latency", "memory", "growth", "delay")
_WIDTH = 118
_PANELS = (
    Panel("Hook", "us a flow", "One flow on mitmproxy's event loop", smallest=1.0),
    Panel("mitmdump", "us of CPU a request", "One request, all of mitmdump"),
    Panel("Latency", "ms", "An event loop beside the writer: 99th percentile", names="p99: "),
    Panel("Writer", "us of CPU a row", "One row, from the hook to the table"),
    Panel("Writer", "rows/s", "One writer, into the real table"),
)


@click.command
@click.option("--quick", is_flag=True, help="Less than a minute; writes nothing.")
@click.option("--only", type=click.Choice(_SECTIONS), multiple=True, help="These sections alone.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where benchmarks.md and benchmarks.svg go; docs/ after a whole run, else nowhere.",
)
def main(*, quick: bool, only: tuple[str, ...], output: Path | None) -> None:
    """Measure, print one table, and write docs/benchmarks.md with its plot.

    A target that is missed is said, and is no failure: the machine may have other things to do.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))  # so that all is cleaned up
    console = Console()
    console.width = max(console.width, _WIDTH)  # else the table can't be read
    started = time.monotonic()
    for name in personal_variables():
        del os.environ[name]
    figures: list[Figure] = []
    failed = []
    server = Postgres(available()["18"])
    server.configure(
        fsync="on",  # as a real one: what is committed is on disk
        wal_level="minimal",  # tables that are made and filled in one go need no log: faster to prepare
        max_wal_senders="0",
    )
    with server:
        machine = describe_machine(server.dsn())
        for section in only or _SECTIONS:
            console.print(f"{section} ...", end=" ")
            began = time.monotonic()
            try:
                figures += measure_apart(section, server, quick=quick)
            except Exception:  # noqa: BLE001 - the others still have something to say
                failed.append(section)
                console.print(traceback.format_exc())
            console.print(f"{time.monotonic() - began:.0f} s")
    console.print(table(figures))
    console.print(f"On {machine}.")
    if output is None and not quick and not only and not failed:
        output = _ROOT / "docs"
    if output is not None and figures:
        seconds = time.monotonic() - started
        _write(
            output, Report(machine, _abouts(), figures, seconds, f"{datetime.now(UTC):%Y-%m-%d}")
        )
        console.print(f"Written to {output}/benchmarks.md.")
    if failed:
        sys.exit(f"These sections could not be measured: {', '.join(failed)}.")


def _abouts() -> dict[str, str]:
    modules = [import_module(f"tests.bench.{section}") for section in _SECTIONS]
    return {module.SECTION: module.ABOUT for module in modules}


def _write(folder: Path, report: Report) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_markdown(folder / "benchmarks.md", report, "benchmarks.svg")
    draw(folder / "benchmarks.svg", report.figures, _PANELS)


if __name__ == "__main__":
    main()

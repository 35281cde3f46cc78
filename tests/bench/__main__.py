"""Measure the cost of the access log and compare it with alternatives: `just bench`."""

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

from tests.bench.machine import describe_machine
from tests.bench.plot import Panel, draw
from tests.bench.report import Report, table, write_markdown
from tests.bench.section_process import measure_section
from tests.support.citus import VARIABLE as CITUS
from tests.support.environment import personal_variables
from tests.support.postgres import Postgres, available

if TYPE_CHECKING:
    from tests.bench.figures import Figure

_ROOT = Path(__file__).resolve().parents[2]
_MODULES = {
    "hook": "hook",
    "writer": "writer",
    "proxy": "proxy",
    "paired": "paired",
    "parts": "parts",
    "latency": "latency",
    "memory": "memory",
    "growth": "growth",
    "years": "years",
    "delay": "row_delay",
    "fleet": "fleet",
}
_WIDTH = 118
_PANELS = (
    Panel("Hook", "us per flow", "Time per flow on mitmproxy's event loop", axis_min=1.0),
    Panel("mitmdump", "us of CPU per request", "CPU time per request, all of mitmdump"),
    Panel("Latency", "ms", "99th percentile of an event loop next to the writer", prefix="p99: "),
    Panel("Writer", "us of CPU per row", "CPU time per row, from the hook to the table"),
    Panel("Writer", "rows/s", "Rows per second of one writer"),
)


@click.command
@click.option("--quick", is_flag=True, help="Take a few minutes, and write no files.")
@click.option(
    "--only", type=click.Choice(list(_MODULES)), multiple=True, help="Run only this section."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for benchmarks.md and benchmarks.svg. [default: docs/ after a full run]",
)
def main(*, quick: bool, only: tuple[str, ...], output: Path | None) -> None:
    """Measure, print a table, and write docs/benchmarks.md with its plot.

    The table marks missed targets, but they are not errors: the machine may be busy.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))  # an exit cleans up
    console = Console()
    console.width = max(console.width, _WIDTH)  # a narrower table is unreadable
    started = time.monotonic()
    for name in personal_variables():
        if name != CITUS:
            del os.environ[name]
    figures: list[Figure] = []
    failed = []
    server = Postgres(available()["18"])
    server.configure(
        fsync="on",  # like a production server
        wal_level="minimal",  # prepares tables faster: filling a new table writes no WAL
        max_wal_senders="0",
    )
    with server:
        machine = describe_machine(server.dsn())
        for section in only or _MODULES:
            console.print(f"{section} ...", end=" ")
            began = time.monotonic()
            try:
                figures += measure_section(_MODULES[section], server, quick=quick)
            except Exception:  # noqa: BLE001 - the other sections still run
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
            output,
            Report(machine, _explanations(), figures, seconds, f"{datetime.now(UTC):%Y-%m-%d}"),
        )
        console.print(f"Written to {output}/benchmarks.md.")
    if failed:
        sys.exit(f"These sections failed: {', '.join(failed)}.")


def _explanations() -> dict[str, str]:
    modules = [import_module(f"tests.bench.{name}") for name in _MODULES.values()]
    return {module.SECTION: module.EXPLANATION for module in modules}


def _write(folder: Path, report: Report) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_markdown(folder / "benchmarks.md", report, "benchmarks.svg")
    draw(folder / "benchmarks.svg", report.figures, _PANELS)


if __name__ == "__main__":
    main()

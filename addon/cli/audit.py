"""The commands `artifactapi audit` and `artifactapi nodes`. Comparing and formatting are in exporter.read."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from addon.cli.answers import AnswerCommand
from addon.cli.queries import archive_option, errors_in_one_sentence, filters
from exporter.read.audit import audit as audit_evidence
from exporter.read.audit_text import audit_lines
from exporter.read.human import printable_json
from exporter.read.ledger import Days, Evidence, collect
from exporter.read.nodes import find_nodes, node_lines
from exporter.read.session import open_database

if TYPE_CHECKING:
    from pathlib import Path

    from exporter import Settings
    from exporter.postgres.connection import DeadlineConnection
    from exporter.read.audit import Verdict
    from exporter.read.selection import Selection

_EXIT_CODES: dict[Verdict, int] = {"complete": 0, "incomplete": 1, "unknown": 2}
_BAR_AFTER_SECONDS = 2.0
_COLUMNS = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())


@click.command(cls=AnswerCommand)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@archive_option
@filters("node", "since", "until")
@click.pass_context
def audit(
    context: click.Context, *, as_json: bool, archive: Path | None, selection: Selection
) -> None:
    """Say whether the log is complete: count its rows, and compare them with what the proxies saw.

    Rows are compared by whole days (UTC), so --since and --until include the rest of their days. With
    --archive, every value of the archived days is checked.

    The exit status is 0 if the log is complete, 1 if requests are missing and their number is known,
    2 if that is not known for some time, and 3 if the log could not be read.
    """
    settings: Settings = context.obj
    days = Days.covering(selection.since, selection.until)
    with errors_in_one_sentence():
        with open_database(settings.for_reading()) as connection:
            evidence = _collect(connection, days, archive)
        found = audit_evidence(evidence, days, (selection.since, selection.until), selection.node)
        if as_json:
            click.echo(printable_json(msgspec.json.encode(found).decode()))
        else:
            console = Console(highlight=False, soft_wrap=True)
            for line in audit_lines(found):
                console.print(line)
        context.exit(_EXIT_CODES[found.verdict])


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per proxy and line.")
@click.pass_obj
def nodes(settings: Settings, *, as_json: bool) -> None:
    """List the proxies of the last 7 days: which run, which are silent, and their counters.

    A proxy that has not reported for 30 seconds is silent: it was killed, or cannot reach the database.
    """
    with errors_in_one_sentence():
        with open_database(settings.for_reading()) as connection:
            found = find_nodes(connection)
        if as_json:
            for node in found:
                click.echo(printable_json(msgspec.json.encode(node).decode()))
        else:
            console = Console(highlight=False, soft_wrap=True)
            for line in node_lines(found):
                console.print(line)


def _collect(connection: DeadlineConnection, days: Days, archive: Path | None) -> Evidence:
    """Show a progress bar if it takes seconds and a person waits for it."""
    console = Console(stderr=True)
    bar = Progress(*_COLUMNS, console=console, disable=not console.is_terminal, transient=True)
    task = bar.add_task("counting rows", total=None)
    timer = threading.Timer(_BAR_AFTER_SECONDS, bar.start)
    timer.daemon = True
    timer.start()
    try:
        return collect(
            connection,
            days,
            lambda done, total: bar.update(task, completed=done, total=total or None),
            archive,
        )
    finally:
        timer.cancel()
        timer.join()
        bar.stop()

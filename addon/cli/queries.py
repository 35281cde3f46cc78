"""The commands that look at the log: tail, report, export; what they ask and print is the exporter's."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from exporter.postgres.connection import describe
from exporter.read.export import GOACCESS_OPTIONS, count, for_terminal, streamed
from exporter.read.human import printable_json
from exporter.read.lines import header, line
from exporter.read.report import make_report
from exporter.read.report_text import report_text
from exporter.read.selection import FILTER_NAMES, Selection, SelectionError
from exporter.read.session import DATABASE_ERRORS, open_database
from exporter.read.tail import tail as tail_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from exporter import Settings
    from exporter.postgres.connection import DeadlineConnection

_DEFAULT_LINES = 20
_MAX_LINES = 100_000
_LINES_AT_ONCE = 1000
_BAR = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
_NO_RIGHT = "42501"
_TOO_SLOW = "57014"  # query_canceled: PostgreSQL docs, appendix A

_FILTERS = (
    click.option("--remote", help="Name of the remote, such as pypi; * stands for anything."),
    click.option("--host", help="Host that was asked; * stands for anything."),
    click.option("--package", help="Package name with its namespace; * stands for anything."),
    click.option("--user", help="Proxy login, such as a build's name; * stands for anything."),
    click.option("--status", help="404, 4xx, or none: no response."),
    click.option(
        "--error",
        is_flag=False,
        flag_value="any",
        metavar="[TYPE]",
        help="With an error; with one of this type, such as dns; none: without.",
    ),
    click.option(
        "--slower", metavar="DURATION", help="That took longer than, such as 500ms or 2s."
    ),
    click.option(
        "--since", metavar="TIME", help="How long ago, such as 10m or 7d, or an ISO time."
    ),
    click.option("--until", metavar="TIME", help="Likewise; where the time ends."),
    click.option("--text", help="Part of the host, path, package, purl or user."),
)


def filters(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which rows; it takes them as `selection`."""

    @functools.wraps(command)
    def selecting(*args: Any, **options: Any) -> None:
        texts = {name: options.pop(name) for name in FILTER_NAMES}
        try:
            selection = Selection.parse(texts)
        except SelectionError as e:
            raise click.UsageError(str(e)) from None
        command(*args, selection=selection, **options)

    return functools.reduce(lambda it, option: option(it), reversed(_FILTERS), selecting)


@click.command()
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(0, _MAX_LINES),
    help="How many rows; by default 20, or with --since all.",
)
@click.option("-f", "--follow", "following", is_flag=True, help="Go on with rows as they arrive.")
@click.option("--json", "as_json", is_flag=True, help="All columns, one JSON object a line.")
@filters
@click.pass_obj
def tail(
    settings: Settings, lines: int | None, *, following: bool, as_json: bool, selection: Selection
) -> None:
    """Show the newest rows, those that match all filters.

    Without --since they are looked for from the newest row back for half a second or so; what was
    not searched is said.
    """
    if lines is None:
        lines = _DEFAULT_LINES if selection.since is None else _MAX_LINES
    console = Console(highlight=False, soft_wrap=True)
    say = functools.partial(click.echo, err=True)
    with errors_in_one_sentence(), contextlib.suppress(KeyboardInterrupt):  # how following ends
        batches = tail_rows(
            settings, selection, lines, following=following, as_json=as_json, say=say
        )
        for number, rows in enumerate(batches):
            if not number and not rows and not following:
                say("No row matches.")
            width = console.width if console.is_terminal else None
            if not number and not as_json:
                console.print(header(width))
            for row in rows:
                if as_json:
                    click.echo(printable_json(row.json or ""))
                else:
                    console.print(line(row, width))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with ten of each kind.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write one HTML file that needs nothing else.",
)
@filters
@click.pass_obj
def report(settings: Settings, *, as_json: bool, html: Path | None, selection: Selection) -> None:
    """Sum up the last 24 hours, or --since, of the rows that match all filters."""
    with errors_in_one_sentence():
        with open_database(settings) as connection:
            found = make_report(connection, selection)
        if html is not None:
            from exporter.read.report_html import report_html  # noqa: PLC0415 - a template engine

            html.write_text(report_html(found), encoding="utf-8")
        if as_json:
            click.echo(printable_json(msgspec.json.encode(found).decode()))
        elif html is None:
            console = Console(highlight=False)
            console.print(report_text(found, console.width))


@click.command(
    epilog=f"GoAccess reads it so: artifactapi export goaccess | goaccess {GOACCESS_OPTIONS} -"
)
@click.argument("form", type=click.Choice(["csv", "jsonl", "goaccess", "cyclonedx"]))
@click.option("--raw", is_flag=True, help="CSV with text as it is, even where it is a formula.")
@filters
@click.pass_obj
def export(settings: Settings, form: str, *, raw: bool, selection: Selection) -> None:
    """Write the rows that match all filters to the output.

    csv and jsonl have all columns, times in UTC; a cell of csv that a spreadsheet would take for a
    formula begins with an apostrophe. cyclonedx is an SBOM of what was really fetched.
    """
    with errors_in_one_sentence(), open_database(settings) as connection:
        if form == "cyclonedx":
            document = _sbom(connection, selection)
            click.echo(document)
            if '"components"' not in document:
                click.echo("No artifact was fetched by a request that matches.", err=True)
            return
        # Closed before the connection is, or that would wait for it.
        with contextlib.closing(streamed(connection, selection, form, raw=raw)) as lines:
            _write(lines, form, lambda: count(connection, selection))


def _sbom(connection: DeadlineConnection, selection: Selection) -> str:
    try:
        from exporter.read.sbom import TooManyError, sbom  # noqa: PLC0415 - an extra may be missing
    except ModuleNotFoundError:
        raise click.ClickException(
            "cyclonedx wants one more package: pip install 'artifactapi[sbom]'."
        ) from None
    try:
        return sbom(connection, selection)
    except TooManyError as e:
        raise click.ClickException(str(e)) from None


def _write(lines: Iterator[bytes], form: str, count_rows: Callable[[], int | None]) -> None:
    """All lines to the output, with a bar where a person waits for them and does not see them."""
    out, to_terminal = sys.stdout.buffer, sys.stdout.isatty()
    console = Console(stderr=True)
    watched = console.is_terminal and not to_terminal
    total = count_rows() if watched else None
    if total is not None and form == "csv":
        total += 1  # the line of names
    with Progress(*_BAR, console=console, disable=not watched) as progress:
        task = progress.add_task(form, total=total)
        for some in itertools.batched(lines, _LINES_AT_ONCE):
            out.writelines(
                for_terminal(it, form) for it in some
            ) if to_terminal else out.writelines(some)
            progress.advance(task, len(some))
        out.flush()


@contextlib.contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """What goes wrong becomes one sentence; that whoever reads has gone is no error."""
    try:
        yield
    except SelectionError as e:
        raise click.UsageError(str(e)) from None
    except BrokenPipeError:
        # Let no flush at exit fail over it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except DATABASE_ERRORS as e:
        if getattr(e, "sqlstate", None) == _TOO_SLOW:
            raise click.ClickException(
                "The database took too long over this; narrow it with --since or other filters."
            ) from None
        if getattr(e, "sqlstate", None) == _NO_RIGHT:
            raise click.ClickException(
                "This database role may not read the log; name one that may with --dsn"
                " (artifactapi init prints its grants)."
            ) from None
        raise click.ClickException(describe(e)) from None

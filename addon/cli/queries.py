"""The commands that read the log: tail, report, export and gaps. Queries and formats are in exporter.read."""

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

from exporter.archive.parquet import ArchiveError
from exporter.postgres.connection import describe
from exporter.read.export import (
    GOACCESS_OPTIONS,
    count_rows,
    printable_line,
    stream_rows,
    write_parquet,
)
from exporter.read.gaps import find_gaps, gap_lines
from exporter.read.human import printable_json
from exporter.read.left_days import left_days_notice
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
    from exporter.read.gaps import RecordedGap

_DEFAULT_LINES = 20
_MAX_LINES = 100_000
_LINES_PER_WRITE = 1000
_PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
)
# SQLSTATEs: PostgreSQL docs, appendix A.
_INSUFFICIENT_PRIVILEGE = "42501"
_QUERY_CANCELED = "57014"

# By filter name, in the order of --help.
_FILTERS = {
    "remote": click.option("--remote", help="Remote, such as pypi; * matches any text."),
    "host": click.option("--host", help="Requested host; * matches any text."),
    "package": click.option(
        "--package", help="Package name with its namespace; * matches any text."
    ),
    "method": click.option("--method", help="Request method, such as POST."),
    "status": click.option("--status", help="404, 4xx, or none: no response."),
    "failed": click.option(
        "--failed",
        is_flag=True,
        flag_value="yes",
        default=None,
        help="Requests that failed: no response, or status 500 and above.",
    ),
    "error": click.option(
        "--error",
        is_flag=False,
        flag_value="any",
        metavar="[TYPE]",
        help="Requests with an error. TYPE: with this error, such as dns; none: without an error.",
    ),
    "slower": click.option(
        "--slower",
        metavar="DURATION",
        help="Requests that took longer than this, such as 500ms or 2s.",
    ),
    "who": click.option(
        "--who",
        help="Proxy login or else client address, as in the column who; * matches any text.",
    ),
    "user": click.option("--user", help="Proxy login, such as a build's name; * matches any text."),
    "client": click.option(
        "--client",
        metavar="ADDRESS",
        help="Client address, or a network such as 192.0.2.0/24.",
    ),
    "node": click.option(
        "--node", help="Name of the proxy, as in its setting node; * matches any text."
    ),
    "since": click.option(
        "--since",
        metavar="TIME",
        help="Start: how long ago, such as 10m or 7d; a day, such as today, yesterday or monday, which"
        " starts at local midnight; or an ISO time.",
    ),
    "until": click.option(
        "--until", metavar="TIME", help="End (exclusive), in the same form as --since."
    ),
    "text": click.option("--text", help="Part of the host, path, package, purl or user."),
}
archive_option = click.option(
    "--archive",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of archived days to include.",
)
html_option = click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write a self-contained HTML file.",
)
_GAP_FILTERS = ("node", "since", "until")
_GAPS_EXIT = 1  # exit code of the command gaps


class GapsUnknownError(click.ClickException):
    """The command gaps has failed. The exit code tells that from gaps."""

    exit_code = 2


def filters(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add these filter options to a command. They are passed to it as the argument `selection`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_selection(*args: Any, **options: Any) -> None:
            texts = {name: options.pop(name) for name in names}
            try:
                selection = Selection.parse(texts)
            except SelectionError as e:
                raise click.UsageError(str(e)) from None
            command(*args, selection=selection, **options)

        # Decorators apply from the bottom up; in reverse order, --help lists them as above.
        decorated: Callable[..., None] = with_selection
        for name in reversed(names):
            decorated = _FILTERS[name](decorated)
        return decorated

    return decorate


@click.command()
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(0, _MAX_LINES),
    help="Number of rows. Default: 20, or all with --since.",
)
@click.option("-f", "--follow", "following", is_flag=True, help="Keep printing new rows.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print all columns, one JSON object per line."
)
@archive_option
@filters(*FILTER_NAMES)
@click.pass_obj
def tail(
    settings: Settings,
    lines: int | None,
    *,
    following: bool,
    as_json: bool,
    archive: Path | None,
    selection: Selection,
) -> None:
    """Show the newest rows that match all filters.

    Without --since, a filtered tail searches backwards for about half a second and reports how far
    it got.
    """
    if lines is None:
        lines = _DEFAULT_LINES if selection.since is None else _MAX_LINES
    console = Console(highlight=False, soft_wrap=True)
    print_notice = functools.partial(click.echo, err=True)
    with errors_in_one_sentence(), contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends --follow
        batches = tail_rows(
            settings.for_reading(),
            selection,
            lines,
            following=following,
            as_json=as_json,
            notify=print_notice,
            archive=archive,
        )
        for number, rows in enumerate(batches):
            is_first = number == 0
            if is_first and not rows and not following:
                print_notice("No rows match.")
            width = console.width if console.is_terminal else None
            if is_first and not as_json:
                console.print(header(width))
            for row in rows:
                if as_json:
                    click.echo(printable_json(row.json or ""))
                else:
                    console.print(line(row, width))


@click.command()
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, with ten entries per list."
)
@html_option
@archive_option
@filters(*FILTER_NAMES)
@click.pass_obj
def report(
    settings: Settings,
    *,
    as_json: bool,
    html: Path | None,
    archive: Path | None,
    selection: Selection,
) -> None:
    """Summarize the rows of the last 24 hours, or --since, that match all filters."""
    with errors_in_one_sentence():
        with open_database(settings.for_reading()) as connection:
            summary = make_report(
                connection, selection, archive=archive, kept_days=settings.retention.days
            )
        if html is not None:
            from exporter.read.report_html import report_html  # noqa: PLC0415 - loads a template engine

            html.write_text(report_html(summary), encoding="utf-8")
        if as_json:
            click.echo(printable_json(msgspec.json.encode(summary).decode()))
        elif html is None:
            console = Console(highlight=False)
            console.print(report_text(summary, console.width))


@click.command(epilog=f"For GoAccess: artifactapi export goaccess | goaccess {GOACCESS_OPTIONS} -")
@click.argument(
    "format_name", type=click.Choice(["csv", "jsonl", "goaccess", "cyclonedx", "parquet"])
)
@click.option("--raw", is_flag=True, help="In csv, write formulas as they are.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="In parquet, the file to write.",
)
@archive_option
@filters(*FILTER_NAMES)
@click.pass_obj
def export(
    settings: Settings,
    format_name: str,
    *,
    raw: bool,
    output: Path | None,
    archive: Path | None,
    selection: Selection,
) -> None:
    """Write the rows that match all filters to standard output, or as parquet to a file.

    csv, jsonl and parquet have all columns, with times in UTC. In csv, an apostrophe precedes text
    that a spreadsheet would read as a formula. cyclonedx is an SBOM of the artifacts that were fetched.
    """
    if (format_name == "parquet") != (output is not None):
        raise click.UsageError(
            "parquet needs --output FILE, and the other formats use standard output."
        )
    with errors_in_one_sentence(), open_database(settings.for_reading()) as connection:
        if archive is None:
            notice = left_days_notice(connection, selection, settings.retention.archive)
            if notice:
                click.echo(notice, err=True)
        if output is not None:
            rows = write_parquet(connection, selection, output, archive=archive)
            click.echo(f"{rows} {'row' if rows == 1 else 'rows'} written to {output}.", err=True)
            return
        if format_name == "cyclonedx":
            document = _sbom(connection, selection, archive)
            click.echo(document)
            if '"components"' not in document:
                click.echo("No matching request fetched an artifact.", err=True)
            return
        rows_of_log = stream_rows(connection, selection, format_name, raw=raw, archive=archive)
        # Close the COPY before the connection; closing the connection would wait for it.
        with contextlib.closing(rows_of_log) as lines:
            _write(
                lines,
                format_name,
                lambda: None if archive else count_rows(connection, selection),
            )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per gap and line.")
@filters(*_GAP_FILTERS)
@click.pass_context
def gaps(context: click.Context, *, as_json: bool, selection: Selection) -> None:
    """List the gaps in the log: how many requests were lost, when and why.

    With --since and --until, list the gaps that overlap this time.

    The exit status is 0 without gaps, 1 with gaps, and 2 if the log could not be read.
    """
    settings: Settings = context.obj
    console = Console(highlight=False, soft_wrap=True)
    found: list[RecordedGap] = []
    try:
        with errors_in_one_sentence():
            with open_database(settings.for_reading()) as connection:
                found = find_gaps(connection, selection)
            if as_json:
                for gap in found:
                    click.echo(printable_json(msgspec.json.encode(gap).decode()))
            else:
                for gap_line in gap_lines(found):
                    console.print(gap_line)
    except click.ClickException as e:
        raise GapsUnknownError(e.message) from None
    if found:
        context.exit(_GAPS_EXIT)


def _sbom(connection: DeadlineConnection, selection: Selection, archive: Path | None) -> str:
    try:
        from exporter.read.sbom import TooManyError, sbom  # noqa: PLC0415 - needs the extra "sbom"
    except ModuleNotFoundError:
        raise click.ClickException(
            "cyclonedx needs an optional package: pip install 'cyclonedx-python-lib>=11,<12'."
        ) from None
    try:
        return sbom(connection, selection, archive)
    except TooManyError as e:
        raise click.ClickException(str(e)) from None


def _write(lines: Iterator[bytes], format_name: str, get_total: Callable[[], int | None]) -> None:
    """Write all lines to standard output.

    A progress bar shows if a person waits for the lines without seeing them: standard error is a
    terminal and standard output is not.
    """
    out, to_terminal = sys.stdout.buffer, sys.stdout.isatty()
    console = Console(stderr=True)
    show_progress = console.is_terminal and not to_terminal
    total = get_total() if show_progress else None
    if total is not None and format_name == "csv":
        total += 1  # the header line
    with Progress(*_PROGRESS_COLUMNS, console=console, disable=not show_progress) as progress:
        task = progress.add_task(format_name, total=total)
        for batch in itertools.batched(lines, _LINES_PER_WRITE):
            if to_terminal:
                out.writelines(printable_line(line, format_name) for line in batch)
            else:
                out.writelines(batch)
            progress.advance(task, len(batch))
        out.flush()


@contextlib.contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Turn an error into a one-sentence message. A reader that closes the pipe is not an error."""
    try:
        yield
    except SelectionError as e:
        raise click.UsageError(str(e)) from None
    except ArchiveError as e:
        raise click.ClickException(str(e)) from None
    except BrokenPipeError:
        # Without this, the flush at exit would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except DATABASE_ERRORS as e:
        sqlstate = getattr(e, "sqlstate", None)
        if sqlstate == _QUERY_CANCELED:
            raise click.ClickException(
                "The query took too long; narrow it with --since or other filters."
            ) from None
        if sqlstate == _INSUFFICIENT_PRIVILEGE:
            raise click.ClickException(
                "This database role cannot read the log; set read.dsn in the settings file, or --dsn,"
                " to a role that can (artifactapi init prints its grants)."
            ) from None
        raise click.ClickException(describe(e)) from None

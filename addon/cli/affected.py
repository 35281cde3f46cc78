"""The command `artifactapi affected`. Queries and formats are in exporter.read."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click
import msgspec
import psycopg
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from addon.cli.answers import AnswerCommand, NoAnswerError
from addon.cli.queries import archive_option, errors_in_one_sentence, filters, html_option
from exporter.advisories.limits import SourceError
from exporter.advisories.names import purl_type
from exporter.read.human import printable, printable_json
from exporter.read.selection import FILTER_NAMES
from exporter.read.session import open_database

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from exporter import Settings
    from exporter.advisories.matching import Advisories
    from exporter.advisories.sources import SourceReader
    from exporter.postgres.connection import DeadlineConnection
    from exporter.read.affected import Affected
    from exporter.read.kept_advisories import KeptState
    from exporter.read.selection import Selection

_HIT_EXIT, _UNCERTAIN_EXIT = 1, 2
_MEGABYTE = 1_000_000
_PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
)


@click.command(cls=AnswerCommand)
@click.argument("sources", nargs=-1)
@click.option(
    "--type",
    "default_type",
    help="Ecosystem of the names in lists that are not Package URLs, such as npm or PyPI.",
)
@click.option(
    "--keep",
    is_flag=True,
    help="Store the advisories, so that the page and reports mark affected packages. Without SOURCES,"
    " compare the stored ones again. Needs a role that can change the tables.",
)
@click.option("--withdrawn", is_flag=True, help="Also use advisories that were withdrawn.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a line per advisory and package.")
@html_option
@archive_option
@filters(*FILTER_NAMES)
@click.pass_context
def affected(
    context: click.Context,
    sources: tuple[str, ...],
    *,
    default_type: str | None,
    keep: bool,
    withdrawn: bool,
    as_json: bool,
    as_csv: bool,
    html: Path | None,
    archive: Path | None,
    selection: Selection,
) -> None:
    """Report which fetched packages SOURCES name, and who fetched them.

    SOURCES are files, folders, zip files or - (standard input). They hold OSV advisories (JSON, JSON lines
    or YAML), CycloneDX or SPDX documents, or lists: a Package URL or name@version per line, or CSV with a
    header. Without SOURCES, the advisories are those that --keep stored. Nothing is sent to or fetched
    from the network.

    The exit status is 0 if no affected package was fetched, 1 if one was, 2 if it is uncertain (a version
    cannot be compared, the log has gaps in this time, or SOURCES name no package), and 3 if there is no answer.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other.")
    if default_type is not None and purl_type(default_type) is None:
        raise click.UsageError(
            f"--type {printable(default_type)!r} is not an ecosystem; expected one such as npm, pypi, maven or"
            " Debian."
        )
    settings: Settings = context.obj
    console = Console(stderr=True)
    columns = _PROGRESS_COLUMNS
    is_shown = console.is_terminal
    with Progress(*columns, console=console, disable=not is_shown, transient=True) as progress:
        reader = _read(sources, default_type, progress, withdrawn=withdrawn) if sources else None
        with errors_in_one_sentence(), _role_that_keeps() if keep else contextlib.nullcontext():
            found = _find(settings, reader, selection, progress, keep=keep, archive=archive)
    with errors_in_one_sentence():
        if html is not None:
            from exporter.read.affected_html import affected_html  # noqa: PLC0415 - loads a template engine

            html.write_text(affected_html(found), encoding="utf-8")
        _print(found, as_json=as_json, as_csv=as_csv, briefly=html is not None)
    if found.is_hit:
        context.exit(_HIT_EXIT)
    if found.is_uncertain:
        context.exit(_UNCERTAIN_EXIT)


def _read(
    sources: tuple[str, ...], default_type: str | None, progress: Progress, *, withdrawn: bool
) -> SourceReader:
    # Not at the top: the libraries that compare versions take a tenth of a second.
    from exporter.advisories.sources import SourceReader, total_bytes  # noqa: PLC0415

    try:
        total = total_bytes(sources)
        task = progress.add_task("read, MB", total=None if total is None else total / _MEGABYTE)
        reader = SourceReader(
            default_type=default_type,
            include_withdrawn=withdrawn,
            on_progress=lambda done: progress.update(task, completed=done // _MEGABYTE),
        )
        for source in sources:
            reader.read(
                source, None if sys.stdin is None else sys.stdin.buffer
            )  # None: it is closed
    except SourceError as e:
        raise NoAnswerError(printable(str(e))) from None
    progress.update(
        task,
        total=max(1, reader.bytes_read // _MEGABYTE),
        completed=max(1, reader.bytes_read // _MEGABYTE),
    )
    return reader


@contextlib.contextmanager
def _role_that_keeps() -> Iterator[None]:
    """Say which role --keep needs. The role of a proxy cannot even read what was fetched."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege:
        raise NoAnswerError(
            "This database role cannot store advisories; set --dsn to the role that owns the tables."
        ) from None


def _find(
    settings: Settings,
    reader: SourceReader | None,
    selection: Selection,
    progress: Progress,
    *,
    keep: bool,
    archive: Path | None,
) -> Affected:
    from exporter.read import advisory_store  # noqa: PLC0415 - as above
    from exporter.read.affected import compare, find_affected, stored_summary  # noqa: PLC0415

    with open_database(settings if keep else settings.for_reading()) as connection:
        state = None
        if reader is None:
            state, advisories = _load_kept(connection)
            summary = stored_summary(state)
        else:
            advisories, summary = reader.advisories, reader.summary
            if keep and not summary.packages:  # such as the output of a download that failed
                raise NoAnswerError(
                    "The sources name no package, so the stored advisories were not replaced."
                )
        task = progress.add_task("compared", total=None)
        comparison = compare(
            connection,
            advisories,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
        progress.update(task, total=1, completed=1)
        if keep:
            counts = summary.advisories, summary.packages
            try:
                advisory_store.keep(
                    connection,
                    None if reader is None else advisories,
                    comparison.matches,
                    comparison.fetched,
                    counts,
                )
            except advisory_store.TooManyAdvisoriesError as e:
                raise NoAnswerError(printable(str(e))) from None
        return find_affected(
            connection, advisories, summary, selection, comparison, kept=state, archive=archive
        )


def _load_kept(connection: DeadlineConnection) -> tuple[KeptState, Advisories]:
    from exporter.read.affected import load_advisories  # noqa: PLC0415 - as above

    state, advisories = load_advisories(connection)
    if state is None:
        raise NoAnswerError("No advisories are stored; name SOURCES, or store some with --keep.")
    return state, advisories


def _print(found: Affected, *, as_json: bool, as_csv: bool, briefly: bool) -> None:
    from exporter.read.affected_text import (  # noqa: PLC0415 - as above
        affected_csv,
        affected_text,
        headline,
    )

    if as_json:
        click.echo(printable_json(msgspec.json.encode(found).decode()))
    elif as_csv:
        for line in affected_csv(found):
            click.echo(line)
    elif briefly:
        click.echo(headline(found))
    else:
        console = Console(highlight=False)
        console.print(affected_text(found, console.width))

"""The command `artifactapi spool`: what waits on disk, and for which database."""

from __future__ import annotations

import click

from exporter import Settings, redirect_spool, waiting_rows
from exporter.read.human import printable, size


@click.command()
@click.option(
    "--redirect",
    is_flag=True,
    help="Let rows that wait for other databases wait for this one. The next proxy writes them.",
)
@click.pass_obj
def spool(settings: Settings, *, redirect: bool) -> None:
    """List the rows of earlier proxies that wait on disk, by database.

    Rows wait for the database that they were meant for. Files of running proxies are not listed.
    """
    if redirect:
        count = redirect_spool(settings)
        click.echo(f"{count} {'file waits' if count == 1 else 'files wait'} for this database now.")
        return
    found = waiting_rows(settings)
    if not found:
        click.echo("No rows of earlier proxies wait on disk.")
    for waiting, is_current in found:
        files = f"{waiting.files} {'file' if waiting.files == 1 else 'files'}"
        current = "" if is_current else "  (another database; see --redirect)"
        click.echo(f"{files}, {size(waiting.bytes)}: {printable(waiting.database)}{current}")

"""The command `artifactapi status`: the figures of the proxies that run here."""

from __future__ import annotations

import click
import msgspec
from rich.console import Console

from addon.cli.answers import AnswerCommand, NoAnswerError
from exporter import proxy_statuses
from exporter.read.human import printable_json
from exporter.read.proxy_status import exit_status, status_lines


@click.command(cls=AnswerCommand)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per proxy and line.")
@click.pass_context
def status(context: click.Context, *, as_json: bool) -> None:
    """Show the figures of the proxies that use this data folder, whether or not PostgreSQL is available.

    They are at most two seconds old; the output says how old. Call it as the user of the proxy, on the
    same machine or in the same container.

    The exit status is 0 if every request is logged, 1 if requests were lost, 2 if a proxy cannot write,
    had an internal error, is silent or was killed, and 3 if there is no proxy or an error.
    """
    try:
        found = proxy_statuses()
    except OSError as e:
        raise NoAnswerError(f"{e.filename}: can't be read ({e.strerror}).") from None
    if not found:
        raise NoAnswerError(
            "No proxy with this data folder runs here; call the command as the user of the proxy, and with "
            "its ARTIFACTAPI_HOME. `artifactapi nodes` lists the proxies of the database."
        )
    console = Console(highlight=False, soft_wrap=True)
    for place, proxy in enumerate(found):
        if as_json:
            click.echo(printable_json(msgspec.json.encode(proxy).decode()))
            continue
        if place:
            console.print()
        for line in status_lines(proxy):
            console.print(line)
    context.exit(exit_status(found))

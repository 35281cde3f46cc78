"""The commands that look at the log: tail, report, export; what they ask and print is the exporter's."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from exporter.connection import describe
from exporter.human import printable_json
from exporter.lines import header, line
from exporter.readonly import TROUBLE
from exporter.selection import Selection, SelectionError
from exporter.tail import tail as tail_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from exporter import Settings

_DEFAULT_LINES = 20
_MAX_LINES = 100_000
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
        texts = {name: options.pop(name) for name in _FILTER_NAMES}
        try:
            selection = Selection.parse(texts)
        except SelectionError as e:
            raise click.UsageError(str(e)) from None
        command(*args, selection=selection, **options)

    return functools.reduce(lambda it, option: option(it), reversed(_FILTERS), selecting)


_FILTER_NAMES = (
    "remote",
    "host",
    "package",
    "user",
    "status",
    "error",
    "slower",
    "since",
    "until",
    "text",
)


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
    """Show the newest rows, those that match all filters."""
    if lines is None:
        lines = _DEFAULT_LINES if selection.since is None else _MAX_LINES
    console = Console(highlight=False, soft_wrap=True)
    say = functools.partial(click.echo, err=True)
    with told_simply():
        batches = tail_rows(settings, selection, lines, following=following, say=say)
        for number, rows in enumerate(batches):
            width = console.width if console.is_terminal else None
            if not number and not as_json:
                console.print(header(width))
            for row in rows:
                if as_json:
                    click.echo(printable_json(row.json))
                else:
                    console.print(line(row, width))


@contextlib.contextmanager
def told_simply() -> Iterator[None]:
    """What goes wrong becomes one sentence; that whoever reads or watches has gone is no error."""
    try:
        yield
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # Let no flush at exit fail over it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except TROUBLE as e:
        if getattr(e, "sqlstate", None) == _TOO_SLOW:
            raise click.ClickException(
                "The database took too long over this; narrow it with --since or other filters."
            ) from None
        raise click.ClickException(describe(e)) from None

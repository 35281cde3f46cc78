"""The command `artifactapi verify`: whether builds fetched what their lock files say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console

from addon.cli.affected import AnswerCommand
from addon.cli.queries import errors_in_one_sentence, filters
from exporter import Settings, SettingsError, load_remotes
from exporter.lockfiles import FORMATS, LockFileError, read_lock_file
from exporter.read.human import printable, printable_json
from exporter.read.lock_comparison import Allowed
from exporter.read.selection import parse_duration
from exporter.read.session import open_database
from exporter.read.verify import TooManyError, wait_for_rows
from exporter.read.verify import verify as verify_builds
from exporter.read.verify_text import verification_text

if TYPE_CHECKING:
    from exporter.lockfiles import LockFile
    from exporter.read.selection import Selection
    from exporter.read.verify import Verification

_FILTERS = ("user", "who", "client", "node", "since", "until")
_EXITS = {"as locked": 0, "findings": 1, "uncertain": 2}


@click.command(cls=AnswerCommand)
@click.argument(
    "lock_files", nargs=-1, required=True, metavar="LOCKFILE...", type=click.Path(path_type=Path)
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(list(FORMATS)),
    help="Format of the lock files. Default: what their names say.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="HOST",
    help="A host that packages may come from, such as a mirror; * matches any text. Packages whose lock"
    " file names no host must then come from such a host. Can be repeated.",
)
@click.option(
    "--allow-package",
    "packages",
    multiple=True,
    metavar="PACKAGE",
    help="A package that may be fetched although it is not locked, such as setuptools; * matches any"
    " text. Can be repeated.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Artifacts of ecosystems that no lock file covers are findings too.",
)
@click.option(
    "--wait",
    metavar="DURATION",
    default="3s",
    show_default=True,
    help="First wait until no row has arrived for so long, at most a minute. 0s: do not wait.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@filters(*_FILTERS)
@click.pass_context
def verify(
    context: click.Context,
    lock_files: tuple[Path, ...],
    *,
    format_name: str | None,
    hosts: tuple[str, ...],
    packages: tuple[str, ...],
    strict: bool,
    wait: str,
    as_json: bool,
    selection: Selection,
) -> None:
    """Check whether a build fetched what its lock files say.

    Name the build with --user, --who, --client or --since. A finding is an artifact that is not
    locked, or that came from another host, with another digest or file name than the lock files say.

    The exit status is 0 if everything is as locked, 1 with findings, 2 if it is uncertain (the log
    has a gap at that time, a proxy may have more rows, or there is no request of this build), and 3 if
    nothing could be compared.
    """
    if not (selection.user or selection.who or selection.client or selection.since):
        raise click.UsageError("Name the build with --user, --who, --client or --since.")
    allowed = Allowed(tuple(map(str.lower, hosts)), packages, strict)
    try:
        with errors_in_one_sentence():
            quiet_seconds = parse_duration(wait, "--wait").total_seconds()
            files = [read_lock_file(path, format_name) for path in lock_files]
            result = _verify(context.obj, selection, files, allowed, quiet_seconds)
    except (LockFileError, SettingsError, TooManyError) as e:
        raise click.ClickException(printable(str(e))) from None
    if as_json:
        click.echo(printable_json(msgspec.json.encode(result).decode()))
    else:
        console = Console(highlight=False)
        console.print(verification_text(result))
    context.exit(_EXITS[result.status])


def _verify(
    settings: Settings,
    selection: Selection,
    lock_files: list[LockFile],
    allowed: Allowed,
    quiet_seconds: float,
) -> Verification:
    remotes = load_remotes(settings)
    with open_database(settings.for_reading()) as connection:
        if quiet_seconds:
            wait_for_rows(connection, selection, quiet_seconds)
        return verify_builds(connection, selection, lock_files, allowed, remotes)

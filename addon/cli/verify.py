"""The command `artifactapi verify`: whether builds fetched what their lock files say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import msgspec
from rich.console import Console

from addon.cli.answers import AnswerCommand
from addon.cli.queries import archive_option, errors_in_one_sentence, filters
from exporter import SettingsError, load_remotes
from exporter.read.human import printable, printable_json
from exporter.read.selection import parse_duration
from exporter.read.session import open_database

if TYPE_CHECKING:
    from exporter import Settings
    from exporter.read.selection import Selection
    from exporter.read.verify import Verification

_FILTERS = ("user", "who", "client", "node", "since", "until")
_EXITS = {"as locked": 0, "findings": 1, "uncertain": 2}


class _Expected(NamedTuple):
    """What the build should have fetched, as the options say it."""

    lock_files: tuple[Path, ...]
    format_name: str | None
    hosts: tuple[str, ...]
    packages: tuple[str, ...]
    strict: bool
    archive: Path | None


@click.command(cls=AnswerCommand)
@click.argument(
    "lock_files", nargs=-1, required=True, metavar="LOCKFILE...", type=click.Path(path_type=Path)
)
@click.option(
    "--format",
    "format_name",
    help="Format of the lock files, such as npm. Default: what their names say.",
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
@archive_option
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
    archive: Path | None,
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
    with errors_in_one_sentence():
        quiet_seconds = parse_duration(wait, "--wait").total_seconds()
        expected = _Expected(lock_files, format_name, hosts, packages, strict, archive)
        result = _verify(context.obj, selection, expected, quiet_seconds)
    if as_json:
        click.echo(printable_json(msgspec.json.encode(result).decode()))
    else:
        from exporter.read.verify_text import verification_text  # noqa: PLC0415 - like in _verify

        console = Console(highlight=False)
        console.print(verification_text(result))
    context.exit(_EXITS[result.status])


def _verify(
    settings: Settings, selection: Selection, expected: _Expected, quiet_seconds: float
) -> Verification:
    # Not at the top: the libraries that read lock files take a tenth of a second.
    from exporter.lockfiles import LockFileError, read_lock_file  # noqa: PLC0415
    from exporter.read.lock_comparison import Allowed  # noqa: PLC0415
    from exporter.read.verify import TooManyError, wait_for_rows  # noqa: PLC0415
    from exporter.read.verify import verify as compare  # noqa: PLC0415

    allowed = Allowed(tuple(map(str.lower, expected.hosts)), expected.packages, expected.strict)
    try:
        lock_files = [read_lock_file(path, expected.format_name) for path in expected.lock_files]
        remotes = load_remotes(settings)
        with open_database(settings.for_reading()) as connection:
            if quiet_seconds:
                wait_for_rows(connection, selection, quiet_seconds)
            return compare(
                connection, selection, lock_files, allowed, remotes, archive=expected.archive
            )
    except (LockFileError, SettingsError, TooManyError) as e:
        raise click.ClickException(printable(str(e))) from None

"""The command `artifactapi`: run mitmproxy with the log on, and reach the database; writes no rows."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import psycopg
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from addon.cli.identify import identify_urls
from addon.cli.queries import export, report, tail
from exporter import Settings, SettingsError, check_dsn, load_remotes, load_settings, resolve_dsn
from exporter.postgres.connection import describe, reachable
from exporter.postgres.dsn import without_password
from exporter.postgres.embedded import EmbeddedServer, programs
from exporter.postgres.schema import grants, schema_name
from exporter.read.gaps import all_gaps, gap_lines
from exporter.read.session import DATABASE_ERRORS, open_database

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporter.postgres.connection import DeadlineConnection


def _leave(number: int, _: object) -> None:
    """End as by Ctrl-C: what was started, the embedded server among it, is let go of."""
    sys.exit(128 + number)


SCRIPT = Path(__file__).resolve().parents[1] / "artifactapi.py"
_TOOLS = ("mitmdump", "mitmproxy", "mitmweb")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="artifactapi")
@click.option("--dsn", default="", help="Connection string or URI of the database.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Settings file, as for the option artifactapi_config.",
)
@click.pass_context
def main(context: click.Context, dsn: str, config: Path | None) -> None:
    """Access log of mitmproxy in Postgres.

    The database is the one that --dsn, ARTIFACTAPI_DSN or the settings file names, else the
    embedded server, which is started while a command needs it.
    """
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, _leave)
    try:
        settings = load_settings(config)
        settings = settings.with_dsn(resolve_dsn(dsn, settings))
        check_dsn(settings.database.dsn)
    except SettingsError as e:
        raise click.ClickException(str(e)) from None
    context.obj = settings


@main.command()
def path() -> None:
    """Print the script's path: mitmdump -s "$(artifactapi path)"."""
    click.echo(SCRIPT)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--web", "tool", flag_value="mitmweb", help="Run mitmweb instead of mitmdump.")
@click.option("--console", "tool", flag_value="mitmproxy", help="Run mitmproxy's console instead.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(tool: str | None, arguments: tuple[str, ...]) -> None:
    """Run mitmdump with the access log on. ARGUMENTS are mitmproxy's own."""
    from mitmproxy.tools import main as mitmproxy  # noqa: PLC0415 - takes half a second

    sys.argv = [tool or "mitmdump", "-s", str(SCRIPT), *arguments]
    sys.exit(getattr(mitmproxy, sys.argv[0])(sys.argv[1:]))


@main.command()
@click.pass_obj
def dsn(settings: Settings) -> None:
    """Print a connection string without a password, for psql and friends.

    The embedded server answers to it while a proxy or another command keeps it running.
    """
    click.echo(without_password(settings.database.dsn or EmbeddedServer().dsn))


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def psql(settings: Settings, arguments: tuple[str, ...]) -> None:
    """Open psql on the database. ARGUMENTS are psql's own."""
    program = shutil.which("psql") or str(programs() / "psql")
    try:
        with reachable(settings.database) as target:
            # In the environment no password shows in the list of processes.
            done = subprocess.run(
                [program, without_password(target), *arguments],
                check=False,
                env=_with_password(target),
            )
    except DATABASE_ERRORS as e:
        raise click.ClickException(describe(e)) from None
    sys.exit(done.returncode)


@main.command()
@click.option(
    "--proxy-role",
    default="artifactapi_proxy",
    show_default=True,
    help="Role the proxies log in as.",
)
@click.option(
    "--reader-role", default="artifactapi_reader", show_default=True, help="Role that reads."
)
@click.pass_obj
def init(settings: Settings, proxy_role: str, reader_role: str) -> None:
    """Create the schema, or bring it to this version, and print the grants for two roles.

    The first may write rows and neither read nor change them, the second may read.
    """
    with _database(settings) as connection:
        schema = schema_name(connection)
    click.echo(
        f"-- The schema is in place ({schema}.access_log). For roles with no more rights than they need:"
    )
    click.echo(f"-- CREATE ROLE {proxy_role} LOGIN; CREATE ROLE {reader_role} LOGIN;")
    click.echo(grants(schema, proxy_role, reader_role), nl=False)


for looking in (tail, report, export):
    main.add_command(looking)


@main.command()
@click.pass_obj
def gaps(settings: Settings) -> None:
    """Show the holes of the log: what was lost, when and why."""
    console = Console(highlight=False, soft_wrap=True)
    with _database(settings) as connection:
        found = all_gaps(connection)
    for text in gap_lines(found):
        console.print(text)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.argument("urls", nargs=-1)
@click.pass_obj
def identify(settings: Settings, urls: tuple[str, ...], *, as_json: bool) -> None:
    """Say which remote and which package each of URLS is; without any, of each line of the input.

    With a settings file that names remotes.file this is how to try remotes of one's own.
    """
    try:
        remotes = load_remotes(settings)
    except SettingsError as e:
        raise click.ClickException(str(e)) from None
    lines = (text.strip() for text in sys.stdin)
    given = urls or (text for text in lines if text)
    for text in identify_urls(given, remotes, as_json=as_json):
        click.echo(text)


@contextlib.contextmanager
def _database(settings: Settings) -> Iterator[DeadlineConnection]:
    """A connection to a database that has the schema; what goes wrong becomes one sentence."""
    try:
        with open_database(settings) as connection:
            yield connection
    except DATABASE_ERRORS as e:
        raise click.ClickException(describe(e)) from None


def _with_password(target: str) -> dict[str, str]:
    password = psycopg.conninfo.conninfo_to_dict(target).get("password")
    return {**os.environ, "PGPASSWORD": str(password)} if password else dict(os.environ)

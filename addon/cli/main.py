"""The `artifactapi` command: run mitmproxy with the access log, and query the log. Writes no rows."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import psycopg

# An installed package has `addon` and `exporter` in a folder that is not on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from addon.cli.affected import affected
from addon.cli.answers import NoAnswerError
from addon.cli.archive import restore
from addon.cli.audit import audit, nodes
from addon.cli.identify import explain_urls, identify_urls
from addon.cli.prune import prune
from addon.cli.queries import GapsUnknownError, export, gaps, report, tail
from addon.cli.recover import recover
from addon.cli.spool import spool
from addon.cli.status import status
from addon.cli.verify import verify
from exporter import Settings, SettingsError, check_dsn, load_remotes, load_settings, resolve_dsn
from exporter.postgres.citus import DistributionError, check_coordinator, is_distributed
from exporter.postgres.connection import describe, reachable
from exporter.postgres.dsn import without_password
from exporter.postgres.embedded import EmbeddedServer, programs
from exporter.postgres.indexes import build_missing_indexes
from exporter.postgres.locks import SharedSessionError
from exporter.postgres.schema import distribute_schema, grants, schema_name
from exporter.read.session import DATABASE_ERRORS, open_database
from exporter.retention.text_indexes import build_text_indexes, lacks_extension
from exporter.settings import ReadSettings

SCRIPT = Path(__file__).resolve().parents[1] / "artifactapi.py"
# Commands whose exit code tells an error from a result.
_ERRORS = {
    gaps.name: GapsUnknownError,
    audit.name: NoAnswerError,
    verify.name: NoAnswerError,
    affected.name: NoAnswerError,
    status.name: NoAnswerError,
}
_SIGNAL_EXIT_BASE = 128  # the exit code that shells report for a signal is 128 plus its number


def _exit_on_signal(number: int, _: object) -> None:
    """Unwind the stack, as Ctrl-C does, so that an embedded server started here is stopped."""
    sys.exit(_SIGNAL_EXIT_BASE + number)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="artifactapi")
@click.option("--dsn", default="", help="Connection string or URI of the database.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Settings file (same as mitmproxy's option artifactapi_config).",
)
@click.pass_context
def main(context: click.Context, dsn: str, config: Path | None) -> None:
    """Access log of mitmproxy in PostgreSQL.

    The database is the first one set of --dsn, read.dsn in the settings file, ARTIFACTAPI_DSN and
    database.dsn in the settings file. The commands init, prune, recover, restore, run and spool do not use
    read.dsn. If none is set, it is the embedded server, which runs while a command needs it.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    try:
        settings = load_settings(config)
        settings = settings.with_dsn(resolve_dsn(dsn, settings))
        if dsn:
            settings = msgspec.structs.replace(settings, read=ReadSettings())
        check_dsn(settings.database.dsn)
        check_dsn(settings.read.dsn, "read.dsn")
    except SettingsError as e:
        error = _ERRORS.get(context.invoked_subcommand or "", click.ClickException)
        raise error(str(e)) from None
    context.obj = settings


@main.command()
def path() -> None:
    """Print the path of the addon script, for: mitmdump -s "$(artifactapi path)"."""
    click.echo(SCRIPT)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--web", "tool", flag_value="mitmweb", help="Run mitmweb instead of mitmdump.")
@click.option(
    "--console", "tool", flag_value="mitmproxy", help="Run the mitmproxy console instead."
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(context: click.Context, tool: str | None, arguments: tuple[str, ...]) -> None:
    """Run mitmdump with the access log. ARGUMENTS are passed to it."""
    from mitmproxy.tools import main as mitmproxy_tools  # noqa: PLC0415 - takes half a second

    options = context.find_root().params
    if options["dsn"]:
        # Not as an option of mitmproxy, which mitmweb would show to its users.
        os.environ["ARTIFACTAPI_DSN"] = options["dsn"]
    config = options["config"]
    config_option = ["--set", f"artifactapi_config={config.absolute()}"] if config else []
    program = tool or "mitmdump"
    sys.argv = [program, "-s", str(SCRIPT), *config_option, *arguments]
    sys.exit(getattr(mitmproxy_tools, program)(sys.argv[1:]))


@main.command()
@click.pass_obj
def dsn(settings: Settings) -> None:
    """Print a connection string without a password, for clients that read the log.

    The embedded server accepts connections only while a proxy or another command keeps it running.
    """
    click.echo(without_password(settings.for_reading().database.dsn or EmbeddedServer().dsn))


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def psql(settings: Settings, arguments: tuple[str, ...]) -> None:
    """Open psql on the database, to read the log. ARGUMENTS are passed to psql.

    With read.dsn set, use --dsn to connect as a role that can change the tables.
    """
    program = shutil.which("psql") or str(programs() / "psql")
    try:
        with reachable(settings.for_reading().database) as target:
            # The list of processes would show a password among the arguments.
            completed = subprocess.run(
                [program, without_password(target), *arguments],
                check=False,
                env=_password_environment(target),
            )
    except DATABASE_ERRORS as e:
        raise click.ClickException(describe(e)) from None
    sys.exit(completed.returncode)


@main.command()
@click.option(
    "--proxy-role",
    default="artifactapi_proxy",
    show_default=True,
    help="Role of the proxies.",
)
@click.option(
    "--reader-role",
    default="artifactapi_reader",
    show_default=True,
    help="Role of the readers.",
)
@click.option(
    "--distribute",
    is_flag=True,
    help="Distribute the log over the workers of a Citus cluster, with the rows that it has. Writers wait"
    " meanwhile. Connect to the coordinator.",
)
@click.pass_obj
def init(settings: Settings, proxy_role: str, reader_role: str, *, distribute: bool) -> None:
    """Create or upgrade the schema, and print the grants for two roles.

    The proxy role can insert rows but cannot read or change them. The reader role can only read.
    Indexes of a large log are built one day at a time, while proxies write.
    """
    try:
        with open_database(settings, may_create=True) as connection:
            check_coordinator(connection)
            schema = schema_name(connection)
            connection.call_deadline = None
            connection.call_seconds = float("inf")  # an index of a large day takes minutes
            days = itertools.chain(
                build_missing_indexes(connection), build_text_indexes(connection, settings.database)
            )
            for day in days:
                click.echo(f"Building an index of {day}", err=True)
            can_speed_up_text = lacks_extension(connection, settings.database)
            if distribute and distribute_schema(connection):
                click.echo("The log is distributed now", err=True)
            on_cluster = is_distributed(connection)
    except (DistributionError, SharedSessionError) as e:
        raise click.ClickException(str(e)) from None
    except DATABASE_ERRORS as e:
        raise click.ClickException(describe(e)) from None
    click.echo(
        f"-- The schema is ready ({schema}.access_log). To create roles with only the privileges they need:"
    )
    click.echo(f"-- CREATE ROLE {proxy_role} LOGIN; CREATE ROLE {reader_role} LOGIN;")
    click.echo(grants(schema, proxy_role, reader_role, is_distributed=on_cluster), nl=False)
    if can_speed_up_text:
        click.echo("-- To find text in days that are over by an index: CREATE EXTENSION pg_trgm;")


_QUERY_COMMANDS = (
    tail,
    report,
    export,
    gaps,
    audit,
    nodes,
    status,
    verify,
    affected,
    restore,
    spool,
    recover,
    prune,
)
for query_command in _QUERY_COMMANDS:
    main.add_command(query_command)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.option("--explain", "explains", is_flag=True, help="Show what was tried, and why it failed.")
@click.argument("urls", nargs=-1)
@click.pass_obj
def identify(settings: Settings, urls: tuple[str, ...], *, as_json: bool, explains: bool) -> None:
    """Show the remote and the package that each of URLS belongs to.

    Without URLS, read them from standard input, one per line. Use this with --config to test a
    remotes.file.
    """
    if as_json and explains:
        raise click.UsageError("--explain has no JSON form, leave out --json.")
    try:
        remotes = load_remotes(settings)
    except SettingsError as e:
        raise click.ClickException(str(e)) from None
    for warning in remotes.warnings:
        click.echo(f"Warning: {warning}", err=True)
    lines = (
        explain_urls(urls or sys.stdin, remotes)
        if explains
        else identify_urls(urls or sys.stdin, remotes, as_json=as_json)
    )
    for line in lines:
        click.echo(line)


def _password_environment(target: str) -> dict[str, str]:
    password = psycopg.conninfo.conninfo_to_dict(target).get("password")
    return {**os.environ, "PGPASSWORD": str(password)} if password else dict(os.environ)


if __name__ == "__main__":
    main()

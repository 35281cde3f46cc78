"""The command `artifactapi recover`: write what killed proxies have left behind, without a proxy."""

from __future__ import annotations

import contextlib

import click

from exporter import (
    DatabaseUnavailable,
    Settings,
    SettingsError,
    forget_killed,
    recover_journals,
)
from exporter.read.human import printable


@click.command()
@click.option(
    "--redirect",
    is_flag=True,
    help="Also write what killed proxies have left for other databases, to this one.",
)
@click.pass_obj
def recover(settings: Settings, *, redirect: bool) -> None:
    """Write the requests of killed proxies that are still in shared memory.

    The next proxy of this user does the same when it starts.
    """
    is_nothing = True
    try:
        for run in recover_journals(settings, any_database=redirect):
            is_nothing = False
            click.echo(printable(str(run)))
            with contextlib.suppress(OSError):  # it is shown until the next proxy starts
                forget_killed(run.run.run_id)
    except (DatabaseUnavailable, SettingsError) as e:
        raise click.ClickException(str(e)) from None
    if is_nothing:
        click.echo("No killed proxy has left anything for this database.")

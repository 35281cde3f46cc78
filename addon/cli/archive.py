"""The command `artifactapi restore`: load an archived day back into the log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.archive.parquet import ArchiveError
from exporter.postgres.connection import describe
from exporter.read.human import plural
from exporter.read.session import DATABASE_ERRORS, open_database
from exporter.retention.restore import DayBusyError, restore_day

if TYPE_CHECKING:
    from datetime import datetime

    from exporter import Settings

_CALL_SECONDS = 3600.0  # for one statement: a day may have millions of rows


@click.command()
@click.option(
    "--day",
    type=click.DateTime(formats=["%Y-%m-%d"]),
    required=True,
    metavar="DAY",
    help="The day (UTC), such as 2026-11-27.",
)
@click.option(
    "--archive",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of archived days.",
)
@click.pass_obj
def restore(settings: Settings, *, day: datetime, archive: Path) -> None:
    """Load an archived day back into the log. Rows that are in the log already stay as they are.

    The files stay too. Needs the role that owns the tables; does not use read.dsn.
    """
    try:
        with open_database(settings, may_create=True) as connection:
            connection.call_seconds = _CALL_SECONDS
            done = restore_day(connection, archive, day.date())
    except (ArchiveError, DayBusyError) as e:
        raise click.ClickException(str(e)) from None
    except DATABASE_ERRORS as e:
        raise click.ClickException(describe(e)) from None
    known = done.rows - done.inserted
    if done.counted_twice:
        click.echo(
            f"access_log_daily counts rows of {day:%Y-%m-%d} twice now, because other rows of that day"
            " were pruned without this archive.",
            err=True,
        )
    click.echo(
        f"{plural(done.inserted, 'row')} of {day:%Y-%m-%d} restored; {known:,} were in the log already."
    )

"""The command `artifactapi prune`: remove days that need not be kept any longer."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.postgres.citus import DistributionError, check_coordinator
from exporter.postgres.connection import describe
from exporter.postgres.locks import HOUSEKEEPING, SharedSessionError, only_session
from exporter.read.human import plural, size
from exporter.read.selection import SelectionError, parse_duration
from exporter.read.session import DATABASE_ERRORS, open_database
from exporter.retention.days import LogInUseError, owns_log
from exporter.retention.prune import KeptDaysError, oldest_kept, prunable
from exporter.retention.steps import keep_in_order
from exporter.settings import MAX_KEPT_DAYS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from exporter import Settings
    from exporter.retention.prune import PrunedPartition

_DAY = timedelta(days=1)


@click.command()
@click.option(
    "--keep",
    metavar="DURATION",
    help="How long to keep rows, in whole days, such as 90d. Default: the setting retention.days.",
)
@click.option(
    "--archive",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to archive the days in. Default: the setting retention.archive.",
)
@click.option("--dry-run", is_flag=True, help="List the days that would be removed.")
@click.pass_obj
def prune(settings: Settings, keep: str | None, archive: Path | None, *, dry_run: bool) -> None:
    """Remove the days that are older than they need to be kept.

    Proxies do this by themselves if retention.days is set and their role owns the tables. Otherwise,
    run this as the owner, for example once a day. The totals of each day stay. If interrupted, run it
    again.
    """
    if archive is None and settings.retention.archive:
        archive = Path(settings.retention.archive)
    before = oldest_kept(_days_to_keep(settings, keep))
    try:
        with open_database(settings) as connection:
            connection.call_deadline = None
            connection.call_seconds = float("inf")
            check_coordinator(connection)
            if not owns_log(connection):
                raise click.ClickException(
                    "This role does not own the table access_log; use --dsn with the role that does."
                )
            if dry_run:
                total = _show(prunable(connection, before))
            else:
                with only_session(connection, HOUSEKEEPING) as is_free:
                    if not is_free:
                        raise click.ClickException(
                            "A proxy or another `artifactapi prune` is at it already; try again later."
                        )
                    total = _show(keep_in_order(connection, settings.database, before, archive))
    except (KeptDaysError, DistributionError, SharedSessionError) as e:
        raise click.ClickException(str(e)) from None
    except LogInUseError as e:
        raise click.ClickException(f"Try again later: {e}.") from None
    except DATABASE_ERRORS as e:
        raise click.ClickException(describe(e)) from None
    verb = "would leave" if dry_run else "left"
    click.echo(f"{plural(total, 'row')} from before {before:%Y-%m-%d} {verb} the table.")


def _days_to_keep(settings: Settings, keep: str | None) -> int:
    if keep is None:
        if settings.retention.days:
            return settings.retention.days
        raise click.UsageError(
            "Nothing says how long to keep rows; use --keep, such as --keep 90d."
        )
    try:
        kept = parse_duration(keep, "--keep")
    except SelectionError:
        kept = None
    if not kept or kept % _DAY or kept > MAX_KEPT_DAYS * _DAY:
        raise click.UsageError(
            f"--keep {keep!r} is not valid; expected whole days, such as 90d, at most {MAX_KEPT_DAYS}."
        )
    return kept // _DAY


def _show(partitions: Iterable[PrunedPartition]) -> int:
    """Show each partition; return the number of their rows."""
    total = 0
    for partition in partitions:
        total += partition.rows
        click.echo(_line(partition))
    return total


def _line(partition: PrunedPartition) -> str:
    first = f"{partition.from_at:%Y-%m-%d}"
    if partition.until_at - partition.from_at > _DAY:
        first += f" to {partition.until_at - _DAY:%Y-%m-%d}"
    return f"{first}  {plural(partition.rows, 'row'):>18}  {size(partition.bytes):>10}"

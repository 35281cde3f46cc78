"""A few faults while days move to the archive; `just chaos` injects more. The checks notice what they should."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.chaos_archive import FAULTS, ArchiveChaos, run, schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

_FAULTS = (
    "prune kill -9 at a line",
    "late rows, prune kill -9",
    "two prunes, one kill -9",
    "disk full",
    "postgres kill -9",
    "reader during a prune",
)


@pytest.mark.timeout(400)
def test_no_row_is_lost_or_in_two_files() -> None:
    chaos = run(iter(_FAULTS), seed=1)
    assert chaos.complaints == [], chaos.report()
    assert len(chaos.steps) == len(_FAULTS)


def test_schedule_has_every_fault() -> None:
    faults = schedule(1)
    assert {next(faults) for _ in range(63)} == set(FAULTS)


@pytest.fixture
def pruned(tmp_path: Path) -> Iterator[ArchiveChaos]:
    """A log of which a day is in the archive."""
    with ArchiveChaos(tmp_path, seed=1) as chaos:
        chaos.add_day()
        assert chaos.finish(chaos.prune()).code == 0
        chaos.add_day()
        chaos.check("before")
        assert chaos.complaints == []
        yield chaos


def _remove_file(chaos: ArchiveChaos) -> None:
    next(chaos.archive.glob("day=*/*.parquet")).unlink()


def _copy_file(chaos: ArchiveChaos) -> None:
    file = next(chaos.archive.glob("day=*/*.parquet"))
    shutil.copy(file, file.with_name("copy.parquet"))


def _delete_row(chaos: ArchiveChaos) -> None:
    with chaos.connect() as connection:
        connection.execute(
            "DELETE FROM access_log WHERE flow_id = (SELECT (array_agg(flow_id))[1] FROM access_log)"
        )


def _change_row(chaos: ArchiveChaos) -> None:
    with chaos.connect() as connection:
        connection.execute("UPDATE access_log SET path = '/other'")


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (_remove_file, "300 rows are nowhere"),
        (_copy_file, "300 rows are in two files"),
        (_delete_row, "1 rows are nowhere"),
        (_change_row, "rows that nobody wrote"),
    ],
)
def test_check_notices(
    pruned: ArchiveChaos, tamper: Callable[[ArchiveChaos], None], complaint: str
) -> None:
    tamper(pruned)
    pruned.check("after")
    assert any(complaint in found for found in pruned.complaints), pruned.complaints

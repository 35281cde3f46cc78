"""Run a short, fixed schedule of chaos faults under load and check that the log is complete."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tests.chaos import run
from tests.support.chaos_environment import Bounds, Step

if TYPE_CHECKING:
    from pathlib import Path

_SCHEDULE = (
    Step("postgres kill -9, restart", 1.0),
    Step("connection cut", 2.0),
    Step("commit reply cut off", 0.0),
    Step("commit reply swallowed", 0.0),
    Step("black hole", 3.0),
    Step("server SIGSTOP", 3.0),
    Step("ACCESS EXCLUSIVE lock", 3.0),
    Step("proxy SIGTERM, restart", 0.0),
    Step("hot reload", 0.0),
)
_BOUNDS = Bounds(call_seconds=1.0, connect_seconds=2.0, retry_max_seconds=1.0, rate=100.0)


def test_no_row_is_lost_or_duplicated_under_faults(tmp_path: Path) -> None:
    report = run(tmp_path, iter(_SCHEDULE), _BOUNDS, seconds=90)
    sys.stdout.write(report.text())  # pytest shows it if the next line fails
    assert report.complaints == []

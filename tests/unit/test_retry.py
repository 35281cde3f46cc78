"""What the log says about retries."""

from __future__ import annotations

import pytest

from exporter import Settings
from exporter.write import retry
from exporter.write.retry import Retry


@pytest.mark.parametrize(("count", "rows"), [(0, "0 rows"), (1, "1 row"), (2000, "2000 rows")])
def test_rows_are_counted_in_singular_and_plural(
    count: int,
    rows: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(retry, "_SUMMARY_SECONDS", 0.0)
    attempts = Retry(Settings().database)
    attempts.failed("no route", 0, configuration=False)
    attempts.failed("no route", count, configuration=False)
    attempts.succeeded(count)
    assert f"; {rows} buffered: no route" in caplog.messages[1]
    assert caplog.messages[2].endswith(f"; wrote {rows.replace(' ', ' buffered ')}.")

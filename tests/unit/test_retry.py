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


def test_causes_of_one_event_are_one_message_and_a_later_cause_is_another(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that stops refuses logins for other reasons from one attempt to the next."""
    attempts = Retry(Settings().database)
    for reason in ("shutting down", "connection refused", "starting up"):
        attempts.failed(reason, 0)
    assert len(caplog.messages) == 1
    attempts.failed("wrong schema", 0, configuration=True)  # somebody has to do something
    assert caplog.messages[1:] == [
        "artifactapi: PostgreSQL still unavailable; the cause changed: wrong schema"
    ]
    monkeypatch.setattr(retry, "_SETTLE_SECONDS", 0.0)
    attempts.reconfigure(Settings().database)
    for reason in ("connection refused", "no such role", "connection refused"):
        attempts.failed(reason, 0)
    assert [text.rpartition(": ")[2] for text in caplog.messages[2:]] == [
        "connection refused",
        "no such role",
    ]

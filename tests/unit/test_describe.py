"""Database errors in one line, for users: each error stated once."""

from __future__ import annotations

import psycopg
import pytest

from exporter.postgres.connection import describe

REFUSED = 'connection to server at "127.0.0.1", port {} failed: Connection refused'


@pytest.mark.parametrize(
    ("dsn", "text"),
    [
        ("host=127.0.0.1 port=1", REFUSED.format(1)),
        (
            "host=127.0.0.1,127.0.0.1 port=1,2",
            f"{REFUSED.format(1)}; {REFUSED.format(2)}",
        ),
        ("host=127.0.0.1,127.0.0.1 port=1,1", REFUSED.format(1)),
        (
            "host=/nowhere port=1",
            'connection to server on socket "/nowhere/.s.PGSQL.1" failed: No such file or directory',
        ),
    ],
)
def test_failed_connection_is_stated_once(dsn: str, text: str) -> None:
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(dsn)
    assert describe(caught.value) == text


def test_attempts_that_failed_differently_are_told_apart() -> None:
    error = psycopg.OperationalError(
        "connection timeout expired\n"
        "Multiple connection attempts failed. All failures were:\n"
        "- host: 'a', port: '1', hostaddr: '::1': connection failed: connection to server at"
        ' "::1", port 1 failed: Connection refused\n\tIs the server running on that host and'
        " accepting TCP/IP connections?\n"
        "- host: 'b', port: '2', hostaddr: '::2': connection timeout expired"
    )
    assert describe(error) == (
        'connection to server at "::1", port 1 failed: Connection refused;'
        " host: 'b', port: '2', hostaddr: '::2': connection timeout expired"
    )

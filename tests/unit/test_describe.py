"""Database errors in one line, for users: each error stated once."""

from __future__ import annotations

import psycopg
import pytest

from exporter import Settings
from exporter.postgres.connection import connect, describe

REFUSED = 'connection to server at "127.0.0.1", port {} failed: Connection refused'


@pytest.mark.parametrize(
    ("dsn", "text"),
    [
        ("host=127.0.0.1 port=1", REFUSED.format(1)),
        ("host=127.0.0.1,127.0.0.1 port=1,1", REFUSED.format(1)),
        (
            "host=127.0.0.1,127.0.0.1 port=1,2",
            f"{REFUSED.format(1)}; {REFUSED.format(2)}",
        ),
        (
            "host=/nowhere port=1",
            'connection to server on socket "/nowhere/.s.PGSQL.1" failed: No such file or directory',
        ),
    ],
)
def test_failed_connection_is_stated_once(dsn: str, text: str) -> None:
    with pytest.raises(psycopg.OperationalError) as caught:
        connect(dsn, Settings().database)
    assert describe(caught.value) == text

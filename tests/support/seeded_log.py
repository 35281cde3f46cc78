"""An access log filled with generated traffic, for tests that query it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import psycopg

from exporter.postgres.schema import ensure_schema
from tests.bench.seed_rows import Plan, load

from .access_log import AccessLog, temporary_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .postgres import Postgres


@contextlib.contextmanager
def seeded_log(server: Postgres, plan: Plan) -> Iterator[AccessLog]:
    """Create an access log with the rows of `plan` in a new schema; drop it afterwards."""
    with temporary_schema(server) as dsn:
        with psycopg.connect(dsn, autocommit=True) as connection:
            ensure_schema(connection)
            for _ in load(connection, plan):
                pass
        yield AccessLog(dsn)


__all__ = ["Plan", "seeded_log"]

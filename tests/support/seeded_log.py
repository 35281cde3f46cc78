"""A log of made-up traffic for a test module to ask questions about."""

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
    """Make a log in a schema of its own for as long as the block runs, with the rows of the plan."""
    with temporary_schema(server) as dsn:
        with psycopg.connect(dsn, autocommit=True) as connection:
            ensure_schema(connection)
            for _ in load(connection, plan):
                pass
        yield AccessLog(dsn)


__all__ = ["Plan", "seeded_log"]

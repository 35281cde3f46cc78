"""The thread of a proxy that keeps the table in order: days ahead, rollups, indexes, pruning.

It has a connection of its own, so the writer never waits for it.
"""

from __future__ import annotations

import logging
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from ..postgres.citus import is_worker
from ..postgres.connection import Deadline, DeadlineExceededError, connect, describe, reachable
from ..postgres.faults import Fault, classify
from ..postgres.locks import HOUSEKEEPING, SharedSessionError, only_session
from ..postgres.schema import SchemaError, ensure_schema
from .days import LogInUseError, create_days_ahead, owns_log
from .prune import KeptDaysError, oldest_kept
from .steps import keep_in_order

if TYPE_CHECKING:
    from psycopg import Connection

    from ..settings import Settings

logger = logging.getLogger(__name__)

THREAD_NAME = "artifactapi-housekeeping"
_FIRST_SECONDS = (
    60.0  # after the start; up to twice as long, so that a fleet does not start at once
)
_EVERY_SECONDS = 900.0  # a run without work takes milliseconds
_CALL_SECONDS = 1800.0  # limit for one statement
_JOIN_SECONDS = 1.0


class Housekeeping:
    """Owns one thread from the construction until `stop`. Thread-safe."""

    def __init__(self, settings: Settings, first_seconds: float | None = None) -> None:
        """`first_seconds`: when the first run starts; default: a minute or two."""
        self._settings = settings
        self._first_seconds = (
            _FIRST_SECONDS * (1 + random.random())  # noqa: S311 - not a secret
            if first_seconds is None
            else first_seconds
        )
        self._deadline = Deadline()
        self._stopping = threading.Event()
        self._last_problem = ""
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def reconfigure(self, settings: Settings) -> None:
        """Use other settings from the next run on."""
        self._settings = settings

    def stop(self) -> None:
        """End the thread; a statement that runs is canceled. What was begun continues next time."""
        self._stopping.set()
        self._deadline.give_up_at = 0.0
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        pause = self._first_seconds
        while not self._stopping.wait(pause):
            pause = _EVERY_SECONDS
            try:
                self._keep_in_order()
                self._last_problem = ""
            except (SchemaError, LogInUseError, KeptDaysError) as e:
                self._report(str(e))
            except SharedSessionError:
                self._report(
                    "database.dsn leads to a connection pooler; run `artifactapi prune` with a connection "
                    "string that leads to PostgreSQL itself"
                )
            except (psycopg.Error, DeadlineExceededError, OSError) as e:
                if isinstance(e, psycopg.Error) and classify(e) is not Fault.UNAVAILABLE:
                    self._report(describe(e))  # else the writer reports it
            except Exception as e:  # noqa: BLE001 - the proxy goes on whatever our bug is
                self._report(f"{type(e).__name__} in the housekeeping of the table")

    def _keep_in_order(self) -> None:
        settings = self._settings
        with (
            reachable(settings.database) as dsn,
            connect(dsn, settings.database, self._deadline) as connection,
        ):
            connection.call_seconds = _CALL_SECONDS
            ensure_schema(connection)
            create_days_ahead(connection)
            if is_worker(connection):
                if settings.retention.days:
                    self._report(
                        "retention.days is set, but this proxy writes to a worker of a Citus cluster; "
                        "run `artifactapi prune` on the coordinator, or set it for a proxy that writes there"
                    )
                return
            if not owns_log(connection):
                if settings.retention.days:
                    self._report(
                        "retention.days is set, but the role of this proxy does not own access_log; "
                        "run `artifactapi prune` as its owner"
                    )
                return
            with only_session(connection, HOUSEKEEPING) as is_free:
                if is_free:
                    self._work(connection, settings)

    def _work(self, connection: Connection[Any], settings: Settings) -> None:
        retention = settings.retention
        before = oldest_kept(retention.days) if retention.days else None
        archive = Path(retention.archive) if retention.archive else None
        for pruned in keep_in_order(connection, settings.database, before, archive):
            logger.info(
                "artifactapi: pruned %s: %d %s",
                pruned.name,
                pruned.rows,
                "row" if pruned.rows == 1 else "rows",
            )

    def _report(self, problem: str) -> None:
        """Log a problem, but not again while it lasts."""
        if problem != self._last_problem and not self._stopping.is_set():
            self._last_problem = problem
            logger.warning(
                "artifactapi: housekeeping stopped and will try again in 15 minutes: %s", problem
            )

"""A proxy with the access log on and a schema of its own, asked for its rows one request at a time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import psycopg
from psycopg.rows import dict_row

from .clients import RawClient
from .proxy import Mitm
from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .postgres import Postgres

SCRIPT = Path(__file__).resolve().parents[2] / "addon" / "artifactapi.py"
_CONFIG = "batch: {max_seconds: 0.05}\n"
_numbers = itertools.count()

Row = dict[str, Any]


class Facts(NamedTuple):
    """What of a row says how an exchange ended."""

    status: int | None
    error_type: str | None
    sent: int | None
    received: int | None
    source: str | None

    @classmethod
    def of(cls, row: Row) -> Self:
        """Take them from a row."""
        return cls(
            row["status_code"],
            row["error_type"],
            row["request_bytes"],
            row["response_bytes"],
            row["response_source"],
        )


class LoggedProxy:
    """Runs while its `with` lasts, and fails at its end if there are rows nobody has asked for.

    Args:
        server: Where the schema is made.
        folder: Where the proxy's files go.
        arguments: More of its command line.
        scripts: What is loaded; ours alone if nothing is said.
        config: Our settings, as YAML.
        password: What the connection string says, though the server asks for none.
        options: What else Mitm takes.
    """

    def __init__(
        self,
        server: Postgres,
        folder: Path,
        *arguments: str,
        scripts: Sequence[Path] = (SCRIPT,),
        config: str = _CONFIG,
        password: str = "",
        **options: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "settings.yaml"
        settings.write_text(config)
        self._schema = f"logged_{next(_numbers)}"
        self._server = server
        self.dsn = f"{server.dsn()} options=-csearch_path={self._schema}"
        secret = f" password={password}" if password else ""
        self.proxy = Mitm(
            folder,
            *("--set", f"artifactapi_dsn={self.dsn}{secret}"),
            *("--set", f"artifactapi_config={settings}"),
            *arguments,
            scripts=scripts,
            **options,
        )
        self._claimed: set[tuple[str, object]] = set()
        self._agents = (f"agent-{number}" for number in itertools.count(1))

    def __enter__(self) -> Self:
        self._connection = psycopg.connect(self._server.dsn(), autocommit=True)
        self._connection.execute(f"CREATE SCHEMA {self._schema}".encode())
        self._connection.execute(f"SET search_path = {self._schema}".encode())
        self.proxy.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.proxy.__exit__()
            if kind is None:
                self.end()
        finally:
            self._connection.execute(f"DROP SCHEMA {self._schema} CASCADE".encode())
            self._connection.close()

    def end(self) -> None:
        """Let the proxy end, and see that each row is one that was asked for."""
        self.proxy.terminate()
        rows = self.rows()
        found = {(str(row["flow_id"]), row["started_at"]) for row in rows}
        strange = [
            row for row in rows if (str(row["flow_id"]), row["started_at"]) not in self._claimed
        ]
        assert not strange, strange
        assert found == self._claimed
        assert " lost (" not in self.proxy.output()
        assert "could not be read" not in self.proxy.output()

    def agent(self) -> str:
        """A name for a user agent, which no request had before."""
        return next(self._agents)

    def client(self) -> RawClient:
        """A connection to the proxy."""
        return RawClient(self.proxy.address)

    def rows(self, where: str = "true", *values: object) -> list[Row]:
        """The rows there are now."""
        with self._connection.cursor(row_factory=dict_row) as cursor:
            if cursor.execute("SELECT to_regclass('access_log')").fetchone() == {
                "to_regclass": None
            }:
                return []
            sql = f"SELECT * FROM access_log WHERE {where} ORDER BY started_at, path"
            return cursor.execute(sql.encode(), values or None).fetchall()

    def row(self, where: str, *values: object) -> Row:
        """The one row of which this holds, once it is there."""
        rows = self.several(1, where, *values)
        return rows[0]

    def several(self, number: int, where: str, *values: object) -> list[Row]:
        """So many rows of which this holds, once they are there."""
        rows = eventually(
            lambda: found if len(found := self.rows(where, *values)) >= number else None
        )
        assert rows is not None
        assert len(rows) == number, rows
        self._claimed |= {(str(row["flow_id"]), row["started_at"]) for row in rows}
        return rows

    def of(self, agent: str) -> Row:
        """The one row of this user agent."""
        return self.row("user_agent = %s", agent)

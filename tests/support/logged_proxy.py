"""Run a proxy with its own access log, and check that the test expects every row in it."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, override

from .access_log import SCRIPT, AccessLog, Row, temporary_schema
from .http1_client import RawClient, Response
from .proxy import Mitm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .postgres import Postgres

_STATUS_SCRIPT = Path(__file__).with_name("status_file.py")
_CONFIG = "batch: {max_seconds: 0.05}\n"


class Ending(NamedTuple):
    """The columns of a row that describe how an exchange ended."""

    status_code: int | None
    error_type: str | None
    request_bytes: int | None
    response_bytes: int | None
    response_source: str | None

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Take these columns from a row."""
        return cls(*(row[name] for name in cls._fields))


class LoggedProxy(AccessLog):
    """A running proxy and its access log. Rows that a test waited for count as expected."""

    def __init__(self, proxy: Mitm, dsn: str, status_file: Path) -> None:
        super().__init__(dsn)
        self._status_file = status_file
        self.proxy = proxy
        self._expected: set[tuple[object, object]] = set()
        self._agents = (f"agent-{number}" for number in itertools.count(1))

    @override
    def wait_rows(
        self, count: int, where: str = "true", *values: object, timeout: float = 15
    ) -> list[Row]:
        """Wait until exactly `count` rows match, and return them."""
        rows = super().wait_rows(count, where, *values, timeout=timeout)
        assert len(rows) == count, rows
        self._expected |= set(map(_key, rows))
        return rows

    def new_agent(self) -> str:
        """Return a User-Agent that no request has used yet."""
        return next(self._agents)

    def client(self) -> RawClient:
        """Connect to the proxy."""
        return RawClient(self.proxy.address)

    def send_request(
        self, url: str, *headers: str, method: str = "GET", body: bytes = b""
    ) -> tuple[Response | None, Row]:
        """Send one request over a new connection; return its response and its row."""
        agent = self.new_agent()
        with self.client() as client:
            client.request(method, url, f"User-Agent: {agent}", *headers, body=body)
            response = client.read_response(method)
            return response, self.row_for_agent(agent)

    def check_rows(self) -> None:
        """Fail if the table holds an unexpected row, lacks an expected one, or a row was lost."""
        rows = self.rows()
        unexpected = [row for row in rows if _key(row) not in self._expected]
        assert not unexpected, unexpected
        assert {_key(row) for row in rows} == self._expected
        assert " lost (" not in self.proxy.output()
        assert "could not be read" not in self.proxy.output()

    def check_in_flight(self) -> None:
        """Fail unless the journal counted every request that began and ended, however it ended."""
        statuses = [json.loads(line) for line in self._status_file.read_text().splitlines()]
        wrong = [status for status in statuses if status["in_flight"] != status["open"]]
        assert not wrong, wrong[:3]


@contextlib.contextmanager
def logged_proxy(
    server: Postgres,
    folder: Path,
    *arguments: str,
    scripts: Sequence[Path] = (SCRIPT,),
    config: str = _CONFIG,
    password: str = "",
    **options: Any,
) -> Iterator[LoggedProxy]:
    """Run a proxy that logs to a new schema, and check the rows once it has stopped.

    Args:
        server: The server for the schema.
        folder: The folder for the proxy's files.
        arguments: More arguments for the proxy's command line.
        scripts: The scripts to load; by default only artifactapi.
        config: The settings file of artifactapi, as YAML.
        password: Added to the connection string, although the server asks for none.
        options: Further parameters of `Mitm`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "settings.yaml"
    settings.write_text(config)
    secret = f" password={password}" if password else ""
    with temporary_schema(server) as dsn:
        with Mitm(
            folder,
            *("--set", f"artifactapi_dsn={dsn}{secret}"),
            *("--set", f"artifactapi_config={settings}"),
            *("--set", f"status_file={folder / 'status'}"),
            *arguments,
            scripts=[*scripts, _STATUS_SCRIPT],
            **options,
        ) as proxy:
            logged = LoggedProxy(proxy, dsn, folder / "status")
            yield logged
        logged.check_rows()
        logged.check_in_flight()


def _key(row: Row) -> tuple[object, object]:
    """Return the primary key: a replayed flow keeps its id."""
    return row["flow_id"], row["started_at"]

"""mitmweb as a process: its rows, options and status command, over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support.access_log import SCRIPT, AccessLog, temporary_schema
from tests.support.http1_client import fetch
from tests.support.mitmweb import WebInterface
from tests.support.proxy import Mitm
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import Postgres


@dataclass
class Web:
    """A running mitmweb with its log and an upstream server."""

    log: AccessLog
    proxy: Mitm
    page: WebInterface
    upstream: RawUpstream

    def send(self, agent: str) -> None:
        """Send one request through the proxy."""
        assert fetch(self.proxy.address, f"{self.upstream.url}/ok", f"User-Agent: {agent}")


@pytest.fixture(scope="module")
def web(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("mitmweb")
    with temporary_schema(postgres) as dsn, RawUpstream() as upstream:
        env = {"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(folder / "home")}
        with Mitm(folder, scripts=[SCRIPT], env=env, program="mitmweb") as proxy:
            yield Web(AccessLog(dsn), proxy, WebInterface(proxy.web_url), upstream)


def test_rows_are_written(web: Web) -> None:
    web.send("seen in mitmweb")
    assert web.log.row_for_agent("seen in mitmweb")["status_code"] == 200


def test_options_exist_with_help(web: Web) -> None:
    ours = {
        name: option
        for name, option in web.page.options().items()
        if name.startswith("artifactapi_")
    }
    assert set(ours) >= {"artifactapi_config", "artifactapi_dsn", "artifactapi_filter"}
    assert all(len(option["help"]) > 20 for option in ours.values())
    assert ours["artifactapi_dsn"]["value"] == "", "the environment's DSN is not shown"


def test_status_counters_add_up(web: Web) -> None:
    for number in range(20):
        web.send(f"status-{number}")
        status = web.page.status()
        parts = ("written", "dropped", "rejected", "waiting", "spooled")
        assert status["seen"] == sum(status[part] for part in parts)
        assert status["seen"] >= number + 1
    web.log.wait_rows(20, "user_agent LIKE 'status-%%'")
    status = eventually(lambda: status if not (status := web.page.status())["waiting"] else {})
    assert status["written"] == len(web.log.rows())
    assert status["last_error"] is None
    assert status["last_written_at"]
    assert "127.0.0.1" in status["database"]


def test_status_command_needs_token(web: Web) -> None:
    assert web.page.post_without_token("/commands/artifactapi.status") == 403


def test_invalid_option_is_refused_and_old_value_stays(web: Web) -> None:
    code, text = web.page.set_options(artifactapi_filter="~bad(")
    assert code == 400
    assert "artifactapi_filter" in text
    assert "'~bad('" in text
    assert web.page.options()["artifactapi_filter"]["value"] == ""
    web.send("after the refusal")
    web.log.row_for_agent("after the refusal")


def test_filter_takes_effect_immediately(web: Web) -> None:
    assert web.page.set_options(artifactapi_filter="!~u /health")[0] == 200
    assert fetch(web.proxy.address, f"{web.upstream.url}/health", "User-Agent: health")
    web.send("no health check")
    web.log.row_for_agent("no health check")
    assert web.log.rows("user_agent = 'health'") == []
    assert web.page.set_options(artifactapi_filter="")[0] == 200

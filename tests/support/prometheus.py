"""Run a real Prometheus that scrapes proxies, with the alerts of configs/."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from .proxy import free_port
from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMETHEUS = shutil.which("prometheus")
_ALERTS = Path(__file__).resolve().parents[2] / "configs" / "prometheus-alerts.yml"
_TIMEOUT_SECONDS = 30


class Prometheus:
    """Scrapes these addresses twice a second, as the job `artifactapi`, inside its `with` block."""

    def __init__(self, folder: Path, addresses: Sequence[tuple[str, int]]) -> None:
        self._folder = folder
        self._port = free_port()
        self._targets = [f"{host}:{port}" for host, port in addresses]

    def __enter__(self) -> Self:
        assert PROMETHEUS
        config = self._folder / "prometheus.yml"
        job = {"job_name": "artifactapi", "static_configs": [{"targets": self._targets}]}
        config.write_text(
            json.dumps(  # which is YAML, too
                {
                    "global": {
                        "scrape_interval": "500ms",
                        "scrape_timeout": "500ms",
                        "evaluation_interval": "500ms",
                    },
                    "rule_files": [str(_ALERTS)],
                    "scrape_configs": [job],
                }
            )
        )
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    PROMETHEUS,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={self._folder / 'prometheus'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            eventually(self._is_ready, _TIMEOUT_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(_TIMEOUT_SECONDS)

    def query(self, expression: str) -> dict[str, float]:
        """The current value of a PromQL expression, by instance."""
        found = self._api(f"query?query={quote(expression)}")["result"]
        return {it["metric"].get("instance", ""): float(it["value"][1]) for it in found}

    def scrape_errors(self) -> dict[str, str]:
        """Why the last scrape of each target failed; empty if it did not."""
        targets = self._api("targets")["activeTargets"]
        return {it["labels"]["instance"]: it["lastError"] for it in targets}

    def alerts(self) -> dict[str, tuple[str, str]]:
        """The health of each alerting rule, and its state."""
        (group,) = self._api("rules")["groups"]
        return {rule["name"]: (rule["health"], rule["state"]) for rule in group["rules"]}

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, (self._folder / "prometheus.log").read_text()
        try:
            return all(health == "ok" for health, _ in self.alerts().values())
        except (OSError, ValueError):
            return False

    def _api(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", f"/api/v1/{path}")
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if answer["status"] != "success":
            raise ValueError(answer)
        return answer["data"]

"""configs/prometheus-alerts.yml: which metrics it reads, and when its alerts fire."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from exporter import Exporter, Settings
from exporter.metrics.families import LogCollector
from exporter.settings import SpoolSettings

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "configs" / "prometheus-alerts.yml"
_TEST = ROOT / "tests" / "data" / "prometheus_alerts.test.yml"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian: prometheus)",
)


def rules() -> list[dict[str, str]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        ["promtool", *arguments], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_alerts_read_only_metrics_that_exist() -> None:
    exporter = Exporter(Settings(spool=SpoolSettings(max_bytes=0)).with_dsn("host=/nowhere"))
    exporter.stop()
    status = {**exporter.status(), "last_written_at": "2026-11-27T19:29:32.916+00:00"}
    families = list(LogCollector(lambda: status).collect())
    samples = {sample.name for family in families for sample in family.samples}
    named = {name for rule in rules() for name in re.findall(r"artifactapi_\w+", rule["expr"])}
    assert named
    assert named <= samples


def test_each_alert_is_tested_and_says_what_to_do() -> None:
    tested = set(re.findall(r"\bArtifactapi\w+", _TEST.read_text()))
    assert {rule["alert"] for rule in rules()} == tested
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "description"}


@needs_promtool
def test_alerts_are_valid() -> None:
    assert f"SUCCESS: {len(rules())} rules found" in promtool("check", "rules", ALERTS)


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    for path in (ALERTS, _TEST):
        shutil.copy(path, tmp_path)
    assert "SUCCESS" in promtool("test", "rules", tmp_path / _TEST.name)

"""With `artifact.sha256`, complete artifacts get a digest, whether buffered or streamed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from tests.support.access_log import SCRIPT, AccessLog
from tests.support.http1_client import fetch
from tests.support.packages import FileServer, make_wheel
from tests.support.proxy import Mitm

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("streaming", [(), ("--set", "stream_large_bodies=1k")])
def test_only_complete_artifacts_have_a_digest(
    dsn: str, tmp_path: Path, streaming: tuple[str, ...]
) -> None:
    wheel = make_wheel(tmp_path / "files")
    (tmp_path / "files" / "page.html").write_text("no artifact")
    remotes, settings = tmp_path / "remotes.yaml", tmp_path / "settings.yaml"
    remotes.write_text("remotes:\n  - {name: ours, host: localhost, format: pypi}\n")
    settings.write_text(
        f"artifact: {{sha256: true}}\nremotes: {{file: {remotes}}}\ndatabase: {{dsn: '{dsn}'}}\n"
    )
    config = ("--set", f"artifactapi_config={settings}")
    with (
        FileServer(tmp_path / "files") as origin,
        Mitm(tmp_path / "mitm", *config, *streaming, scripts=[SCRIPT]) as proxy,
    ):
        for path in (wheel.name, "page.html", "absent-1.0-py3-none-any.whl"):
            assert fetch(proxy.address, f"{origin.url}/{path}")
        rows = AccessLog(dsn).wait_rows(3)
    assert [(row["status_code"], row["artifact_kind"]) for row in rows] == [
        (200, "artifact"),
        (200, None),
        (404, "artifact"),
    ]
    assert [row["sha256"] for row in rows] == [
        hashlib.sha256(wheel.read_bytes()).digest(),
        None,
        None,
    ]
    assert rows[0]["response_bytes"] == wheel.stat().st_size

"""The ten lines of docs/incident.md, run in order as one script, after a package was compromised."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exporter import Exporter, Settings
from exporter.settings import RemotesSettings
from tests.support.environment import clean_environment
from tests.support.samples import make_exchange

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "incident.md"
_FOLDER = "/etc/artifactapi"
# user, path, status
_REQUESTS = (
    ("build-41", "/left-padding", 200),  # the index only
    ("build-42", "/left-padding", 200),
    ("build-42", "/left-padding/-/left-padding-1.3.0.tgz", 200),
    ("build-42", "/other/-/other-2.0.0.tgz", 200),
    ("build-43", "/left-padding/-/left-padding-1.2.0.tgz", 200),
    ("build-44", "/left-padding/-/left-padding-1.3.0.tgz", 404),
)


def story() -> list[str]:
    """The lines of the story: comments and commands."""
    blocks = re.findall(r"(?:^    .*\n)+", _PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    (found,) = (block for block in blocks if block.startswith("    # 1."))
    return [line.removeprefix("    ") for line in found.splitlines()]


@pytest.fixture
def incident(dsn: str, tmp_path: Path) -> str:
    """A log in which build-42 fetched the compromised version an hour ago."""
    remotes = tmp_path / "remotes.yaml"
    remotes.write_text("remotes:\n  - {name: npm, host: registry.example, format: npm}\n")
    settings = Settings(node="proxy-1", remotes=RemotesSettings(file=str(remotes))).with_dsn(dsn)
    start = datetime.now(UTC).timestamp() - 3600
    exporter = Exporter(settings)
    try:
        for number, (user, path, status) in enumerate(_REQUESTS):
            at = start + number
            exchange = make_exchange(
                number,
                started_at=at,
                head_at=at + 0.1,
                ended_at=at + 0.2,
                proxy_user=user,
                target=path.encode(),
                status_code=status,
            )
            assert exporter.log_access(exchange)
    finally:
        assert exporter.stop()
    return dsn


def test_the_story_has_ten_numbered_lines() -> None:
    lines = story()
    comments, commands = lines[::2], lines[1::2]
    assert [line.split(".")[0] for line in comments] == [f"# {number}" for number in range(1, 11)]
    assert len(commands) == 10
    assert not any(line.startswith("#") for line in commands)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of mitmproxy's use of pyparsing
def test_the_option_that_blocks_the_package_is_valid() -> None:
    from mitmproxy.addons.blocklist import parse_spec  # noqa: PLC0415 - warns while it is imported

    (option,) = re.findall(r"block_list='([^']+)'", "\n".join(story()))
    assert parse_spec(option).status_code == 403


def test_the_story_finds_the_build_and_leaves_evidence(
    incident: str, tmp_path: Path, query: Callable[..., list[tuple[object, ...]]]
) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    (tmp_path / "bad.txt").write_text("left-padding@1.3.0\n")
    evidence = tmp_path / "evidence"
    evidence.mkdir()
    script = "\n".join(story()).replace(_FOLDER, str(tmp_path))
    done = subprocess.run(
        ["bash", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        cwd=evidence,
        timeout=100,
        env={
            **clean_environment(),
            "ARTIFACTAPI_DSN": incident,
            "ARTIFACTAPI_HOME": str(tmp_path / "home"),
            "COLUMNS": "120",
            "LC_ALL": "C.UTF-8",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr in {"", "No rows match.\n"}  # in the last hour
    assert re.findall(r"status \d", done.stdout) == ["status 1", "status 0", "status 1", "status 1"]
    assert done.stdout.startswith("1 affected package was fetched, by 1 user.")
    assert "npm left-padding 1.3.0" in done.stdout
    assert (evidence / "builds.txt").read_text() == "build-42\n"
    with (evidence / "affected.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["how"], row["users"]) for row in csv.DictReader(file) if row["version"]]
    assert rows == [("fetched", "build-42"), ("not found", "build-44")]
    assert "build-42" in (evidence / "affected.html").read_text(encoding="utf-8")
    with (evidence / "requests.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 5
    sbom = json.loads((evidence / "build-42.cdx.json").read_text(encoding="utf-8"))
    assert {each["purl"] for each in sbom["components"]} == {
        "pkg:npm/left-padding@1.3.0",
        "pkg:npm/other@2.0.0",
    }
    assert query("SELECT purl, verdict FROM advisory_match") == [
        ("pkg:npm/left-padding@1.3.0", "affected")
    ]

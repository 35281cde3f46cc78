"""Every `artifactapi` command and every SQL statement in the docs runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.support.environment import clean_environment
from tests.support.seeded_log import Plan, seeded_log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import Postgres

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# `run` starts a proxy; tests/proxy/test_commandline.py runs it. `-f` never ends.
_NOT_HERE = re.compile(r"artifactapi run|tail -f|--config|service=")


def code_lines(page: Path) -> Iterator[str]:
    """The lines of the code blocks of a page, without prompt and indentation."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            yield line.strip().removeprefix("$ ").removeprefix("uv run ")


def commands() -> list[str]:
    found = {line for page in PAGES for line in code_lines(page) if line.startswith("artifactapi ")}
    return sorted(line for line in found if not _NOT_HERE.search(line))


def statements() -> list[str]:
    page = (ROOT / "docs" / "schema.md").read_text(encoding="utf-8")
    blocks = re.findall(r"\n\n((?:    .*\n)+)", page)
    return [text for block in blocks if (text := block.strip()).startswith("SELECT")]


@pytest.fixture(scope="module")
def dsn(postgres: Postgres) -> Iterator[str]:
    with seeded_log(postgres, Plan(2000, datetime.now(UTC), days=2)) as log:
        yield log.dsn


def test_the_docs_hold_commands_and_statements() -> None:
    assert len(commands()) > 8
    assert len(statements()) > 3


@pytest.mark.parametrize("command", commands())
def test_a_command_in_the_docs_runs(dsn: str, command: str, tmp_path: Path) -> None:
    words = shlex.split(re.split(r" \||>", command)[0].rstrip("\\"))
    words = [word for word in words if word != "-v" or "psql" in words]
    words[0] = str(Path(sys.executable).with_name("artifactapi"))
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    done = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env={**clean_environment(), "ARTIFACTAPI_DSN": dsn},
    )
    expected = (0, 1) if " gaps" in command else (0,)  # the generated log has gaps
    assert done.returncode in expected, done.stderr


@pytest.mark.parametrize("statement", statements())
def test_a_statement_in_the_docs_runs(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(statement.encode())

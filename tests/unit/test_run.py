"""Tests of exporter/run.py: what identifies a run."""

from __future__ import annotations

import time
import tomllib
import uuid
from pathlib import Path

import msgspec

from exporter.run import Run


def test_each_run_has_its_own_random_id() -> None:
    runs = [Run.start("proxy-1") for _ in range(100)]
    assert len({run.run_id for run in runs}) == 100
    assert {uuid.UUID(run.run_id).version for run in runs} == {4}


def test_a_run_says_which_proxy_of_which_version_started_when() -> None:
    before = time.time()
    run = Run.start("proxy-1")
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (run.node, run.version) == ("proxy-1", project["version"])
    assert before <= run.started_at <= time.time()


def test_a_run_can_be_stored_as_bytes() -> None:
    run = Run.start("proxy-1")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(run), type=Run) == run

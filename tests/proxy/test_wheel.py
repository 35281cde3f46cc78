"""The wheel built from this checkout works outside of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.wheel_check import check

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(300)
def test_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    built = tmp_path / "dist"
    subprocess.run(
        [os.environ.get("UV", "uv"), "build", "--quiet", "--out-dir", built, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = built.glob("*.whl")
    check(wheel, tmp_path)

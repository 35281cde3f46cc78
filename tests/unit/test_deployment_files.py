"""configs/artifactapi.service and configs/Containerfile: what other programs say about them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from exporter import Settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_UNITS = sorted(path.name for path in CONFIGS.glob("*.service"))
_DOCKER_STOP_SECONDS = 10.0
_MAX_EXPOSURE = 2.0  # of 10; systemd calls up to 2 "OK", and a service without any setting has 9.6

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def analyze(*arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
@pytest.mark.parametrize("name", _UNITS)
def test_unit_is_valid(name: str) -> None:
    assert name not in analyze("verify", str(CONFIGS / name))


def test_all_units_find_the_command_in_the_same_place() -> None:
    texts = [(CONFIGS / name).read_text() for name in _UNITS]
    paths = [re.findall(r"^Environment=PATH=(.*)$", text, re.MULTILINE) for text in texts]
    commands = [re.findall(r"^ExecStart=/usr/bin/env (\S+)", text, re.MULTILINE) for text in texts]
    assert commands == [["artifactapi"]] * len(_UNITS)
    assert paths == [["/opt/artifactapi/bin:/usr/local/bin:/usr/bin:/bin"]] * len(_UNITS)


@needs_systemd
def test_proxy_can_do_little_beyond_its_task() -> None:
    shown = analyze("security", "--offline=true", str(CONFIGS / "artifactapi.service"))
    (exposure,) = re.findall(r"Overall exposure level for artifactapi.service: ([\d.]+)", shown)
    assert float(exposure) <= _MAX_EXPOSURE


def test_unit_leaves_time_for_a_stop() -> None:
    unit = (CONFIGS / "artifactapi.service").read_text()
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)s$", unit, re.MULTILINE)
    assert float(seconds) > Settings().shutdown.drain_seconds + 5
    assert Settings().shutdown.drain_seconds + 1 < _DOCKER_STOP_SECONDS


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_containerfile_is_clean() -> None:
    done = subprocess.run(
        ["hadolint", CONFIGS / "Containerfile"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_image_runs_as_an_ordinary_user_and_holds_no_secret() -> None:
    text = (CONFIGS / "Containerfile").read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]
    assert not re.search(r"^(?:ARG|ENV|COPY) .*(?:PASSWORD|TOKEN|pgpass|DSN)", text, re.MULTILINE)
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert sources
    assert all((CONFIGS.parent / source).exists() for source in sources)

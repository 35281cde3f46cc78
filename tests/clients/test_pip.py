"""Run a real pip through a real proxy and compare the rows with the files it downloaded."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.access_log import SCRIPT, AccessLog
from tests.support.certificates import certificate
from tests.support.packages import FileServer, make_index, make_wheel, pip_command
from tests.support.proxy import Mitm

if TYPE_CHECKING:
    from pathlib import Path


def test_pip_install_logs_page_and_wheel(dsn: str, tmp_path: Path) -> None:
    try:
        pip = pip_command()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    files, pem = tmp_path / "files", certificate(tmp_path)
    wheel = make_wheel(files / "packages")
    make_index(files, wheel)
    trust = ("--set", f"ssl_verify_upstream_trusted_ca={pem}")
    env = {"ARTIFACTAPI_DSN": dsn}
    with (
        FileServer(files, pem) as origin,
        Mitm(tmp_path / "mitm", *trust, scripts=[SCRIPT], env=env) as proxy,
    ):
        done = subprocess.run(
            [
                *pip,
                *("--proxy", proxy.url, "--cert", str(proxy.ca_path), "--no-cache-dir"),
                *("install", "--index-url", f"{origin.url}/simple/", "--no-compile"),
                *("--target", str(tmp_path / "target"), "demo-package"),
            ],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        page, file = AccessLog(dsn).wait_rows(2)
    check = "import demo_package; print(demo_package.__version__)"
    shown = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path / "target", check=True, capture_output=True
    )
    assert shown.stdout.strip() == b"1.2.3"
    assert (page["path"], page["status_code"]) == ("/simple/demo-package/", 200)
    assert (file["path"], file["status_code"]) == (f"/packages/{wheel.name}", 200)
    assert file["response_bytes"] == wheel.stat().st_size
    assert file["user_agent"].startswith("pip/")
    assert (file["scheme"], file["host"]) == ("https", "localhost")

"""The command that the start message shows: it works from where the proxy was started."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from addon.cli import invocation
from addon.cli.invocation import command_line, database_options
from exporter import Settings, load_settings

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
DSN = "host=db.example user=me dbname=log"


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of PATH, without those that have our command."""
    folders = [
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not (Path(folder) / "artifactapi").exists()
    ]
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    return folders


def works(command: str) -> bool:
    """Run the command in a shell with --help."""
    done = subprocess.run(
        ["sh", "-c", f"{command} --help"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"UV_OFFLINE": "1", "UV_NO_SYNC": "1"},
    )
    return "--follow" in done.stdout


@pytest.mark.slow
def test_command_on_path_needs_no_folder(
    path: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join([str(SCRIPTS), *path]))
    monkeypatch.chdir(tmp_path)
    assert command_line(["tail", "-f"]) == "artifactapi tail -f"
    assert works(command_line(["tail"]))


@pytest.mark.skipif(not shutil.which("uv"), reason="needs uv")
@pytest.mark.skipif(Path(sys.prefix) != CHECKOUT / ".venv", reason="needs uv's own environment")
@pytest.mark.parametrize("folder", [".", "docs"])
@pytest.mark.parametrize("by_uv", [False, True])
def test_checkout_uses_uv_run(
    path: list[str], monkeypatch: pytest.MonkeyPatch, folder: str, *, by_uv: bool
) -> None:
    if by_uv:  # `uv run` puts the folder on the PATH of what it starts, not on the user's
        monkeypatch.setenv("UV", shutil.which("uv") or "")
        monkeypatch.setenv("PATH", os.pathsep.join([str(SCRIPTS), *path]))
    monkeypatch.chdir(CHECKOUT / folder)
    assert command_line(["tail", "-f"]) == "uv run artifactapi tail -f"
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    assert works(command_line(["tail"]))


@pytest.mark.slow
@pytest.mark.usefixtures("path")
def test_elsewhere_the_command_has_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line(["tail", "-f"]) == f"{shlex.quote(str(SCRIPTS / 'artifactapi'))} tail -f"
    assert works(command_line(["tail"]))


@pytest.mark.usefixtures("path")
def test_command_of_a_proxy_whose_folder_was_removed_has_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert command_line([]) == shlex.quote(str(SCRIPTS / "artifactapi"))


def test_without_uv_the_command_has_its_folder_in_a_checkout_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(CHECKOUT)
    assert command_line([]) == shlex.quote(str(SCRIPTS / "artifactapi"))


@pytest.mark.usefixtures("path")
def test_without_an_installed_command_python_runs_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with a mitmproxy that only has the dependencies."""
    python = tmp_path / "with space" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(tmp_path)
    assert command_line(["tail"]) == f"'{python}' {CHECKOUT / 'addon/cli/main.py'} tail"
    assert works(command_line(["tail"]))


def test_embedded_server_needs_no_option() -> None:
    assert database_options(Settings(), None) == []


def test_dsn_from_an_option_or_the_environment_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another terminal does not have the environment that the proxy was started with."""
    settings = Settings().with_dsn(DSN)
    shown = ["--dsn", "user=me dbname=log host=db.example"]
    assert database_options(settings, None) == shown
    monkeypatch.setenv("ARTIFACTAPI_DSN", DSN)
    assert database_options(settings, None) == shown
    line = command_line(["tail", "-f"], database_options(settings, None))
    assert line.endswith("artifactapi --dsn 'user=me dbname=log host=db.example' tail -f")


@pytest.mark.parametrize(
    "dsn",
    [f"{DSN} password=hunter2 sslpassword=hunter2", "postgresql://me:hunter2@db.example/log"],
)
def test_password_is_never_shown(monkeypatch: pytest.MonkeyPatch, dsn: str) -> None:
    settings = Settings().with_dsn(dsn)
    shown = database_options(settings, None)
    assert shown == ["--dsn", "user=me dbname=log host=db.example"]
    monkeypatch.setenv("ARTIFACTAPI_DSN", dsn)
    assert database_options(settings, None) == [], "only the environment has the password"


@pytest.mark.parametrize(
    "text",
    [
        f"database: {{dsn: '{DSN} password=hunter2'}}",
        f"read: {{dsn: '{DSN}'}}\ndatabase: {{dsn: host=other.example}}",
        f"read: {{dsn: '{DSN}'}}",
    ],
)
def test_dsn_from_the_settings_file_is_found_through_the_file(tmp_path: Path, text: str) -> None:
    config = tmp_path / "my settings.yaml"
    config.write_text(text)
    settings = load_settings(config)
    assert database_options(settings, config) == ["--config", str(config)]
    line = command_line(["tail"], database_options(settings, config))
    assert line.endswith(f"artifactapi --config '{config}' tail")


def test_file_that_does_not_decide_the_database_is_not_shown(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("node: here")
    assert database_options(load_settings(config), config) == []
    config.write_text("database: {dsn: host=other.example}")
    shown = database_options(load_settings(config).with_dsn(DSN), config)
    assert shown == ["--dsn", "user=me dbname=log host=db.example"]


def test_dsn_that_artifactapi_run_was_given_is_shown_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`artifactapi --dsn ... run` sets the variable in its own environment only."""
    dsn = f"{DSN} password=hunter2"
    monkeypatch.setenv("ARTIFACTAPI_DSN", dsn)
    monkeypatch.setattr(invocation, "_dsn_of_run", lambda: dsn)
    shown = database_options(Settings().with_dsn(dsn), None)
    assert shown == ["--dsn", "user=me dbname=log host=db.example"]

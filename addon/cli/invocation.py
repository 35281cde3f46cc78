"""Say how to call the `artifactapi` command from where the proxy was started. Runs nothing."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter import Settings, has_password, load_settings
from exporter.postgres.dsn import without_password

if TYPE_CHECKING:
    from collections.abc import Sequence

_NAME = "artifactapi"
_MAIN = Path(__file__).with_name("main.py")


def command_line(arguments: Sequence[str], options: Sequence[str] = ()) -> str:
    """Return a line for the user's shell that runs the command.

    Args:
        arguments: The subcommand and its arguments.
        options: Options before the subcommand, see `database_options`.
    """
    return shlex.join([*_program(), *options, *arguments])


def database_options(settings: Settings, config: Path | None) -> list[str]:
    """Return the options with which the command reads what this proxy writes. They hold no password.

    Args:
        settings: The settings of the proxy.
        config: The file that they are from.
    """
    dsn = settings.for_reading().database.dsn
    in_file = load_settings(config)
    if in_file.read.dsn or (dsn and dsn == in_file.database.dsn):
        return ["--config", str(config)]
    if not dsn:
        return []
    is_in_environment = os.environ.get("ARTIFACTAPI_DSN") == dsn != _dsn_of_run()
    if is_in_environment and has_password(dsn):
        return []  # without the password, --dsn would be worse than nothing
    return ["--dsn", without_password(dsn)]


def _program() -> list[str]:
    script = Path(sys.executable).with_name(_NAME)
    path = os.environ.get("PATH", os.defpath)
    if "UV" in os.environ:  # uv adds the folder to the PATH of what it runs, not to the user's
        folders = path.split(os.pathsep)
        path = os.pathsep.join(folder for folder in folders if Path(folder) != script.parent)
    if shutil.which(_NAME, path=path):
        return [_NAME]
    if not script.exists():
        return [sys.executable, str(_MAIN)]
    if shutil.which("uv", path=path) and _uv_project() == Path(sys.prefix).parent.resolve():
        return ["uv", "run", _NAME]
    return [str(script)]


def _uv_project() -> Path | None:
    """Return the project whose environment `uv run` uses in the current folder."""
    try:
        folder = Path.cwd()
    except OSError:  # the folder was removed
        return None
    return next((p for p in (folder, *folder.parents) if (p / "pyproject.toml").exists()), None)


def _dsn_of_run() -> str:
    """Return the --dsn that `artifactapi run` was given in this process, or an empty string."""
    context = click.get_current_context(silent=True)
    return str(context.find_root().params.get("dsn", "")) if context else ""

"""How real clients lock and install packages of the local registry, for tests of `artifactapi verify`.

A client that is not installed skips its test.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pytest

from .packages import pip_command
from .registries import NEW

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .proxy import Mitm
    from .registries import Registry

_WHEELS = ("pkg:pypi/demo-package", "pkg:pypi/zope-thing")
_NPM = ("pkg:npm/%40demo/core", "pkg:npm/left-padding")


class Builds(Protocol):
    """Runs clients behind a proxy, each as a build with a name."""

    proxy: Mitm
    registry: Registry

    def run(
        self,
        build: str,
        folder: Path,
        command: Sequence[str],
        *,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a client in a folder. With `check`, it must succeed."""
        ...


class Client(NamedTuple):
    """How one tool locks and installs."""

    lock: Callable[[Builds, Path], Path]  # writes the lock file into a new folder; returns its path
    install: Callable[[Builds, str, Path], None]  # as a build, in a copy of this folder
    packages: tuple[str, ...]  # what it installs, as Package URLs without version
    digest: str = "sha256"  # of the lock file; empty: none
    options: tuple[str, ...] = ()  # of `artifactapi verify`
    is_tampered: bool = True  # whether to tamper; once is enough for formats of one tool


def find_program(name: str, version: str = "") -> str:
    """Return the path of a program whose version starts with this; skip the test without one.

    A program of pyenv that works only in some folders does not count.
    """
    for folder in os.environ["PATH"].split(os.pathsep):
        path = shutil.which(name, path=folder)
        if path is not None and (found := _version(path)) and found.startswith(version):
            return path
    pytest.skip(f"{name} {version} is not installed")


def _version(path: str) -> str:
    command = [path, "--version"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/")
    found = re.search(r"\d+(?:\.\d+)+", done.stdout) if done.returncode == 0 else None
    return found[0] if found else ""


def _is_good(build: str) -> bool:
    """Return whether nobody tampers with a build, so that it must succeed."""
    return build.endswith("-good")


# --- Python

_PYPROJECT = """
[project]
name = "build"
version = "1.0"
requires-python = ">=3.9"
dependencies = ["demo_package", "zope.thing"]
"""


def _uv(builds: Builds, build: str, folder: Path, *arguments: str, check: bool = True) -> None:
    options = ("--no-config", "--no-cache", "--python", sys.executable, "--no-python-downloads")
    env = {"UV_DEFAULT_INDEX": f"{builds.registry.url}/pypi/simple/", "UV_LINK_MODE": "copy"}
    env |= {name: value for name, value in os.environ.items() if name == "PYENV_VERSION"}
    # `uv run` says where it is; on the PATH may be a script of pyenv that works only in some folders.
    command = [os.environ.get("UV") or find_program("uv"), *arguments, *options]
    builds.run(build, folder, command, check=check, env=env)


def _lock_uv(builds: Builds, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PYPROJECT)
    _uv(builds, "locking", folder, "lock")
    return folder / "uv.lock"


def _install_uv(builds: Builds, build: str, folder: Path) -> None:
    _uv(builds, build, folder, "sync", "--frozen", check=_is_good(build))


def _lock_pylock(builds: Builds, folder: Path) -> Path:
    _lock_uv(builds, folder)
    output = ("-o", "pylock.toml", "--no-emit-project")
    _uv(builds, "locking", folder, "export", "--format", "pylock.toml", *output)
    return folder / "pylock.toml"


def _lock_requirements(builds: Builds, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PYPROJECT)
    output = ("-o", "requirements.txt", "--generate-hashes", "--emit-index-url")
    _uv(builds, "locking", folder, "pip", "compile", "pyproject.toml", *output)
    return folder / "requirements.txt"


def _install_requirements(builds: Builds, build: str, folder: Path) -> None:
    try:
        pip = pip_command()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    trust = ("--cert", str(builds.proxy.ca_path), "--no-cache-dir", "--retries", "0")
    options = ("--require-hashes", "--target", "target", "--no-compile", "-r", "requirements.txt")
    command = [*pip, *trust, "install", *options]
    builds.run(build, folder, command, check=_is_good(build))


def _poetry(builds: Builds, build: str, folder: Path, *arguments: str, check: bool = True) -> None:
    env = {
        "POETRY_CACHE_DIR": str(folder / "cache"),
        "POETRY_VIRTUALENVS_IN_PROJECT": "true",
        "POETRY_CERTIFICATES_OURS_CERT": str(builds.proxy.ca_path),
        "POETRY_REQUESTS_MAX_RETRIES": "0",
    }
    command = [find_program("poetry"), *arguments, "--no-interaction"]
    builds.run(build, folder, command, check=check, env=env)


def _lock_poetry(builds: Builds, folder: Path) -> Path:
    folder.mkdir(parents=True)
    source = f'name = "ours"\nurl = "{builds.registry.url}/pypi/simple/"\npriority = "primary"\n'
    (folder / "pyproject.toml").write_text(f"{_PYPROJECT}\n[[tool.poetry.source]]\n{source}")
    _poetry(builds, "locking", folder, "lock")
    shutil.rmtree(folder / "cache")
    return folder / "poetry.lock"


def _install_poetry(builds: Builds, build: str, folder: Path) -> None:
    _poetry(builds, build, folder, "install", "--no-root", check=_is_good(build))


def _pipenv(builds: Builds, build: str, folder: Path, *arguments: str, check: bool = True) -> None:
    env = {
        "PIPENV_VENV_IN_PROJECT": "1",
        "PIPENV_CACHE_DIR": str(folder / "cache"),
        "PIP_CERT": str(builds.proxy.ca_path),
        "PIP_RETRIES": "0",
        "PIPENV_NOSPIN": "1",
    }
    command = [find_program("pipenv"), *arguments]
    builds.run(build, folder, command, check=check, env=env)


def _lock_pipenv(builds: Builds, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "Pipfile").write_text(
        f'[[source]]\nname = "ours"\nurl = "{builds.registry.url}/pypi/simple/"\nverify_ssl = true\n'
        '[packages]\ndemo_package = "*"\n"zope.thing" = "*"\n'
    )
    _pipenv(builds, "locking", folder, "lock")
    for made in (".venv", "cache"):
        shutil.rmtree(folder / made, ignore_errors=True)
    return folder / "Pipfile.lock"


def _install_pipenv(builds: Builds, build: str, folder: Path) -> None:
    _pipenv(builds, build, folder, "sync", check=_is_good(build))


# --- JavaScript


class _NodeClient(NamedTuple):
    """What differs between the clients of npm registries."""

    program: str
    version: str  # that the program's version starts with
    lock: tuple[str, ...]
    install: tuple[str, ...]
    lock_file: str


def _node_environment(builds: Builds) -> dict[str, str]:
    ca = str(builds.proxy.ca_path)
    return {
        "npm_config_registry": f"{builds.registry.url}/npm/",
        "npm_config_cafile": ca,
        "npm_config_update_notifier": "false",
        "npm_config_audit": "false",
        "npm_config_fetch_retries": "0",
        "YARN_ENABLE_TELEMETRY": "0",
        "YARN_ENABLE_GLOBAL_CACHE": "false",
        "YARN_NPM_REGISTRY_SERVER": f"{builds.registry.url}/npm",
        "YARN_HTTPS_CA_FILE_PATH": ca,
        "YARN_HTTP_RETRY": "0",
        "YARN_NPM_MINIMAL_AGE_GATE": "0",  # the registry does not say how old its packages are
        "CI": "true",
    }


def _node(client: _NodeClient, *, digest: str = "sha512", is_tampered: bool = True) -> Client:
    def run(builds: Builds, build: str, folder: Path, arguments: tuple[str, ...]) -> None:
        command = [find_program(client.program, client.version), *arguments]
        env = _node_environment(builds)
        if client.program == "yarn" and client.version == "4.":
            proxy = builds.proxy.url.replace("://", f"://{build}:x@")
            env |= {"YARN_HTTPS_PROXY": proxy, "YARN_ENABLE_IMMUTABLE_INSTALLS": "false"}
        check = _is_good(build) or build == "locking"
        builds.run(build, folder, command, check=check, env=env)

    def lock(builds: Builds, folder: Path) -> Path:
        folder.mkdir(parents=True)
        manifest = {"name": "build", "version": "1.0.0", "dependencies": {"@demo/core": NEW}}
        (folder / "package.json").write_text(json.dumps(manifest))
        if client.version == "1.":  # it has no variables for these
            (folder / ".yarnrc").write_text(
                f'registry "{builds.registry.url}/npm/"\ncafile "{builds.proxy.ca_path}"\n'
            )
        run(builds, "locking", folder, client.lock)
        for made in folder.iterdir():
            if made.name not in {"package.json", ".yarnrc", client.lock_file}:
                shutil.rmtree(made) if made.is_dir() else made.unlink()
        return folder / client.lock_file

    def install(builds: Builds, build: str, folder: Path) -> None:
        run(builds, build, folder, client.install)

    options = ("--allow-host", "127.0.0.1")  # some of the lock files name no host
    return Client(lock, install, _NPM, digest, options, is_tampered)


def _npm(lock_version: int) -> Client:
    lock = ("install", "--package-lock-only", f"--lockfile-version={lock_version}")
    client = _NodeClient("npm", "", lock, ("ci",), "package-lock.json")
    return _node(client, is_tampered=lock_version == 3)


def _pnpm(version: str) -> Client:
    lock = ("install", "--lockfile-only", "--store-dir", "store")
    install = ("install", "--frozen-lockfile", "--store-dir", "store")
    return _node(_NodeClient("pnpm", version, lock, install, "pnpm-lock.yaml"))


_YARN_1 = _NodeClient(
    "yarn",
    "1.",
    ("install", "--cache-folder", "cache", "--ignore-scripts"),
    ("install", "--cache-folder", "cache", "--frozen-lockfile"),
    "yarn.lock",
)
_YARN_4 = _NodeClient("yarn", "4.", ("install",), ("install",), "yarn.lock")


# --- Rust, Ruby, PHP


def _cargo(builds: Builds, build: str, folder: Path, *arguments: str, check: bool = True) -> None:
    cargo = find_program("cargo", "1.")
    if tuple(map(int, _version(cargo).split(".")[:2])) < (1, 68):
        pytest.skip("cargo 1.68 or newer is not installed")
    store = folder / "cargo"
    store.mkdir(parents=True, exist_ok=True)
    (store / "config.toml").write_text(
        f'[registries.local]\nindex = "sparse+{builds.registry.url}/cargo/index/"\n'
        f'[http]\ncainfo = "{builds.proxy.ca_path}"\n[net]\nretry = 0\n'
    )
    toolchains = Path(os.environ.get("RUSTUP_HOME", Path.home() / ".rustup"))
    env = {"CARGO_HOME": str(store)}
    if toolchains.exists():
        env["RUSTUP_HOME"] = str(toolchains)
    builds.run(build, folder, [cargo, *arguments], check=check, env=env)


def _lock_cargo(builds: Builds, folder: Path) -> Path:
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "lib.rs").touch()
    (folder / "Cargo.toml").write_text(
        '[package]\nname = "build"\nversion = "1.0.0"\nedition = "2021"\n'
        '[dependencies]\ndemo-crate = { version = "1", registry = "local" }\n'
    )
    _cargo(builds, "locking", folder, "generate-lockfile")
    shutil.rmtree(folder / "cargo")
    return folder / "Cargo.lock"


def _install_cargo(builds: Builds, build: str, folder: Path) -> None:
    _cargo(builds, build, folder, "fetch", "--locked", check=_is_good(build))


def _bundle(builds: Builds, build: str, folder: Path, *arguments: str, check: bool = True) -> None:
    env = {
        "BUNDLE_SSL_CA_CERT": str(builds.proxy.ca_path),
        "BUNDLE_PATH": str(folder / "vendor"),
        "BUNDLE_RETRY": "0",
        "BUNDLE_USER_HOME": str(folder / "bundle"),
    }
    builds.run(build, folder, [find_program("bundle"), *arguments], check=check, env=env)


def _lock_bundler(builds: Builds, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "Gemfile").write_text(f'source "{builds.registry.url}/gem/"\ngem "demo_gem"\n')
    _bundle(builds, "locking", folder, "lock")
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    return folder / "Gemfile.lock"


def _install_bundler(builds: Builds, build: str, folder: Path) -> None:
    _bundle(builds, build, folder, "install", check=_is_good(build))


def _composer(
    builds: Builds, build: str, folder: Path, *arguments: str, check: bool = True
) -> None:
    env = {"COMPOSER_HOME": str(folder / "composer"), "COMPOSER_ALLOW_SUPERUSER": "1"}
    command = [find_program("composer"), "--no-interaction", *arguments]
    builds.run(build, folder, command, check=check, env=env)


def _lock_composer(builds: Builds, folder: Path) -> Path:
    folder.mkdir(parents=True)
    repositories = [
        {"type": "composer", "url": f"{builds.registry.url}/composer"},
        {"packagist": False},
    ]
    manifest = {
        "repositories": repositories,
        "require": {"demo/lib": "*"},
        "config": {"cafile": str(builds.proxy.ca_path)},
    }
    (folder / "composer.json").write_text(json.dumps(manifest))
    _composer(builds, "locking", folder, "update", "--no-install")
    shutil.rmtree(folder / "composer", ignore_errors=True)
    return folder / "composer.lock"


def _install_composer(builds: Builds, build: str, folder: Path) -> None:
    _composer(builds, build, folder, "install", check=_is_good(build))


CLIENTS = {
    "uv": Client(_lock_uv, _install_uv, _WHEELS),
    "pylock": Client(_lock_pylock, _install_uv, _WHEELS, is_tampered=False),
    "pip": Client(_lock_requirements, _install_requirements, _WHEELS),
    "poetry": Client(_lock_poetry, _install_poetry, _WHEELS),
    "pipenv": Client(_lock_pipenv, _install_pipenv, _WHEELS, is_tampered=False),
    "npm-1": _npm(1),
    "npm-2": _npm(2),
    "npm-3": _npm(3),
    "pnpm-8": _pnpm("8."),
    "pnpm-10": _pnpm("10."),
    "yarn-1": _node(_YARN_1),
    "yarn-4": _node(_YARN_4, digest="yarn"),
    "cargo": Client(_lock_cargo, _install_cargo, ("pkg:cargo/demo-crate",)),
    "bundler": Client(_lock_bundler, _install_bundler, ("pkg:gem/demo_gem",), digest=""),
    "composer": Client(
        _lock_composer, _install_composer, ("pkg:composer/demo/lib",), digest="sha1"
    ),
}

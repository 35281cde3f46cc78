"""Real clients lock and install through a proxy, `artifactapi verify` compares, and finds tampering.

The registry runs on this machine. Each build is a proxy login; an addon tampers with the downloads of
those whose name says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from addon.cli.main import main
from tests.support.access_log import SCRIPT, AccessLog, temporary_schema
from tests.support.certificates import certificate
from tests.support.packages import pip_command
from tests.support.proxy import Mitm
from tests.support.registries import REMOTES, Registry, add_crate, add_npm, add_wheels
from tests.support.tampering_addon import tampering_script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

OLD, NEW = "1.2.2", "1.2.3"  # the versions of each package in the registry; the addon swaps them
_TIMEOUT_SECONDS = 60


@dataclass
class Builds:
    """A registry, and a proxy that logs and tampers."""

    log: AccessLog
    proxy: Mitm
    registry: Registry
    settings: Path
    folder: Path

    def run(
        self,
        build: str,
        folder: Path,
        command: Sequence[str],
        *,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a client in a clean environment, as a build with this name would."""
        folder.mkdir(parents=True, exist_ok=True)
        proxy = self.proxy.url.replace("://", f"://{build}:x@")
        ca = str(self.proxy.ca_path)
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(folder),
                "LC_ALL": "C.UTF-8",
                **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy),
                **dict.fromkeys(("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE"), ca),
                **(env or {}),
            },
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done

    def verify(self, build: str, *arguments: str) -> Verified:
        """Run `artifactapi verify` for a build."""
        done = CliRunner().invoke(
            main,
            ["--config", str(self.settings), "verify", "--json", "--user", build, *arguments],
            env={"ARTIFACTAPI_DSN": self.log.dsn},
        )
        assert done.exit_code in {0, 1, 2}, done.output
        return Verified(done.exit_code, json.loads(done.stdout))


@dataclass
class Verified:
    """What `artifactapi verify --json` said."""

    exit_code: int
    result: dict[str, Any]

    @property
    def findings(self) -> set[tuple[str, str]]:
        """Kind and Package URL of each finding."""
        return {(each["kind"], each["purl"]) for each in self.result["comparison"]["findings"]}

    @property
    def not_fetched(self) -> dict[str, str]:
        """Reasons by Package URL."""
        return {each["purl"]: each["reason"] for each in self.result["comparison"]["not_fetched"]}

    @property
    def digests(self) -> dict[str, Any]:
        """Counts of compared digests."""
        return dict(self.result["comparison"]["digests"])


@pytest.fixture(scope="module")
def builds(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    folder = tmp_path_factory.mktemp("verify")
    pem = certificate(folder)
    remotes, settings = folder / "remotes.yaml", folder / "settings.yaml"
    remotes.write_text(REMOTES)
    settings.write_text(
        "artifact: {sha256: true}\nbatch: {max_seconds: 0.1}\n"
        f"remotes: {{file: {json.dumps(str(remotes))}}}\n"
    )
    with (
        temporary_schema(postgres) as dsn,
        Registry(pem) as registry,
        Mitm(
            folder / "mitm",
            *("--proxyauth", "any", "--set", f"artifactapi_config={settings}"),
            *("--set", f"ssl_verify_upstream_trusted_ca={pem}"),
            scripts=[tampering_script(folder, (NEW, OLD)), SCRIPT],
            env={"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(folder / "home")},
            timeout=60,
        ) as proxy,
    ):
        for version in (OLD, NEW):  # indexes have the last one only
            add_wheels(
                registry, folder / "made", ("demo_package", version), ("zope.thing", version)
            )
            add_npm(registry, "@demo/core", version, {"left-padding": version})
            add_npm(registry, "left-padding", version)
            add_crate(registry, "demo-crate", version)
        yield Builds(AccessLog(dsn), proxy, registry, settings, folder)
        assert proxy.terminate() == 0
        assert "Traceback" not in proxy.output()


def find_program(name: str, *paths: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([*paths, os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@dataclass
class Client:
    """How one tool locks and installs.

    Attributes:
        lock: Writes the lock file into a folder; returns its path.
        install: Installs what the lock file says; the arguments are the name of a build and a new
            folder with a copy of the project.
        packages: What it installs, as Package URLs without version.
        digest: Whether the lock file has a SHA-256 of each file.
            host: Whether the lock file names the host of each file.
        is_tampered: Whether to tamper; once is enough for formats of one tool.
    """

    lock: Callable[[Builds, Path], Path]
    install: Callable[[Builds, str, Path], None]
    packages: tuple[str, ...]
    digest: bool = True
    host: bool = True
    is_tampered: bool = True


def _uv(builds: Builds, build: str, folder: Path, *arguments: str, check: bool = True) -> None:
    options = ("--no-config", "--no-cache", "--python", sys.executable, "--no-python-downloads")
    env = {"UV_DEFAULT_INDEX": f"{builds.registry.url}/pypi/simple/", "UV_LINK_MODE": "copy"}
    env |= {name: value for name, value in os.environ.items() if name == "PYENV_VERSION"}
    command = [find_program("uv"), *arguments, *options]
    builds.run(build, folder, command, check=check, env=env)


_PYPROJECT = """
[project]
name = "build"
version = "1.0"
requires-python = ">=3.9"
dependencies = ["demo_package", "zope.thing"]
"""


def _lock_uv(builds: Builds, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PYPROJECT)
    _uv(builds, "locking", folder, "lock")
    return folder / "uv.lock"


def _install_uv(builds: Builds, build: str, folder: Path) -> None:
    _uv(builds, build, folder, "sync", "--frozen", check=build.endswith("good"))


def _lock_pylock(builds: Builds, folder: Path) -> Path:
    _lock_uv(builds, folder)
    _uv(
        builds,
        "locking",
        folder,
        "export",
        "--format",
        "pylock.toml",
        "-o",
        "pylock.toml",
        "--no-emit-project",
    )
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
    builds.run(build, folder, command, check=build.endswith("good"))


_WHEELS = ("pkg:pypi/demo-package", "pkg:pypi/zope-thing")
_NPM = ("pkg:npm/%40demo/core", "pkg:npm/left-padding")
_MANIFEST = {"name": "build", "version": "1.0.0", "dependencies": {"@demo/core": NEW}}


def _npm(lock_version: int) -> Client:
    def settings(builds: Builds) -> dict[str, str]:
        return {
            "npm_config_registry": f"{builds.registry.url}/npm/",
            "npm_config_cafile": str(builds.proxy.ca_path),
            "npm_config_update_notifier": "false",
            "npm_config_audit": "false",
            "npm_config_lockfile_version": str(lock_version),
        }

    def lock(builds: Builds, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps(_MANIFEST))
        npm = find_program("npm")
        command = [npm, "install", "--package-lock-only"]
        builds.run("locking", folder, command, env=settings(builds))
        return folder / "package-lock.json"

    def install(builds: Builds, build: str, folder: Path) -> None:
        check = build.startswith("good")
        command = [find_program("npm"), "ci"]
        builds.run(build, folder, command, check=check, env=settings(builds))

    return Client(lock, install, _NPM, digest=False, is_tampered=lock_version == 3)


def _cargo(builds: Builds, build: str, folder: Path, *arguments: str, check: bool = True) -> None:
    cargo = find_program("cargo")
    done = subprocess.run([cargo, "--version"], check=False, capture_output=True, text=True)
    found = re.search(r"(\d+)\.(\d+)", done.stdout)
    if found is None or (int(found[1]), int(found[2])) < (1, 68):
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
    _cargo(builds, build, folder, "fetch", "--locked", check=build.endswith("good"))


CLIENTS = {
    "uv": Client(_lock_uv, _install_uv, _WHEELS),
    "pylock": Client(_lock_pylock, _install_uv, _WHEELS, is_tampered=False),
    "pip": Client(_lock_requirements, _install_requirements, _WHEELS),
    "npm-1": _npm(1),
    "npm-2": _npm(2),
    "npm-3": _npm(3),
    "cargo": Client(_lock_cargo, _install_cargo, ("pkg:cargo/demo-crate",)),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_install_is_as_locked_and_tampering_is_found(
    builds: Builds, tmp_path: Path, name: str
) -> None:
    client = CLIENTS[name]
    lock_file = client.lock(builds, tmp_path / "locked")

    def build(what: str) -> Verified:
        user, folder = f"{name}-{what}", tmp_path / what
        shutil.copytree(tmp_path / "locked", folder)
        client.install(builds, user, folder)
        return builds.verify(user, str(lock_file), "--wait", "0.3s")

    good = build("good")
    assert (good.exit_code, good.findings, good.not_fetched) == (0, set(), {})
    assert good.result["status"] == "as locked"
    assert good.result["comparison"]["as_locked"] == len(client.packages)
    if client.digest:
        assert good.digests["equal"] == len(client.packages)
    else:
        assert good.digests["not_comparable"] == {"sha512": len(client.packages)}
    if client.is_tampered:
        # A client may stop at the first file that is not as locked.
        assert_found(build("version"), "not locked", {f"{purl}@{OLD}" for purl in client.packages})
        new = {f"{purl}@{NEW}" for purl in client.packages}
        if client.host:
            assert_found(build("host"), "other host", new)
        if client.digest:
            assert_found(build("byte"), "other digest", new)


def assert_found(verified: Verified, kind: str, purls: set[str]) -> None:
    """Check that there are findings, and only of this kind and these packages."""
    assert verified.exit_code == 1
    assert verified.findings
    assert verified.findings <= {(kind, purl) for purl in purls}

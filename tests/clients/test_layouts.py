"""Run real package clients with private registries on hosts that no remote names. There is no remotes file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support.access_log import SCRIPT, AccessLog, Row, temporary_schema
from tests.support.proxy import Mitm
from tests.support.registries import (
    Registry,
    add_composer,
    add_cpan,
    add_gem,
    add_go_module,
    add_image,
    add_npm,
    add_rock,
    add_wheels,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

# Connects the clients' hosts to this machine, without changing what they asked for.
RESOLVER = """
def server_connect(data):
    data.server.address = ("127.0.0.1", data.server.address[1])
"""


@dataclass
class Setup:
    """A proxy, its log, and a registry that has any host name."""

    log: AccessLog
    proxy: Mitm
    registry: Registry

    def url(self, host: str) -> str:
        """Return the base URL of the registry under this host name."""
        return f"http://{host}:{self.registry.port}"

    def run(self, home: Path, *command: str, **env: str) -> None:
        """Run a client through the proxy."""
        home.mkdir(exist_ok=True)
        proxies = dict.fromkeys(("http_proxy", "https_proxy"), self.proxy.url)
        variables = {"PATH": os.environ["PATH"], "HOME": str(home), **proxies, **env}
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            cwd=home,
            env=variables,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"

    def rows(self, served: int) -> list[Row]:
        """Wait for the rows of everything that the registry served after its first `served` replies."""
        rows = self.log.wait_rows(len(self.registry.served), "response_source = 'upstream'")
        return rows[served:]


@pytest.fixture(scope="module")
def setup(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("layouts")
    settings, resolver = folder / "settings.yaml", folder / "resolver.py"
    settings.write_text("batch: {max_seconds: 0.1}\n")
    resolver.write_text(RESOLVER)
    with (
        temporary_schema(postgres) as dsn,
        Registry() as registry,
        Mitm(
            folder / "mitm",
            *("--set", f"artifactapi_config={settings}", "--set", "connection_strategy=lazy"),
            scripts=[SCRIPT, resolver],
            env={"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(folder / "home")},
        ) as proxy,
    ):
        yield Setup(AccessLog(dsn), proxy, registry)
        assert proxy.terminate() == 0
        assert "Traceback" not in proxy.output()


def program(name: str, package: str = "") -> str:
    # `uv run` says where it is; on the PATH may be a script of pyenv that works only in some folders.
    path = (os.environ.get("UV") if name == "uv" else None) or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: install the package {package or name}")
    return path


@pytest.mark.parametrize(
    ("folder", "remote"),
    [
        ("/repository/npm-group", "nexus:pkgs.corp.example:{port}/npm-group"),
        ("/artifactory/api/npm/team", "artifactory:pkgs.corp.example:{port}/team"),
        ("/api/v4/packages/npm", "gitlab:pkgs.corp.example:{port}"),
    ],
)
def test_npm_rows_match_the_lock_file(
    setup: Setup, tmp_path: Path, folder: str, remote: str
) -> None:
    npm, url = program("npm"), setup.url("pkgs.corp.example")
    for name, needs in (("@demo/core", {"left-padding": "*"}), ("left-padding", {})):
        add_npm(setup.registry, name, "1.0.0-rc.1", needs, folder=folder, url=url)
    served = len(setup.registry.served)
    home = tmp_path / "home"
    home.mkdir()
    manifest = {"name": "build", "version": "1.0.0", "dependencies": {"@demo/core": "1.0.0-rc.1"}}
    (home / "package.json").write_text(json.dumps(manifest))

    options = {"npm_config_registry": f"{url}{folder}/", "npm_config_update_notifier": "false"}
    setup.run(home, npm, "install", "--no-audit", "--no-fund", **options)

    lock = json.loads((home / "package-lock.json").read_text())["packages"]
    locked = {
        f"pkg:npm/{path.removeprefix('node_modules/').replace('@', '%40')}@{entry['version']}"
        for path, entry in lock.items()
        if path
    }
    rows = setup.rows(served)
    assert {row["purl"] for row in rows if row["artifact_kind"] == "artifact"} == locked
    assert {row["purl"] for row in rows if row["artifact_kind"] == "index"} == {
        purl.rpartition("@")[0] for purl in locked
    }
    assert {row["remote"] for row in rows} == {remote.format(port=setup.registry.port)}


def artifacts(rows: list[Row]) -> dict[str, int]:
    """The size of each artifact that a client got, by its purl."""
    return {
        row["purl"]: row["response_bytes"]
        for row in rows
        if row["artifact_kind"] == "artifact"
        and (row["method"], row["status_code"]) == ("GET", 200)
    }


@pytest.mark.parametrize("folder", ["/repository/pypi-all", "/artifactory/api/pypi/team"])
def test_uv_rows_match_the_lock_file(setup: Setup, tmp_path: Path, folder: str) -> None:
    uv, url = program("uv"), setup.url("pkgs.corp.example") + folder
    wheels = add_wheels(
        setup.registry,
        tmp_path / "made",
        ("Demo_Package", "1.0.post1"),
        ("zope.thing", "2!3.0"),
        root=folder,
    )
    served, home = len(setup.registry.served), tmp_path / "home"
    home.mkdir()
    (home / "pyproject.toml").write_text(
        '[project]\nname = "build"\nversion = "1"\nrequires-python = ">=3.8"\n'
        'dependencies = ["demo-package", "zope.thing"]\n'
        f'[[tool.uv.index]]\nurl = "{url}/simple"\ndefault = true\n'
    )
    options = {"UV_PYTHON_DOWNLOADS": "never", "UV_CACHE_DIR": str(home / "cache")}
    setup.run(home, uv, "sync", "--python", sys.executable, **options)

    lock = tomllib.loads((home / "uv.lock").read_text())["package"]
    locked = {
        (each["name"].replace(".", "-"), each["version"])
        for each in lock
        if each["name"] != "build"
    }
    rows = setup.rows(served)
    found = [row for row in rows if row["artifact_kind"] == "artifact"]
    assert {(row["package"], row["version"]) for row in found} == locked
    assert sorted(row["response_bytes"] for row in found) == sorted(
        wheel.stat().st_size for wheel in wheels
    )
    assert {row["package"] for row in rows if row["artifact_kind"] == "index"} == {
        name for name, _ in locked
    }


@pytest.mark.parametrize("folder", ["/repository/go-proxy", "/artifactory/api/go/team"])
def test_go_rows_match_go_sum(setup: Setup, tmp_path: Path, folder: str) -> None:
    go, module = program("go", "golang-go"), "github.com/Demo-Org/Lib/v2"
    archive = add_go_module(setup.registry, folder, module, "v2.1.0-rc.1")
    served, home = len(setup.registry.served), tmp_path / "home"
    home.mkdir()
    (home / "go.mod").write_text(f"module build\n\ngo 1.19\n\nrequire {module} v2.1.0-rc.1\n")
    (home / "main.go").write_text(f'package main\n\nimport _ "{module}"\n\nfunc main() {{}}\n')
    variables = {
        "GOPROXY": setup.url("pkgs.corp.example") + folder,
        "GONOSUMDB": "*",
        "GOFLAGS": "-modcacherw",
    }
    setup.run(home, go, "mod", "tidy", GOPATH=str(home / "go"), **variables)

    sums = [line.split() for line in (home / "go.sum").read_text().splitlines()]
    locked = {
        f"pkg:golang/{name.lower()}@{version}"
        for name, version, _ in sums
        if "/go.mod" not in version
    }
    rows = setup.rows(served)
    assert artifacts(rows) == dict.fromkeys(locked, len(archive))
    assert {row["purl"] for row in rows} == locked
    assert "golang" in {row["ecosystem"] for row in rows}


@pytest.mark.parametrize("folder", ["/repository/rubygems-all", "/artifactory/api/gems/team"])
def test_gem_rows_match_the_installed_gem(setup: Setup, tmp_path: Path, folder: str) -> None:
    gem = program("gem", "ruby")
    data = add_gem(setup.registry, tmp_path / "made", "demo_gem-x86", "1.2.0.pre1", root=folder)
    served, home = len(setup.registry.served), tmp_path / "home"
    source = f"{setup.url('pkgs.corp.example')}{folder}/"
    options = ("--no-document", "--install-dir", "gems", "--clear-sources", "--source", source)
    setup.run(home, gem, "install", "demo_gem-x86", "--version", "1.2.0.pre1", *options)

    (installed,) = (home / "gems" / "cache").glob("*.gem")
    assert installed.read_bytes() == data
    rows = setup.rows(served)
    assert artifacts(rows) == {"pkg:gem/demo_gem-x86@1.2.0.pre1": len(data)}


def test_composer_rows_match_the_lock_file(setup: Setup, tmp_path: Path) -> None:
    composer, folder = program("composer"), "/repository/composer-proxy"
    url = setup.url("pkgs.corp.example")
    data = add_composer(setup.registry, "demo/lib", "1.2.0-RC1", root=folder, url=url)
    served, home = len(setup.registry.served), tmp_path / "home"
    home.mkdir()
    repositories = [{"type": "composer", "url": url + folder}, {"packagist": False}]
    manifest = {
        "repositories": repositories,
        "require": {"demo/lib": "*"},
        "minimum-stability": "dev",
        "config": {"secure-http": False},
    }
    (home / "composer.json").write_text(json.dumps(manifest))
    environment = {"COMPOSER_HOME": str(home / "composer"), "COMPOSER_ALLOW_SUPERUSER": "1"}
    setup.run(home, composer, "--no-interaction", "update", **environment)

    lock = json.loads((home / "composer.lock").read_text())["packages"]
    locked = {f"pkg:composer/{each['name']}@{each['version']}" for each in lock}
    assert artifacts(setup.rows(served)) == dict.fromkeys(locked, len(data))


def test_cpanm_rows_match_what_it_installed(setup: Setup, tmp_path: Path) -> None:
    cpanm, folder = program("cpanm", "cpanminus"), "/repository/cpan-proxy"
    program("make")
    data = add_cpan(setup.registry, folder, "DEMO", "Demo-Thing2", "v1.2.3")
    served, home = len(setup.registry.served), tmp_path / "home"
    mirror = setup.url("pkgs.corp.example") + folder
    options = (
        "--notest",
        "--mirror",
        mirror,
        "--mirror-only",
        "--save-dists",
        "saved",
        "-l",
        "local",
    )
    setup.run(home, cpanm, *options, "Demo::Thing2")

    (saved,) = (home / "saved").rglob("*.tar.gz")
    assert saved.read_bytes() == data
    rows = setup.rows(served)
    assert artifacts(rows) == {"pkg:cpan/DEMO/Demo-Thing2@v1.2.3": len(data)}
    assert {row["artifact_kind"] for row in rows} == {"artifact", "index"}


def test_luarocks_rows_match_what_it_installed(setup: Setup, tmp_path: Path) -> None:
    luarocks, folder = program("luarocks"), "/repository/luarocks-proxy"
    program("unzip")
    data = add_rock(setup.registry, folder, "demo", "2.1.0-3")
    served, home = len(setup.registry.served), tmp_path / "home"
    server = setup.url("pkgs.corp.example") + folder
    setup.run(home, luarocks, "install", "--tree", "tree", "--only-server", server, "demo")

    installed = [path.name for path in (home / "tree").rglob("*.rockspec")]
    assert installed == ["demo-2.1.0-3.rockspec"]
    assert artifacts(setup.rows(served)) == {"pkg:luarocks/demo@2.1.0-3": len(data)}


def test_skopeo_rows_are_those_of_one_image(setup: Setup, tmp_path: Path) -> None:
    """The host is unknown, so that only the responses tell that it is a registry."""
    skopeo, host = program("skopeo"), f"pkgs.corp.example:{setup.registry.port}"
    digest, sizes = add_image(setup.registry, "team/app", "1.0")
    served = len(setup.registry.served)

    platform = ("--override-os", "linux", "--override-arch", "arm64", "--insecure-policy")
    source = f"docker://{host}/team/app:1.0"
    setup.run(
        tmp_path,
        skopeo,
        *platform,
        "copy",
        "--src-tls-verify=false",
        source,
        f"dir:{tmp_path}/image",
    )

    rows = [row for row in setup.rows(served) if row["path"] != "/v2/"]
    image = f"pkg:oci/app@{digest}?repository_url={host}/team/app&tag=1.0"
    blobs = [row for row in rows if row["artifact_kind"] == "blob"]
    assert {row["remote"] for row in rows} == {host}
    assert {row["purl"] for row in rows if row["path"].endswith("/manifests/1.0")} == {image}
    assert {row["purl"] for row in blobs} == {image}
    assert {row["path"]: row["response_bytes"] for row in blobs}.items() <= sizes.items()
    assert len(blobs) == 2  # the configuration and the layer

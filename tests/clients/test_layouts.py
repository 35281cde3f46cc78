"""Run real package clients with private registries on hosts that no remote names. There is no remotes file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support.access_log import SCRIPT, AccessLog, Row, temporary_schema
from tests.support.proxy import Mitm
from tests.support.registries import Registry, add_image, add_npm

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


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: install the package {name}")
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

"""Real clients lock and install through a proxy, `artifactapi verify` compares, and finds tampering.

The registry runs on this machine. Each build is a proxy login; an addon tampers with the downloads of
those whose name says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from addon.cli.main import main
from tests.support.access_log import SCRIPT, AccessLog, temporary_schema
from tests.support.certificates import certificate
from tests.support.lock_clients import CLIENTS
from tests.support.proxy import Mitm
from tests.support.registries import (
    NEW,
    OLD,
    REMOTES,
    Registry,
    add_composer,
    add_crate,
    add_gem,
    add_npm,
    add_wheels,
)
from tests.support.tampering_addon import tampering_script

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

_TIMEOUT_SECONDS = 60


@dataclass
class Builds:
    """A registry, and a proxy that logs and tampers."""

    log: AccessLog
    proxy: Mitm
    registry: Registry
    settings: Path
    folder: Path
    exit_codes: dict[str, int] = field(default_factory=dict)  # of each build's last command

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
        self.exit_codes[build] = done.returncode
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


class AddressRegistry(Registry):
    """A registry that clients know by its address, so that its name is another host.

    Not the other way round: a row has the name for which a client asked, even if an addon goes to an
    address instead.
    """

    @property
    def url(self) -> str:
        """The base URL."""
        return super().other_url

    @property
    def other_url(self) -> str:
        """The base URL with the host `localhost`."""
        return super().url


@pytest.fixture(scope="module")
def builds(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    folder = tmp_path_factory.mktemp("verify")
    pem = certificate(folder)
    remotes, settings = folder / "remotes.yaml", folder / "settings.yaml"
    remotes.write_text(REMOTES.replace("host: localhost", "host: 127.0.0.1"))
    settings.write_text(
        "artifact: {sha256: true}\nbatch: {max_seconds: 0.1}\n"
        f"remotes: {{file: {json.dumps(str(remotes))}}}\n"
    )
    with (
        temporary_schema(postgres) as dsn,
        AddressRegistry(pem) as registry,
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
            add_composer(registry, "demo/lib", version)
            if shutil.which("gem"):
                add_gem(registry, folder / "gems", "demo_gem", version)
        yield Builds(AccessLog(dsn), proxy, registry, settings, folder)
        assert proxy.terminate() == 0
        assert "Traceback" not in proxy.output()


@pytest.mark.timeout(300)  # Poetry and Pipenv take a minute
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
        return builds.verify(user, str(lock_file), "--wait", "0.3s", *client.options)

    good = build("good")
    assert (good.exit_code, good.findings, good.not_fetched) == (0, set(), {})
    assert good.result["status"] == "as locked"
    assert good.result["comparison"]["as_locked"] == len(client.packages)
    count = len(client.packages)
    assert good.digests == {
        "equal": count if client.digest == "sha256" else 0,
        "different": 0,
        "not_recorded": 0,
        "not_in_lock_file": 0 if client.digest else count,
        "not_comparable": {} if client.digest in {"", "sha256"} else {client.digest: count},
    }
    if client.is_tampered:
        # A client may stop at the first file that is not as locked.
        assert_found(build("version"), "not locked", {f"{purl}@{OLD}" for purl in client.packages})
        new = {f"{purl}@{NEW}" for purl in client.packages}
        assert_found(build("host"), "other host", new)
        byte = build("byte")
        if client.digest == "sha256":
            assert_found(byte, "other digest", new)
        else:  # only the client can notice
            assert byte.exit_code == 0
            assert builds.exit_codes[f"{name}-byte"] != 0


def assert_found(verified: Verified, kind: str, purls: set[str]) -> None:
    """Check that there are findings, and only of this kind and these packages."""
    assert verified.exit_code == 1
    assert verified.findings
    assert verified.findings <= {(kind, purl) for purl in purls}

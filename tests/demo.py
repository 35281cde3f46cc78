"""`just demo`: a local registry, mitmdump with the log on, real clients, and the rows they leave.

It uses no network and leaves nothing behind.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exporter.postgres.embedded import EmbeddedServer
from tests.support.access_log import SCRIPT, AccessLog
from tests.support.certificates import certificate
from tests.support.environment import personal_variables, temporary_home
from tests.support.packages import pip_command
from tests.support.proxy import Mitm, free_port
from tests.support.registries import REMOTES, Registry, add_npm, add_wheels

_WHEELS = (("demo_parser", "2.4.1"), ("tiny_http", "0.9.0"))
_NPM = ("left-padding", "1.3.0")
_ARTIFACTS = "SELECT proxy_user, purl, bytes FROM access_log_artifacts ORDER BY 1, 2"
_REDIRECTED_WIDTH = "120"  # columns, if the output is not a terminal


class Client(NamedTuple):
    """A command that fetches something through the proxy."""

    title: str
    command: list[str]
    requests: int
    environment: dict[str, str]


def main() -> None:
    """Run the demo in temporary folders."""
    for name in personal_variables():
        del os.environ[name]
    with (
        tempfile.TemporaryDirectory(prefix="artifactapi-demo-") as folder,
        temporary_home() as home,
    ):
        os.environ["ARTIFACTAPI_HOME"] = str(home)
        _run_demo(Path(folder))


def _run_demo(folder: Path) -> None:
    pem = certificate(folder)
    remotes, config = folder / "remotes.yaml", folder / "artifactapi.yaml"
    remotes.write_text(REMOTES)
    config.write_text(f"remotes:\n  file: {remotes}\n")
    options = (
        *("--set", f"ssl_verify_upstream_trusted_ca={pem}"),
        *("--set", f"artifactapi_config={config}"),
        *("--proxyauth", "any"),
    )
    _print("Starting a registry and: mitmdump -s addon/artifactapi.py --proxyauth any")
    with Registry(pem) as registry, Mitm(folder / "mitm", *options, scripts=[SCRIPT]) as proxy:
        add_wheels(registry, folder / "wheels", *_WHEELS)
        add_npm(registry, *_NPM)
        count = 0
        for client in _clients(proxy, registry.url, folder):
            _print(client.title)
            subprocess.run(
                client.command,
                check=False,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **client.environment},
            )
            count += client.requests
        AccessLog(EmbeddedServer().dsn).wait_rows(count, timeout=10)
        size = {} if sys.stdout.isatty() else {"COLUMNS": _REDIRECTED_WIDTH}
        program = Path(sys.executable).with_name("artifactapi")
        for arguments in (["tail"], ["report"], ["psql", "-c", _ARTIFACTS]):
            _print(shlex.join(["artifactapi", *arguments]))
            command: list[str | Path] = [program, *arguments]
            subprocess.run(command, check=True, env={**os.environ, "PAGER": "", **size})


def _clients(proxy: Mitm, registry: str, folder: Path) -> list[Client]:
    """pip, npm and curl, as far as this machine has them. Each logs in with the name of a build."""
    login = proxy.url.replace("://", "://build-42:x@")
    wheels = [name.replace("_", "-") for name, _ in _WHEELS]
    found = []
    try:
        pip = [*pip_command(), "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    except FileNotFoundError as e:
        _print(f"{e}; continuing without it")
    else:
        pip += ["--proxy", login, "--cert", str(proxy.ca_path)]
        index = ["--index-url", f"{registry}/pypi/simple/", "--target", str(folder / "target")]
        title = f"pip install {' '.join(wheels)}"
        found.append(Client(title, [*pip, "install", *index, *wheels], 3 * len(wheels), {}))
    npm = shutil.which("npm")
    if npm is not None:
        settings = {
            "npm_config_registry": f"{registry}/npm/",
            "npm_config_proxy": login,
            "npm_config_https_proxy": login,
            "npm_config_noproxy": "",
            "npm_config_cafile": str(proxy.ca_path),
            "npm_config_cache": str(folder / "npm-cache"),
            "npm_config_update_notifier": "false",
            "npm_config_audit": "false",
        }
        command = [npm, "install", "--silent", "--prefix", str(folder / "app"), _NPM[0]]
        found.append(Client(f"npm install {_NPM[0]}", command, 2, settings))
    curl = shutil.which("curl")
    if curl is not None:
        other = proxy.url.replace("://", "://build-43:x@")
        common = [curl, "-sS", "-o", os.devnull, "--noproxy", "", "--cacert", str(proxy.ca_path)]
        common += ["--proxy", other]
        wheel = f"{registry}/pypi/packages/{wheels[0]}/demo_parser-2.4.1-py3-none-any.whl"
        missing = f"{registry}/pypi/simple/internal-tools/"
        nobody = f"http://localhost:{free_port()}/?key=s3cret"
        found += [
            Client("curl: the same wheel again", [*common, wheel], 1, {}),
            Client("curl: a package that does not exist", [*common, missing], 1, {}),
            Client("curl: a server that is down", [*common, nobody], 1, {}),
        ]
    return found


def _print(text: str) -> None:
    sys.stdout.write(f"# {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

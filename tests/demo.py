"""Show it all on this machine alone: an origin, the proxy, real clients, and the rows they leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exporter.postgres.embedded import EmbeddedServer
from tests.support.access_log import SCRIPT, AccessLog
from tests.support.certificates import certificate
from tests.support.packages import FileServer, make_index, make_tarball, make_wheel, pip_command
from tests.support.proxy import Mitm, free_port


def main() -> None:
    """Run the demo in a folder that is gone afterwards."""
    for name in [*os.environ]:
        if name.startswith(("ARTIFACTAPI_", "PG")) or name.lower().endswith("_proxy"):
            del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="artifactapi-demo-") as folder:
        os.environ["ARTIFACTAPI_HOME"] = str(Path(folder, "home"))
        _show(Path(folder))


def _show(folder: Path) -> None:
    pem, files = certificate(folder), folder / "files"
    wheel = make_wheel(files / "packages")
    tarball = make_tarball(files / "releases")
    make_index(files, wheel)
    _say("Starting an origin with a wheel and a tarball, and mitmdump -s addon/artifactapi.py")
    trust = ("--set", f"ssl_verify_upstream_trusted_ca={pem}")
    with (
        FileServer(files, pem) as origin,
        Mitm(folder / "mitm", *trust, scripts=[SCRIPT]) as proxy,
    ):
        requests = 0
        for title, command, count in _clients(proxy, origin.url, tarball.name, folder):
            _say(title)
            subprocess.run(command, check=False, cwd=folder, stdout=subprocess.DEVNULL)
            requests += count
        AccessLog(EmbeddedServer().dsn).wait_rows(requests, timeout=10)
        _say("artifactapi tail")
        subprocess.run([Path(sys.executable).with_name("artifactapi"), "tail"], check=True)


def _clients(
    proxy: Mitm, origin: str, tarball: str, folder: Path
) -> list[tuple[str, list[str], int]]:
    """What to say, what to run, and how many rows it makes."""
    found: list[tuple[str, list[str], int]] = []
    curl = shutil.which("curl")
    if curl:
        common = [curl, "-sS", "-o", os.devnull, "--proxy", proxy.url, "--noproxy", ""]
        secure = [*common, "--cacert", str(proxy.ca_path)]
        found += [
            ("curl: a tarball", [*secure, f"{origin}/releases/{tarball}"], 1),
            ("curl: one that is not there", [*secure, f"{origin}/releases/gone.tar.gz"], 1),
            (
                "curl: a server that is not there",
                [*common, f"http://localhost:{free_port()}/?key=s3cret"],
                1,
            ),
        ]
    else:
        _say("curl is not installed here, so that pip must do")
    try:
        pip = pip_command()
    except FileNotFoundError as e:
        _say(f"{e}, so that curl must do")
    else:
        options = ["--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        options += ["--proxy", proxy.url, "--cert", str(proxy.ca_path)]
        index = ["--index-url", f"{origin}/simple/", "--target", str(folder / "target")]
        found.append(
            ("pip install demo-package", [*pip, *options, "install", *index, "demo-package"], 2)
        )
    return found


def _say(text: str) -> None:
    sys.stdout.write(f"# {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

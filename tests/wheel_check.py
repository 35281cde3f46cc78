"""Install and use the built wheel away from the source tree: `python tests/wheel_check.py WHEEL`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.environment import clean_environment, temporary_home
from tests.support.wait import eventually

START_SECONDS = 60
UV = os.environ.get("UV", "uv")  # `uv run` sets it; uv may not be on PATH
_LISTENING = re.compile(r"proxy listening at \S+?:(\d+)")


def check(wheel: Path, folder: Path) -> None:
    """Install the wheel into a new environment in `folder`, and use it there.

    Raises:
        AssertionError, OSError: it does not do what the README says.
    """
    environment = folder / "environment"
    _run(UV, "venv", "--quiet", "--python", sys.executable, str(environment))
    python = environment / "bin" / "python"
    _run(UV, "pip", "install", "--quiet", "--python", str(python), str(wheel))
    bin_folder = environment / "bin"
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    env = {
        **clean_environment(),
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }
    script = Path(_run("artifactapi", "path", env=env, cwd=elsewhere).strip())
    assert "site-packages" in script.parts, script
    packages = script.parents[2]
    _check_top_level(python, packages)
    with temporary_home() as home:
        _check_rows(script, folder, elsewhere, {**env, "ARTIFACTAPI_HOME": str(home)})


def _check_top_level(python: Path, packages: Path) -> None:
    """The wheel adds one package and its metadata to site-packages, with all data files."""
    listing = (
        "from importlib.metadata import files;"
        "print(*sorted({f.parts[0] for f in files('artifactapi')} - {'..'}))"
    )
    top = _run(str(python), "-c", listing, cwd=packages).split()
    metadata = [name for name in top if name.endswith(".dist-info")]
    assert len(metadata) == 1, top
    assert set(top) == {"artifactlog", *metadata}, top
    for name in ("list.html", "script.js", "style.css"):
        assert (packages / "artifactlog" / "addon" / "web" / "files" / name).is_file(), name
    for name in ("addon", "exporter", "configs", "tests"):
        assert not (packages / name).exists(), name


def _check_rows(script: Path, folder: Path, elsewhere: Path, env: dict[str, str]) -> None:
    """The installed script, loaded by mitmdump, writes a row to the embedded server."""
    output = folder / "output"
    listen = ["--listen-host", "127.0.0.1", "-p", "0", "--set", f"confdir={folder / 'confdir'}"]
    with output.open("wb") as file:
        proxy = subprocess.Popen(
            [Path(env["PATH"].split(os.pathsep)[0]) / "mitmdump", "-s", script, *listen],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=elsewhere,
            env=env,
        )
    try:
        port = _port(proxy, output)
        # mitmproxy itself responds to this host name, so this needs no other server.
        opener = build_opener(ProxyHandler({"http": f"http://127.0.0.1:{port}"}))
        with opener.open("http://mitm.it/", timeout=START_SECONDS) as response:
            assert response.status == 200
        # The first start of the server can take longer than a stopping proxy waits for it.
        eventually(
            lambda: "http://mitm.it/" in _run("artifactapi", "tail", env=env, cwd=elsewhere),
            START_SECONDS,
        )
    finally:
        proxy.terminate()
        proxy.wait(START_SECONDS)
    text = output.read_text()
    assert proxy.returncode == 0, text
    assert "1 row written, none lost" in text, text
    shown = _run("artifactapi", "tail", env=env, cwd=elsewhere)
    assert "http://mitm.it/" in shown, shown
    page = folder / "report.html"
    _run("artifactapi", "report", "--html", str(page), env=env, cwd=elsewhere)
    assert "mitm.it" in page.read_text()


def _port(proxy: subprocess.Popen[bytes], output: Path) -> int:
    def ports() -> list[str]:
        text = output.read_text()
        assert proxy.poll() is None, text
        return _LISTENING.findall(text)

    return int(eventually(ports, START_SECONDS)[0])


def _run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    program = command[0]
    if env is not None:  # Popen would look it up in our own PATH
        program = str(Path(env["PATH"].split(os.pathsep)[0]) / program)
    done = subprocess.run(
        [program, *command[1:]], check=False, capture_output=True, text=True, env=env, cwd=cwd
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Check the wheel given on the command line."""
    with tempfile.TemporaryDirectory(prefix="artifactapi-wheel-") as folder:
        check(Path(sys.argv[1]).resolve(), Path(folder))
    sys.stdout.write("The wheel works outside the checkout.\n")


if __name__ == "__main__":
    main()

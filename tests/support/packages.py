"""Create small packages, serve files over HTTP, and find the pip that comes with Python."""

from __future__ import annotations

import base64
import ensurepip
import functools
import hashlib
import io
import random
import sys
import tarfile
import zipfile
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

from .http_server import HttpServer, QuietHandler


def make_wheel(folder: Path, name: str = "demo_package", version: str = "1.2.3") -> Path:
    """Write a small, valid, pure Python wheel (the binary distribution format) to `folder`."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    tag = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {
        f"{name}/__init__.py": f'__version__ = "{version}"\n'.encode(),
        f"{name}/data.bin": noise(140_000),
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": tag.encode(),
    }
    record = "".join(f"{path},{_digest(data)},{len(data)}\n" for path, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for inner, data in files.items():
            wheel.writestr(inner, data)
    return path


def make_tarball(folder: Path, name: str = "sources-4.5.tar.gz") -> Path:
    """Write a small archive to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("README")
        info.size = 1_200_000
        archive.addfile(info, io.BytesIO(noise(info.size)))
    return path


def make_index(folder: Path, wheel: Path, name: str = "demo-package") -> None:
    """Write a simple index page that links to this wheel, under `folder`/simple."""
    page = folder / "simple" / name / "index.html"
    page.parent.mkdir(parents=True)
    link = f"../../{wheel.relative_to(folder).as_posix()}"
    page.write_text(f'<!DOCTYPE html><html><body><a href="{link}">{wheel.name}</a></body></html>')


def pip_command() -> list[str]:
    """Return a command that runs pip from the wheel that comes with Python.

    Raises:
        FileNotFoundError: This Python has no such wheel.
    """
    bundled = Path(ensurepip.__file__).parent / "_bundled"
    for wheel in sorted(bundled.glob("pip-*.whl")):
        return [sys.executable, f"{wheel}/pip", "--isolated", "--no-input"]
    raise FileNotFoundError("this Python does not include pip")


def noise(size: int) -> bytes:
    """Return random bytes, which do not compress; always the same ones."""
    return random.Random(1).randbytes(size)


def _digest(data: bytes) -> str:
    raw = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={raw.decode()}"


class _FolderHandler(QuietHandler, SimpleHTTPRequestHandler):
    """Serves the files of a folder."""


class FileServer(HttpServer):
    """Serves a folder; see `HttpServer`."""

    def __init__(self, folder: Path, certificate: Path | None = None) -> None:
        super().__init__(functools.partial(_FolderHandler, directory=str(folder)), certificate)

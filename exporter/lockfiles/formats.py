"""The formats of lock files, by name and by the usual names of their files. Reads files, within bounds."""

from __future__ import annotations

import os
import stat
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from .conda import read_conda_lock, read_pixi
from .dart import read_pub
from .dotnet import read_nuget
from .elixir import read_mix
from .golang import read_go
from .gradle import read_gradle
from .helm import read_helm
from .javascript import read_npm, read_pnpm
from .locked import LockedPackage, MalformedError, Unchecked
from .php import read_composer
from .python import read_pipfile, read_poetry, read_pylock, read_uv
from .requirements import read_requirements
from .ruby import read_bundler
from .rust import read_cargo
from .terraform import read_terraform
from .yarn import read_yarn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .locked import Entry

MAX_BYTES = 32 * 1024 * 1024  # the largest known ones have 10 MB
MAX_ENTRIES = 500_000


class LockFileError(Exception):
    """A lock file cannot be read. The message is one sentence that names the file."""


class LockFormat(NamedTuple):
    """One format of lock files."""

    ecosystems: tuple[str, ...]  # purl types of the packages that its tool fetches
    file_names: tuple[str, ...]  # globs
    read: Callable[[bytes], Iterator[Entry]]


class LockFile(NamedTuple):
    """A lock file that was read."""

    path: str
    format_name: str
    ecosystems: tuple[str, ...]
    packages: list[LockedPackage]
    unchecked: list[Unchecked]


_CONFLICT = b"<<<<<<< "

# Tried in this order; requirements come last because their names vary.
FORMATS = {
    "pylock": LockFormat(("pypi",), ("pylock.toml", "pylock.*.toml"), read_pylock),
    "uv": LockFormat(("pypi",), ("uv.lock",), read_uv),
    "poetry": LockFormat(("pypi",), ("poetry.lock", "pdm.lock"), read_poetry),
    "pipfile": LockFormat(("pypi",), ("Pipfile.lock",), read_pipfile),
    "npm": LockFormat(
        ("npm",), ("package-lock.json", "npm-shrinkwrap.json", ".package-lock.json"), read_npm
    ),
    "pnpm": LockFormat(("npm",), ("pnpm-lock.yaml",), read_pnpm),
    "yarn": LockFormat(("npm",), ("yarn.lock",), read_yarn),
    "cargo": LockFormat(("cargo",), ("Cargo.lock",), read_cargo),
    "go": LockFormat(("golang",), ("go.sum", "go.work.sum"), read_go),
    "bundler": LockFormat(
        ("gem",), ("Gemfile.lock", "gems.locked", "*.gemfile.lock"), read_bundler
    ),
    # Archives of commits on GitHub are Composer's packages too.
    "composer": LockFormat(("composer", "github"), ("composer.lock",), read_composer),
    "nuget": LockFormat(("nuget",), ("packages.lock.json", "packages.*.lock.json"), read_nuget),
    "gradle": LockFormat(("maven",), ("verification-metadata.xml",), read_gradle),
    "conda-lock": LockFormat(
        ("conda", "pypi"), ("conda-lock.yml", "*.conda-lock.yml"), read_conda_lock
    ),
    "pixi": LockFormat(("conda", "pypi"), ("pixi.lock",), read_pixi),
    "pub": LockFormat(("pub",), ("pubspec.lock",), read_pub),
    "mix": LockFormat(("hex",), ("mix.lock",), read_mix),
    "terraform": LockFormat(("terraform",), (".terraform.lock.hcl",), read_terraform),
    "helm": LockFormat(("helm",), ("Chart.lock", "requirements.lock"), read_helm),
    "requirements": LockFormat(
        ("pypi",), ("*requirements*.txt", "constraints*.txt"), read_requirements
    ),
}


def read_lock_file(path: Path, format_name: str | None = None) -> LockFile:
    """Read a lock file. Executes nothing, fetches nothing, and reads no other file.

    Args:
        path: A regular file of at most MAX_BYTES.
        format_name: A key of FORMATS; None: the one that the file's name says.

    Raises:
        LockFileError: there is no such format, or the file cannot be read, is not valid or too large.
    """
    name = format_name or _format_of(path)
    lock_format = FORMATS.get(name)
    if lock_format is None:
        raise LockFileError(f"There is no format {name!r}; expected one of {', '.join(FORMATS)}.")
    try:
        entries = list(islice(lock_format.read(_bounded_bytes(path)), MAX_ENTRIES + 1))
    except MalformedError as e:
        raise LockFileError(f"{path} {e}.") from None
    except RecursionError:
        raise LockFileError(f"{path} is nested too deeply.") from None
    except OSError as e:
        raise LockFileError(f"{path} cannot be read: {e.strerror}.") from None
    if len(entries) > MAX_ENTRIES:
        raise LockFileError(f"{path} lists more than {MAX_ENTRIES:,} packages.")
    packages = [entry for entry in entries if isinstance(entry, LockedPackage)]
    unchecked = [entry for entry in entries if isinstance(entry, Unchecked)]
    return LockFile(str(path), name, lock_format.ecosystems, packages, unchecked)


def _format_of(path: Path) -> str:
    for name, lock_format in FORMATS.items():
        if any(fnmatchcase(path.name, glob) for glob in lock_format.file_names):
            return name
    raise LockFileError(
        f"{path} has no name of a known lock file; name its format with --format:"
        f" {', '.join(FORMATS)}."
    )


def _bounded_bytes(path: Path) -> bytes:
    """Read a regular file. Opening does not wait for a writer, as it would with a named pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - it owns the descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise MalformedError("is not a regular file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise MalformedError(f"is larger than {MAX_BYTES // 1024 // 1024} MiB")
    # Some formats would be read with the packages of both sides.
    if data.startswith(_CONFLICT) or b"\n" + _CONFLICT in data:
        raise MalformedError("has a merge conflict; resolve it first")
    return data

"""Declare every setting once, with its default, unit and limits, and load them from a YAML file."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
import platformdirs
import re2
import yaml
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=3600)]

_PATH_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")  # a key or an index of "redact.paths[0]"
_MAX_SHOWN = 80  # characters of a wrong value in a message


class SettingsError(Exception):
    """A setting is invalid. The message is one sentence: file, key, value and what was expected."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, rejects unknown keys."""


class DatabaseSettings(_Section, frozen=True):
    """Where the rows go, and how long a call to the server may take."""

    dsn: str = ""  # libpq connection string or URI; empty: the embedded server
    connect_seconds: Seconds = 5.0  # limit for one connection attempt
    call_seconds: Seconds = 8.0  # limit for one statement or COPY
    retry_min_seconds: Seconds = 0.1  # pause after the first failure; doubles each time
    retry_max_seconds: Seconds = 30.0  # longest pause between attempts
    # false: faster on a slow disk, but a server crash loses its last second
    synchronous_commit: bool = True


class BufferSettings(_Section, frozen=True):
    """Limits of the in-memory buffer. At either limit, new entries are dropped."""

    max_entries: Count = 65_536
    max_bytes: Annotated[int, Meta(ge=65_536)] = 56 * 1024 * 1024  # about 64 MiB of process memory


class BatchSettings(_Section, frozen=True):
    """A batch is written when it has this many entries or the oldest is this old."""

    max_entries: Annotated[int, Meta(ge=1, le=10_000)] = 128
    max_seconds: Seconds = 2.0


class SpoolSettings(_Section, frozen=True):
    """Disk space for entries in the data folder while PostgreSQL is unavailable."""

    max_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024  # 0: use no disk


class ShutdownSettings(_Section, frozen=True):
    """How long shutdown may take; it blocks mitmproxy's event loop."""

    drain_seconds: Annotated[float, Meta(ge=0, le=60)] = 5.0


class ArtifactSettings(_Section, frozen=True):
    """Optional details of artifacts."""

    sha256: bool = False  # of complete status 200 bodies; costs about 0.6 ms per MB


class RemotesSettings(_Section, frozen=True):
    """Registries to recognize in addition to the built-in ones."""

    file: str = ""  # same format as configs/remotes.yaml, and tried before it; empty: none


class RedactSettings(_Section, frozen=True):
    """What to redact in queries and paths."""

    query: Literal["keys", "signed", "drop", "full"] = "keys"
    # RE2 patterns matched against "host/path"; group 1, or else the whole match, is REDACTED
    paths: tuple[str, ...] = ()


class PageSettings(_Section, frozen=True):
    """The page /access-log in mitmweb."""

    dsn: str = ""  # for a role that can read; empty: database.dsn
    query_seconds: Annotated[float, Meta(ge=0.1, le=60)] = 5.0  # limit for one query


class Settings(_Section, frozen=True):
    """All settings. A test checks that `Settings()` equals `configs/artifactapi.yaml`."""

    node: str = ""  # name of this proxy in each row; empty: the host name
    database: DatabaseSettings = DatabaseSettings()
    buffer: BufferSettings = BufferSettings()
    batch: BatchSettings = BatchSettings()
    spool: SpoolSettings = SpoolSettings()
    shutdown: ShutdownSettings = ShutdownSettings()
    redact: RedactSettings = RedactSettings()
    remotes: RemotesSettings = RemotesSettings()
    artifact: ArtifactSettings = ArtifactSettings()
    page: PageSettings = PageSettings()

    @property
    def node_name(self) -> str:
        """The name of this proxy: `node`, or the host name."""
        return self.node or platform.node()

    def with_dsn(self, dsn: str) -> Settings:
        """Return these settings with another database, or unchanged if `dsn` is empty."""
        if not dsn:
            return self
        return msgspec.structs.replace(
            self, database=msgspec.structs.replace(self.database, dsn=dsn)
        )


def load_settings(path: Path | None) -> Settings:
    """Load settings from a YAML file; None means the defaults.

    Raises:
        SettingsError: the file can't be read, is not valid YAML, or has an unknown key or an
            invalid value.
    """
    if path is None:
        return Settings()
    document = _read_yaml(path)
    try:
        settings = msgspec.convert({} if document is None else document, Settings)
    except msgspec.ValidationError as e:
        raise SettingsError(f"{path}: {_explain(str(e), document)}") from e
    for pattern in settings.redact.paths:
        try:
            re2.compile(pattern)
        except re2.error as e:
            raise SettingsError(
                f"{path}: redact.paths has {pattern!r}, expected a valid RE2 pattern."
            ) from e
    if settings.database.retry_max_seconds < settings.database.retry_min_seconds:
        raise SettingsError(
            f"{path}: database.retry_max_seconds is {settings.database.retry_max_seconds}, "
            f"expected at least retry_min_seconds ({settings.database.retry_min_seconds})."
        )
    return settings


def _read_yaml(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise SettingsError(f"{path}: is not a file.")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise SettingsError(f"{path}: can't be read ({e.strerror}).") from e
    except UnicodeDecodeError as e:
        raise SettingsError(f"{path}: is not UTF-8 text.") from e
    except yaml.YAMLError as e:
        raise SettingsError(f"{path}: is not valid YAML: {_yaml_problem(e)}.") from e
    except (ArithmeticError, AttributeError, LookupError, RecursionError, ValueError) as e:
        # PyYAML raises these for an invalid date or number, and for too deep nesting.
        raise SettingsError(f"{path}: is not valid YAML ({type(e).__name__}).") from e


def resolve_dsn(option: str, settings: Settings) -> str:
    """Return the first one set: `option`, ARTIFACTAPI_DSN, `database.dsn`, else "" (embedded)."""
    return option or os.environ.get("ARTIFACTAPI_DSN", "") or settings.database.dsn


def data_folder() -> Path:
    """Return where the embedded server and the spool keep their files; they create it.

    `ARTIFACTAPI_HOME`, else the platform's user data folder. For root it is a system folder instead:
    the server does not run as root, and root's home is usually closed to other users.
    """
    home = os.environ.get("ARTIFACTAPI_HOME")
    if home:
        return Path(home).expanduser().absolute()
    if os.geteuid() == 0:
        is_mac = platform.system() == "Darwin"
        return Path("/Library/Application Support" if is_mac else "/var/lib", "artifactapi")
    return platformdirs.user_data_path("artifactapi", appauthor=False).expanduser().absolute()


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return str(error).replace("\n", " ")


def _explain(error: str, document: Any) -> str:
    """Reword an error of msgspec so that it names the key, its value and what was expected.

    An example of such an error is "Expected `int` >= 1 - at `$.buffer.max_entries`".
    """
    problem, _, place = error.partition(" - at `$")
    key = place.rstrip("`").lstrip(".")
    if problem.startswith("Object contains unknown field"):
        unknown = problem.split("`")[1]
        return (
            f"{key + '.' if key else ''}{unknown} is not a setting; remove it or correct its name."
        )
    value = document
    for name, index in _PATH_STEP.findall(key):
        value = value[name] if name else value[int(index)]
    shown = "***" if key.endswith("dsn") else _shown(value)
    expected = problem.removeprefix("Expected ").replace("`", "").partition(", got ")[0]
    if expected.startswith("Invalid enum value"):
        expected = "one of " + ", ".join(_choices(key))
    return f"{key or 'the file'} is {shown}, expected {expected}."


def _shown(value: Any) -> str:
    """Format a value for a message; hide what could be a misplaced connection string."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return "***" if "://" in text or "=" in text else text[:_MAX_SHOWN]


def _choices(key: str) -> list[str]:
    """Return the values that a setting of type Literal allows."""
    annotation: Any = Settings
    for name in key.split("."):
        annotation = get_type_hints(annotation)[name]
    return sorted(get_args(annotation))

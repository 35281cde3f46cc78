"""Every setting: its default, unit, bound and reason, declared once; reads nothing but one YAML file."""

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


_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")  # of "redact.paths[0]"
_MAX_SHOWN = 80


class SettingsError(Exception):
    """A setting is wrong. The text is one sentence: file, key, value, what was expected."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all sections share: unknown keys are refused, nothing changes after loading."""


class DatabaseSettings(_Section, frozen=True):
    """Where the rows go, and how long a call to the server may take."""

    dsn: str = ""  # libpq connection string or URI; empty: the embedded server
    connect_seconds: Seconds = 5.0  # longest one attempt to connect may take
    call_seconds: Seconds = 8.0  # longest one statement or COPY may take, whatever the peer does
    retry_min_seconds: Seconds = 0.1  # pause after the first failure; doubles from there
    retry_max_seconds: Seconds = 30.0  # longest pause between two attempts
    # off: faster on a slow disk; a crash of the server loses its last second
    synchronous_commit: bool = True


class BufferSettings(_Section, frozen=True):
    """What may wait in memory. Whichever bound is met first, the newest entry is dropped."""

    max_entries: Count = 65_536
    max_bytes: Annotated[int, Meta(ge=65_536)] = 56 * 1024 * 1024  # some 64 MiB of the process


class BatchSettings(_Section, frozen=True):
    """When waiting entries are written: whichever comes first."""

    max_entries: Annotated[int, Meta(ge=1, le=10_000)] = 128
    max_seconds: Seconds = 2.0


class SpoolSettings(_Section, frozen=True):
    """What is kept on disk, in the data folder, while Postgres is away."""

    max_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024  # 0: nothing


class ShutdownSettings(_Section, frozen=True):
    """What a stop may cost: mitmproxy's event loop stands still on_wait."""

    drain_seconds: Annotated[float, Meta(ge=0, le=60)] = 5.0


class ArtifactSettings(_Section, frozen=True):
    """What more is kept of an artifact."""

    sha256: bool = False  # of whole 200 bodies; costs about 0.6 ms for each MB


class RemotesSettings(_Section, frozen=True):
    """Which registries there are beside those we know."""

    file: str = ""  # YAML as configs/remotes.yaml; its remotes are tried before those; empty: none


class RedactSettings(_Section, frozen=True):
    """What of a query, and of secrets in paths, reaches the table."""

    query: Literal["keys", "signed", "drop", "full"] = "keys"
    # RE2 patterns over "host/path"; what group 1 matches, or else all of it, is REDACTED in the path
    paths: tuple[str, ...] = ()


class PageSettings(_Section, frozen=True):
    """The page /access-log in mitmweb."""

    dsn: str = ""  # of a role that may read; empty: the connection the rows are written by
    query_seconds: Annotated[float, Meta(ge=0.1, le=60)] = 5.0  # longest its questions may take


class Settings(_Section, frozen=True):
    """All settings. `Settings()` equals `configs/artifactapi.yaml`; a test holds it to that."""

    node: str = ""  # written into each row; empty: this machine's host name
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
        """Which proxy writes: `node`, or this machine's host name."""
        return self.node or platform.node()

    def with_dsn(self, dsn: str) -> Settings:
        """These settings with another database; an empty `dsn` changes nothing."""
        if not dsn:
            return self
        return msgspec.structs.replace(
            self, database=msgspec.structs.replace(self.database, dsn=dsn)
        )


def load_settings(path: Path | None) -> Settings:
    """Read settings from a YAML file; None gives the defaults.

    Raises:
        SettingsError: the file can't be read, is no YAML, or holds an unknown key or a wrong value.
    """
    if path is None:
        return Settings()
    document = _read_yaml(path)
    try:
        settings = msgspec.convert({} if document is None else document, Settings)
    except msgspec.ValidationError as e:
        raise SettingsError(f"{path}: {_sentence(str(e), document)}") from e
    for pattern in settings.redact.paths:
        try:
            re2.compile(pattern)
        except re2.error as e:
            raise SettingsError(
                f"{path}: redact.paths has {pattern!r}, expected an RE2 pattern."
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
            raise SettingsError(f"{path}: is no file.")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise SettingsError(f"{path}: can't be read ({e.strerror}).") from e
    except UnicodeDecodeError as e:
        raise SettingsError(f"{path}: is not UTF-8 text.") from e
    except yaml.YAMLError as e:
        raise SettingsError(f"{path}: is no YAML: {_yaml_problem(e)}.") from e
    except (ArithmeticError, AttributeError, LookupError, RecursionError, ValueError) as e:
        # PyYAML's own way to say that a date, a number or the nesting is beyond it.
        raise SettingsError(f"{path}: is no YAML that can be read ({type(e).__name__}).") from e


def resolve_dsn(option: str, settings: Settings) -> str:
    """Where the database is; first hit wins: option, ARTIFACTAPI_DSN, `database.dsn`, "" (embedded)."""
    return option or os.environ.get("ARTIFACTAPI_DSN", "") or settings.database.dsn


def data_folder() -> Path:
    """Where the embedded server and the spool keep their files; created by whoever writes there.

    `ARTIFACTAPI_HOME`, else the platform's user data folder.
    """
    home = os.environ.get("ARTIFACTAPI_HOME")
    path = Path(home) if home else platformdirs.user_data_path("artifactapi", appauthor=False)
    return path.expanduser().absolute()


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return str(error).replace("\n", " ")


def _sentence(problem: str, document: Any) -> str:
    """Turn "Expected `int` >= 1 - at `$.buffer.max_entries`" round: key, value, what was expected."""
    expected, _, place = problem.partition(" - at `$")
    key = place.rstrip("`").lstrip(".")
    if expected.startswith("Object contains unknown field"):
        unknown = expected.split("`")[1]
        return (
            f"{key + '.' if key else ''}{unknown} is not a setting; remove it or correct its name."
        )
    value = document
    for name, index in _STEP.findall(key):
        value = value[name] if name else value[int(index)]
    shown = "***" if key.endswith("dsn") else _shown(value)
    wanted = expected.removeprefix("Expected ").replace("`", "").partition(", got ")[0]
    if wanted.startswith("Invalid enum value"):
        wanted = "one of " + ", ".join(_choices(key))
    return f"{key or 'the file'} is {shown}, expected {wanted}."


def _shown(value: Any) -> str:
    """A value as it may be shown: a connection string can stand in the wrong place."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return "***" if "://" in text or "=" in text else text[:_MAX_SHOWN]


def _choices(key: str) -> list[str]:
    """What a setting with a closed list of values may be."""
    kind: Any = Settings
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return sorted(get_args(kind))

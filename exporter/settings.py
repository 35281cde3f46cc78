"""Declare every setting once, with its default, unit and limits, and load them from a YAML file."""

from __future__ import annotations

import ipaddress
import os
import platform
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import platformdirs
import re2
import yaml
from msgspec import Meta, inspect

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
# access_log_has_grown relies on it: no batch takes longer from its logged_at to its commit.
CallSeconds = Annotated[float, Meta(gt=0, le=600)]

_PATH_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")  # a key or an index of "redact.paths[0]"
_MAX_SHOWN = 80  # characters of a wrong value in a message
_MAX_PORT = 65_535
MAX_KEPT_DAYS = 36_500
_IPV6 = 6
# What to expect of a setting that is more than any text.
_EXPECTED_TEXT = {
    "metrics.listen": "an address and a port in quotes, such as '127.0.0.1:9464', '[::1]:9464', "
    "or ':9464' for all addresses"
}
_HIDDEN = "***"  # replaces a value that may hold a password


class SettingsError(Exception):
    """A setting is invalid. The message is one sentence: file, key, value and what was expected."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, rejects unknown keys."""


class DatabaseSettings(_Section, frozen=True):
    """Where the rows go, and how long a call to the server may take."""

    dsn: str = ""  # libpq connection string or URI; empty: the embedded server
    connect_seconds: Seconds = 5.0  # limit for one connection attempt
    call_seconds: CallSeconds = 8.0  # limit for one statement or COPY
    retry_min_seconds: Seconds = 0.1  # pause after the first failure; doubles each time
    retry_max_seconds: Seconds = 30.0  # longest pause between attempts
    # false: faster on a slow disk, but a server crash loses its last second
    synchronous_commit: bool = True
    # an index for the filter `text` on days that are over, if the database has the extension pg_trgm
    index_text: bool = True


class BufferSettings(_Section, frozen=True):
    """Limits of the in-memory buffer. At either limit, new entries are dropped."""

    max_entries: Count = 65_536
    max_bytes: Annotated[int, Meta(ge=65_536)] = 48 * 1024 * 1024  # about 64 MiB of process memory


class BatchSettings(_Section, frozen=True):
    """A batch is written when it has this many entries or the oldest is this old."""

    max_entries: Annotated[int, Meta(ge=1, le=10_000)] = 128
    max_seconds: Seconds = 2.0


class SpoolSettings(_Section, frozen=True):
    """Disk space for entries in the data folder while PostgreSQL is unavailable."""

    max_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024  # 0: use no disk


class JournalSettings(_Section, frozen=True):
    """Shared memory for entries that are neither in PostgreSQL nor on disk, for the case of a kill."""

    # 0: off. Read when the proxy starts. An entry takes about 400 bytes.
    max_bytes: Annotated[int, Meta(ge=0, le=1 << 30)] = 16 * 1024 * 1024


class ShutdownSettings(_Section, frozen=True):
    """How long shutdown may take; it blocks mitmproxy's event loop."""

    drain_seconds: Annotated[float, Meta(ge=0, le=60)] = 5.0


class ArtifactSettings(_Section, frozen=True):
    """Optional details of artifacts."""

    sha256: bool = False  # of complete status 200 bodies; costs about 0.6 ms per MB
    debian_epochs: bool = (
        True  # from the indexes that pass; the worker reads each once, in up to 1 s
    )


class RemotesSettings(_Section, frozen=True):
    """Registries to recognize in addition to the built-in ones."""

    file: str = ""  # same format as configs/remotes.yaml, and tried before it; empty: none


class RedactSettings(_Section, frozen=True):
    """What to redact in queries and paths."""

    query: Literal["keys", "signed", "drop", "full"] = "keys"
    # RE2 patterns matched against "host/path"; group 1, or else the whole match, is REDACTED
    paths: tuple[str, ...] = ()


class RetentionSettings(_Section, frozen=True):
    """How long rows stay in the table. Totals of each day stay forever."""

    # whole UTC days before today; 0: keep all rows
    days: Annotated[int, Meta(ge=0, le=MAX_KEPT_DAYS)] = 0
    # folder for a Parquet file of each day that leaves the table; empty: its rows are deleted
    archive: str = ""


class ReadSettings(_Section, frozen=True):
    """How the page and the commands that read the log reach the database."""

    dsn: str = ""  # for a role that can read; empty: database.dsn


class PageSettings(_Section, frozen=True):
    """The page /access-log in mitmweb."""

    query_seconds: Annotated[float, Meta(ge=0.1, le=60)] = 5.0  # limit for one query


class MetricsSettings(_Section, frozen=True):
    """Metrics for Prometheus, over HTTP at /metrics."""

    listen: str = ""  # address and port, see `listen_address`; empty: off


class Settings(_Section, frozen=True):
    """All settings. A test checks that `Settings()` equals `configs/artifactapi.yaml`."""

    node: str = ""  # name of this proxy in each row; empty: the host name
    database: DatabaseSettings = DatabaseSettings()
    buffer: BufferSettings = BufferSettings()
    batch: BatchSettings = BatchSettings()
    spool: SpoolSettings = SpoolSettings()
    journal: JournalSettings = JournalSettings()
    shutdown: ShutdownSettings = ShutdownSettings()
    redact: RedactSettings = RedactSettings()
    remotes: RemotesSettings = RemotesSettings()
    artifact: ArtifactSettings = ArtifactSettings()
    retention: RetentionSettings = RetentionSettings()
    read: ReadSettings = ReadSettings()
    page: PageSettings = PageSettings()
    metrics: MetricsSettings = MetricsSettings()

    @property
    def node_name(self) -> str:
        """The name of this proxy: `node`, or the host name."""
        return self.node or platform.node() or "localhost"

    def with_dsn(self, dsn: str) -> Settings:
        """Return these settings with another database, or unchanged if `dsn` is empty."""
        if not dsn:
            return self
        return msgspec.structs.replace(
            self, database=msgspec.structs.replace(self.database, dsn=dsn)
        )

    def for_reading(self) -> Settings:
        """Return these settings with `read.dsn` as the database, if it is set."""
        return self.with_dsn(self.read.dsn)


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
        problem = _pattern_problem(pattern)
        if problem:
            raise SettingsError(
                f"{path}: redact.paths has {pattern!r}, expected a valid RE2 pattern: {problem}."
            )
    if settings.database.retry_max_seconds < settings.database.retry_min_seconds:
        raise SettingsError(
            f"{path}: database.retry_max_seconds is {settings.database.retry_max_seconds}, "
            f"expected at least retry_min_seconds ({settings.database.retry_min_seconds})."
        )
    if settings.metrics.listen and listen_address(settings.metrics.listen) is None:
        raise SettingsError(
            f"{path}: metrics.listen is {_shown(settings.metrics.listen)}, "
            f"expected {_EXPECTED_TEXT['metrics.listen']}."
        )
    return settings


def listen_address(text: str) -> tuple[str, int] | None:
    """Return the IP address and the port of `metrics.listen`; None if it is not valid.

    The address is empty for all addresses of the machine. Port 0 is any free one. Names are not looked up,
    except that `localhost` is 127.0.0.1.
    """
    host, colon, port = text.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and int(port) <= _MAX_PORT):
        return None
    if host == "localhost":
        host = "127.0.0.1"
    is_bracketed = host.startswith("[") and host.endswith("]")
    address = host[1:-1] if is_bracketed else host
    if address or is_bracketed:
        try:
            version = ipaddress.ip_address(address).version
        except ValueError:
            return None
        if is_bracketed is not (version == _IPV6):
            return None
    return address, int(port)


def _read_yaml(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise SettingsError(f"{path}: is not a file.")
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
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


def create_data_folder(folder: Path) -> None:
    """Create the data folder and its parents where they are missing. Raises OSError.

    For root, every user can pass them, whatever the umask is: the embedded server does not run as root.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        try:
            path.mkdir(mode=0o700 if path == folder else 0o777)
        except FileExistsError:  # another thread or proxy was faster
            continue
        if os.geteuid() == 0:
            path.chmod(0o711)


def create_private_folder(folder: Path) -> None:
    """Create a folder in the data folder, which only this user can enter. Raises OSError."""
    create_data_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, as YAML 1.2 does (3.2.1.3). PyYAML would keep only the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {_key_name(key.value)} appears twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return str(error).replace("\n", " ")


def _pattern_problem(pattern: str) -> str:
    """Return why RE2 rejects a pattern, or "" if it does not."""
    options = re2.Options()
    options.log_errors = False  # the error is in the exception; do not print it as well
    try:
        re2.compile(pattern, options)
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    except re2.error as e:
        (reason,) = e.args
        return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
    return ""


def _explain(error: str, document: Any) -> str:
    """Reword an error of msgspec so that it names the key, its value and what was expected.

    Examples of such errors are "Expected `int` >= 1 - at `$.buffer.max_entries`",
    "Object contains unknown field `a` - at `$.buffer`" and "Expected `str` - at `key` in `$.buffer`".
    """
    is_about_key = " - at `key` in `$" in error
    problem, _, place = error.partition(" - at `key` in `$" if is_about_key else " - at `$")
    key = place.rstrip("`").lstrip(".")
    value, kind = _value_and_type(key, document)
    if is_about_key:  # YAML reads a key such as 1 or on as a number or a boolean
        unknown = next(name for name in value if not isinstance(name, str))
        return _explain_unknown(key, unknown, value[unknown])
    if problem.startswith("Object contains unknown field"):
        unknown = problem.partition("`")[2].removesuffix("`")
        return _explain_unknown(key, unknown, value[unknown])
    shown = _HIDDEN if key.endswith("dsn") else _shown(value)
    return f"{key or 'the file'} is {shown}, expected {_expected(key, kind)}."


def _value_and_type(key: str, document: Any) -> tuple[Any, inspect.Type]:
    """Return the value of a setting in the document, and the type that it should have."""
    value, kind = document, inspect.type_info(Settings)
    for name, index in _PATH_STEP.findall(key):
        value = value[name] if name else value[int(index)]
        if isinstance(kind, inspect.StructType):
            kind = next(field.type for field in kind.fields if field.name == name)
        elif isinstance(kind, inspect.VarTupleType):
            kind = kind.item_type
    return value, kind


def _explain_unknown(section: str, name: Any, value: Any) -> str:
    """Say that a key is not a setting, and where it belongs if another section has it."""
    is_text = isinstance(name, str)
    full_name = (f"{section}." if section else "") + (_key_name(name) if is_text else _shown(name))
    wanted_section, _, field = name.rpartition(".") if is_text else ("", "", "")
    sections = [
        section
        for section, fields in _fields_by_section().items()
        if field in fields and wanted_section in {"", section}
    ]
    if not sections:
        return f"{full_name} is not a setting; remove it or correct its name."
    is_hidden = field == "dsn" or isinstance(value, (dict, list)) or _shown(value) == _HIDDEN
    return (
        f"{full_name} is not a setting; write {': or '.join(sections)}: and below it, indented,"
        f" {field}: {'..' if is_hidden else _shown(value)}."
    )


def _fields_by_section() -> dict[str, tuple[str, ...]]:
    defaults = Settings()
    values = {name: getattr(defaults, name) for name in Settings.__struct_fields__}
    return {
        name: value.__struct_fields__
        for name, value in values.items()
        if isinstance(value, _Section)
    }


def _expected(key: str, kind: inspect.Type) -> str:
    """Describe the valid values of a setting."""
    if isinstance(kind, inspect.IntType):
        return f"a whole number{' of bytes' if key.endswith('_bytes') else ''}{_bounds(kind)}"
    if isinstance(kind, inspect.FloatType):
        return f"a number{' of seconds' if key.endswith('_seconds') else ''}{_bounds(kind)}"
    if isinstance(kind, inspect.LiteralType):
        return "one of " + ", ".join(map(str, kind.values))
    if isinstance(kind, inspect.StructType):
        return f"its settings, indented below {key}:" if key else "settings such as node: proxy-1"
    if isinstance(kind, inspect.VarTupleType):
        return "a list such as ['a', 'b']"
    is_boolean = isinstance(kind, inspect.BoolType)
    return "true or false" if is_boolean else _EXPECTED_TEXT.get(key, "text in quotes")


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.gt is not None:
        return f", above {kind.gt} and at most {kind.le}"
    if kind.le is not None:
        return f", from {kind.ge} to {kind.le}"
    return f", at least {kind.ge}"


def _shown(value: Any) -> str:
    """Format a value for a message, as YAML writes it; hide what could be a connection string."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value) if isinstance(value, date) else repr(value)
    return _HIDDEN if "://" in text or "=" in text else text[:_MAX_SHOWN]


def _key_name(name: str) -> str:
    """Format a key for a message. A key with unusual characters is shown like a value."""
    return name if re.fullmatch(r"[\w.-]{1,80}", name) else _shown(name)

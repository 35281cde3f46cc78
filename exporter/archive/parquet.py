"""Write and read Parquet files with DuckDB, in bounded memory. Knows no folder layout and no table."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
from datetime import datetime  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING, Any

from msgspec import DecodeError, Struct, json

from .columns import (
    ArchiveColumn,
    Digest,
    as_digest,
    duckdb_csv,
    duckdb_digest,
    quoted_name,
    quoted_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path
    from types import ModuleType
    from typing import IO, Self

    from duckdb import DuckDBPyConnection

# A row group is built in memory. Larger ones compress hardly better.
_ROW_GROUP_ROWS, _ROW_GROUP_BYTES = 122_880, 32 * 1024 * 1024
_MEMORY_LIMIT = "256MB"
_PIPE_BUFFER_BYTES = 256 * 1024
# DuckDB keeps all that it read from a pipe until its end.
_ROWS_PER_PIPE = 5_000
_POLL_SECONDS = 0.005
PARTIAL = ".partial"  # suffix of files that no reader looks at
_METADATA_KEY = "artifactapi"
# Nothing may be downloaded, and no file but those named may be written.
_SETTINGS = {
    "threads": 1,
    "memory_limit": _MEMORY_LIMIT,
    "temp_directory": "",
    "preserve_insertion_order": False,  # one thread keeps it, and row groups are bounded in bytes
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
_REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)


class ArchiveError(Exception):
    """The archive cannot be written or read. The message is one sentence; no row was lost."""


class FileRecord(Struct, frozen=True):
    """What a file says about itself in its metadata."""

    columns: list[ArchiveColumn]
    digest: Digest
    last_arrival: datetime  # the latest logged_at


def common_columns(
    records: Sequence[FileRecord], columns: Sequence[ArchiveColumn]
) -> list[ArchiveColumn]:
    """Return the columns of the table that at least one of the files has."""
    archived = {column.name for record in records for column in record.columns}
    return [column for column in columns if column.name in archived]


def load_duckdb() -> ModuleType:
    """Return the module. Raises ArchiveError if it is not installed."""
    try:
        import duckdb  # noqa: PLC0415 - optional, and takes 0.3 s
    except ModuleNotFoundError:
        raise ArchiveError(
            "Parquet files need an optional package: pip install 'duckdb>=1.4,<3'."
        ) from None
    return duckdb


@contextlib.contextmanager
def engine() -> Iterator[DuckDBPyConnection]:
    """Open DuckDB in memory: one thread, bounded memory, no temporary files, no downloads.

    Raises:
        ArchiveError: DuckDB is not installed, or it reported an error in the block.
    """
    duckdb = load_duckdb()
    with contextlib.closing(duckdb.connect(config=_SETTINGS)) as connection:
        try:
            connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
            yield connection
        except duckdb.Error as e:
            raise ArchiveError(_sentence(e)) from None


@contextlib.contextmanager
def new_parquet_file(
    path: Path, columns: Sequence[ArchiveColumn], expected_rows: int
) -> Iterator[ParquetWriter]:
    """Write a Parquet file that is not part of an archive. It gets its name when it is complete and on the disk.

    Args: as those of `ParquetWriter`.

    Raises:
        ArchiveError: the path is not that of a file; see also `ParquetWriter`.
    """
    try:
        if path.exists() and not path.is_file():  # it would be replaced
            raise ArchiveError(f"Cannot write {path}: it is a device or a pipe; name a file.")
        target = path.resolve()  # a link stays one
        partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
        try:
            metadata = json.encode({"columns": columns})
            with ParquetWriter(partial, columns, metadata, expected_rows) as writer:
                yield writer
            sync_file(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as e:
        raise ArchiveError(f"Cannot write {path}: {e.strerror or e}.") from None


class ParquetWriter:
    """Writes one Parquet file from the CSV output of COPY, which it takes row by row.

    DuckDB reads named pipes in a thread of its own and does not hold the GIL. It reads them one after another, so that
    its memory does not grow with the number of rows. The caller decides what becomes of the file: after an exception
    it may look complete.

    Raises:
        ArchiveError: DuckDB is not installed, or cannot write the file, or cannot read the text.
    """

    def __init__(
        self, path: Path, columns: Sequence[ArchiveColumn], metadata: bytes, expected_rows: int
    ) -> None:
        """Prepare to write.

        Args:
            path: The file. It is overwritten.
            columns: The columns of the text, as in `csv_columns`.
            metadata: What the file says about itself, in JSON.
            expected_rows: About how many rows there will be. Many more take more memory.
        """
        self._pipe_count = expected_rows // _ROWS_PER_PIPE + 1
        self._rows_in_pipe = 0
        self._path = path
        self._columns = list(columns)
        self._metadata = metadata
        self._cleanup = contextlib.ExitStack()
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as cleanup:
            folder = cleanup.enter_context(
                tempfile.TemporaryDirectory(prefix="artifactapi-archive-")
            )
            self._pipes = [f"{folder}/{number}" for number in range(self._pipe_count)]
            for pipe in self._pipes:
                os.mkfifo(pipe, 0o600)
            self._waiting = iter(self._pipes)
            self._engine = cleanup.enter_context(engine())
            self._thread = threading.Thread(target=self._run, name="artifactapi-archive")
            self._thread.start()
            cleanup.callback(self._release_pipes)
            self._pipe = self._open_pipe(next(self._waiting))
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._cleanup:
            if kind is not None:
                self._engine.interrupt()
            with contextlib.suppress(BrokenPipeError):  # DuckDB's own error says why
                self._pipe.close()
                for pipe in self._waiting if kind is None else ():
                    self._open_pipe(pipe).close()
            self._release_pipes()
            self._thread.join()
            if kind is None:
                self._raise_error()

    def write(self, row: bytes | bytearray | memoryview) -> None:
        """Take the text of the next row."""
        try:
            if self._rows_in_pipe >= _ROWS_PER_PIPE and (pipe := next(self._waiting, None)):
                self._pipe.close()
                self._pipe = self._open_pipe(pipe)
                self._rows_in_pipe = 0
            self._pipe.write(row)
            self._rows_in_pipe += 1
        except BrokenPipeError:
            self._thread.join()
            self._raise_error()
            raise ArchiveError(f"DuckDB stopped reading the rows for {self._path}.") from None

    def _release_pipes(self) -> None:
        """Let DuckDB end, which may be waiting for somebody to open the next pipe."""
        while self._thread.is_alive():
            for pipe in self._pipes:
                with contextlib.suppress(OSError):
                    os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            self._thread.join(_POLL_SECONDS)

    def _run(self) -> None:
        metadata = quoted_text(self._metadata.decode())
        options = (
            f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_ROW_GROUP_ROWS},"
            f" ROW_GROUP_SIZE_BYTES {_ROW_GROUP_BYTES}, KV_METADATA {{{_METADATA_KEY}: {metadata}}}"
        )
        rows = duckdb_csv(self._columns, self._pipes)
        try:
            self._engine.execute(f"COPY ({rows}) TO {quoted_text(str(self._path))} ({options})")
        except Exception as e:  # noqa: BLE001 - raised in the caller's thread
            self._error = e.with_traceback(None)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise ArchiveError(f"Cannot write {self._path}: {_reason(self._error)}.") from None

    def _open_pipe(self, path: str) -> IO[bytes]:
        """Open the pipe as soon as DuckDB reads it. A plain open would wait forever if DuckDB has failed."""
        while True:
            try:
                pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as e:
                if e.errno != errno.ENXIO:  # nobody reads yet
                    raise
            else:
                os.set_blocking(pipe, True)
                return os.fdopen(pipe, "wb", _PIPE_BUFFER_BYTES)
            self._thread.join(_POLL_SECONDS)
            if not self._thread.is_alive():
                self._raise_error()
                raise ArchiveError(f"DuckDB did not read the rows for {self._path}.")


def count_by(paths: Sequence[Path], column: str) -> dict[Any, int]:
    """Return the number of rows by the value of a column.

    Raises:
        ArchiveError: DuckDB is not installed, or a file is damaged.
    """
    name = quoted_name(column)
    query = f"SELECT {name}, count(*) FROM {files_relation(paths)} GROUP BY 1"  # noqa: S608
    with engine() as connection:
        return dict(connection.execute(query).fetchall())


def read_records(paths: Sequence[Path]) -> list[FileRecord]:
    """Return what the files say about themselves, without reading their rows.

    Raises:
        ArchiveError: a file is damaged, or artifactapi did not write it.
    """
    with engine() as connection:
        return _records(connection, paths)


def check_file(path: Path) -> FileRecord:
    """Read all values of a file and compare them with its digest.

    Raises:
        ArchiveError: they differ, or the file is damaged, or artifactapi did not write it.
    """
    with engine() as connection:
        (record,) = _records(connection, [path])
        query = duckdb_digest(record.columns, files_relation([path]))
        try:
            found = as_digest(connection.execute(query).fetchone())
        except Exception as e:  # noqa: BLE001 - DuckDB's errors have no common cause
            raise ArchiveError(f"{path} is damaged: {_reason(e)}.") from None
    if found != record.digest:
        raise ArchiveError(f"{path} is damaged: its values are not those that were written.")
    return record


def sync_file(path: Path) -> None:
    """Make the file survive a power failure, and let the next reader read it from the disk, where that is possible."""
    file = os.open(path, os.O_RDWR)
    try:
        os.fsync(file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def files_relation(paths: Iterable[Path]) -> str:
    """Return what to SELECT FROM in DuckDB. Columns that only some files have are NULL for the others."""
    names = ", ".join(quoted_text(str(path)) for path in paths)
    return f"read_parquet([{names}], union_by_name = true, hive_partitioning = false)"


def copy_lines(
    connection: DuckDBPyConnection,
    columns: Sequence[ArchiveColumn],
    rows: str,
    values: dict[str, Any],
) -> Iterator[bytes]:
    """Run a query in DuckDB and yield its rows in COPY's text format, a thousand rows at a time.

    Args:
        connection: From `engine`.
        columns: The columns to read, in this order.
        rows: A FROM clause, with any WHERE, ORDER BY and LIMIT.
        values: The values of its named parameters.
    """
    cells = ", ".join(_copy_cell(column) for column in columns)
    cursor = connection.execute(f"SELECT concat_ws(chr(9), {cells}) FROM {rows}", values)  # noqa: S608
    while lines := cursor.fetchmany(_LINES_AT_ONCE):
        yield "\n".join([*(line for (line,) in lines), ""]).encode()


_LINES_AT_ONCE = 1000


def _copy_cell(column: ArchiveColumn) -> str:
    r"""Return a cell of COPY's text format, with \N for NULL (PostgreSQL docs, COPY, "Text Format")."""
    name = column.duckdb_name
    text = f"{name}::VARCHAR"
    if column.type == "bytea":
        text = f"'\\\\x' || hex({name})"
    elif column.kind.duckdb == "VARCHAR":
        text = f"replace({name}, '\\', '\\\\')"
        for character, letter in ((9, "t"), (10, "n"), (13, "r")):
            text = f"replace({text}, chr({character}), '\\{letter}')"
    return f"coalesce({text}, '\\N')"


def _records(connection: DuckDBPyConnection, paths: Sequence[Path]) -> list[FileRecord]:
    """Return the files' records, in this order. All in one query: there may be hundreds."""
    query = "SELECT file_name, value FROM parquet_kv_metadata($paths) WHERE key = $key"
    values = {"paths": [str(path) for path in paths], "key": _METADATA_KEY.encode()}
    if not paths:
        return []
    try:
        found = dict(connection.execute(query, values).fetchall())
    except Exception as e:  # noqa: BLE001 - DuckDB's errors have no common cause
        if len(paths) > 1:
            return [_records(connection, [path])[0] for path in paths]  # one of them says which
        raise ArchiveError(f"{paths[0]} is damaged: {_reason(e)}.") from None
    return [_decoded(path, found.get(str(path))) for path in paths]


def _decoded(path: Path, record: bytes | None) -> FileRecord:
    try:
        return json.decode(record or b"", type=FileRecord)
    except DecodeError:
        raise ArchiveError(
            f"{path} is not from an archive of artifactapi; move it to another folder."
        ) from None


def _reason(error: Exception) -> str:
    """Return the cause of an error of DuckDB as a short text without values of rows."""
    text = str(error)
    for number in _REASONS:
        if os.strerror(number) in text:
            return os.strerror(number)
    return " ".join(text.split("\n", 1)[0].split()).rstrip(".")[:200]


def _sentence(error: Exception) -> str:
    return f"DuckDB reported an error: {_reason(error)}."

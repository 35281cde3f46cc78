"""Read advisories from files, folders, zip files and streams. Nothing is unpacked to disk or executed.

Sources are not trusted: every size is bounded (limits.py), links out of a folder are not followed, and
whatever is wrong becomes one SourceError.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import os
import re
import stat
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree as ET

import msgspec
import yaml

from . import limits
from .limits import SourceError
from .lists import read_list
from .matching import Advisories
from .osv import OsvReader
from .sbom_documents import SbomReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .model import AffectedPackage

STANDARD_INPUT = "-"
_SUFFIXES = frozenset(
    {".csv", ".json", ".jsonl", ".ndjson", ".spdx", ".txt", ".xml", ".yaml", ".yml"}
)  # that are read in folders
_ZIP_MAGICS = frozenset({b"PK\x03\x04", b"PK\x05\x06"})  # with files, and without
_MAX_REASON = 200  # characters
_YAML_KEY = re.compile(
    rb"(?:---\s+)?(?:id|schema_version|modified|published|affected|spdxVersion)\s*:"
)
_PROGRESS_BYTES = 4 * limits.MEBIBYTE
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # an unknown compression
    RuntimeError,  # encrypted
    OSError,
    ValueError,
)


_NOTHING = msgspec.Raw()


class _Probe(msgspec.Struct):
    """The keys that tell the formats of JSON documents apart."""

    id: Any = None
    affected: msgspec.Raw = _NOTHING
    modified: msgspec.Raw = _NOTHING
    vulns: list[msgspec.Raw] = []
    bomFormat: Any = None  # noqa: N815 - CycloneDX
    spdxVersion: Any = None  # noqa: N815 - SPDX 2
    graph: msgspec.Raw = msgspec.field(default=_NOTHING, name="@graph")  # SPDX 3


_PROBE = msgspec.json.Decoder(_Probe)


class SourceSummary(NamedTuple):
    """What was read."""

    files: int
    advisories: int
    packages: int  # different ones
    skipped: dict[str, int]  # what was left out, by reason


class SourceReader:
    """Reads sources into `advisories`. Use it once."""

    def __init__(
        self,
        *,
        default_type: str | None = None,
        include_withdrawn: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Prepare to read.

        Args:
            default_type: The ecosystem of names in lists, such as npm or Debian.
            include_withdrawn: Whether to use withdrawn advisories too.
            on_progress: Called with the number of bytes read so far, unpacked.
        """
        self.advisories = Advisories()
        self._default_type = default_type
        self._osv = OsvReader(include_withdrawn=include_withdrawn)
        self._sbom = SbomReader(self._osv.skipped, include_withdrawn=include_withdrawn)
        self._on_progress = on_progress
        self._ids = 0
        self._last_id: tuple[str, str] | None = None
        self._files = self._packages = self._versions = self._bytes = self._reported = 0

    @property
    def summary(self) -> SourceSummary:
        """What was read so far."""
        skipped = {reason: count for reason, count in self._osv.skipped.items() if count}
        return SourceSummary(self._files, self._ids, len(self.advisories), skipped)

    @property
    def bytes_read(self) -> int:
        """How much was read so far, unpacked."""
        return self._bytes

    def read(self, source: str, stdin: IO[bytes] | None = None) -> None:
        """Read a file, a folder, a zip file, or with "-" standard input.

        Raises:
            SourceError: the source is missing, not valid or too large.
        """
        try:
            if source == STANDARD_INPUT:
                if stdin is None:
                    raise SourceError("There is no standard input; name a file.")
                self._read_stream(stdin, "standard input")
                return
            path = Path(source)
            if path.is_dir():
                self._read_folder(path)
            elif path.exists():  # also a pipe, as the shell's <(...) makes one
                with path.open("rb") as stream:
                    self._read_stream(stream, path.name)
            else:
                raise SourceError(
                    f"{source}: no such file or folder; expected advisories, an SBOM or a list."
                )
        except OSError as e:
            raise SourceError(f"{source}: cannot be read ({e.strerror or e}).") from None

    def _read_folder(self, root: Path) -> None:
        resolved = root.resolve()
        for folder, names, files in os.walk(root):  # does not follow links to folders
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(files):
                path = Path(folder, name)
                if path.suffix.lower() not in _SUFFIXES:
                    self._osv.skipped["files of other types"] += 1
                elif path.is_symlink() and not path.resolve().is_relative_to(resolved):
                    self._osv.skipped["links out of the folder"] += 1
                elif not path.exists():
                    self._osv.skipped["links to nothing"] += 1
                elif not stat.S_ISREG(path.stat().st_mode):
                    self._osv.skipped["files that are not regular"] += 1
                else:
                    with path.open("rb") as stream:
                        self._read_stream(stream, str(path.relative_to(root)), in_collection=True)

    def _read_zip(self, stream: IO[bytes], source: str) -> None:
        try:
            with zipfile.ZipFile(stream) as archive:
                for member in archive.infolist():
                    self._read_member(archive, member, source)
        except SourceError:
            raise
        except _ZIP_ERRORS as e:
            raise SourceError(f"{source}: not a valid zip file ({_reason(e)}).") from None

    def _read_member(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, source: str) -> None:
        if member.is_dir():
            return
        if Path(member.filename).suffix.lower() not in _SUFFIXES:
            self._osv.skipped["files of other types"] += 1
            return
        if stat.S_ISLNK(member.external_attr >> 16):
            self._osv.skipped["links in a zip file"] += 1
            return
        if member.file_size > limits.MEBIBYTE and (
            member.file_size > limits.MAX_ZIP_RATIO * max(1, member.compress_size)
        ):
            raise SourceError(
                f"{source}, {member.filename!r}: unpacks to more than {limits.MAX_ZIP_RATIO} times its size,"
                " like an attack; unpack it yourself if you trust it."
            )
        with archive.open(member) as stream:
            self._read_stream(stream, member.filename, in_collection=True)

    def _read_stream(self, stream: IO[bytes], source: str, *, in_collection: bool = False) -> None:
        """Read one file. In a folder or zip, files that name no packages are left out and counted."""
        self._files += 1
        if self._files > limits.MAX_FILES:
            raise SourceError(
                f"There are more than {limits.MAX_FILES:,} files; name fewer sources."
            )
        if stream.peek(4)[:4] in _ZIP_MAGICS:  # type: ignore[attr-defined]
            if in_collection:
                self._osv.skipped["zip files in other sources"] += 1
            else:
                self._read_zip(_seekable(stream, source), source)
            return
        lines = self._lines(stream, source)
        first = next((line for line in lines if line.strip()), b"")
        first = first.removeprefix(codecs.BOM_UTF8)
        start = first.lstrip()
        if start.startswith((b"{", b"[")):
            self._read_json(start, lines, source, in_collection=in_collection)
        elif start.startswith(b"<"):
            with _document_errors(source):
                text = _joined((start, *lines), source)
                self._add(self._sbom.read_cyclonedx_xml(text, source), source)
        elif start.startswith(b"SPDXVersion:"):
            with _document_errors(source):
                text = _joined((start, *lines), source)
                self._add(self._sbom.read_spdx_tags(text.decode(), source), source)
        elif source.lower().endswith((".yaml", ".yml")) or _YAML_KEY.match(start):
            self._read_yaml(_joined((first, *lines), source), source, in_collection=in_collection)
        else:
            texts = _texts(itertools.chain((first,), lines), source)
            listed = read_list(texts, source, self._default_type)
            self._add(self._whole(listed) if in_collection else listed, source)

    def _whole(self, listed: Iterable[AffectedPackage]) -> list[AffectedPackage]:
        """Return the packages of a file; none, and count it, if it is another text, such as a license."""
        try:
            return list(itertools.islice(listed, limits.MAX_PACKAGES + 1))
        except SourceError:
            self._osv.skipped["text files that are not lists"] += 1
            return []

    def _lines(self, stream: IO[bytes], source: str) -> Iterator[bytes]:
        """Yield the lines of a stream, which has at most MAX_DOCUMENT_BYTES in a line."""
        while line := stream.readline(limits.MAX_DOCUMENT_BYTES + 1):
            if len(line) > limits.MAX_DOCUMENT_BYTES:
                raise SourceError(
                    f"{source}: a line is longer than {limits.MAX_DOCUMENT_BYTES // limits.MEBIBYTE} MiB;"
                    " split the document."
                )
            self._count_bytes(len(line))
            yield line

    def _count_bytes(self, count: int) -> None:
        self._bytes += count
        if self._bytes > limits.MAX_TOTAL_BYTES:
            raise SourceError(
                f"The sources hold more than {limits.MAX_TOTAL_BYTES // (1024 * limits.MEBIBYTE)} GiB;"
                " name fewer."
            )
        if self._on_progress is not None and self._bytes - self._reported > _PROGRESS_BYTES:
            self._reported = self._bytes
            self._on_progress(self._bytes)

    def _read_json(
        self, start: bytes, lines: Iterator[bytes], source: str, *, in_collection: bool
    ) -> None:
        """Read one document, or a document per line."""
        with _document_errors(source):
            if not _is_complete(start):
                text = _joined((start, *lines), source)
                self._read_document(text, source, in_collection=in_collection)
                return
            for line in itertools.chain((start,), filter(bytes.strip, lines)):
                self._read_document(line, source, in_collection=in_collection)

    def _read_document(self, text: bytes, source: str, *, in_collection: bool) -> None:
        if text.lstrip().startswith(b"["):
            for each in msgspec.json.decode(text, type=list[msgspec.Raw]):
                self._read_document(bytes(each), source, in_collection=in_collection)
            return
        probe = _PROBE.decode(text)
        if probe.vulns:  # OSV's API, /v1/query
            for each in probe.vulns:
                self._read_document(bytes(each), source, in_collection=in_collection)
        elif probe.bomFormat == "CycloneDX":
            self._add(self._sbom.read_cyclonedx(text, source), source)
        elif probe.spdxVersion is not None:
            self._add(self._sbom.read_spdx(text, source), source)
        elif bytes(probe.graph):
            self._add(self._sbom.read_spdx3(text, source), source)
        elif isinstance(probe.id, str) and (bytes(probe.affected) or bytes(probe.modified)):
            self._add(self._osv.read_json(text, source), source)
        elif in_collection:
            self._osv.skipped["JSON files of other kinds"] += 1
        else:
            raise SourceError(
                f"{source}: the JSON document is neither an OSV advisory nor an SBOM."
            )

    def _read_yaml(self, text: bytes, source: str, *, in_collection: bool) -> None:
        with _document_errors(source):
            _check_yaml(text, source)
            # All scalars as text: the version 1.10 is not the number 1.1.
            document = yaml.load(text, Loader=yaml.CBaseLoader)  # noqa: S506 - makes only text, lists and dicts
            if isinstance(document, dict) and "id" in document and "affected" in document:
                self._add(self._osv.read(_without_empty(document), source), source)
            elif isinstance(document, dict) and "spdxVersion" in document:
                self._add(self._sbom.read_parsed_spdx(document, source), source)
            elif in_collection:
                self._osv.skipped["YAML files of other kinds"] += 1
            else:
                raise SourceError(
                    f"{source}: the YAML document is neither an OSV advisory nor SPDX."
                )

    def _add(self, affected: Iterable[AffectedPackage], source: str) -> None:
        for each in affected:
            place = (each.advisory.id, each.advisory.source)
            if place != self._last_id:
                self._last_id = place
                self._ids += 1
            self._packages += 1
            self._versions += len(each.versions) + sum(len(r.events) for r in each.ranges)
            if self._packages > limits.MAX_PACKAGES or self._versions > limits.MAX_VERSIONS:
                raise SourceError(
                    f"{source}: the sources name more than {limits.MAX_PACKAGES:,} packages or"
                    f" {limits.MAX_VERSIONS:,} versions; name fewer."
                )
            self.advisories.add(each)


def total_bytes(sources: Iterable[str]) -> int | None:
    """Return how much the sources hold, unpacked, as far as they say so; None: one is a stream."""
    total = 0
    for source in sources:
        path = Path(source)
        if source == STANDARD_INPUT or not (path.is_file() or path.is_dir()):
            return None
        with contextlib.suppress(*_ZIP_ERRORS):
            if path.is_dir():
                total += sum(each.lstat().st_size for each in path.rglob("*"))
            elif zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    total += sum(member.file_size for member in archive.infolist())
            else:
                total += path.stat().st_size
    return total


@contextlib.contextmanager
def _document_errors(source: str) -> Iterator[None]:
    """Turn whatever parsers raise into one sentence."""
    try:
        yield
    except RecursionError:
        raise SourceError(f"{source}: the document is nested too deeply.") from None
    except (msgspec.MsgspecError, yaml.YAMLError, ET.ParseError, UnicodeDecodeError) as e:
        raise SourceError(f"{source}: not a valid document ({_reason(e)}).") from None


def _is_complete(text: bytes) -> bool:
    """Return whether the first line is a whole JSON document."""
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError:
        return False
    return True


def _seekable(stream: IO[bytes], source: str) -> IO[bytes]:
    """Return a stream in which zipfile can seek. A zip from a pipe is held in memory."""
    if stream.seekable():
        return stream
    data = stream.read(limits.MAX_PIPED_ZIP_BYTES + 1)
    if len(data) > limits.MAX_PIPED_ZIP_BYTES:
        raise SourceError(
            f"{source}: a zip file from a pipe can have {limits.MAX_PIPED_ZIP_BYTES // limits.MEBIBYTE} MiB;"
            " name the file."
        )
    return io.BytesIO(data)


def _joined(lines: Iterable[bytes], source: str) -> bytes:
    """Join the lines of one document, which has a bounded size."""
    parts, size = [], 0
    for line in lines:
        size += len(line)
        if size > limits.MAX_DOCUMENT_BYTES:
            raise SourceError(
                f"{source}: a document is larger than {limits.MAX_DOCUMENT_BYTES // limits.MEBIBYTE} MiB;"
                " write one advisory per line."
            )
        parts.append(line)
    return b"".join(parts)


def _texts(lines: Iterable[bytes], source: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if len(line) > limits.MAX_LIST_LINE_BYTES:
            raise SourceError(
                f"{source}, line {number}: longer than {limits.MAX_LIST_LINE_BYTES // limits.KIBIBYTE} KiB,"
                " so this is not a list of packages."
            )
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise SourceError(
                f"{source}, line {number}: not UTF-8 text, and no known format."
            ) from None


def _check_yaml(text: bytes, source: str) -> None:
    """Reject what makes a small YAML document large or deep. Advisories use neither."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CBaseLoader):
        if isinstance(event, yaml.AliasEvent):
            raise SourceError(f"{source}: YAML aliases are not allowed in advisories.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > limits.MAX_YAML_DEPTH:
            raise SourceError(f"{source}: the YAML document is nested too deeply.")


def _without_empty(document: dict[str, Any]) -> dict[str, Any]:
    """Leave out keys without a value, which CBaseLoader reads as empty text."""
    return {key: value for key, value in document.items() if value not in ("", "null", "~")}


def _reason(error: Exception) -> str:
    """Return the first line of an error's text, without control characters."""
    text = " ".join(str(error).split())
    return text[:_MAX_REASON].rstrip(".") or type(error).__name__

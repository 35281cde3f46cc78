"""Bounds on what sources may hold, and the error that they raise. Sources are not trusted."""

from __future__ import annotations

KIBIBYTE = 1024
MEBIBYTE = 1024 * KIBIBYTE
MAX_DOCUMENT_BYTES = 64 * MEBIBYTE  # one JSON, YAML or XML document, which can be one line
MAX_LIST_LINE_BYTES = 64 * KIBIBYTE
MAX_TOTAL_BYTES = 8 * 1024 * MEBIBYTE  # of all sources together, unpacked
MAX_PIPED_ZIP_BYTES = 512 * MEBIBYTE  # a zip from standard input is held in memory
MAX_FILES = 2_000_000
MAX_PACKAGES = (
    2_000_000  # packages that advisories name; one of them takes about 500 bytes of memory
)
MAX_VERSIONS = 10_000_000  # versions and events of ranges, together
MAX_ZIP_RATIO = 200  # unpacked to packed; advisories have 4 to 30
MAX_XML_BYTES = 16 * MEBIBYTE  # the tree of a document takes ten times its size
MAX_XML_DEPTH = 100
MAX_YAML_DEPTH = 50  # the schema needs 6


class SourceError(ValueError):
    """A source cannot be read. The message is one sentence that says where, what and what to do."""

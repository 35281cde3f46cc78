"""Decode JSON, TOML, YAML and XML of unknown origin, within bounds. Reads no files.

All functions take the bytes of a whole file and raise MalformedError. `msgspec` checks the types of
what a format uses, so that its reader needs no checks of its own.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any
from xml.parsers import expat

import msgspec
import re2
import yaml

from .locked import MalformedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_DEPTH = 200  # npm's first format nests a package in those that need it
MAX_NODES = 5_000_000  # of YAML

# Python's parser takes quadratic time for a key with many parts. RE2 searches in linear time.
_LONG_KEY = re2.compile(rb"""(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){100}""")

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster


def text_of(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise MalformedError(f"is not UTF-8 text (byte {e.start})") from None


def json_as[T](data: bytes, kind: type[T]) -> T:
    """Decode JSON into a type that msgspec knows."""
    try:
        return msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=kind)
    except msgspec.ValidationError as e:
        raise MalformedError(f"has an unexpected value ({_decapitalized(e)})") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise MalformedError(f"is not valid JSON ({_decapitalized(e)})") from None
    except RecursionError:
        raise MalformedError("is nested too deeply") from None


def toml_as[T](data: bytes, kind: type[T]) -> T:
    """Decode TOML into a type that msgspec knows."""
    return convert(toml(data), kind)


def toml(data: bytes) -> dict[str, Any]:
    """Decode TOML."""
    text = text_of(data)
    if _LONG_KEY.search(data):
        raise MalformedError("has a key with a hundred parts")
    try:
        return tomllib.loads(text)
    except ValueError as e:  # also for a number with thousands of digits
        raise MalformedError(f"is not valid TOML ({_decapitalized(e)})") from None
    except RecursionError:
        raise MalformedError("is nested too deeply") from None


def yaml_as[T](data: bytes, kind: type[T]) -> T:
    """Decode YAML into a type that msgspec knows. All scalars are text, also 1.10 and true."""
    documents = all_yaml_as(data, kind)
    if len(documents) != 1:
        raise MalformedError(f"has {len(documents)} YAML documents, expected one")
    return documents[0]


def all_yaml_as[T](data: bytes, kind: type[T]) -> list[T]:
    """Decode like `yaml_as` a file that can have several documents, or none."""
    return [convert(tree, kind) for tree in _yaml_trees(text_of(data))]


def convert[T](tree: object, kind: type[T]) -> T:
    """Check decoded data and convert it into a type that msgspec knows."""
    try:
        return msgspec.convert(tree, type=kind)
    except msgspec.ValidationError as e:
        raise MalformedError(f"has an unexpected value ({_decapitalized(e)})") from None
    except RecursionError:
        raise MalformedError("is nested too deeply") from None


def _yaml_trees(text: str) -> list[Any]:
    """Build mappings, lists and strings from YAML events.

    `yaml.safe_load` would turn an unquoted version 1.10 into the number 1.1, and crash in libyaml's
    recursion. No lock file uses aliases, which could make a small file large.
    """
    root: list[Any] = []
    stack: list[_Collection] = [_Collection(root, is_mapping=False)]
    try:
        for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
            if isinstance(event, yaml.AliasEvent):
                raise MalformedError(
                    f"has the YAML alias {str(event.anchor)[:80]!r}, expected none"
                )
            if number > MAX_NODES:
                raise MalformedError(f"has more than {MAX_NODES:,} YAML nodes")
            if isinstance(event, yaml.ScalarEvent):
                is_null = event.implicit[0] and event.value in {"", "~", "null"}
                stack[-1].add(None if is_null else event.value)
            elif isinstance(event, yaml.CollectionStartEvent):
                if len(stack) > MAX_DEPTH:
                    raise MalformedError("is nested too deeply")
                is_mapping = isinstance(event, yaml.MappingStartEvent)
                value: dict[str, Any] | list[Any] = {} if is_mapping else []
                stack[-1].add(value)
                stack.append(_Collection(value, is_mapping=is_mapping))
            elif isinstance(event, yaml.CollectionEndEvent):
                stack.pop()
    except yaml.YAMLError as e:
        raise MalformedError(f"is not valid YAML ({' '.join(str(e).split())[:200]})") from None
    return root


class _Collection:
    """A mapping or a list that grows by one value at a time."""

    def __init__(self, value: dict[str, Any] | list[Any], *, is_mapping: bool) -> None:
        self._value: Any = value
        self._is_mapping = is_mapping
        self._key: str | None = None

    def add(self, value: object) -> None:
        if not self._is_mapping:
            self._value.append(value)
        elif self._key is None:
            if not isinstance(value, str):
                raise MalformedError("has a YAML mapping with a key that is not text")
            self._key = value
        else:
            self._value[self._key] = value
            self._key = None


def each_xml_element(
    data: bytes, on_start: Callable[[tuple[str, ...], Mapping[str, str]], None]
) -> None:
    """Call `on_start` with the path and the attributes of each XML element, in order.

    A path is the names from the root to the element, without namespaces. Text is ignored.
    """
    path: list[str] = []
    parser = expat.ParserCreate()

    def start(name: str, attributes: dict[str, str]) -> None:
        path.append(name.rpartition(":")[2])
        if len(path) > MAX_DEPTH:
            raise MalformedError("is nested too deeply")
        on_start(tuple(path), attributes)

    def end(_name: str) -> None:
        path.pop()

    def doctype(*_: object) -> None:
        raise MalformedError("has a DOCTYPE, which this format never needs")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(data, True)
    except expat.ExpatError as e:
        raise MalformedError(f"is not valid XML ({e})") from None


def _decapitalized(error: Exception) -> str:
    """Return a library's message for use within a sentence, on one line and bounded."""
    text = " ".join(str(error).split()).rstrip(".")[:300]
    return text[:1].lower() + text[1:]

"""Replace secrets in text, by the patterns in configs/secrets.yaml and configs/token_forms.yaml.

Decodes nothing: redaction.py passes each form of an encoded text.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import re2
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

REDACTED = "REDACTED"

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_PATTERN_BYTES = 1024 * 1024  # limit for the memory of one pattern, also while it matches

# A token starts a word. In a message that quotes raw bytes, the escape of a control character may
# stand before it.
_WORD_START = r"(?:^|[^A-Za-z0-9]|\\[nrt])"
_HOST_START = r"(?:^|[/@.])"
_PORT = r"(?::\d+)?"
# What {segment}, {token} and {end} stand for in configs/secrets.yaml
_SEGMENT = r"[^/?#\s]+"
_RANDOM_SEGMENT = (
    "(?:[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}|[A-Za-z0-9]{20,39}|[A-Za-z0-9]{41,})"
)
_END = r"""(?:[/?#&,;\s"')>\]}]|$)"""


class SecretPatterns:
    """Patterns that are matched together, in time linear in the length of the text. Thread-safe.

    One pass finds the literal parts of all patterns in a text. Only patterns whose literal parts it
    has are matched one by one.
    """

    def __init__(self, places: Iterable[str], forms: Iterable[str], folders: Iterable[str]) -> None:
        """Compile the patterns.

        Args:
            places: RE2 patterns of URLs. Group 1 is the secret.
            forms: RE2 patterns of tokens.
            folders: where registries expect a secret as the name of the next folder.
        """
        self._filter = re2.Filter()
        for pattern in places:
            self._filter.Add(f"(?i){pattern}".encode(), _options())
        for form in forms:
            self._filter.Add(f"{_WORD_START}({form})".encode(), _options(longest_match=True))
        self._filter.Compile()
        starts = "|".join(re.escape(folder) or "^" for folder in sorted(set(folders)))
        self._secret_folder = re.compile(f"(?:{starts})/{REDACTED}(?=/)")

    def redact(self, text: str, before: str = "") -> str:
        """Return the text with each secret replaced. `before` is what precedes it, such as a host."""
        # RE2 matches bytes, because secrets are ASCII. "surrogatepass" accepts every str.
        context = before.encode("utf-8", "surrogatepass")
        raw = context + text.encode("utf-8", "surrogatepass")
        matching = self._filter.Match(raw)
        if not matching:
            return text
        pieces, position = [], len(context)
        for start, end in self._secrets(matching, raw):
            if end > position:
                pieces += [raw[position : max(start, position)], REDACTED.encode()]
                position = end
        pieces.append(raw[position:])
        return b"".join(pieces).decode("utf-8", "surrogatepass")

    def without_secret_folder(self, path: str) -> str:
        """Return a redacted path without the folder whose name was a secret."""
        return self._secret_folder.sub("", path, count=1) if REDACTED in path else path

    def _secrets(self, matching: Iterable[int], raw: bytes) -> Iterator[tuple[int, int]]:
        """Yield start and end of each secret, in order. Secrets that overlap or touch are one."""
        spans = sorted(
            match.span(1) for index in matching for match in self._filter.re(index).finditer(raw)
        )
        while spans:
            start, end = spans.pop(0)
            while spans and spans[0][0] <= end:
                end = max(end, spans.pop(0)[1])
            yield start, end


@cache
def secret_patterns() -> SecretPatterns:
    """Return the patterns of both files. Takes some 25 ms the first time."""
    ours, maintained = _load("secrets.yaml"), _load("token_forms.yaml")
    return SecretPatterns(
        places=[_url_pattern(place) for place in ours["urls"]],
        forms=[*ours["tokens"].values(), *maintained["tokens"].values()],
        folders=[place["folder"] for place in ours["urls"] if "folder" in place],
    )


def _load(name: str) -> Any:
    # libyaml's loader is ten times faster. It is missing if PyYAML was built without it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((_CONFIGS / name).read_text(encoding="utf-8"), loader)  # noqa: S506 - it is safe


def _url_pattern(place: Mapping[str, str]) -> str:
    pattern = place["re"].replace("{segment}", _SEGMENT)
    pattern = pattern.replace("{token}", _RANDOM_SEGMENT).replace("{end}", _END)
    if "host" in place:
        host = re.escape(place["host"]).replace(r"\*", r"[^/\s]*")
        return f"{_HOST_START}{host}{_PORT}{pattern}"
    return pattern


def _options(*, longest_match: bool = False) -> Any:
    options = re2.Options()
    options.log_errors = False  # errors are raised as exceptions
    options.longest_match = longest_match
    options.max_mem = _PATTERN_BYTES
    options.encoding = re2.Options.Encoding.LATIN1  # byte by byte
    return options

"""Keep secrets out of paths, queries and error texts; pure functions that never raise.

What is kept follows OpenTelemetry's `url.full` (names of query parameters kept, values replaced)
and is stricter by default: every value goes, since no list of secret names is complete.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

import re2

if TYPE_CHECKING:
    from collections.abc import Iterable

REDACTED = "REDACTED"
QueryPolicy = Literal["keys", "signed", "drop", "full"]

MAX_PARAMETERS = 200
_MAX_NAME = 128
_MAX_DECODINGS = 3  # of a path that was percent-encoded more than once

# Tokens that tell themselves by their shape, wherever they stand: JSON web tokens, and the
# prefixes that the issuers of access tokens chose so that scanners can find them.
# Only at the beginning of a word, and long: "ask-sdk" and "npm_package" are no tokens.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"eyJ[\w-]{8,}(?:(?:\.|%2[eE])[\w-]*)*"
    r"|(?:gh[pousr]_|github_pat_|hf_|npm_|dop_v1_|dckr_pat_|shpat_|[sr]k_live_)[A-Za-z0-9_]{16,}"
    r"|(?:glpat|gldt|xox[abeoprs])-[\w-]{16,}|pypi-AgE[\w-]{16,}|ya29\.[\w-]{16,}|AIza[\w-]{16,}"
    r"|sk-(?:[a-z]+-)?[A-Za-z0-9_]{20,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16})"
)
_PATH_PARAMETER = re.compile(r"(;[^/;=?]+=)[^/;?]+")  # RFC 3986 3.3; session ids stand there
# After one slash too, where it has a password: proxies make one of two.
_USERINFO = re.compile(
    r"(?<=//)[^/?#@\s]*(?:@|%40)"
    r"|(?<=/)(?:(?!%2[fF])[^/?#@\s:])+(?::|%3[aA])(?:(?!%2[fF])[^/?#@\s])*(?:@|%40)"
)
_ERROR_QUERY = re.compile(r"\?[^\s'\")>\]]+")
# mitmproxy and h11 quote raw bytes of a peer in some messages: any header may be among them.
_RAW_BYTES = re.compile(
    r"\b(?:b|bytearray\(b)(?:'(?:[^'\\]|\\.)*(?:'|$)|\"(?:[^\"\\]|\\.)*(?:\"|$))", re.DOTALL
)
# Others quote a value of a peer as it was; of what stands in quotes only addresses are kept.
_QUOTED = re.compile(
    r"(?<!\w)(?!'(?:\d{1,3}(?:\.\d{1,3}){3}|[\da-fA-F]{0,4}:[\da-fA-F.:]*(?:%\w+)?)')"
    r"(?:'(?:[^'\\]|\\.)*(?:'|$)|\"(?:[^\"\\]|\\.)*(?:\"|$))",
    re.DOTALL,
)
_CREDENTIALS = re.compile(r"(?i)\b(basic|bearer|digest|negotiate|token)\s+[\w.~+/=-]{4,}")
_ASSIGNMENT = re.compile(
    r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|location|referer|password|passwd|pwd|secret|token"
    r"|api[_-]?key)(\s*[:=]\s*)[^\r\n]+"
)
# The names OpenTelemetry, the cloud vendors and common practice give to credentials in a query.
_SIGNED = re.compile(
    r"(?i)x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|googleaccessid"
    r"|signature|sig|policy|key-pair-id|.*token.*|.*api[_-]?key.*|key|.*auth.*|.*pass(?:word|wd)?.*|pwd"
    r"|.*secret.*|jwt|verify|code|credential|session(?:id)?|sas|se|ske|skoid|sks|skt|sktid|skv|sp|spr|sr|sv|hmac"
)


class PathPatterns:
    """Patterns of the user's own: where their registries put a token into the path."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """RE2 patterns over "host/path", already checked. Matching takes linear time."""
        self._patterns = [re2.compile(pattern) for pattern in patterns]

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def redact(self, host: str, path: str) -> str:
        """The path with what group 1, or else the whole pattern, matches of it replaced."""
        for pattern in self._patterns:
            text = host + path
            for match in reversed(list(pattern.finditer(text))):
                start, end = match.span(1 if pattern.groups else 0)
                start = max(start, len(host))
                if start < end:
                    text = text[:start] + REDACTED + text[end:]
            path = text[len(host) :]
        return path


def redact_path(path: str) -> str:
    """A path with tokens of known shapes and the userinfo of URLs inside it replaced."""
    redacted = read = _redact_segments(path)
    for _ in range(_MAX_DECODINGS):
        decoded = unquote(read, errors="surrogateescape") if "%" in read else read
        if decoded == read:
            break
        outer, mark, query = decoded.partition("?")
        read = _redact_segments(outer) + (f"?{redact_query(query, 'keys')}" if mark else "")
        # What is hidden by percent-encoding is shown as it was read, or not at all.
        if read != decoded:
            redacted = read
    return redacted


def _redact_segments(path: str) -> str:
    if ";" in path:
        path = _PATH_PARAMETER.sub(rf"\1{REDACTED}", path)
    return redact_text(path)


def redact_text(text: str) -> str:
    """Any text with tokens of known shapes and the userinfo of URLs inside it replaced."""
    if "@" in text or "%40" in text:
        text = _USERINFO.sub(f"{REDACTED}@", text)
    return _TOKEN.sub(REDACTED, text)


def redact_query(query: str, policy: QueryPolicy) -> str | None:
    """What of a query (without its question mark) may be kept; None for nothing.

    `keys` keeps the names and replaces every value; what has no name is taken for a value.
    `signed` replaces the values of names that mean credentials. `drop` keeps nothing,
    `full` everything.
    """
    if policy == "drop":
        return None
    if policy == "full":
        return query
    parameters = query.split("&", MAX_PARAMETERS)
    cut = len(parameters) > MAX_PARAMETERS
    kept = [_redact_parameter(p, policy) for p in parameters[:MAX_PARAMETERS]]
    return "&".join([*kept, "..."] if cut else kept)


def redact_error(text: str) -> str:
    """A message with queries, userinfo, credentials and the raw bytes of a peer replaced."""
    text = _RAW_BYTES.sub(f"<{REDACTED}>", text)
    text = _QUOTED.sub(f"<{REDACTED}>", text)
    text = _ERROR_QUERY.sub(f"?{REDACTED}", text)
    text = _USERINFO.sub(f"{REDACTED}@", text)
    text = _CREDENTIALS.sub(rf"\1 {REDACTED}", text)
    text = _ASSIGNMENT.sub(rf"\1\2{REDACTED}", text)
    return _TOKEN.sub(REDACTED, text)


def _redact_parameter(parameter: str, policy: QueryPolicy) -> str:
    name, equals, value = parameter.partition("=")
    if policy == "signed":
        if _SIGNED.fullmatch(name) or not equals:
            return f"{_redact_name(name)}={REDACTED}" if equals else _redact_name(name)
        return f"{_redact_name(name)}={redact_path(value)}"
    if not equals:
        return REDACTED if parameter else ""
    return f"{_redact_name(name)}={REDACTED}" if value else f"{_redact_name(name)}="


def _redact_name(name: str) -> str:
    return REDACTED if len(name) > _MAX_NAME else redact_path(name)

"""Redact secrets in paths, queries, error messages and other text. Pure functions that never raise.

Every text of a row passes `redact`. Paths, queries and error messages have additional rules, because
more is known about their contents. Queries follow OpenTelemetry's `url.full`: names of parameters are
kept, secret values replaced. The default is stricter and replaces all values, because no list of
secret names is complete.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

import re2

from .secret_patterns import REDACTED, secret_patterns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "MAX_PARAMETERS",
    "REDACTED",
    "PathPatterns",
    "QueryPolicy",
    "redact",
    "redact_error",
    "redact_path",
    "redact_query",
]

QueryPolicy = Literal["keys", "signed", "drop", "full"]

MAX_PARAMETERS = 200
_MAX_NAME_CHARACTERS = 128
_MAX_DECODINGS = 5  # for text that is percent-encoded more than once

_PATH_PARAMETER = re.compile(r"(;[^/;=?]+=)[^/;?]+")  # RFC 3986 3.3; often a session id
# RFC 3986 3.2.1. After a single slash only with a password: some proxies turn "//" into "/".
_USERINFO = re.compile(r"(?<=//)[^/?#@\s]*@|(?<=/)[^/?#@\s:]+:[^/?#@\s]*@")
# The query of a URL in other text, such as a User-Agent
_URL_QUERY = re.compile(r"(?<=://)([^\s?#<>\"')\]]*\?)([^\s#<>\"')\]]+)")
# A word that may be a random token, and its kinds of characters. Names seldom change them so often.
_LONG_WORD = re.compile(r"(?<![\w~+=-])[\w-]{32,}(?![\w~+-])", re.ASCII)
_MIN_RANDOM_CHARACTERS = 32
_KINDS = (re.compile(r"[a-z]+"), re.compile(r"[A-Z]+"), re.compile(r"[0-9]+"))
_MIN_RUNS_PER_KIND = 2
_MIN_RUNS_SHARE = 0.46  # runs of one kind, per character; random letters and digits have 0.62
_ERROR_QUERY = re.compile(r"\?[^\s'\")>\]]+")
# Some messages of mitmproxy and h11 quote raw bytes from a peer, which can include any header.
_RAW_BYTES = re.compile(
    r"\b(?:b|bytearray\(b)(?:'(?:[^'\\]|\\.)*(?:'|$)|\"(?:[^\"\\]|\\.)*(?:\"|$))", re.DOTALL
)
# Other messages quote a peer's value as text. Of quoted text, only IP addresses are kept.
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
# Names of query parameters with credentials: from OpenTelemetry, cloud vendors and common practice.
_CREDENTIAL_NAME = re.compile(
    r"(?i)x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|googleaccessid"
    r"|signature|sig|policy|key-pair-id|.*token.*|.*api[_-]?key.*|key|.*auth.*|.*pass(?:word|wd)?.*|pwd"
    r"|.*secret.*|jwt|verify|code|credential|session(?:id)?|sas|se|ske|skoid|sks|skt|sktid|skv|sp|spr|sr|sv|hmac"
)


class PathPatterns:
    """The user's patterns for tokens in paths (the setting `redact.paths`)."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Compile valid RE2 patterns, which are matched against "host/path" in linear time."""
        self._patterns = [re2.compile(pattern) for pattern in patterns]

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def redact(self, host: str, path: str) -> str:
        """Return the path with all matches of group 1, or else of the whole pattern, replaced."""
        for pattern in self._patterns:
            text = host + path
            for match in reversed(list(pattern.finditer(text))):
                start, end = match.span(1 if pattern.groups else 0)
                start = max(start, len(host))
                if start < end:
                    text = text[:start] + REDACTED + text[end:]
            path = text[len(host) :]
        return path


def redact(text: str, before: str = "") -> str:
    """Return text with recognized secrets, and the userinfo of URLs, replaced.

    `before` is what precedes the text, such as the host of a path. The values in the query of a URL are
    replaced, too. The result is percent-decoded only if a secret was hidden by percent-encoding.
    """
    if "?" in text and "://" in text:
        text = _URL_QUERY.sub(lambda url: f"{url[1]}{redact_query(url[2], 'keys')}", text)
    if "%" not in text:
        return _redact_as_is(text, before)
    return _redact_each_decoding(text, lambda current: _redact_as_is(current, before))


def redact_path(path: str, host: str = "") -> str:
    """Return a path with recognized secrets, path parameters and the userinfo of URLs in it replaced.

    The result is percent-decoded only if a secret was hidden by percent-encoding.
    """
    if "%" not in path and ";" not in path:
        return _redact_as_is(path, host)

    def redact_as_is(current: str) -> str:
        # What follows a question mark that was encoded is treated like a query.
        inner_path, mark, query = current.partition("?") if current is not path else (path, "", "")
        if ";" in inner_path:
            inner_path = _PATH_PARAMETER.sub(rf"\1{REDACTED}", inner_path)
        inner_path = _redact_as_is(inner_path, host)
        return f"{inner_path}?{redact_query(query, 'keys')}" if mark else inner_path

    return _redact_each_decoding(path, redact_as_is)


def _redact_each_decoding(text: str, redact_as_is: Callable[[str], str]) -> str:
    """Redact a text as it is, then percent-decoded, and so on while there is something to decode."""
    result = current = redact_as_is(text)
    for _ in range(_MAX_DECODINGS):
        decoded = unquote(current, errors="surrogateescape") if "%" in current else current
        if decoded == current:
            break
        current = redact_as_is(decoded)
        if current != decoded:
            result = current
    return result


def _redact_as_is(text: str, before: str) -> str:
    if "@" in text:
        text = _USERINFO.sub(f"{REDACTED}@", text)
    text = secret_patterns().redact(text, before)
    if len(text) < _MIN_RANDOM_CHARACTERS:
        return text
    return _LONG_WORD.sub(lambda word: REDACTED if _is_random(word[0]) else word[0], text)


def _is_random(word: str) -> bool:
    """Whether a long word of letters and digits is a random one, such as 32 bytes in Base64.

    A checksum in hexadecimal digits is not: its letters are all small or all capital.
    """
    if word.islower() or word.isupper():
        return False
    runs = [len(kind.findall(word)) for kind in _KINDS]
    return min(runs) >= _MIN_RUNS_PER_KIND and sum(runs) >= _MIN_RUNS_SHARE * len(word)


def redact_query(query: str, policy: QueryPolicy) -> str | None:
    """Redact a query, given without its question mark.

    Args:
        query: the query as sent.
        policy: `keys` keeps names and replaces all values, including a parameter without "=".
            `signed` replaces the values of credentials. `drop` returns None, `full` the whole
            query.
    """
    if policy == "drop":
        return None
    if policy == "full":
        return query
    parameters = query.split("&", MAX_PARAMETERS)
    redacted = [_redact_parameter(p, policy) for p in parameters[:MAX_PARAMETERS]]
    if len(parameters) > MAX_PARAMETERS:
        redacted.append("...")
    return "&".join(redacted)


def redact_error(text: str) -> str:
    """Return an error message with queries, userinfo, credentials and quoted data replaced."""
    text = _RAW_BYTES.sub(f"<{REDACTED}>", text)
    text = _QUOTED.sub(f"<{REDACTED}>", text)
    text = _ERROR_QUERY.sub(f"?{REDACTED}", text)
    text = _CREDENTIALS.sub(rf"\1 {REDACTED}", text)
    text = _ASSIGNMENT.sub(rf"\1\2{REDACTED}", text)
    return redact(text)


def _redact_parameter(parameter: str, policy: QueryPolicy) -> str:
    name, equals, value = parameter.partition("=")
    if not equals:
        if policy == "signed":
            return _redact_name(name)
        return REDACTED if parameter else ""
    if policy == "signed":
        shown = REDACTED if _CREDENTIAL_NAME.fullmatch(name) else redact_path(value)
    else:
        shown = REDACTED if value else ""
    return f"{_redact_name(name)}={shown}"


def _redact_name(name: str) -> str:
    return REDACTED if len(name) > _MAX_NAME_CHARACTERS else redact_path(name)

"""Redact secrets in paths, queries and error messages. Pure functions that never raise.

Queries follow OpenTelemetry's `url.full`: names of parameters are kept, secret values replaced. The
default is stricter and replaces all values, because no list of secret names is complete.
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
_MAX_NAME_CHARACTERS = 128
_MAX_DECODINGS = 3  # for paths that are percent-encoded more than once

# Tokens with a recognizable form: JSON web tokens, and access tokens with a prefix that their
# issuer chose so that scanners can find them. They must start a word and be long, because
# "ask-sdk" and "npm_package" are not tokens.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"eyJ[\w-]{8,}(?:(?:\.|%2[eE])[\w-]*)*"
    r"|(?:gh[pousr]_|github_pat_|hf_|npm_|dop_v1_|dckr_pat_|shpat_|[sr]k_live_)[A-Za-z0-9_]{16,}"
    r"|(?:glpat|gldt|xox[abeoprs])-[\w-]{16,}|pypi-AgE[\w-]{16,}|ya29\.[\w-]{16,}|AIza[\w-]{16,}"
    r"|sk-(?:[a-z]+-)?[A-Za-z0-9_]{20,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16})"
)
_PATH_PARAMETER = re.compile(r"(;[^/;=?]+=)[^/;?]+")  # RFC 3986 3.3; often a session id
# Also after a single slash if it has a password, because some proxies turn "//" into "/".
_USERINFO = re.compile(
    r"(?<=//)[^/?#@\s]*(?:@|%40)"
    r"|(?<=/)(?:(?!%2[fF])[^/?#@\s:])+(?::|%3[aA])(?:(?!%2[fF])[^/?#@\s])*(?:@|%40)"
)
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


def redact_path(path: str) -> str:
    """Return a path with known tokens, path parameters and the userinfo of URLs in it replaced.

    The result is percent-decoded only if a secret was hidden by percent-encoding.
    """
    result = current = _redact_path_once(path)
    for _ in range(_MAX_DECODINGS):
        decoded = unquote(current, errors="surrogateescape") if "%" in current else current
        if decoded == current:
            break
        inner_path, mark, query = decoded.partition("?")
        current = _redact_path_once(inner_path)
        if mark:
            current += f"?{redact_query(query, 'keys')}"
        if current != decoded:
            result = current
    return result


def _redact_path_once(path: str) -> str:
    """Redact a path without percent-decoding it."""
    if ";" in path:
        path = _PATH_PARAMETER.sub(rf"\1{REDACTED}", path)
    return redact_text(path)


def redact_text(text: str) -> str:
    """Return text with known tokens and the userinfo of URLs in it replaced."""
    if "@" in text or "%40" in text:
        text = _USERINFO.sub(f"{REDACTED}@", text)
    return _TOKEN.sub(REDACTED, text)


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
    text = _USERINFO.sub(f"{REDACTED}@", text)
    text = _CREDENTIALS.sub(rf"\1 {REDACTED}", text)
    text = _ASSIGNMENT.sub(rf"\1\2{REDACTED}", text)
    return _TOKEN.sub(REDACTED, text)


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

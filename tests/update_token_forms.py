"""Write configs/token_forms.yaml: the forms of access tokens that a maintained rule set knows.

    uv run --with kingfisher-secret-scanner==1.5.0 python -m tests.update_token_forms

The rules are those of Betterleaks, the successor of gitleaks, which kingfisher-secret-scanner ships.
They are made for source code: they require whole tokens, and often the name of a variable before
them. A log has no variables, and must also hide a token that was cut. Therefore:

- Only the pattern of the token itself is kept, not what must stand before or after it.
- A rule without a recognizable token is left out: 32 hexadecimal digits can also be a checksum.
- Lengths are minimums. After a prefix such as "ghp_", 16 characters are enough, in any case.
"""

from __future__ import annotations

import importlib.metadata
import re
import textwrap
from pathlib import Path
from typing import Any

import re2

TARGET = Path(__file__).resolve().parents[1] / "configs" / "token_forms.yaml"

_PACKAGE = "kingfisher-secret-scanner"
_RULES = "betterleaks."
_MIN_CHARACTERS = 16  # of a token after its prefix

# What the rules expect between the name of a variable and its value, and around the value.
_ASSIGNMENT = r"""(?:=|>|:{1,3}=|\|\||:|=>|\?=|,)[\x60'"\s=]{0,5}"""
_ENDS = (
    r"""(?:\\?['"\x60]|[\s;]|\\[nr]|$)""",
    r"""(?:[\x60'"\s;]|\\[nr]|$|\b)""",
    r"(?:$|[^A-Za-z0-9_-])",
    r"(?:[^A-Za-z0-9_-]|$)",
    r"(?:[^\w-]|\z)",
    r"(?:[^a-zA-Z0-9+/]|\z)",
    r"(?:[^\w\/+=-]|\z)",
    r"""(?:$|[\\'"\x60\s<),])""",
    r"\b",
)
_STARTS = (
    r"\b",
    r"""(?:^|[\\'"\x60\s>=:(,)])""",
    r"(?:^|[^A-Za-z0-9_-])",
    r"(?:^|[^A-Za-z0-9+/])",
)
_LITERAL = re.compile(r"(?:[\w~:!-](?![{*+?])|\\[.$+-])*", re.ASCII)
_HEXADECIMAL = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_COUNT = re.compile(r"(?<!=)\{(\d+)(?:,\d*)?\}")
_CLASS_RUN = re.compile(r"(?:\(\?i:)?(\[[^\]]+\]|\\w)\{(\d+)(?:,\d*)?\}")
_ELEMENT = re.compile(r"\\.|\[(?:\\.|[^\]])*\]|.", re.DOTALL)

# Rules without a prefix of at least three characters whose tokens are recognizable all the same.
_RECOGNIZABLE = {
    "asaas-api-token",
    "authress-service-client-access-key",
    "azure-ad-client-secret",
    "cloudflare-api-key.2",
    "github-app-token",
    "harness-api-key",
    "hashicorp-tf-api-token",
    "lob-api-key",
    "lob-pub-api-key",
    "mailchimp-api-key",
    "maxmind-license-key",
    "square-access-token",
    "stripe-access-token",
    "tableau-personal-access-token.1",
    "zoho-zapi-key.1",
}
# Rules for something else: code, configuration, URLs (see configs/secrets.yaml), public names. The
# tokens of alibaba-sts-security-token look like paths.
_NOT_TOKENS = {
    "alibaba-sts-security-token",
    "amplitude-secret-key",
    "azure-app-configuration-connection-string",
    "azure-servicebus-connection-string",
    "bitly-access-token",
    "clickhouse-cloud-key-id",
    "cloudinary-api-key",
    "cloudinary-api-secret",
    "cloudinary-cloud-name",
    "curl-auth-header",
    "curl-auth-user",
    "flyio-access-token",
    "gitlab-incoming-mail-address-token",
    "gitlab-session-cookie",
    "jwt-base64",
    "lark-app-id",
    "microsoft-teams-webhook",
    "monday-api-token.1",
    "private-key",
    "sidekiq-sensitive-url",
    "supabase-project-url",
    "temporal-cloud-api-key.1",
    "upstash-redis-rest-url.1",
}
# Prefixes that names and versions also start with. Their tokens must have the full length.
_ALSO_IN_NAMES = {
    "1000.",
    "API-",
    "STS.",
    "access-",
    "key-",
    "key_",
    "live_",
    "phx_",
    "pubkey-",
    "rpa_",
    "tfp_",
    "v1.0-",
    "vcr_",
    "xai-",
}


def token_forms(rule: str, pattern: str) -> list[str]:
    """Return RE2 patterns of the tokens that a rule finds; none if they have no recognizable form."""
    if rule in _NOT_TOKENS:
        return []
    ignore_case, token = _without_context(pattern)
    forms = [_form(rule, ignore_case, each) for each in _alternatives(token)]
    return [form for form in forms if form is not None]


def _form(rule: str, ignore_case: bool, token: str) -> str | None:
    prefix = _LITERAL.match(token)
    assert prefix is not None  # for the type checker: the pattern matches anything
    literal = prefix[0].replace("\\", "")
    if len(literal) < 3 and rule not in _RECOGNIZABLE:
        return None
    if _HEXADECIMAL.fullmatch(literal):  # checksums begin like this, too
        return None
    form = _open_ended(token)
    run = _CLASS_RUN.match(token, prefix.end())
    if run and _is_distinctive(literal, run[1]):
        ignore_case = True
        if len(_COUNT.findall(token)) == 1:
            form = f"{prefix[0]}{run[1]}{{{_MIN_CHARACTERS},}}=*"
        else:
            length = min(int(run[2]), _MIN_CHARACTERS)
            rest = f"[\\w-]{{{_MIN_CHARACTERS - length},}}"
            form = f"{form}|{prefix[0]}{run[1]}{{{length},}}{rest}"
    return f"(?i){form}" if ignore_case else form


def _is_distinctive(prefix: str, characters: str) -> bool:
    """Whether the prefix with a few of these characters is a token, even if its end is missing."""
    return (
        len(prefix) > 3
        and prefix[-1] in "_-.:~"
        and prefix not in _ALSO_IN_NAMES
        and "/" not in characters  # these would be the rest of a path
    )


def _without_context(pattern: str) -> tuple[bool, str]:
    """Return whether to ignore the case, and the pattern of the token alone."""
    ignore_case = pattern.startswith("(?i)")
    _, assignment, value = pattern.partition(_ASSIGNMENT)
    pattern = (value if assignment else pattern).removeprefix("(?i)")
    for end in _ENDS:
        pattern = pattern.removesuffix(end)
    for start in _STARTS:
        pattern = pattern.removeprefix(start)
    while _is_one_group(pattern):
        pattern = pattern[1:-1]
    pattern = pattern.replace("[[:alnum:]]", "[A-Za-z0-9]")
    # Some rules have a dot that is not escaped, but means a dot.
    pattern = "".join(r"\." if each == "." else each for each in _ELEMENT.findall(pattern))
    # RE2 accepts a flag in the middle of a pattern. Python's re, which the tests use, does not.
    before, flag, after = pattern.partition("(?i)")
    return ignore_case, f"{before}(?i:{after})" if flag else pattern


def _is_one_group(pattern: str) -> bool:
    """Whether the whole pattern is one capturing group without a name."""
    if not (pattern.startswith("(") and pattern.endswith(")")) or pattern.startswith("(?"):
        return False
    depth = 0
    for element in _ELEMENT.finditer(pattern):
        depth += (element[0] == "(") - (element[0] == ")")
        if depth == 0:
            return element.end() == len(pattern)
    return False


def _alternatives(pattern: str) -> list[str]:
    """Split a pattern at each | that is in no group and no class."""
    pieces, depth = [""], 0
    for element in _ELEMENT.finditer(pattern):
        depth += (element[0] == "(") - (element[0] == ")")
        if element[0] == "|" and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += element[0]
    return pieces


def _open_ended(token: str) -> str:
    """Return the pattern without an upper limit for its last part."""
    counts = list(_COUNT.finditer(token))
    if not counts:
        return token
    last = counts[-1]
    return f"{token[: last.start()]}{{{last[1]},}}{token[last.end() :]}"


def main() -> None:
    """Convert the rules of the installed package."""
    from kingfisher_sdk import Rules  # type: ignore[import-not-found]  # noqa: PLC0415 - see above

    rules: Any = Rules(confidence="low", cache=False)
    forms: dict[str, str] = {}
    for metadata in sorted(rules.metadata(), key=lambda metadata: metadata["id"]):
        if not metadata["id"].startswith(_RULES):
            continue
        rule = metadata["id"].removeprefix(_RULES)
        pattern = rules.detail(metadata["id"])["pattern"]
        for number, form in enumerate(token_forms(rule, pattern), start=1):
            if form not in forms.values():
                re2.compile(form)  # raises re2.error if RE2 does not accept it
                forms[rule if number == 1 else f"{rule}.{number}"] = form
    head = _HEAD.format(package=_PACKAGE, version=importlib.metadata.version(_PACKAGE))
    lines = [f"  {name}: '{form.replace("'", "''")}'\n" for name, form in forms.items()]
    TARGET.write_text(head + "".join(lines), encoding="utf-8")
    print(f"{len(forms)} forms from {len(rules)} rules")  # noqa: T201


_HEAD = textwrap.dedent("""\
    # Forms of access tokens, as RE2 patterns. What they match becomes REDACTED.
    #
    # Do not edit. tests/update_token_forms.py makes this file, and explains how, from the rules of
    # Betterleaks in the package {package} {version}. The license of the rules:
    #
    # MIT License
    #
    # Copyright (c) 2026 Zachary Rice
    #
    # Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
    # associated documentation files (the "Software"), to deal in the Software without restriction,
    # including without limitation the rights to use, copy, modify, merge, publish, distribute,
    # sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
    # furnished to do so, subject to the following conditions:
    #
    # The above copyright notice and this permission notice shall be included in all copies or
    # substantial portions of the Software.
    #
    # THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
    # NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
    # NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
    # DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
    # OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

    tokens:
    """)

if __name__ == "__main__":
    main()

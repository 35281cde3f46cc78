"""Rules for source code become forms of tokens for a log."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.update_token_forms import TARGET, token_forms

_END = r"""(?:\\?['"\x60]|[\s;]|\\[nr]|$)"""
_ASSIGNED = r"""(?i)(?:vendor)(?:[ \t\w.-]{0,20})[\s'"]{0,3}(?:=|>|:{1,3}=|\|\||:|=>|\?=|,)[\x60'"\s=]{0,5}"""


@pytest.mark.parametrize(
    ("pattern", "forms"),
    [
        # After a distinctive prefix: a minimum length, in any case
        ("abc_[0-9a-zA-Z]{36}", ["(?i)abc_[0-9a-zA-Z]{16,}=*"]),
        (rf"\b(abc-[a-z]{{8,40}}={{0,2}}){_END}", ["(?i)abc-[a-z]{16,}=*"]),
        (r"abc\.(?i)[a-z0-9]{43}", [r"(?i)abc\.[a-z0-9]{16,}=*"]),
        (rf"{_ASSIGNED}(abc_[a-z]{{30}}){_END}", ["(?i)abc_[a-z]{16,}=*"]),
        # Of several parts: all of them, or the first one
        (
            r"\b(abc_[a-f0-9]{32}_[a-z]{8})\b",
            [r"(?i)abc_[a-f0-9]{32}_[a-z]{8,}|abc_[a-f0-9]{16,}[\w-]{0,}"],
        ),
        (
            "abc_[a-f0-9]{20}|def_[a-f0-9]{20}",
            ["(?i)abc_[a-f0-9]{16,}=*", "(?i)def_[a-f0-9]{16,}=*"],
        ),
        # Another prefix: the full length, as written
        (rf"\b(Abcd[a-f0-9]{{32}}){_END}", ["Abcd[a-f0-9]{32,}"]),
        ("key-[a-f0-9]{32}", ["key-[a-f0-9]{32,}"]),
        ("abc_[a-z/]{40}", ["abc_[a-z/]{40,}"]),
        ("abcd.efg[a-z]{40}", [r"abcd\.efg[a-z]{40,}"]),
        # No prefix: it could be a name or a checksum
        (rf"{_ASSIGNED}([a-f0-9]{{32}}){_END}", []),
        (r"\b(4b1d[A-Za-z0-9]{38})\b", []),
        (r"\b[A-Za-z0-9]{6}_[a-z]{20}\b", []),
    ],
)
def test_rule_becomes_forms(pattern: str, forms: list[str]) -> None:
    assert token_forms("rule", pattern) == forms


def test_file_names_its_source_and_has_its_license() -> None:
    text = TARGET.read_text(encoding="utf-8")
    assert "kingfisher-secret-scanner 1.5.0" in text
    assert "MIT License" in text
    assert len(yaml.safe_load(text)["tokens"]) > 200


def test_script_says_how_to_install_the_version_of_the_file() -> None:
    script = Path(__file__).parents[1] / "update_token_forms.py"
    assert "--with kingfisher-secret-scanner==1.5.0" in script.read_text(encoding="utf-8")

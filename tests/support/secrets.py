"""Make secrets of every kind that configs/secrets.yaml and configs/token_forms.yaml describe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import yaml
from hypothesis import strategies as st

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_OURS = yaml.safe_load((_CONFIGS / "secrets.yaml").read_text(encoding="utf-8"))
_MAINTAINED = yaml.safe_load((_CONFIGS / "token_forms.yaml").read_text(encoding="utf-8"))


class SecretUrl(NamedTuple):
    """The example of a place in configs/secrets.yaml."""

    host: str
    path: str
    secret: str
    redacted_path: str


def _secret_url(example: str) -> SecretUrl:
    before, secret, after = re.split(r"[{}]", example)
    host, slash, folder = before.partition("/")
    return SecretUrl(
        host, f"{slash}{folder}{secret}{after}", secret, f"{slash}{folder}REDACTED{after}"
    )


SECRET_URLS = [_secret_url(place["example"]) for place in _OURS["urls"]]

# Tokens of all forms. RE2 and Python's re agree on the patterns in these files.
TOKENS = st.sampled_from([*_OURS["tokens"].values(), *_MAINTAINED["tokens"].values()]).flatmap(
    lambda form: st.from_regex(re.compile(form, re.ASCII), fullmatch=True)
)

"""Order Composer (PHP) versions: composer/semver's VersionParser and PHP's version_compare.

No Python library follows them. A test compares this module with the results of composer/semver.
Branches such as dev-main have no order.
"""

from __future__ import annotations

import re

# Possessive quantifiers: with others, a hostile version of 40 characters would take hours.
_MODIFIER = (
    r"[._-]?(?:(?P<word>stable|beta|b|rc|alpha|a|patch|pl|p)(?P<number>(?:[.-]?\d++)*+))?"
    r"(?P<dev>[.-]?dev)?"
)
_CLASSICAL = re.compile(r"v?(?P<core>\d{1,5}(?:\.\d+){0,3})" + _MODIFIER, re.ASCII | re.IGNORECASE)
_DATED = re.compile(
    r"v?(?P<core>\d{4}(?:[.:-]?\d{2}){1,6}(?:[.:-]?\d{1,3})?)" + _MODIFIER,
    re.ASCII | re.IGNORECASE,
)
_BUILD = re.compile(r"\+\S+\Z")
_NUMBERS = 4  # Composer fills up versions with zeros
# PHP manual, version_compare: dev < alpha < beta < RC < # (a number) < patch
_DEV, _ALPHA, _BETA, _RC, _NUMBER, _PATCH = range(6)
_RANKS = {
    "alpha": _ALPHA,
    "a": _ALPHA,
    "beta": _BETA,
    "b": _BETA,
    "rc": _RC,
    "patch": _PATCH,
    "pl": _PATCH,
    "p": _PATCH,
}
_END = (_NUMBER, -1)


def composer_key(text: str) -> tuple[tuple[int, int], ...]:
    """Return a key that orders versions.

    Raises:
        ValueError: the version has no order.
    """
    text = _BUILD.sub("", text)
    found = _CLASSICAL.fullmatch(text)
    if found is not None:
        numbers = [int(number) for number in found["core"].split(".")]
        numbers += [0] * (_NUMBERS - len(numbers))
    else:
        found = _DATED.fullmatch(text)
        if found is None:
            raise ValueError(text)
        numbers = [int(number) for number in re.split(r"\D", found["core"])]
    key = [(_NUMBER, number) for number in numbers]
    word = (found["word"] or "").lower()
    if word and word != "stable":
        key.append((_RANKS[word], 0))
        key += [(_NUMBER, int(number)) for number in re.findall(r"\d+", found["number"])]
    if found["dev"] and word != "stable":
        key.append((_DEV, 0))
    return (*key, _END)

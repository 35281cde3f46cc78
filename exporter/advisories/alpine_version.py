"""Order Alpine (apk) versions. The rules: apk-tools, apk-version(8).

digits{.digits}...{letter}{_suffix{number}}...{~commit}{-r number}. univers knows only Gentoo's suffixes.
A test compares this module with the comparisons that apk-tools itself is tested with.
"""

from __future__ import annotations

import re

_FORM = re.compile(
    r"(?P<numbers>\d+(?:\.\d+)*)(?P<letter>[a-z])?"
    r"(?P<suffixes>(?:_(?:alpha|beta|pre|rc|cvs|svn|git|hg|p)\d*)*)"
    r"(?:~(?P<commit>[0-9a-f]+))?(?:-r(?P<revision>\d+))?",
    re.ASCII,
)
_SUFFIX = re.compile(r"_([a-z]+)(\d*)", re.ASCII)
_BEFORE = ("alpha", "beta", "pre", "rc")  # before the release without a suffix
_AFTER = ("cvs", "svn", "git", "hg", "p")
# What comes next in a version, when another version has the same start. Lowest first.
_PRERELEASE, _END, _REVISION, _COMMIT, _SUFFIX_NUMBER, _POSTRELEASE, _LETTER, _NUMBER = range(8)

type _Token = tuple[int, int, int, str]


def alpine_key(text: str) -> tuple[_Token, ...]:
    """Return a key that orders versions.

    Raises:
        ValueError: the version is not valid.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(text)
    first, *others = found["numbers"].split(".")
    tokens: list[_Token] = [(_NUMBER, 1, int(first), "")]
    tokens += [_number(number) for number in others]
    if found["letter"]:
        tokens.append((_LETTER, 0, 0, found["letter"]))
    for name, number in _SUFFIX.findall(found["suffixes"]):
        is_before = name in _BEFORE
        order = (_BEFORE if is_before else _AFTER).index(name)
        tokens.append((_PRERELEASE if is_before else _POSTRELEASE, order, 0, ""))
        if number:
            tokens.append((_SUFFIX_NUMBER, 0, int(number), ""))
    if found["commit"]:
        tokens.append((_COMMIT, 0, 0, found["commit"]))
    if found["revision"]:
        tokens.append((_REVISION, 0, int(found["revision"]), ""))
    return (*tokens, (_END, 0, 0, ""))


def _number(text: str) -> _Token:
    """With a leading zero, numbers after the first are compared as text: 1.02 < 1.1 < 1.10."""
    return (_NUMBER, 0, 0, text) if text.startswith("0") else (_NUMBER, 1, int(text), "")

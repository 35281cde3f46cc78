"""Order Maven versions as Maven 3.9 does. The rules: Maven's POM reference, "Version Order Specification".

No Python library follows them: univers has the rules of Maven 3.0. A test compares this module with
the results of Maven's own ComparableVersion.
"""

from __future__ import annotations

import re
from functools import total_ordering
from itertools import zip_longest

type _Qualifier = tuple[int, str]
type _Item = int | _Qualifier | list[_Item]

# Lowest first. Unknown qualifiers come after them, in alphabetical order.
_QUALIFIERS = ("alpha", "beta", "milestone", "rc", "snapshot", "", "sp")
_RANKS: dict[str, _Qualifier] = {name: (rank, "") for rank, name in enumerate(_QUALIFIERS)}
_RANKS |= {"cr": _RANKS["rc"], "ga": _RANKS[""], "final": _RANKS[""], "release": _RANKS[""]}
_BEFORE_NUMBER = {"a": "alpha", "b": "beta", "m": "milestone"}
_RELEASE = _RANKS[""]
_TOKEN = re.compile(r"\d+|[^\d.-]+|[.-]", re.ASCII)
_SEPARATORS = frozenset(".-")


@total_ordering
class MavenVersion:
    """A parsed version, which can be compared with others."""

    def __init__(self, text: str) -> None:
        self._items = _parsed(_TOKEN.findall(text.lower()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MavenVersion) and not _compare(self._items, other._items)

    def __lt__(self, other: MavenVersion) -> bool:
        return _compare(self._items, other._items) < 0

    __hash__ = None  # type: ignore[assignment]


def _parsed(tokens: list[str]) -> list[_Item]:
    """Nest the tokens: a hyphen, or a change between digits and letters, starts a list in the list."""
    root: list[_Item] = []
    lists = [root]
    before = "."
    for token, after in zip_longest(tokens, tokens[1:], fillvalue=""):
        if token in _SEPARATORS:
            if before in _SEPARATORS:
                lists[-1].append(0)
            starts_list = token == "-"  # noqa: S105 - not a password
        else:
            # A qualifier after a dot counts as after a hyphen if it is the last, or before a number.
            starts_list = before not in _SEPARATORS or (
                before == "." and not token.isdigit() and (not after or after.isdigit())
            )
        if starts_list and lists[-1]:
            nested: list[_Item] = []
            lists[-1].append(nested)
            lists.append(nested)
        if token.isdigit():
            lists[-1].append(int(token))
        elif token not in _SEPARATORS:
            name = _BEFORE_NUMBER.get(token, token) if after.isdigit() else token
            lists[-1].append(_RANKS.get(name, (len(_QUALIFIERS), name)))
        before = token
    for items in reversed(lists):
        _trim(items)
    return root


def _trim(items: list[_Item]) -> None:
    """Remove what means nothing at the end: zeros, release qualifiers and empty lists."""
    for index in reversed(range(len(items))):
        if items[index] in (0, _RELEASE, []):
            del items[index]
        elif not isinstance(items[index], list):
            return


def _compare(left: _Item | None, right: _Item | None) -> int:
    """Return a number below, equal to or above 0. None stands for a missing item."""
    if left is None:
        return 0 if right is None else -_compare(right, None)
    if right is None:
        return _compare_with_nothing(left)
    if isinstance(left, int):
        return (left > right) - (left < right) if isinstance(right, int) else 1
    if isinstance(left, tuple):
        return (left > right) - (left < right) if isinstance(right, tuple) else -1
    if not isinstance(right, list):
        return -1 if isinstance(right, int) else 1
    return next(
        (found for pair in zip_longest(left, right) if (found := _compare(*pair))),
        0,
    )


def _compare_with_nothing(item: _Item) -> int:
    if isinstance(item, int):
        return int(item > 0)
    if isinstance(item, tuple):
        return (item > _RELEASE) - (item < _RELEASE)
    return next((found for each in item if (found := _compare_with_nothing(each))), 0)

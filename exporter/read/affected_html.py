"""Render what `affected` found as one self-contained HTML page without scripts. Runs no queries."""

from __future__ import annotations

from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from .affected_text import headline, notes, span
from .report_html import page_environment

if TYPE_CHECKING:
    from jinja2 import Template

    from .affected import Affected

_TEMPLATE = Path(__file__).with_name("affected.html")
_MAX_NAMES = 200  # users, clients or digests of one package that the page lists


def affected_html(affected: Affected) -> str:
    """Return the page, with times in the local time zone. Text from others is printable and escaped."""
    groups = [
        (advisory, verdict, list(hits))
        for (verdict, advisory), hits in groupby(
            affected.hits, key=lambda hit: (hit.verdict, hit.advisory)
        )
    ]
    return _template().render(
        affected=affected,
        groups=groups,
        headline=headline(affected),
        looks=[each for each in affected.looked_at if each.version is not None],
        max_names=_MAX_NAMES,
        notes=list(notes(affected)),
        span=span(affected),
    )


@cache
def _template() -> Template:
    return page_environment().from_string(_TEMPLATE.read_text(encoding="utf-8"))

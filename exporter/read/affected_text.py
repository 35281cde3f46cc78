"""Render what `affected` found for a terminal, or as CSV. Runs no queries."""

from __future__ import annotations

import csv
import io
from datetime import UTC, timedelta
from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..advisories.model import Verdict
from .human import are, package_text, plural, printable, size, were

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from rich.console import RenderableType

    from .affected import AboutAdvisory, Affected, Hit, LookedAt
    from .fetched import Callers, PrunedFetches

_FULL_WIDTH = 110  # cells; a narrower terminal does not show every column
_MAX_NAMES = 5  # users or clients that a line of the table shows
_FORMULA_STARTS = tuple("=+@\t\r\n-\uff1d\uff0b\uff20\uff0d")  # OWASP, "CSV Injection"
_CSV_COLUMNS = (
    *("verdict", "advisory", "severity", "summary", "aliases", "source", "purl", "package"),
    *("version", "how", "requests", "bytes", "first_at", "last_at", "users", "clients"),
    *("anonymous_clients", "remotes", "from_cache", "sha256", "rows_removed"),
)
_FETCHED = "fetched"


def affected_text(affected: Affected, width: int) -> RenderableType:
    """Return the answer for a terminal of `width` cells. Text from advisories and clients is printable."""
    parts: list[RenderableType] = [_head(affected)]
    for advisory, hits in groupby(affected.hits, key=lambda hit: (hit.verdict, hit.advisory)):
        parts += [_advisory_line(advisory[1], advisory[0]), _hit_table(list(hits), width)]
    with_version = [each for each in affected.looked_at if each.version is not None]
    if with_version:
        parts.append(_look_table(with_version))
    parts += [Text(note, style="dim") for note in notes(affected)]
    return Group(*parts)


def headline(affected: Affected) -> str:
    """Return the answer in one sentence."""
    sure = [hit for hit in affected.hits if hit.verdict == Verdict.AFFECTED]
    unsure = [hit for hit in affected.hits if hit.verdict == Verdict.POSSIBLE]
    if sure:
        packages = len({hit.purl for hit in sure})
        text = f"{plural(packages, 'affected package')} {were(packages)} fetched"
        text += _by(sure)
    elif unsure:
        packages = len({hit.purl for hit in unsure})
        text = f"{plural(packages, 'fetched package')} may be affected"
    elif not affected.packages:
        text = "Nothing was compared, because the sources name no package"
    elif affected.unattributed:
        text = (
            "No affected package was fetched by a request in the log, but older rows were removed"
        )
    elif affected.gaps.gaps:
        text = "No affected package was fetched by a request in the log, but the log has gaps"
    else:
        text = "No affected package was fetched"
    if sure and unsure:
        text += f"; {len({hit.purl for hit in unsure}):,} more may be affected"
    return f"{text}."


def span(affected: Affected) -> str:
    """Say in one sentence what was compared."""
    filters = "".join(f", {name} {printable(value)}" for name, value in affected.filters.items())
    since = "the start of the log" if affected.since is None else _moment(affected.since)
    until = "now" if affected.until is None else _moment(affected.until)
    return (
        f"{affected.advisories:,} {'advisory' if affected.advisories == 1 else 'advisories'} about"
        f" {plural(affected.packages, 'package')}, compared with what was fetched from {since} to {until}"
        f"{filters}."
    )


def notes(affected: Affected) -> Iterator[str]:
    """Yield what limits the answer, one sentence each."""
    if affected.kept is not None:
        yield f"The advisories were stored {_moment(affected.kept.kept_at)}."
    index_reads = [each for each in affected.looked_at if each.version is None]
    if index_reads:
        packages = {each.package for each in index_reads}
        yield (
            f"Of {plural(len(packages), 'package')} that the sources name, an index or a file without a version"
            " was requested, which fetches none; --json lists these requests."
        )
    if affected.gaps.gaps:
        yield (
            f"The log has {plural(affected.gaps.gaps, 'gap')} in this time:"
            f" {plural(affected.gaps.entries, 'request')} {are(affected.gaps.entries)}"
            " missing (see artifactapi gaps)."
        )
    if any(hit.has_missing_rows for hit in affected.hits) and affected.log_start is not None:
        yield (
            f"The rows before {_moment(affected.log_start)} were removed. Of earlier fetches only the users are"
            " known, by day, if the days were rolled up."
        )
    if affected.unattributed and affected.log_start is not None:
        yield (
            f"The rows before {_moment(affected.log_start)} were removed; whether earlier fetches of"
            f" {plural(affected.unattributed, 'affected package')} match the filters and the time is unknown."
        )
    if affected.source_packages:
        yield (
            f"{plural(affected.source_packages, 'package')} of distributions"
            f" {are(affected.source_packages)} named as the source package; binary packages"
            " with other names were not compared."
        )
    if affected.skipped:
        yield "Left out: " + ", ".join(
            f"{count:,} {reason}" for reason, count in affected.skipped.items()
        )


def affected_csv(affected: Affected) -> Iterator[str]:
    """Yield lines of CSV with a header: a line per advisory and package. Formulas are neutralized."""
    yield _csv_line(_CSV_COLUMNS)
    for hit in affected.hits:
        yield _csv_line(_csv_hit(hit))
    for look in affected.looked_at:
        yield _csv_line(_csv_look(look))


def _head(affected: Affected) -> Text:
    style = (
        "bold red" if affected.is_hit else "bold yellow" if affected.is_uncertain else "bold green"
    )
    return Text(headline(affected), style=style).append(
        f"\n{span(affected)}\n", style="not bold default"
    )


def _advisory_line(advisory: AboutAdvisory, verdict: Verdict) -> Text:
    text = Text("possible: " if verdict == Verdict.POSSIBLE else "", style="yellow")
    text.append(printable(advisory.id), style="bold")
    for part, style in ((advisory.severity, "red"), (advisory.summary, "")):
        if part:
            text.append(f"  {printable(part)}", style=style)
    if advisory.withdrawn:
        text.append("  withdrawn", style="yellow")
    return text


def _hit_table(hits: list[Hit], width: int) -> Table:
    """Return a table; on a narrow terminal without the size and the cache."""
    shown = [
        column
        for column in ("package", "fetches", "size", "first", "last", "cache", "who")
        if width >= _FULL_WIDTH or column not in {"size", "cache"}
    ]
    table = _table(*shown)
    for hit in hits:
        for cells in _hit_cells(hit):
            table.add_row(*(cells[column] for column in shown))
    return table


def _hit_cells(hit: Hit) -> Iterator[dict[str, RenderableType]]:
    """Yield the cells of each line about a hit, by column."""
    empty: dict[str, RenderableType] = dict.fromkeys(("fetches", "size", "cache"), "-")
    empty["package"] = Text(package_text(hit.purl))
    if hit.fetches is not None:
        fetches = hit.fetches
        yield empty | {
            "fetches": f"{fetches.requests:,}",
            "size": size(fetches.bytes),
            "first": _moment(fetches.first_at),
            "last": _moment(fetches.last_at),
            "cache": {None: "-", True: "yes", False: "no"}[fetches.from_cache],
            "who": Text(_who(fetches)),
        }
    if hit.pruned is not None:
        pruned = hit.pruned
        yield empty | {
            "first": _day(pruned.from_at),
            "last": _day(pruned.until_at - timedelta(days=1)),
            "who": Text(_pruned_users(pruned)).append(" (by day)", style="dim"),
        }
    if hit.ever is not None and hit.has_missing_rows:
        ever = hit.ever
        who = f"ever; first {printable(ever.first_user)}" if ever.first_user else "ever"
        yield empty | {
            "fetches": f"{ever.fetches:,}",
            "size": size(ever.bytes),
            "first": _moment(ever.first_at),
            "last": _moment(ever.last_at),
            "who": Text(who, style="dim"),
        }


def _look_table(looks: list[LookedAt]) -> Group:
    table = _table("package", "how", "requests", "first", "last", "who")
    for looked_at in looks:
        looks_ = looked_at.looks
        table.add_row(
            Text(package_text(looks_.purl)),
            looks_.how,
            f"{looks_.requests:,}",
            _moment(looks_.first_at),
            _moment(looks_.last_at),
            Text(_who(looks_)),
        )
    return Group(Text("Only looked at, not fetched", style="bold"), table)


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(first, header_style="dim", overflow="fold")
    for column in columns:
        is_text = column in {"who", "how", "cache"}
        table.add_column(
            column,
            header_style="dim",
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
        )
    return table


def _by(hits: list[Hit]) -> str:
    """Say how many users fetched any of these; without a login, clients are not counted alone."""
    users = {name for hit in hits for name in hit.users}
    if not users:
        return ""
    text = f", by {plural(len(users), 'user')}"
    clients = {client for hit in hits for client in hit.anonymous_clients}
    if any(hit.pruned is not None and hit.pruned.is_anonymous for hit in hits):
        return f"{text} and clients without a login"  # the rollups do not know which
    return f"{text} and {plural(len(clients), 'client')} without a login" if clients else text


def _who(callers: Callers) -> str:
    """Return the users, and the addresses of requests without a login."""
    users = _names(callers.users, callers.user_count)
    anonymous = _names(callers.anonymous_clients, callers.anonymous_client_count)
    if not callers.users:
        return anonymous
    return f"{users}; without a login: {anonymous}" if callers.anonymous_clients else users


def _pruned_users(pruned: PrunedFetches) -> str:
    """Return the users whom the rollups know."""
    users = _names(pruned.users, pruned.user_count)
    return f"{users}; others without a login" if pruned.is_anonymous and pruned.users else users


def _names(names: list[str], count: int) -> str:
    shown = ", ".join(map(printable, names[:_MAX_NAMES]))
    more = count - len(names[:_MAX_NAMES])
    return f"{shown} and {more:,} more" if more > 0 else shown or "-"


def _csv_hit(hit: Hit) -> list[str]:
    fetches = hit.fetches
    return [
        *_csv_about(hit.advisory, hit.verdict, hit.purl, hit.package, hit.version),
        _FETCHED,
        *(_csv_callers(fetches) if fetches is not None else _csv_ever(hit)),
        "" if fetches is None or fetches.from_cache is None else str(fetches.from_cache).lower(),
        "" if fetches is None else " ".join(fetches.sha256),
        "true" if hit.has_missing_rows else "",
    ]


def _csv_look(look: LookedAt) -> list[str]:
    return [
        *_csv_about(look.advisory, look.verdict, look.looks.purl, look.package, look.version),
        look.looks.how,
        *_csv_callers(look.looks),
        *("", "", ""),
    ]


def _csv_about(
    advisory: AboutAdvisory, verdict: Verdict, purl: str, package: str, version: str | None
) -> list[str]:
    about = [advisory.id, advisory.severity, advisory.summary, advisory.aliases, advisory.source]
    return [str(verdict), *about, purl, package, version or ""]


def _csv_callers(callers: Callers) -> list[str]:
    return [
        str(callers.requests),
        "" if callers.bytes is None else str(callers.bytes),
        callers.first_at.isoformat(),
        callers.last_at.isoformat(),
        " ".join(callers.users),
        " ".join(callers.clients),
        " ".join(callers.anonymous_clients),
        " ".join(callers.remotes),
    ]


def _csv_ever(hit: Hit) -> list[str]:
    ever = hit.ever
    if ever is None:
        return [""] * 8
    times = [ever.first_at.isoformat(), ever.last_at.isoformat()]
    return [
        str(ever.fetches),
        str(ever.bytes),
        *times,
        ever.first_user or "",
        *("", ""),
        ever.remote or "",
    ]


def _csv_line(cells: Iterable[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(
        f"'{cell}" if cell.startswith(_FORMULA_STARTS) else cell for cell in map(printable, cells)
    )
    return out.getvalue()


def _day(at: datetime) -> str:
    """Return a day in UTC, as the rollups have them."""
    return f"{at.astimezone(UTC):%Y-%m-%d} UTC"


def _moment(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M}"

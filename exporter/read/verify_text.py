"""Render a verification for a terminal. Compares nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .human import package_text, plural, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from rich.console import RenderableType

    from .lock_comparison import Comparison
    from .verify import Verification

MAX_FINDINGS = 200  # --json has all
_MAX_NAMES = 5


def verification_text(result: Verification) -> RenderableType:
    """Return the result for a terminal. Text from clients and lock files is printable."""
    parts: list[RenderableType] = [_head(result)]
    if result.comparison.findings:
        parts.append(_findings(result))
    parts += [Text(f"Note: {note}", style="dim") for note in _notes(result)]
    parts.append(_verdict(result))
    return Group(*parts)


def _head(result: Verification) -> Text:
    filters = "".join(f", {name} {printable(value)}" for name, value in result.filters.items())
    times = [at.astimezone() for at in (result.since, result.until) if at is not None]
    span = " to ".join(f"{at:%Y-%m-%d %H:%M}" for at in times) or "no time"
    text = Text(f"{span}{filters}\n", style="bold")
    for lock_file in result.lock_files:
        packages = plural(lock_file.packages, "package")
        text.append(
            f"{printable(lock_file.path)}: {packages} ({lock_file.format})\n", style="not bold"
        )
    return text


def _findings(result: Verification) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("finding", no_wrap=True)
    table.add_column("package", overflow="fold")
    table.add_column("fetches", justify="right", no_wrap=True)
    findings = result.comparison.findings
    for finding in findings[:MAX_FINDINGS]:
        package = Text(package_text(finding.purl))
        table.add_row(
            Text(finding.kind, style="red"),
            package.append(f"\n{printable(finding.detail)}", style="dim"),
            Text(f"{finding.fetches:,}"),
        )
    more = len(findings) - MAX_FINDINGS
    rest = [Text(f"... and {plural(more, 'more finding')}; --json has all")] if more > 0 else []
    return Group(table, *rest)


def _notes(result: Verification) -> Iterator[str]:
    comparison = result.comparison
    by_reason: dict[str, list[str]] = {}
    for package in comparison.not_fetched:
        by_reason.setdefault(package.reason, []).append(package_text(package.purl))
    for reason, names in by_reason.items():
        yield f"{len(names):,} locked but not fetched ({printable(reason)}): {_names(names)}"
    yield from _host_notes(comparison)
    unchecked = [
        f"{each.name} ({each.reason})" for file in result.lock_files for each in file.unchecked
    ]
    if unchecked:
        yield f"{len(unchecked):,} not from a registry, not checked: {_names(map(printable, unchecked))}"
    digests = comparison.digests
    if digests.not_recorded:
        count = plural(digests.not_recorded, "artifact")
        yield f"{count} without a recorded digest; see the setting artifact.sha256"
    for algorithms, number in digests.not_comparable.items():
        count = plural(number, "artifact")
        yield f"{count} locked by {printable(algorithms)}, which cannot be compared with SHA-256"
    if comparison.allowed:
        yield f"allowed although not locked: {_names(map(package_text, comparison.allowed))}"
    for text, counts in (
        ("artifacts of ecosystems that no lock file covers", comparison.other_ecosystems),
        ("downloads of artifacts whose package is unknown", result.unidentified),
        ("downloads from hosts that no remote describes", result.unknown_hosts),
    ):
        if counts:
            yield f"{text}, not checked: {_counts(counts)}"


def _host_notes(comparison: Comparison) -> Iterator[str]:
    hosts = sorted({each.host or "-" for each in comparison.findings if each.kind == "other host"})
    if hosts:
        yield f"if you expect this host, add --allow-host: {_names(map(printable, hosts))}"
    if comparison.hosts_not_in_lock_file:
        count = plural(comparison.hosts_not_in_lock_file, "artifact")
        yield f"{count} whose lock file names no host; name the expected ones with --allow-host"


def _verdict(result: Verification) -> Text:
    comparison = result.comparison
    good = plural(comparison.as_locked, "artifact")
    if comparison.findings:
        return Text(
            f"{plural(len(comparison.findings), 'finding')}; {good} as locked.", style="red"
        )
    if result.reasons:
        return Text(
            f"Uncertain: {printable(' '.join(result.reasons))} {good} as locked.", style="yellow"
        )
    return Text(f"As locked: {good}.", style="green")


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _MAX_NAMES
    return ", ".join(listed[:_MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _counts(counts: Mapping[str, int]) -> str:
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return _names(f"{printable(name)} {count:,}" for name, count in largest)

"""Format the figures of running proxies for people, and sum them up as an exit status."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..health import judge
from .human import duration, plural, printable, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..status_file import ProxyStatus

# What the exit status says, worst first.
LOST, TROUBLE, COMPLETE = 1, 2, 0

_STYLES = {"green": "green", "amber": "yellow", "red": "red"}


def exit_status(proxies: Sequence[ProxyStatus]) -> int:
    """LOST if requests were lost; TROUBLE if a proxy cannot write, failed or is gone; else COMPLETE."""
    if any(it.status["dropped"] + it.status["rejected"] for it in proxies):
        return LOST
    is_well = all(it.state == "running" and judge(it.status).level == "green" for it in proxies)
    return COMPLETE if is_well else TROUBLE


def status_lines(proxy: ProxyStatus) -> Iterator[Text]:
    """The figures of one proxy. Text from the proxy is printable."""
    status = proxy.status
    version = f", artifactapi {printable(status['version'])}" if status["version"] else ""
    age = duration(proxy.age_seconds * 1000)
    yield Text(
        f"{printable(status['node'])}{version}, process {proxy.pid}, as of {age} ago", style="bold"
    )
    yield _sentence(proxy)
    parts = ("written", "dropped", "rejected", "waiting", "spooled")
    counts = ", ".join(f"{status[name]:,} {name}" for name in parts)
    yield _line(
        "requests", f"{status['seen']:,} seen = {counts}; {status['in_flight']:,} in flight"
    )
    yield _line("database", f"{printable(status['database'])}; {_last_write(status)}")
    yield _line("batches", _batches(status))
    yield _line(
        "space",
        f"memory {_share(status['buffer_bytes'], status['buffer_max_bytes'])}, "
        f"disk {_share(status['spool_bytes'], status['spool_max_bytes'])}, {_journal(status)}",
    )
    yield _line(
        "since the start",
        f"{plural(status['recovered'], 'row')} of earlier runs, {status['retries']:,} retried, "
        f"{plural(status['failures'], 'internal error')}",
    )


def _sentence(proxy: ProxyStatus) -> Text:
    if proxy.state == "killed":
        return Text(
            "Killed: the process is gone. The next proxy, or `artifactapi recover`, writes what it left.",
            style="red",
        )
    if proxy.state == "silent":
        return Text("Silent: the process is there and does not report.", style="yellow")
    health = judge(proxy.status)
    return Text(f"{health.word}: {printable(health.sentence)}", style=_STYLES[health.level])


def _line(name: str, value: str) -> Text:
    return Text(f"  {name:<15} {value}")


def _last_write(status: Mapping[str, Any]) -> str:
    if status["last_written_at"] is None:
        return "nothing written yet"
    at = datetime.fromisoformat(status["last_written_at"]).astimezone()
    return f"last write {at:%Y-%m-%d %H:%M:%S}"


def _batches(status: Mapping[str, Any]) -> str:
    rows, seconds = status["batch_rows"], status["batch_seconds"]
    count = rows["buckets"]["+Inf"]
    if not count:
        return "none yet"
    mean = (
        f"{rows['sum'] / count:,.1f} rows and {duration(1000 * seconds['sum'] / count)} on average"
    )
    return f"{count:,}; {mean}; 95 % {_within(seconds['buckets'])}"


def _within(buckets: Mapping[str, int]) -> str:
    """The smallest bound that at least 95 % of the values are not above."""
    bounds = [bound for bound, count in buckets.items() if count >= 0.95 * buckets["+Inf"]]
    if bounds[0] == "+Inf":
        return f"took more than {duration(1000 * float([*buckets][-2]))}"
    return f"within {duration(1000 * float(bounds[0]))}"


def _share(used: int, limit: int) -> str:
    return f"{size(used)} of {size(limit)}"


def _journal(status: Mapping[str, Any]) -> str:
    if status["journal"] != "on":
        return f"no journal ({printable(status['journal'])})"
    used = _share(status["journal_used_bytes"], status["journal_bytes"])
    return f"journal {used}, {status['unjournaled']:,} without room"

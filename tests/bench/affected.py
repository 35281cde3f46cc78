"""Measure `artifactapi affected`: many advisories against a large log, and one list of compromised versions.

python -m tests.bench.affected --rows 10000000 --artifacts 1000000 --advisories 200000
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import psycopg

from exporter.postgres.schema import ensure_schema
from tests.support.access_log import temporary_schema
from tests.support.compromise import VERSIONS_PER_PACKAGE, advisories, compromised, generate
from tests.support.postgres import Postgres, available

_COMMAND = Path(sys.executable).with_name("artifactapi")
_DAYS = 30
_COMPROMISED = 180
_MEBIBYTE = 1024 * 1024


@click.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--artifacts", default=100_000, show_default=True)
@click.option("--advisories", "count", default=20_000, show_default=True)
def main(rows: int, artifacts: int, count: int) -> None:
    """Generate a log and advisories, and print how long each question takes."""
    packages = artifacts // VERSIONS_PER_PACKAGE
    attack = compromised(_COMPROMISED)
    with (
        tempfile.TemporaryDirectory() as folder,
        Postgres(available()["18"]) as server,
        temporary_schema(server) as dsn,
    ):
        osv, bad, one = Path(folder, "osv.jsonl"), Path(folder, "bad.txt"), Path(folder, "one.txt")
        with osv.open("w", encoding="utf-8") as out:
            out.writelines(f"{line}\n" for line in advisories(count, packages))
        bad.write_text(
            "".join(f"{each.name}@{each.version}\n" for each in attack), encoding="utf-8"
        )
        one.write_text(f"{attack[0].purl}\n", encoding="utf-8")
        started = time.monotonic()
        with psycopg.connect(dsn, autocommit=True) as connection:
            ensure_schema(connection)
            for done in generate(connection, rows, packages, _DAYS, attack):
                click.echo(f"{done:,} rows, {time.monotonic() - started:.0f} s", err=True)
            connection.execute("VACUUM ANALYZE access_log, artifact_by_node")
            (found,) = connection.execute("SELECT count(*) FROM artifact").fetchone() or (0,)
        click.echo(
            f"{rows:,} rows, {found:,} artifacts, {count:,} advisories ({osv.stat().st_size // _MEBIBYTE} MiB)"
        )
        for name, arguments in {
            "one": [str(one)],
            "one, again": [str(one)],
            f"{_COMPROMISED} compromised": [str(bad), "--type", "npm"],
            "all": [str(osv)],
        }.items():
            _measure(name, dsn, [*arguments, "--json"])


def _measure(name: str, dsn: str, arguments: list[str]) -> None:
    started = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [_COMMAND, "affected", *arguments],
            stdout=out,
            env={**os.environ, "ARTIFACTAPI_DSN": dsn},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        size = out.seek(0, os.SEEK_END)
    click.echo(
        f"{name:<16} {seconds:6.2f} s  {usage.ru_utime + usage.ru_stime:6.2f} s of CPU"
        f"  {usage.ru_maxrss // 1024:>5} MiB  status {process.returncode}  {size:,} bytes"
    )


if __name__ == "__main__":
    main()

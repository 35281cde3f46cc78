"""`artifactapi export`: other tools read from it exactly what is in the table, however many rows there are."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import psutil
import psycopg
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from exporter import Settings
from exporter.read.export import GOACCESS_OPTIONS
from exporter.read.session import COLUMN_NAMES, open_database, read_only
from exporter.write.database import Database
from tests.support.access_log import AccessLog, temporary_schema
from tests.support.command import COMMAND, call, write
from tests.support.samples import make_entry
from tests.support.terminal import on_terminal
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

MIB = 2**20
DIGESTS = [bytes([n]) * 32 for n in range(3)]
HOSTILE = (
    "=cmd|' /C calc'!A0",
    "@SUM(1)",
    "+1",
    "-1",
    "\t=1",
    '"quoted", and, commas',
    "line\nbreak\r\n|pipe|",
    "\x01\x02\x1b]0;x\x07\x9b\u202e\\\\",
    "\uff1dfull width",
    "",
)
ARTIFACT: dict[str, Any] = {"artifact_kind": "artifact", "ecosystem": "pypi", "remote": "pypi"}


def rows() -> Iterator[Any]:
    """Yield rows with hostile text in every column that can contain it, and rows of every kind."""
    for number, text in enumerate(HOSTILE):
        yield make_entry(
            number, user_agent=text, proxy_user=text, path=f"/{text}", error=text, package=text
        )
    yield make_entry(20, method=None, path=None, status_code=None, client_ip=None, duration_ms=None)
    yield make_entry(
        21, client_ip="2001:db8::1", method="BREW", status_code=999, host="other.example"
    )
    demo = {**ARTIFACT, "purl": "pkg:pypi/demo@1.0", "version": "1.0", "proxy_user": "build-1"}
    wheel, sdist = {"filename": "demo-1.0.whl"}, {"filename": "demo-1.0.tar.gz"}
    yield make_entry(30, **demo, **wheel, sha256=_hex(DIGESTS[0]))
    yield make_entry(31, **demo, **wheel, sha256=_hex(DIGESTS[0]))
    yield make_entry(32, **demo, **sdist, sha256=_hex(DIGESTS[1]))
    other = {**ARTIFACT, "purl": "pkg:npm/%40scope/thing@2.0", "proxy_user": "build-1"}
    yield make_entry(33, **other, sha256=_hex(DIGESTS[2]))
    yield make_entry(34, **other, status_code=304)
    lost = {**ARTIFACT, "purl": "pkg:pypi/lost@1", "proxy_user": "build-1"}
    yield make_entry(35, **lost, status_code=404)
    yield make_entry(36, **lost, error_type="client_disconnected")
    yield make_entry(37, **lost | {"artifact_kind": "index"})


def _hex(digest: bytes) -> str:
    return f"\\x{digest.hex()}"


@pytest.fixture(scope="module")
def table(postgres: Postgres) -> Iterator[str]:
    with temporary_schema(postgres) as dsn:
        database = Database(Settings().with_dsn(dsn).database)
        assert database.write(list(rows())) == []
        database.close()
        yield dsn


def exported(dsn: str, *arguments: str) -> str:
    done = subprocess.run(
        [COMMAND, "--dsn", dsn, "export", *arguments], check=False, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def expected(dsn: str) -> list[dict[str, Any]]:
    """Return the rows of the table in order, with values as text."""
    found = AccessLog(f"{dsn} options='{_options(dsn)} -ctimezone=UTC'").rows()
    return [{k: _as_text(v) for k, v in row.items()} for row in found]


def _options(dsn: str) -> str:
    (options,) = re.findall(r"options=(\S+)", dsn)
    return str(options)


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, bool):
        return "t" if value else "f"
    return "" if value is None else str(value)


def test_raw_csv_equals_the_table(table: str) -> None:
    found = list(csv.DictReader(io.StringIO(exported(table, "csv", "--raw"), newline="")))
    assert list(found[0]) == list(COLUMN_NAMES)
    for row, truth in zip(found, expected(table), strict=True):
        for time in ("started_at", "logged_at"):
            assert truth.pop(time).startswith(row.pop(time).removesuffix("+00"))
        for number in ("duration_ms", "ttfb_ms", "connect_ms"):
            assert float(row.pop(number) or -1) == float(truth.pop(number) or -1)
        assert row == truth


def test_csv_has_no_formulas(table: str) -> None:
    found = list(csv.DictReader(io.StringIO(exported(table, "csv"), newline="")))
    assert len(found) == len(list(rows()))
    for row in found:
        for cell in row.values():
            assert not cell or cell[0] not in "=+-@\t\r\n\uff1d"
    assert [row["user_agent"].removeprefix("'") for row in found[: len(HOSTILE)]] == list(HOSTILE)


def test_jsonl_equals_the_table(table: str) -> None:
    lines = exported(table, "jsonl").split("\n")
    assert lines.pop() == ""
    for line, truth in zip(lines, expected(table), strict=True):
        row = json.loads(line)
        assert list(row) == list(COLUMN_NAMES)
        for name in (
            "user_agent",
            "proxy_user",
            "path",
            "error",
            "package",
            "sha256",
            "flow_id",
            "host",
        ):
            assert _as_text(row[name]) == truth[name]
        assert type(row["response_bytes"]) is int


def test_filters_select_rows(table: str) -> None:
    assert len(exported(table, "jsonl", "--host", "other.*").splitlines()) == 1
    assert len(exported(table, "csv", "--status", "none").splitlines()) == 2
    assert exported(table, "goaccess", "--since", "1m") == ""


def test_terminal_gets_no_control_characters_and_a_file_all_bytes(
    table: str, tmp_path: Path
) -> None:
    for format_name in ("csv", "jsonl", "goaccess"):
        text = on_terminal(80, "--dsn", table, "export", format_name)
        assert all(c.isprintable() for c in text.replace("\r\n", "")), format_name
    with (tmp_path / "file").open("w+b") as file:
        shown = on_terminal(80, "--dsn", table, "export", "csv", "--raw", output=file)
        file.seek(0)
        assert file.read().decode() == exported(table, "csv", "--raw")
    count = len(list(rows()))
    assert f"{count + 1}/{count + 1}" in shown


def test_interrupted_export_fails(table: str) -> None:
    with psycopg.connect(table) as connection:
        connection.execute("LOCK TABLE access_log IN ACCESS EXCLUSIVE MODE")
        with subprocess.Popen(
            [COMMAND, "--dsn", table, "export", "csv"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            eventually(lambda: _is_waiting(table))
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert output == b""
    assert b"Traceback" not in errors


def _is_waiting(dsn: str) -> bool:
    with psycopg.connect(dsn) as connection:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'COPY%'"
        return bool((connection.execute(waiting).fetchone() or (0,))[0])


def test_closed_pipe_gives_no_traceback(table: str) -> None:
    command = f"{COMMAND} export jsonl | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "ARTIFACTAPI_DSN": table},
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("format_name", ["csv", "jsonl", "goaccess"])
def test_closed_pipe_ends_a_large_export(dsn: str, format_name: str) -> None:
    database = Database(Settings().with_dsn(dsn).database)
    database.write([make_entry(number) for number in range(20_000)])
    database.close()
    environment = {**os.environ, "ARTIFACTAPI_DSN": dsn}
    with subprocess.Popen(
        [COMMAND, "export", format_name],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as export:
        assert export.stdout is not None
        assert export.stderr is not None
        assert export.stdout.readline()
        export.stdout.close()
        assert export.stderr.read() == b""
        assert export.wait(20) == 0


@pytest.mark.skipif(shutil.which("goaccess") is None, reason="goaccess is not installed")
def test_goaccess_reads_every_line(table: str, tmp_path: Path) -> None:
    log, report = tmp_path / "log", tmp_path / "report.json"
    log.write_text(exported(table, "goaccess"))
    command = f"goaccess {log} {GOACCESS_OPTIONS} --no-progress --no-global-config -o {report}"
    subprocess.run(
        ["bash", "-c", command],
        check=True,
        capture_output=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    found = json.loads(report.read_text())
    count = len(list(rows()))
    general = found["general"]
    assert (general["valid_requests"], general["failed_requests"]) == (count, 0)
    truth = expected(table)
    assert general["bandwidth"] == sum(int(row["response_bytes"] or 0) for row in truth)
    hosts = {host["data"]: host["hits"]["count"] for host in found["vhosts"]["data"]}
    assert hosts == {"registry.example": count - 1, "other.example": 1}
    users = {user["data"]: user["hits"]["count"] for user in found["remote_user"]["data"]}
    assert users["build-1"] == 8


def test_cyclonedx_is_valid_and_lists_the_fetched_artifacts(table: str) -> None:
    text = exported(table, "cyclonedx", "--user", "build-1")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    found = {component["purl"]: component for component in document["components"]}
    assert set(found) == {"pkg:pypi/demo@1.0", "pkg:npm/%40scope/thing@2.0"}
    thing = found["pkg:npm/%40scope/thing@2.0"]
    assert (thing["group"], thing["name"], thing["version"]) == ("@scope", "thing", "2.0")
    assert thing["hashes"] == [{"alg": "SHA-256", "content": DIGESTS[2].hex()}]
    properties = {item["name"]: item["value"] for item in thing["properties"]}
    assert properties["artifactapi:fetches"] == "2"
    demo = found["pkg:pypi/demo@1.0"]
    assert "hashes" not in demo, "the two files have different hashes"
    files = {file["name"]: file["hashes"][0]["content"] for file in demo["components"]}
    assert files == {"demo-1.0.whl": DIGESTS[0].hex(), "demo-1.0.tar.gz": DIGESTS[1].hex()}
    assert document["metadata"]["component"]["name"] == "build-1"
    graph = {node["ref"]: node.get("dependsOn") for node in document["dependencies"]}
    assert graph[document["metadata"]["component"]["bom-ref"]] == sorted(found)


def test_empty_sbom_is_valid(table: str) -> None:
    text = exported(table, "cyclonedx", "--user", "nobody")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert "components" not in json.loads(text)


def test_memory_does_not_grow_with_the_number_of_rows(dsn: str) -> None:
    write(dsn, 1)
    with psycopg.connect(dsn) as connection:
        connection.execute(
            "INSERT INTO access_log (started_at, flow_id, node, path)"
            " SELECT started_at, gen_random_uuid(), node, repeat('x', 20000)"
            " FROM access_log, generate_series(1, 7500)"
        )
    with subprocess.Popen(
        [COMMAND, "--dsn", dsn, "export", "jsonl"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        size = peak = 0
        while data := process.stdout.read(MIB):
            size += len(data)
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
    assert process.returncode == 0
    assert size > 140 * MIB
    assert peak < 100 * MIB  # most of it is Python and its modules


def test_read_only_transactions_cannot_write_and_are_limited_in_time(dsn: str) -> None:
    write(dsn, 1)
    with open_database(Settings().with_dsn(dsn)) as connection:
        with (
            pytest.raises(psycopg.errors.ReadOnlySqlTransaction),
            read_only(connection, 5),
        ):
            connection.execute("DELETE FROM access_log")
        with pytest.raises(psycopg.errors.QueryCanceled), read_only(connection, 0.1):
            connection.execute("SELECT pg_sleep(30)")
        with read_only(connection, 5):
            assert connection.execute("SELECT count(*) FROM access_log").fetchone() == (1,)


def test_unknown_format_is_rejected_with_a_list_of_formats() -> None:
    done = call("export", "xml")
    assert done.returncode == 2
    assert "'cyclonedx'" in done.stderr

"""Compare the journal with a model, kill it at every byte, damage it, and test who may use its file."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from msgspec.structs import replace

from exporter import Exchange, Settings
from exporter.exchange import RESPONSE_FIELDS
from exporter.rows.entry_builder import EntryBuilder
from exporter.run import Run
from exporter.settings import JournalSettings
from exporter.write import journal_file
from exporter.write.encoding import decode, encode
from exporter.write.journal import Journal, Safe
from exporter.write.journal_file import (
    COUNTERS_AT,
    RING_AT,
    DeadJournalFile,
    JournalError,
    journal_paths,
    read_identity,
)
from exporter.write.recovery import JournalContent, Recovery
from tests.support.samples import make_exchange

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="journals need tmpfs")

_ROOT = Path(__file__).resolve().parents[2]
_DSN = "host=db.example dbname=logs"


def settings(max_bytes: int = 1 << 20, dsn: str = _DSN) -> Settings:
    return replace(
        Settings(node="proxy-1").with_dsn(dsn), journal=JournalSettings(max_bytes=max_bytes)
    )


@pytest.fixture
def journal() -> Iterator[Journal]:
    journal = start()
    yield journal
    journal.close()


def start(max_bytes: int = 1 << 20) -> Journal:
    return Journal(Run.start("proxy-1"), settings(max_bytes))


def content_of(journal: Journal) -> bytes:
    assert journal.path
    return journal.path.read_bytes()


def read(content: bytes) -> JournalContent:
    identity = read_identity(content)
    assert identity
    return JournalContent(content, identity)


def numbers(content: JournalContent) -> list[int]:
    """The ports of the exchanges, which the tests use as numbers."""
    return [decode(encoded).port for encoded in content.exchanges()]


def record(journal: Journal, exchange: Exchange) -> None:
    journal.put(encode(exchange)[0])


@pytest.mark.parametrize("seed", range(20))
def test_journal_holds_what_is_not_safe_and_counts_the_rest(seed: int) -> None:
    """Random puts, drops, releases and wraps; a kill after each step, and at any byte of a put."""
    rng = random.Random(seed)
    capacity = rng.choice([5_000, 50_000, 300_000])
    journal = start(capacity)
    recorded: list[int] = []  # numbers, in the order of the puts
    put = released = begun = ended = skipped = drops = drops_recorded = 0
    for _ in range(250):
        step = rng.random()
        if step < 0.15:
            journal.begin(float(begun))
            begun += 1
        elif step < 0.2 and begun > ended:
            journal.skip()
            skipped += 1
            ended += 1
        elif step < 0.25:
            journal.count_drop()
            drops += 1
            ended += 1
            begun = max(begun, ended)
            journal.set_in_flight(begun - ended)
        elif step < 0.35:
            released = rng.randint(released, put)
            drops_recorded = rng.randint(drops_recorded, drops)
            journal.release(Safe(released, drops_recorded))
        else:
            journal.begin(float(begun))
            begun += 1
            before = content_of(journal)
            unrecorded = journal.unrecorded
            target = b"/" + rng.randbytes(rng.choice([0, 10, 300, 3000, 9000]))
            record(journal, make_exchange(put, port=put, target=target))
            is_recorded = journal.unrecorded == unrecorded
            if is_recorded:
                recorded.append(put)
            after = content_of(journal)
            if is_recorded and rng.random() < 0.1:
                check_torn_put(before, after, journal._offset, put)
            put += 1
            ended += 1
        found = read(content_of(journal))
        expected = [n for n in recorded if n >= released]
        assert numbers(found) == expected
        assert found.lost == (put - released - len(expected)) + (begun - ended)
        assert (found.begun, journal.in_flight) == (begun - skipped, begun - ended)
        assert found.unrecorded_drops == drops - drops_recorded
        assert not found.is_damaged
    assert len(recorded) > 20
    journal.release(Safe(put, drops))
    assert capacity < 50_000 or _is_recorded(journal, put)
    journal.close()


def _is_recorded(journal: Journal, number: int) -> bool:
    unrecorded = journal.unrecorded
    record(journal, make_exchange(number))
    return journal.unrecorded == unrecorded


def check_torn_put(before: bytes, after: bytes, end: int, number: int) -> None:
    """Stop a put at any byte: the exchange is in flight, or there, and all others stay.

    `end`: of the exchange in the file.
    """
    whole = read(before[:RING_AT] + after[RING_AT:])  # it is complete, but not counted yet
    assert (numbers(whole), whole.lost) == (numbers(read(after)), read(after).lost)
    size = len(msgspec.msgpack.encode(make_exchange(number)))  # at least
    changed = [at for at in range(end - size, end) if before[at] != after[at]]
    for at in [*range(changed[-1] - 40, changed[-1]), *changed[::20]]:
        torn = read(before[:RING_AT] + after[RING_AT:at] + before[at:])
        assert [*numbers(torn), number] == numbers(whole)
        assert torn.lost == whole.lost + 1


def test_space_that_is_released_is_used_again() -> None:
    journal = start(100_000)
    for number in range(10_000):
        journal.begin(0.0)
        record(journal, make_exchange(number, port=number))
        journal.release(Safe(max(number - 50, 0), 0))
    assert journal.unrecorded == 0
    assert numbers(read(content_of(journal))) == list(range(9_949, 10_000))
    journal.close()


def test_full_journal_goes_on_without_and_counts_it() -> None:
    journal = start(20_000)
    for number in range(200):
        journal.begin(0.0)
        record(journal, make_exchange(number, port=number))
    found = read(content_of(journal))
    assert 20 < len(found) < 100
    assert numbers(found) == list(range(len(found)))
    assert journal.unrecorded == found.lost == 200 - len(found)
    journal.release(Safe(200, 0))
    record(journal, make_exchange(200, port=200))
    assert numbers(read(content_of(journal))) == [200]
    journal.close()


# --- values


def test_every_value_of_an_exchange_comes_back(journal: Journal) -> None:
    fields = tuple((name, name.upper()) for name in sorted(RESPONSE_FIELDS))
    exchanges = [
        make_exchange(1),
        make_exchange(
            2, client=None, server=("::1", 443, 0, 0), response_fields=fields, sha256=b"\xff" * 32
        ),
        make_exchange(3, ended_at=None, head_at=None, status_code=None, error="caf\u00e9 \u20ac"),
        make_exchange(4, target=bytes(range(256)) * 32, request_bytes=2**62),
        make_exchange(5, requested_url=(b"https", "pypi.example", 443, b"/simple/?a=b")),
    ]
    for exchange in exchanges:
        record(journal, exchange)
    assert [*map(decode, read(content_of(journal)).exchanges())] == exchanges


def test_bodies_are_not_recorded(journal: Journal) -> None:
    record(journal, make_exchange(1, body=b"confidential" * 10))
    assert b"confidential" not in content_of(journal)
    (found,) = read(content_of(journal)).exchanges()
    assert decode(found) == make_exchange(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "caf\udce9.example"},
        {"error": "broken \ud800 text \udcff"},
        {"proxy_user": "b\udcfcild", "host": "\x00"},
    ],
)
def test_text_that_is_not_utf_8_gives_the_same_row(
    journal: Journal, changes: dict[str, str]
) -> None:
    exchange = make_exchange(1, **changes)
    record(journal, exchange)
    (found,) = read(content_of(journal)).exchanges()
    build = EntryBuilder(Settings(node="test")).build
    assert build(decode(found)) == build(exchange)


def test_fields_of_another_version_are_found_by_name(journal: Journal) -> None:
    record(journal, make_exchange(1))
    content = content_of(journal)
    identity = read_identity(content)
    assert identity
    names = ["proxy_login" if name == "proxy_user" else name for name in identity.fields]
    other = JournalContent(content, replace(identity, fields=tuple(names)))
    assert [*map(decode, other.exchanges())] == [make_exchange(1, proxy_user=None)]
    fewer = JournalContent(content, replace(identity, fields=identity.fields[:-1]))
    assert list(fewer.exchanges()) == [(b"", None)]


def test_odd_values_of_another_version_are_kept_and_damaged_ones_are_empty(
    journal: Journal,
) -> None:
    exchange = make_exchange(1, host="caf\udce9.example", error="\ud800")
    record(journal, exchange)
    journal.put(b"\x91" * 100_000)  # a list in a list in a list
    content = content_of(journal)
    identity = read_identity(content)
    assert identity
    names = ["cut_by" if name == "sha256" else name for name in identity.fields]
    kept, damaged = JournalContent(content, replace(identity, fields=tuple(names))).exchanges()
    assert decode(kept) == exchange
    assert damaged == (b"", None)


def test_client_cannot_forge_an_exchange(journal: Journal) -> None:
    """A URL that holds a record of another journal, and then one of a released exchange."""
    record(journal, make_exchange(0, port=0))
    other = start()
    record(other, make_exchange(1, port=666))
    forged = content_of(other)[RING_AT : RING_AT + 600]
    other.close()
    record(journal, make_exchange(1, port=1, target=forged))
    damaged = bytearray(content_of(journal))
    at = damaged.index(b"/simple/", RING_AT + 400)
    damaged[at - 200] ^= 1
    assert 666 not in numbers(read(bytes(damaged)))


# --- kills


_PUT_UNTIL_KILLED = """
import sys
from exporter.run import Run
from exporter.write.encoding import decode, encode
from exporter.write.journal import Journal, Safe
from tests.support.samples import make_exchange
from tests.unit.test_journal import settings
journal = Journal(Run.start("proxy-1"), settings(200_000))
print("ready", flush=True)
number = 0
while True:
    journal.begin(1.0)
    record(journal, make_exchange(number, port=number))
    number += 1
    if number % 100 == 0:
        journal.release(Safe(number - 50, 0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_process_leaves_every_exchange_it_has_put(runtime: Path, seed: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PUT_UNTIL_KILLED], stdout=subprocess.PIPE, cwd=_ROOT
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        (path,) = runtime.iterdir()
        with pytest.raises(BlockingIOError):
            DeadJournalFile(path)
        deadline = time.monotonic() + random.Random(seed).uniform(0.02, 0.2)
        while time.monotonic() < deadline:
            path.read_bytes()
        process.kill()
    dead = DeadJournalFile(path)
    found = read(dead.read())
    dead.remove()
    assert list(runtime.iterdir()) == []
    first = found.counters.released
    assert first is not None
    assert numbers(found) == list(range(first, first + len(found)))
    assert (found.lost in {0, 1}, found.is_damaged) == (True, False)


def test_child_processes_do_not_hold_the_lock(journal: Journal) -> None:
    assert journal.path
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        folder = Path(f"/proc/{child.pid}/fd")
        links = [str(fd.readlink()) for fd in folder.iterdir()]
        child.send_signal(signal.SIGKILL)
    assert links
    assert not [link for link in links if str(journal.path) in link]


# --- damage


@pytest.mark.parametrize("seed", range(20))
def test_damage_costs_only_the_exchanges_that_it_hits(journal: Journal, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(1000):
        journal.begin(0.0)
        record(journal, make_exchange(number, port=number))
    journal.release(Safe(300, 0))
    content = bytearray(content_of(journal))
    kind = rng.choice(["flip", "zero", "truncate"])
    used = content.rindex(b"/simple/") + 300
    at = rng.randrange(RING_AT, used)
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        size = rng.randrange(1, 4096)
        content[at : at + size] = bytes(len(content[at : at + size]))
    else:
        del content[at:]
    found = read(bytes(content))
    survived = numbers(found)
    assert survived == sorted(set(survived) & set(range(300, 1000)))
    assert len(survived) + found.lost == 700
    assert found.lost <= {"flip": 1, "zero": 4096 // 200 + 2, "truncate": 700}[kind]


def test_one_damaged_byte_never_hides_the_identity_or_a_counter() -> None:
    journal = start(20_000)
    for number in range(10):
        journal.begin(0.0)
        record(journal, make_exchange(number, port=number))
    journal.release(Safe(3, 0))
    content = content_of(journal)
    identity = read_identity(content)
    for at in range(600):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        assert read_identity(bytes(damaged)) == identity
    for at in (*range(COUNTERS_AT, COUNTERS_AT + 24), *range(COUNTERS_AT + 64, COUNTERS_AT + 80)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            found = read(bytes(damaged))
            assert found.is_damaged
            assert set(numbers(found)) >= set(range(3, 10))
    journal.close()


@pytest.mark.parametrize("size", [0, 10, 4096, COUNTERS_AT + 20, RING_AT])
def test_truncated_file_is_reported(runtime: Path, journal: Journal, size: int) -> None:
    """A killed run whose file is damaged has lost an unknown number of requests: at least one."""
    journal.begin(1.0)
    record(journal, make_exchange(1))
    (path,) = runtime.iterdir()
    content = content_of(journal)
    journal.close()
    path.write_bytes(content[:size])
    path.chmod(0o600)
    recovery = Recovery(settings(), None)
    recovery.find()
    (dead,) = recovery.journals
    assert list(dead.batches()) == []
    expected = {"journal_damaged": 1} if size < RING_AT else {"killed": 1}
    assert {gap.reason: gap.entries for gap in dead.gaps()} == expected
    before = dead.gaps()
    assert list(dead.batches()) == []
    assert dead.gaps() == before
    recovery.finish(dead)
    assert list(runtime.iterdir()) == []


# --- files


def test_file_is_private_and_complete_and_removed_at_the_end(runtime: Path) -> None:
    journal = start(1 << 20)
    (path,) = runtime.iterdir()
    status = path.stat()
    assert path == journal.path
    assert (status.st_mode & 0o777, status.st_size) == (0o600, RING_AT + (1 << 20))
    assert status.st_blocks * 512 >= status.st_size, "the memory is reserved"
    journal.close()
    assert list(runtime.iterdir()) == []
    record(journal, make_exchange(1))  # a late write does no harm


def test_size_zero_turns_the_journal_off(runtime: Path) -> None:
    journal = start(0)
    journal.begin(1.0)
    assert (journal.off_reason, journal.path, journal.in_flight) == (
        "journal.max_bytes is 0",
        None,
        1,
    )
    record(journal, make_exchange(1))
    assert (journal.in_flight, journal.unrecorded, list(runtime.iterdir())) == (0, 0, [])


def test_no_memory_turns_the_journal_off_with_one_line(
    runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as if tmpfs were full
    try:
        journal = start(1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(journal.off_reason)
    assert [record.message[:24] for record in caplog.records] == ["artifactapi: no journal:"]
    assert list(runtime.iterdir()) == []
    record(journal, make_exchange(1))
    journal.close()


def test_folder_on_a_disk_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: Path
) -> None:
    if journal_file._is_in_memory(tmp_path):
        pytest.skip("the temporary folder is in memory here")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(journal_file, "_SHARED_MEMORY", runtime)
    journal = start()
    assert journal.path
    assert journal.path.parent == runtime
    journal.close()
    monkeypatch.setattr(journal_file, "_SHARED_MEMORY", tmp_path / "missing")
    assert start().off_reason == "neither XDG_RUNTIME_DIR nor /dev/shm is a tmpfs"


def dead_file(runtime: Path) -> Path:
    """The file of a run that was killed."""
    journal = start(100_000)
    record(journal, make_exchange(1))
    content = content_of(journal)
    path = journal.path
    assert path
    journal.close()
    path.write_bytes(content)
    path.chmod(0o600)
    assert list(runtime.iterdir()) == [path]
    return path


@pytest.mark.parametrize("fault", ["link", "folder", "mode", "owner", "pipe", "version"])
def test_file_that_is_not_ours_is_left_alone_and_reported_once(
    runtime: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    path = dead_file(runtime)
    if fault == "link":
        path.rename(runtime / "elsewhere")
        path.symlink_to(runtime / "elsewhere")
    elif fault in {"folder", "pipe"}:
        path.unlink()
        (path.mkdir if fault == "folder" else lambda: os.mkfifo(path, 0o600))()
    elif fault == "mode":
        path.chmod(0o644)
    elif fault == "owner":
        if os.geteuid():
            pytest.skip("needs root to give a file away")
        os.chown(path, 12345, -1)
    else:
        content = bytearray(path.read_bytes())
        content[7] = content[4096 + 7] = ord("9")
        path.write_bytes(content)
    recovery = Recovery(settings(), None)
    for _ in range(2):
        recovery.find()
    assert recovery.journals == []
    (record,) = caplog.records
    assert record.message.startswith(f"artifactapi: journal ignored: {path} (")
    assert os.path.lexists(path)


def test_name_of_a_file_cannot_forge_a_log_message(
    runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = dead_file(runtime)
    path.rename(path.with_name(f"{path.stem}\nartifactapi: \x1b[31mforged{path.suffix}"))
    path = next(runtime.iterdir())
    path.chmod(0o644)
    Recovery(settings(), None).find()
    (record,) = caplog.records
    assert record.message.isprintable()


def test_only_one_process_recovers_a_journal(runtime: Path) -> None:
    path = dead_file(runtime)
    first = DeadJournalFile(path)
    with pytest.raises(BlockingIOError):
        DeadJournalFile(path)
    first.close()
    second = DeadJournalFile(path)
    second.remove()
    with pytest.raises(FileNotFoundError):
        DeadJournalFile(path)


def test_journal_of_another_database_waits_for_it(
    runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = dead_file(runtime)
    recovery = Recovery(settings(dsn="host=other.example dbname=logs"), None)
    recovery.find()
    assert recovery.journals == []
    assert f"another database, {path} (db.example:5432/logs)" in caplog.text
    assert "artifactapi recover --redirect" in caplog.text
    recovery.reconfigure(settings())
    recovery.find()
    assert [journal.path for journal in recovery.journals] == [path]
    recovery.close()
    anywhere = Recovery(settings(dsn="host=other.example"), None, any_database=True)
    anywhere.find()
    assert len(anywhere.journals) == 1
    anywhere.close()


def test_new_run_and_database_replace_the_old_ones(journal: Journal) -> None:
    run = replace(Run.start("proxy-2"), run_id="0" * 36)
    journal.set_identity(run, settings(dsn="host=new.example dbname=x"))
    content = content_of(journal)
    identity = read_identity(content)
    assert identity
    assert (identity.run, identity.database) == (run, "new.example:5432/x")
    old = bytearray(content)
    old[20] ^= 1  # as if killed while writing the first copy
    assert read_identity(bytes(old)) == identity


def test_deleted_file_is_noticed_once(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    journal.check()
    assert journal.off_reason is None
    assert journal.path
    journal.path.unlink()
    for _ in range(2):
        journal.check()
    assert journal.off_reason == f"{journal.path} was deleted"
    assert len(caplog.records) == 1
    record(journal, make_exchange(1))


def test_password_is_not_in_the_file(runtime: Path) -> None:
    secret = settings(dsn="postgresql://me:s3cretpw@db.example/logs")
    journal = Journal(Run.start("proxy-1"), secret)
    assert b"s3cretpw" not in content_of(journal)
    assert b"db.example:5432/logs" in content_of(journal)
    journal.close()
    assert list(runtime.iterdir()) == []


def test_own_journal_is_not_found(journal: Journal) -> None:
    assert journal.path in journal_paths(None)
    assert journal.path not in journal_paths(journal.path)


def test_reason_without_memory_names_each_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.write.journal_file.sys.platform", "darwin")
    with pytest.raises(JournalError, match="only Linux"):
        journal_file.JournalFile(journal_file.Identity(Run.start("n"), "db", os.getpid(), 100_000))


def test_exchange_has_a_field_for_each_value() -> None:
    """The journal stores the names of the fields in their order."""
    assert Exchange.__struct_config__.array_like

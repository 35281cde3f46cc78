"""Bytes from a shared store count for the repository that the client asked before."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from exporter.rows import references
from exporter.rows.entry_builder import EntryBuilder
from exporter.settings import Settings
from tests.support.samples import make_exchange

if TYPE_CHECKING:
    from exporter.rows.entry import AccessLogEntry

OBJECT = ("github-cloud.githubusercontent.example", "/alambic/media/1/ab/cd/" + "ab" * 32)
XORB = ("transfer.xethub.hf.example", "/xorbs/default/" + "cd" * 32)
MODEL = "pkg:huggingface/org/model"


@pytest.fixture
def builder() -> EntryBuilder:
    return EntryBuilder(Settings(node="test"))


def get(
    builder: EntryBuilder,
    host: str,
    path: str,
    fields: tuple[tuple[bytes, bytes], ...] = (),
    client: str = "192.0.2.7",
) -> AccessLogEntry:
    exchange = make_exchange(
        host=host, target=path.encode(), response_fields=fields, client=(client, 50_000)
    )
    return builder.build(exchange)


def ask_for_lfs(builder: EntryBuilder, repository: str) -> AccessLogEntry:
    return get(builder, "github.example", f"/{repository}.git/info/lfs/objects/batch")


def test_git_lfs_object_counts_for_the_repository(builder: EntryBuilder) -> None:
    assert get(builder, *OBJECT).purl is None

    assert ask_for_lfs(builder, "org/data").artifact_kind == "api"
    found = get(builder, *OBJECT)

    assert (found.remote, found.artifact_kind) == ("github-lfs", "blob")
    assert (found.ecosystem, found.package, found.purl) == (
        "github",
        "org/data",
        "pkg:github/org/data",
    )
    assert get(builder, *OBJECT, client="192.0.2.8").purl is None


def test_objects_of_several_repositories_count_for_none(builder: EntryBuilder) -> None:
    for repository in ("org/data", "org/other", "org/data"):
        ask_for_lfs(builder, repository)

    assert get(builder, *OBJECT).purl is None


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/org/model/resolve/main/model.safetensors", ((b"x-xet-hash", b"ab" * 32),)),
        (
            "/org/model/resolve/" + "a1" * 20 + "/model.safetensors",
            ((b"x-xet-hash", b"ab" * 32),),
        ),
        ("/api/models/org/model/xet-read-token/" + "a1" * 20, ()),
    ],
)
def test_xet_bytes_count_for_the_model(
    builder: EntryBuilder, path: str, fields: tuple[tuple[bytes, bytes], ...]
) -> None:
    get(builder, "huggingface.example", path, fields)
    found = get(builder, *XORB)

    assert (found.remote, found.artifact_kind, found.purl) == ("huggingface-xet", "blob", MODEL)
    assert (found.package, found.version) == ("org/model", None)
    assert get(builder, *OBJECT).purl is None  # another store


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("cas-bridge.xethub.hf.example", "/xet-bridge-us/65a1/" + "ab" * 32),
        ("cdn-lfs-us-1.hf.example", "/repos/aa/bb/" + "ab" * 64),
        ("cdn-lfs.huggingface.example", "/repos/aa/bb/" + "ab" * 64),
    ],
)
def test_git_lfs_object_of_a_model_counts_for_it(
    builder: EntryBuilder, host: str, path: str
) -> None:
    ask_for_lfs(builder, "org/data")  # elsewhere
    asked = get(builder, "huggingface.example", "/org/model.git/info/lfs/objects/batch")
    assert (asked.artifact_kind, asked.purl) == ("api", MODEL)

    assert (get(builder, host, path).artifact_kind, get(builder, host, path).purl) == (
        "blob",
        MODEL,
    )
    assert get(builder, *OBJECT).purl == "pkg:github/org/data"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/datasets/org/data/resolve/main/x.parquet", ((b"x-xet-hash", b"ab" * 32),)),
        ("/api/datasets/org/data/xet-read-token/" + "a1" * 20, ()),
        ("/datasets/org/data.git/info/lfs/objects/batch", ()),
    ],
)
def test_bytes_of_a_data_set_count_for_no_model(
    builder: EntryBuilder, path: str, fields: tuple[tuple[bytes, bytes], ...]
) -> None:
    """A data set has no Package URL."""
    model = ("huggingface.example", "/api/models/org/model/xet-read-token/" + "a1" * 20)
    get(builder, *model)
    assert get(builder, *XORB).purl == MODEL

    get(builder, "huggingface.example", path, fields)
    assert get(builder, *XORB).purl is None

    get(builder, *model)
    assert get(builder, *XORB).purl is None  # of either


def test_references_expire_and_are_bounded(
    builder: EntryBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "_MAX_CLIENTS", 10)
    for number in range(30):
        get(
            builder,
            "github.example",
            "/org/data.git/info/lfs/objects/batch",
            client=f"192.0.2.{number}",
        )
    assert len(builder._references._entries) == 10

    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + references._TTL_SECONDS + 1)
    assert get(builder, *OBJECT, client="192.0.2.29").purl is None

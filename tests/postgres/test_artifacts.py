"""Test the artifact table, its views and how redirects pass on the artifact."""

from __future__ import annotations

import hashlib
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from exporter import Settings
from exporter.rows.entry_builder import EntryBuilder
from exporter.settings import RemotesSettings
from exporter.write.database import Database
from tests.support.samples import make_entry, make_exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from exporter import AccessLogEntry

    Query = Callable[..., list[tuple[object, ...]]]


@pytest.fixture
def database(dsn: str) -> Iterator[Database]:
    database = Database(Settings().with_dsn(dsn).database)
    yield database
    database.close()


def fetch(number: int, package: str = "demo", **changes: Any) -> AccessLogEntry:
    """Return the entry of an artifact download."""
    identity = {
        "remote": "pypi",
        "artifact_kind": "artifact",
        "ecosystem": "pypi",
        "package": package,
        "version": "1.0",
        "filename": f"{package}-1.0.whl",
        "purl": f"pkg:pypi/{package}@1.0",
    }
    return make_entry(number, **(identity | changes))


def test_each_fetch_counts_once_if_its_batch_is_sent_again(
    database: Database, query: Query
) -> None:
    batch = [
        fetch(0),
        fetch(1, proxy_user="other"),
        fetch(2, "left"),
        fetch(3, status_code=302, response_bytes=0),
    ]
    for _ in range(3):
        assert database.write(batch) == []
    assert database.write([*batch, fetch(4)]) == []  # partly written before
    bad = fetch(6, port=2**40)
    assert len(database.write([fetch(5), bad, *batch])) == 1  # partly written before, one rejected
    assert query("SELECT purl, remote, first_user, fetches, bytes FROM artifact ORDER BY purl") == [
        ("pkg:pypi/demo@1.0", "pypi", "build-42", 4, 4 * 1234),
        ("pkg:pypi/left@1.0", "pypi", "build-42", 1, 1234),
    ]


def test_special_characters_in_names_are_stored_unchanged(database: Database, query: Query) -> None:
    names = [
        "{",
        "}",
        '"',
        "\\",
        "\\\\",
        "'",
        "''",
        ",",
        "NULL",
        "null",
        " ",
        "caf\u00e9",
        "%s",
        "\n",
        "');--",
    ]
    batch = [
        fetch(number, purl=f"pkg:generic/{name}", proxy_user=name, remote=name)
        for number, name in enumerate(names)
    ]
    without_user = [
        fetch(number, purl=f"pkg:generic/{number}", proxy_user=None) for number in range(100, 3000)
    ]
    assert database.write([*batch, *without_user]) == []  # more than one write holds
    found = query("SELECT first_user, remote, purl FROM artifact WHERE first_user IS NOT NULL")
    assert sorted(found) == sorted((name, name, f"pkg:generic/{name}") for name in names)
    assert query("SELECT count(*) FROM artifact") == [(len(names) + 2900,)]


def test_incomplete_or_failed_downloads_do_not_count_as_fetches(
    database: Database, query: Query
) -> None:
    not_fetched = [
        fetch(1, "head", method="HEAD", response_bytes=0),
        fetch(2, "put", method="PUT"),
        fetch(3, "cut", error_type="upstream_closed"),
        fetch(4, "absent", status_code=404),
    ]
    assert database.write([fetch(0), fetch(5, "part", status_code=206), *not_fetched]) == []
    fetched = [("pkg:pypi/demo@1.0",), ("pkg:pypi/part@1.0",)]
    for table in ("artifact", "access_log_artifacts", "access_log_first_seen"):
        assert query(f"SELECT purl FROM {table} ORDER BY purl") == fetched
    assert query("SELECT purl FROM access_log_redundant") == []


def test_first_user_is_the_earliest_fetch_not_the_first_written(
    database: Database, query: Query
) -> None:
    database.write([fetch(10, proxy_user="late", remote="mirror")])
    database.write([fetch(1, proxy_user="early")])
    database.write([fetch(5, proxy_user="between")])
    (row,) = query("SELECT first_user, remote, fetches, last_seen - first_seen FROM artifact")
    assert row[:3] == ("early", "pypi", 3)
    assert str(row[3]) == "0:00:00.009000"


def test_ten_concurrent_writers_of_the_same_artifacts_do_not_deadlock(
    dsn: str, query: Query
) -> None:
    failures: list[BaseException] = []

    def write(writer: int) -> None:
        database = Database(Settings().with_dsn(dsn).database)
        try:
            for batch in range(20):
                numbers = range(30) if writer % 2 else range(29, -1, -1)
                base = writer * 100_000 + batch * 1000
                database.write([fetch(base + n, f"package-{n}") for n in numbers])
        except BaseException as e:  # noqa: BLE001 - reported by the assertion below
            failures.append(e)
        finally:
            database.close()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert query("SELECT count(*), min(fetches), max(fetches) FROM artifact") == [(30, 200, 200)]
    assert query("SELECT count(*) FROM access_log") == [(6000,)]


def test_redirect_passes_its_artifact_to_the_next_request() -> None:
    builder = EntryBuilder(Settings(node="test"))
    release = make_exchange(
        1,
        host="github.example",
        target=b"/cli/cli/releases/download/v2.35.0/gh_2.35.0.tar.gz",
        status_code=302,
        response_fields=((b"location", b"https://assets.storage.example/1234/abcd?sig=s3cret"),),
    )
    first = builder.build(release)
    second = builder.build(
        make_exchange(
            2, host="assets.storage.example", target=b"/1234/abcd?sig=s3cret", response_fields=()
        )
    )
    other = builder.build(make_exchange(3, host="assets.storage.example", target=b"/1234/other"))
    assert first.purl == second.purl == "pkg:github/cli/cli@v2.35.0"
    assert (second.remote, second.host) == (first.remote, "assets.storage.example")
    assert other.purl is None
    assert "s3cret" not in repr((first, second))


def test_row_names_the_artifact_and_its_cache_status() -> None:
    entry = EntryBuilder(Settings(node="test")).build(
        make_exchange(
            host="files.pythonhosted.example",
            target=b"/packages/aa/bb/cc/requests-2.31.0-py3-none-any.whl",
            response_fields=((b"x-cache", b"HIT from edge"), (b"age", b"75")),
        )
    )
    assert entry[-13:-6] == ("HIT", "x-cache", 75, "pypi", "artifact", "pypi", "requests")
    assert entry[-6:-2] == (
        "2.31.0",
        "requests-2.31.0-py3-none-any.whl",
        "pkg:pypi/requests@2.31.0",
        True,
    )


def test_purl_of_a_tag_contains_the_registry_digest() -> None:
    digest = "sha256:" + "0" * 64
    exchange = make_exchange(
        host="registry-1.docker.example",
        target=b"/v2/library/alpine/manifests/3.18",
        response_fields=((b"docker-content-digest", digest.encode()),),
    )
    entry = EntryBuilder(Settings(node="test")).build(exchange)
    assert entry.purl is not None
    assert digest.replace(":", "%3A") in entry.purl or digest in entry.purl


def test_configured_remotes_take_precedence(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("remotes:\n  - {name: ours, host: wheels.corp.example, format: pypi}\n")
    settings = Settings(node="test", remotes=RemotesSettings(file=str(file)))
    target = b"/any/where/demo-1.0-py3-none-any.whl"
    entry = EntryBuilder(settings).build(make_exchange(host="wheels.corp.example", target=target))
    assert (entry.remote, entry.purl) == ("ours", "pkg:pypi/demo@1.0")


def test_local_response_source_overrides_cache_headers() -> None:
    builder = EntryBuilder(Settings(node="test"))
    fields = ((b"x-cache", b"MISS"),)
    replayed = builder.build(make_exchange(response_source="replay", response_fields=fields))
    assert (replayed.cache_status, replayed.cache_source) == ("HIT", "local")
    from_addon = builder.build(make_exchange(response_source="addon", response_fields=fields))
    assert (from_addon.cache_status, from_addon.cache_source) == (None, None)


def test_each_view_returns_the_expected_rows(database: Database, query: Query) -> None:
    day = "2026-05-04"
    at = [f"{day} 10:{minute:02d}:00.000000+00" for minute in range(10)]
    database.write(
        [
            fetch(
                1,
                started_at=at[0],
                proxy_user="build-1",
                cache_status="MISS",
                cache_source="x-cache",
            ),
            fetch(
                2,
                started_at=at[1],
                proxy_user="build-1",
                cache_status="HIT",
                cache_source="x-cache",
            ),
            fetch(3, started_at=at[2], proxy_user="build-2", status_code=502, error_type="connect"),
            make_entry(
                4,
                started_at=at[3],
                remote="pypi",
                artifact_kind="index",
                package="secret-lib",
                status_code=404,
            ),
            make_entry(5, started_at=at[4], host="odd.example", remote=None, request_bytes=77),
        ]
    )
    assert query(
        "SELECT proxy_user, purl, fetches, bytes, from_cache FROM access_log_artifacts"
    ) == [("build-1", "pkg:pypi/demo@1.0", 2, 2468, True)]
    assert query("SELECT purl, first_user, fetches FROM access_log_first_seen") == [
        ("pkg:pypi/demo@1.0", "build-1", 2)
    ]
    assert query(
        "SELECT remote, cache_source, requests, hits, bytes, hit_bytes FROM access_log_cache"
    ) == [("pypi", "x-cache", 2, 1, 2468, 1234)]
    assert query(
        "SELECT remote, requests, failures, p50_ms FROM access_log_remotes ORDER BY 1"
    ) == [
        ("odd.example", 1, 0, 250.0),
        ("pypi", 4, 1, 250.0),
    ]
    assert query(
        "SELECT host, port, requests, callers, sent_bytes FROM access_log_unknown_hosts"
    ) == [("odd.example", 443, 1, 1, 77)]
    assert query("SELECT remote, package, requests, callers FROM access_log_not_found") == [
        ("pypi", "secret-lib", 1, 1)
    ]
    assert query("SELECT purl, fetches, clients, avoidable_bytes FROM access_log_redundant") == [
        ("pkg:pypi/demo@1.0", 2, 1, 1234)
    ]


def test_every_view_has_a_comment(database: Database, query: Query) -> None:
    database.open()
    views = "SELECT relname FROM pg_class WHERE relkind = 'v' AND relnamespace = current_schema()::regnamespace"
    assert query(f"{views} AND obj_description(oid) IS NULL") == []


def test_only_artifacts_get_a_sha256(database: Database, query: Query) -> None:
    builder = EntryBuilder(Settings(node="test"))
    wheel = {"host": "files.pythonhosted.example", "target": b"/packages/demo-1.0-py3-none-any.whl"}
    digest = hashlib.sha256(b"content")
    database.write(
        [
            builder.build(make_exchange(1, **wheel, body=b"content")),
            builder.build(make_exchange(2, **wheel, sha256=digest.digest())),
            builder.build(make_exchange(3, body=b"content")),
            builder.build(make_exchange(4, **wheel)),
        ]
    )
    assert query("SELECT encode(sha256, 'hex') FROM access_log ORDER BY started_at") == [
        (digest.hexdigest(),),
        (digest.hexdigest(),),
        (None,),
        (None,),
    ]


@pytest.mark.parametrize(
    ("location", "host", "target"),
    [
        ("https://cdn.example/a/b?sig=x", "cdn.example", b"/a/b?sig=x"),
        ("//cdn.example", "cdn.example", b"/"),
        ("../../blob/1", "github.example", b"/cli/cli/releases/blob/1"),
        ("https://CDN.example./a", "cdn.example", b"/a"),
        ("https://cdn.example/a b/\u00e9", "cdn.example", b"/a%20b/%C3%A9"),
        ("https://cdn.example/a%2fb|c", "cdn.example", b"/a%2fb|c"),
        (
            "https://cdn.example/ghp_0123456789abcdefABCD/x",
            "cdn.example",
            b"/ghp_0123456789abcdefABCD/x",
        ),
        ("https://cdn.example/" + "a" * 5000, "cdn.example", b"/" + b"a" * 5000),
    ],
)
def test_redirect_is_recognized_in_any_spelling_of_its_location(
    location: str, host: str, target: bytes
) -> None:
    builder = EntryBuilder(Settings(node="test"))
    release = b"/cli/cli/releases/download/v2.35.0/gh_2.35.0.tar.gz"
    fields = ((b"location", location.encode()),)
    builder.build(
        make_exchange(
            host="github.example", target=release, status_code=302, response_fields=fields
        )
    )
    octets = ((b"content-type", b"application/octet-stream"),)
    followed = make_exchange(host=host, target=target, response_fields=octets)
    assert builder.build(followed).purl == "pkg:github/cli/cli@v2.35.0"
    page = replace(followed, response_fields=((b"content-type", b"Text/HTML; charset=utf-8"),))
    assert builder.build(page).purl is None


def test_location_that_is_not_a_valid_url_is_ignored() -> None:
    builder = EntryBuilder(Settings(node="test"))
    for location in (b"http://[", b"\xff\xfe", b"", b"http://h\x00/"):
        exchange = make_exchange(
            host="github.example",
            target=b"/cli/cli/releases/download/v2.35.0/gh_2.35.0.tar.gz",
            status_code=302,
            response_fields=((b"location", location),),
        )
        assert builder.build(exchange).purl == "pkg:github/cli/cli@v2.35.0"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("/get?id=1", "/get?id=2"),
        ("/ghp_0123456789abcdefABCD", "/ghp_0123456789abcdefABCE"),
        ("/" + "a" * 3000 + "1", "/" + "a" * 3000 + "2"),
    ],
)
def test_redirects_to_similar_locations_are_kept_apart(first: str, second: str) -> None:
    builder = EntryBuilder(Settings(node="test"))
    locations = {"alpha": f"https://cdn.example{first}", "beta": f"https://cdn.example{second}"}
    for name, location in locations.items():
        wheel = f"/packages/aa/bb/{name}-1.0-py3-none-any.whl".encode()
        redirect = make_exchange(
            host="pypi.example",
            target=wheel,
            status_code=302,
            response_fields=((b"location", location.encode()),),
        )
        builder.build(redirect)
    for name, target in (("alpha", first), ("beta", second)):
        followed = make_exchange(host="cdn.example", target=target.encode(), response_fields=())
        assert builder.build(followed).purl == f"pkg:pypi/{name}@1.0"
        assert builder.build(replace(followed, port=8443)).purl is None


def test_overlong_package_name_does_not_lose_the_row_or_its_batch(
    database: Database, query: Query
) -> None:
    rng = random.Random(1)
    builder = EntryBuilder(Settings(node="test"))
    name = "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(900))
    tag = f"/a/b/archive/refs/tags/{name}.tar.gz".encode()
    image = f"/v2/{rng.randbytes(900).hex()}/manifests/latest".encode()
    digest = ((b"docker-content-digest", b"sha256:" + b"0" * 64),)
    exchanges = [
        make_exchange(1, host="github.example", target=tag, status_code=404),
        make_exchange(2, host="ghcr.example", target=image, response_fields=digest),
    ]
    rows = [builder.build(exchange) for exchange in exchanges]
    assert [(row.remote, row.purl, row.version) for row in rows] == [
        ("github", None, None),
        ("ghcr", None, None),
    ]
    assert database.write(rows) == []
    assert query("SELECT count(*) FROM access_log") == [(2,)]

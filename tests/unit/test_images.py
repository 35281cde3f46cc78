"""The requests of an image pull count for the image that the client asked for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from exporter.rows import images
from exporter.rows.entry_builder import EntryBuilder
from exporter.settings import Settings
from tests.support.samples import make_exchange

if TYPE_CHECKING:
    from exporter.rows.entry import AccessLogEntry

INDEX = "sha256:" + "1a" * 32
PLATFORM = "sha256:" + "2b" * 32
OTHER = "sha256:" + "3c" * 32
LAYER = "sha256:" + "4d" * 32
INDEX_TYPE = b"application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = b"application/vnd.docker.distribution.manifest.v2+json"
NAME = "pkg:oci/alpine?repository_url=registry-1.docker.example/library/alpine"


def purl(digest: str, tag: str | None = None) -> str:
    suffix = f"&tag={tag}" if tag else ""
    return NAME.replace("?", f"@{digest}?") + suffix


class Client:
    """Sends requests for one repository from one address."""

    def __init__(self, builder: EntryBuilder, address: str = "192.0.2.7") -> None:
        self.builder = builder
        self.address = address
        self.host = "registry-1.docker.example"

    def manifest(
        self, reference: str, digest: str, media_type: bytes, method: bytes = b"GET"
    ) -> AccessLogEntry:
        """Request a manifest by its tag or digest."""
        fields = ((b"docker-content-digest", digest.encode()), (b"content-type", media_type))
        return self._get(f"manifests/{reference}", fields, method=method)

    def layer(self, status_code: int = 200, location: bytes | None = None) -> AccessLogEntry:
        """Request a layer."""
        fields = ((b"location", location),) if location else ((b"content-type", b"binary"),)
        return self._get(f"blobs/{LAYER}", fields, status_code=status_code)

    def _get(
        self, path: str, fields: tuple[tuple[bytes, bytes], ...], **changes: Any
    ) -> AccessLogEntry:
        exchange = make_exchange(
            host=self.host,
            target=f"/v2/library/alpine/{path}".encode(),
            client=(self.address, 50_000),
            response_fields=fields,
            **changes,
        )
        return self.builder.build(exchange)


@pytest.fixture
def client() -> Client:
    return Client(EntryBuilder(Settings(node="test")))


def test_pull_by_tag_with_several_platforms(client: Client) -> None:
    head = client.manifest("3.18", INDEX, INDEX_TYPE, b"HEAD")
    index = client.manifest(INDEX, INDEX, INDEX_TYPE)
    platform = client.manifest(PLATFORM, PLATFORM, MANIFEST_TYPE)
    layer = client.layer()

    assert [head.purl, index.purl] == [purl(INDEX, "3.18")] * 2
    assert platform.purl == purl(PLATFORM)  # the tag is not this manifest's
    assert (layer.artifact_kind, layer.purl) == ("blob", purl(INDEX, "3.18"))
    assert (layer.ecosystem, layer.package, layer.version) == ("oci", "alpine", INDEX)
    assert layer.artifact_complete is None  # a layer is not a fetch of the image


def test_pull_by_digest(client: Client) -> None:
    assert client.manifest(OTHER, OTHER, MANIFEST_TYPE).purl == purl(OTHER)
    assert client.layer().purl == purl(OTHER)


def test_layer_without_a_manifest_has_no_image(client: Client) -> None:
    assert (client.layer().artifact_kind, client.layer().purl) == ("blob", None)


def test_layers_of_several_images_have_only_the_name(client: Client) -> None:
    client.manifest("3.18", INDEX, INDEX_TYPE, b"HEAD")
    client.manifest("3.19", OTHER, MANIFEST_TYPE, b"HEAD")
    layer = client.layer()

    assert (layer.purl, layer.package, layer.version) == (NAME, "alpine", None)


def test_a_second_manifest_of_an_index_may_be_another_image(client: Client) -> None:
    client.manifest("3.18", INDEX, INDEX_TYPE)
    client.manifest(PLATFORM, PLATFORM, MANIFEST_TYPE)
    client.manifest(OTHER, OTHER, MANIFEST_TYPE)

    assert client.layer().purl == NAME


def test_clients_do_not_share_pulls(client: Client) -> None:
    client.manifest("3.18", INDEX, INDEX_TYPE, b"HEAD")
    other = Client(client.builder, "192.0.2.8")

    assert other.manifest(INDEX, INDEX, INDEX_TYPE).purl == purl(INDEX)
    assert client.manifest(INDEX, INDEX, INDEX_TYPE).purl == purl(INDEX, "3.18")


def test_layer_from_a_cdn_counts_for_the_image(client: Client) -> None:
    client.manifest("3.18", INDEX, INDEX_TYPE)
    client.layer(307, b"https://cdn.example/data?signature=x")
    cdn = client.builder.build(
        make_exchange(host="cdn.example", target=b"/data?signature=x", response_fields=())
    )

    assert (cdn.artifact_kind, cdn.purl) == ("blob", purl(INDEX, "3.18"))


def test_layer_on_an_unknown_host_is_recognized_by_the_manifest(client: Client) -> None:
    client.host = "unknown.example"
    assert client.layer().artifact_kind is None

    client.manifest("3.18", INDEX, INDEX_TYPE)
    layer = client.layer()

    assert (layer.remote, layer.artifact_kind) == ("unknown.example", "blob")
    assert layer.purl == purl(INDEX, "3.18").replace("registry-1.docker.example", client.host)


def test_failed_manifest_starts_no_pull(client: Client) -> None:
    fields = ((b"docker-content-digest", INDEX.encode()),)
    client._get("manifests/3.18", fields, status_code=401)

    assert client.layer().purl is None


def test_pulls_expire(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.manifest("3.18", INDEX, INDEX_TYPE)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + images._TTL_SECONDS + 1)

    assert client.layer().purl is None
    assert client.manifest(INDEX, INDEX, INDEX_TYPE).purl == purl(INDEX)


def test_memory_is_bounded(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_MAX_PULLS", 10)
    for number in range(30):
        Client(client.builder, f"192.0.2.{number}").manifest("3.18", INDEX, INDEX_TYPE)
    for number in range(100):
        digest = f"sha256:{number:064x}"
        client.manifest(f"1.{number}", digest, MANIFEST_TYPE)
        client.manifest(digest, digest, MANIFEST_TYPE)
    pulls = client.builder._images._pulls

    assert len(pulls) == 10
    pull = list(pulls.values())[-1]
    assert max(len(pull.images), len(pull.tags), len(pull.platforms)) <= images._MAX_IMAGES
    assert client.layer().purl == NAME

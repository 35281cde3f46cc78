"""Identify realistic URLs and compare with the known truth. Nothing is downloaded."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packageurl import PackageURL

from exporter.rows.packages.identity import PATH_MAX, UNKNOWN, Identity, Remotes
from exporter.rows.packages.rules import KINDS

DATA = Path(__file__).parents[1] / "data"
REMOTES = Remotes.load()


def rows(name: str) -> list[list[str]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def identify(url: str) -> Identity:
    parts = urlsplit(url)
    return REMOTES.identify(parts.hostname or "", parts.path, scheme=parts.scheme, port=parts.port)


# --- URLs of every ecosystem with their expected identity ---------------------------------------

URLS = [*rows("urls.tsv"), *rows("edges.tsv"), *rows("registries.tsv")]


@pytest.mark.parametrize(("url", "kind", "purl"), URLS)
def test_urls_have_the_expected_identity(url: str, kind: str, purl: str) -> None:
    identity = identify(url)

    assert (identity.artifact_kind or "-", identity.purl or "-") == (kind, purl)


# --- names and versions from lock files and package lists ---------------------------------------

HOSTS = {
    "bioconductor": "bioconductor.example",
    "cargo": "static.crates.example",
    "conda": "conda.anaconda.example",
    "cpan": "www.cpan.example",
    "cran": "cran.r-project.example",
    "deb": "deb.debian.example",
    "gem": "rubygems.example",
    "golang": "proxy.golang.example",
    "hex": "repo.hex.example",
    "maven": "repo1.maven.example",
    "npm": "registry.npmjs.example",
    "nuget": "api.nuget.example",
    "pub": "pub.example",
    "pypi": "files.pythonhosted.example",
}


@pytest.mark.parametrize("ecosystem", sorted(HOSTS))
def test_names_and_versions_of_lock_files_and_lists(ecosystem: str) -> None:
    packages = [row[1:] for row in rows("packages.tsv") if row[0] == ecosystem]
    assert len(packages) >= 40

    for path, package, version in packages:
        identity = REMOTES.identify(HOSTS[ecosystem], path)
        expected = package.lower() if ecosystem in {"npm", "nuget"} else package
        assert identity[2:5] == (ecosystem, expected, version), path


@pytest.mark.parametrize(
    "prefix",
    [
        "nexus.corp.example/repository/{ecosystem}-proxy",
        "corp.jfrog.example/artifactory/{ecosystem}-remote",
        "artifacts.corp.example/api/v1/remote/{ecosystem}",
        "nexus.corp.example/repository/unnamed",
        "artifacts.corp.example/api/v1/remote/unnamed",
    ],
)
def test_mirror_gives_the_same_identity_as_the_registry(prefix: str) -> None:
    for ecosystem, path, _, _ in rows("packages.tsv"):
        name = "debian" if ecosystem == "deb" else ecosystem
        host, _, folder = prefix.format(ecosystem=name).partition("/")
        mirrored = REMOTES.identify(host, f"/{folder}{path.removeprefix('/maven2')}")
        direct = REMOTES.identify(HOSTS[ecosystem], path)

        is_update = re.search(r"\+deb\d+u\d+_", path) is not None
        if ecosystem == "deb" and "unnamed" in prefix and not is_update:  # the vendor is unknown
            assert mirrored[1:7] == ("artifact", None, None, None, direct.filename, None)
        else:
            assert mirrored[1:7] == direct[1:7], path


def test_every_purl_is_canonical() -> None:
    for purl in filter(None, (identify(url).purl for url, _, _ in URLS)):
        canonical = PackageURL.from_string(purl).to_string()
        assert purl.replace("%2F", "/") == canonical  # packageurl does not encode / in a version


def test_columns_agree_with_the_purl() -> None:
    for url, _, purl in URLS:
        if purl != "-":
            parsed, identity = PackageURL.from_string(purl), identify(url)
            name = f"{parsed.namespace}/{parsed.name}" if parsed.namespace else parsed.name
            assert identity[2:5] == (parsed.type, name, parsed.version)


# --- digests from responses ---------------------------------------------------------------------

TAG = ("registry-1.docker.example", "/v2/library/alpine/manifests/3.18")
DIGEST = "sha256:" + "a1" * 32


def test_tag_with_a_digest_is_an_artifact() -> None:
    identity = REMOTES.identify(*TAG, digest=DIGEST)

    assert identity.artifact_kind == "artifact"
    assert identity.version == DIGEST
    assert identity.purl == (
        f"pkg:oci/alpine@{DIGEST}?repository_url=registry-1.docker.example/library/alpine&tag=3.18"
    )


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v2/app/manifests/1", "index"),
        ("/v2/app/manifests/sha256:" + "a1" * 32, "artifact"),
        ("/v2/app/blobs/sha256:" + "a1" * 32, "blob"),
    ],
)
def test_unknown_host_is_a_registry_if_its_response_says_so(path: str, kind: str) -> None:
    host, port = "unknown.example", 5000
    media_type = "application/vnd.oci.image.manifest.v1+json; charset=utf-8"
    assert REMOTES.identify(host, path, port=port) == UNKNOWN
    assert REMOTES.identify(host, path, port=port, content_type="application/json") == UNKNOWN

    found = REMOTES.identify(host, path, port=port, content_type=media_type)
    assert found[:2] == ("unknown.example:5000", kind)
    found = REMOTES.identify(host, path, port=port, digest=DIGEST)
    assert found.artifact_kind == ("artifact" if kind == "index" else kind)
    assert (kind == "blob") is (found.purl is None)
    assert kind == "blob" or "repository_url=unknown.example:5000/app" in (found.purl or "")


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "md5:" + "a" * 32, DIGEST + "?token=x", "x" * 999]
)
def test_invalid_digest_is_ignored(digest: str) -> None:
    assert REMOTES.identify(*TAG, digest=digest) == REMOTES.identify(*TAG)


# --- unknown input, and secrets -----------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["", "/", "*", "/%", "/%zz", "/%00", "/%0a", "/\x00", "/\udcff", "/%ff", "/a\nb", "//"]
)
def test_malformed_path_has_a_remote_and_no_package(path: str) -> None:
    assert REMOTES.identify("files.pythonhosted.example", path) == Identity("pypi")


def test_too_long_path_has_a_remote_and_no_package() -> None:
    path = "/a" * PATH_MAX + "/foo-1.0.tar.gz"

    assert REMOTES.identify("pypi.example", path) == Identity("pypi")


@pytest.mark.parametrize("host", ["", "localhost", "10.0.0.1", "::1", "\udcff.example", "a" * 999])
def test_unknown_host_has_no_identity(host: str) -> None:
    assert REMOTES.identify(host, "/simple/attrs/") == UNKNOWN


def test_password_before_the_host_is_not_in_any_column() -> None:
    identity = REMOTES.identify("user:CANARY@ghcr.example", "/v2/a/manifests/1")

    assert identity.remote == "ghcr"
    assert "CANARY" not in repr(identity)


@given(st.sampled_from([*HOSTS.values(), "ghcr.example", "nexus.example"]), st.text(max_size=80))
def test_any_path_gives_a_known_kind_and_a_valid_purl(host: str, path: str) -> None:
    identity = REMOTES.identify(host, f"/{path}")

    assert identity.artifact_kind in {*KINDS, None}
    assert identity.purl is None or PackageURL.from_string(identity.purl)
    assert (identity.package is None) == (identity.purl is None)


# --- time ---------------------------------------------------------------------------------------

PIECES = ["/", "-", ".", "_", "@", "!", "+", "1", "1.0", "a", "A", "-1", "a-", "a-1", "/a-1.0"]
PIECES += ["/-/", "//", "/v2", "/@v/v1", "/simple", "/manifests/", "/packages/", "%2f", "%C3%A9"]
ENDS = ["", ".whl", ".tar.gz", "-1.0.tgz", ".jar.sha1", "_1_a.deb", "-1-1.x.rpm", ".nupkg", "!"]


def hostile_paths(count: int) -> list[str]:
    """Return repetitions that many patterns almost match, up to about the longest path."""
    rng = random.Random(1)
    paths = []
    for _ in range(count):
        unit = "".join(rng.choices(PIECES, k=rng.choice([1, 2, 3, 7, 40])))
        length = rng.choice([200, 500, 1000, 2000])
        path = f"/{unit * (length // len(unit))}"
        paths.append(path[:length] + rng.choice(ENDS))
    return paths


@pytest.mark.slow
def test_hostile_paths_take_bounded_time() -> None:
    """With backtracking, a single one of the 100,000 paths could take minutes."""
    hosts = [*HOSTS.values(), "charts.example", "github.example", "ghcr.example", "nexus.example"]
    prefixes = {"nexus.example": "/repository/zzz"}
    worst = total = 0.0
    for number, path in enumerate(hostile_paths(100_000)):
        host = hosts[number % len(hosts)]
        started = time.thread_time()
        REMOTES.identify(host, prefixes.get(host, "") + path)
        seconds = time.thread_time() - started
        worst, total = max(worst, seconds), total + seconds

    assert worst < 0.25
    assert total < 60


def test_user_pattern_cannot_backtrack(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        r"""
        formats:
          slow: [{re: '^(?P<name>(?:/?(?:a+)+)+)+$', kind: index, purl: 'pkg:generic/{name}'}]
        remotes: [{name: slow, host: slow.example, format: slow}]
        """
    )
    remotes = Remotes.load(path)
    started = time.thread_time()

    for length in range(1000, 2000, 10):
        assert remotes.identify("slow.example", f"/{'a' * length}!").purl is None

    assert time.thread_time() - started < 5


def test_result_depends_neither_on_order_nor_on_the_cache() -> None:
    urls = [url for url, _, _ in URLS]
    first = [identify(url) for url in urls]
    fresh = Remotes.load()
    parts = [urlsplit(url) for url in reversed(urls)]

    again = [
        fresh.identify(part.hostname or "", part.path, scheme=part.scheme, port=part.port)
        for part in parts
    ]

    assert again[::-1] == first
    assert all(re.fullmatch(r"[a-z-]+#[1-9]\d*", found.rule) for found in first if found.rule)


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("pypi.example", "/simple/aREDACTED/"),
        ("pypi.example", "/packages/source/a/a/aREDACTED-1.0.tar.gz"),
        ("registry.npmjs.example", "/@scope/flaREDACTED/-/flaREDACTED-1.0.0.tgz"),
    ],
)
def test_partly_redacted_name_gives_no_package(host: str, path: str) -> None:
    found = Remotes.load().identify(host, path)
    assert found.remote is not None
    assert found.artifact_kind in {"artifact", "index"}
    assert found[2:7] == (None, None, None, None, None)


def test_redacted_folder_of_the_remote_does_not_matter() -> None:
    path = "/repository/REDACTED-pypi/simple/demo/"
    assert Remotes.load().identify("nexus.example", path).purl == "pkg:pypi/demo"


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("repo1.maven.example", "/maven2/com/google/xx/../guava/guava/1.0/guava-1.0.jar"),
        ("registry-1.docker.example", "/v2/a/xx/../manifests/1.0"),
        ("registry.npmjs.example", "/@acme/a/b/../../tool/-/tool-2.5.0.tgz"),
        ("registry.npmjs.example", "/%2e%2e/tool/-/tool-2.5.0.tgz"),
    ],
)
def test_a_path_that_leaves_its_folders_identifies_no_package(host: str, path: str) -> None:
    identity = Remotes.load().identify(host, path)
    assert (identity.purl, identity.package, identity.artifact_kind) == (None, None, None)


@pytest.mark.parametrize(
    ("host", "path", "purl"),
    [
        ("pypi.example", "/./simple//attrs/", "pkg:pypi/attrs"),
        ("pypi.example", "/%2E/simple/attrs/", "pkg:pypi/attrs"),
        ("registry.npmjs.example", "/@a//b/-/b-1.0.0.tgz", "pkg:npm/%40a/b@1.0.0"),
        ("registry.npmjs.example", "/@a%2f%2fb/-/b-1.0.0.tgz", None),
        ("registry.npmjs.example", "/@a%2f..%2fb/-/b-1.0.0.tgz", None),
        ("registry.npmjs.example", "/a%252db/-/a%252db-1.0.0.tgz", None),
    ],
)
def test_a_path_is_resolved_unless_it_is_ambiguous(host: str, path: str, purl: str | None) -> None:
    assert REMOTES.identify(host, path).purl == purl


@pytest.mark.parametrize(
    ("path", "purl"),
    [
        ("/maven2/org/apache/maven/plugins/maven-metadata.xml", None),
        ("/maven2/org/codehaus/mojo/maven-metadata.xml.sha1", None),
        ("/maven2/org/jacoco/maven-metadata.xml", None),
        ("/maven2/com/github/git-commit-id/maven-metadata.xml", None),
        ("/maven2/com/google/guava/guava/maven-metadata.xml", "pkg:maven/com.google.guava/guava"),
        ("/maven2/com/h2database/h2/maven-metadata.xml", "pkg:maven/com.h2database/h2"),
        ("/maven2/org/slf4j/slf4j-api/maven-metadata.xml", "pkg:maven/org.slf4j/slf4j-api"),
    ],
)
def test_metadata_of_a_maven_group_has_no_package(path: str, purl: str | None) -> None:
    identity = REMOTES.identify("repo1.maven.example", path)

    assert (identity.artifact_kind, identity.purl) == ("index", purl)


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("repo1.maven.example", "/MAVEN2/ORG/SLF4J/SLF4J-API/2.0.9/SLF4J-API-2.0.9.JAR"),
        ("repo1.maven.example", "/MAVEN2/org/slf4j/slf4j-api/2.0.9/slf4j-api-2.0.9.jar"),
        ("repo1.maven.example", "/x/maven2/org/slf4j/slf4j-api/2.0.9/slf4j-api-2.0.9.jar"),
        ("nexus.example", "/repository/maven/mirror/org/a/a-b/1.0/a-b-1.0.jar"),
        ("nexus.example", "/repository/zzz/mirror/public/a/a-b/1.0/a-b-1.0.jar"),
        ("maven.google.example", "/org/guava/1.0/guava-1.0.jar"),
    ],
)
def test_a_folder_before_a_maven_group_is_no_part_of_it(host: str, path: str) -> None:
    assert REMOTES.identify(host, path).purl is None


@pytest.fixture
def whole_mirror(tmp_path: Path) -> Remotes:
    """Remotes with a whole host that mirrors registries of unknown kind."""
    path = tmp_path / "mine.yaml"
    path.write_text("remotes: [{name: mirror, host: mirror.example, format: any}]")
    return Remotes.load(path)


@pytest.mark.parametrize(
    "path",
    [
        "/pub/central/junit/junit/4.13/junit-4.13.jar",
        "/com/org/slf4j/slf4j-api/2.0.9/slf4j-api-2.0.9.jar",
        "/pub/org/slf4j/slf4j-api/1-SNAPSHOT/slf4j-api-1-20260102.030405-6.jar",
        "/pub/org/slf4j/slf4j-api/maven-metadata.xml",
        "/go.d/h.example/a/@v/v1.0.0.zip",
        "/packages/lodash/4.17.21/lodash-4.17.21.tgz",
        "/packages/tool/1.0/tool-1.0.tar.gz",
    ],
)
def test_a_whole_host_of_unknown_kind_gives_no_uncertain_package(
    whole_mirror: Remotes, path: str
) -> None:
    assert whole_mirror.identify("mirror.example", path) == Identity("mirror")


def test_a_whole_host_of_unknown_kind_gives_certain_packages(whole_mirror: Remotes) -> None:
    path = "/any/folder/attrs-23.1.0-py3-none-any.whl"
    assert whole_mirror.identify("mirror.example", path).purl == "pkg:pypi/attrs@23.1.0"


def test_a_slash_in_a_version_is_encoded() -> None:
    for path in (
        "codeload.github.example/a/b/tar.gz/refs/tags/tool/v1.0",
        "github.example/a/b/releases/download/tool/v1.0/x.tgz",
        "github.example/a/b/releases/download/tool%2Fv1.0/x.tgz",
        "github.example/a/b/archive/refs/tags/tool/v1.0.tar.gz",
    ):
        identity = identify(f"https://{path}")
        assert identity.purl == "pkg:github/a/b@tool%2Fv1.0"
        assert identity.version == "tool/v1.0"


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        ("main/d/x.sh", "@main#d/x.sh"),
        ("v1.2/d/x.sh", "@v1.2#d/x.sh"),
        (
            "0123456789abcdef0123456789abcdef01234567/d/x.sh",
            "@0123456789abcdef0123456789abcdef01234567#d/x.sh",
        ),
        ("topic/x.sh", "@topic#x.sh"),
        ("topic/d/x.sh", ""),  # topic, or topic/d
        ("topic%2Fd/x.sh", ""),
        ("release/1.0/d/x.sh", ""),
    ],
)
def test_a_branch_of_a_raw_file_may_contain_a_slash(path: str, rest: str) -> None:
    url = f"https://raw.githubusercontent.example/a/b/{path}"
    assert identify(url).purl == f"pkg:github/a/b{rest}"


# --- ports --------------------------------------------------------------------------------------


@pytest.fixture
def ports(tmp_path: Path) -> Remotes:
    """Remotes that differ in their ports."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        """
        remotes:
          - {name: verdaccio, host: 'localhost:4873', format: npm}
          - {name: images, host: ['localhost:5000', '[::1]:5000'], format: oci}
          - {name: wheels, host: 'localhost:443', format: pypi}
          - {name: gems, host: 'localhost', format: gem}
        """
    )
    return Remotes.load(path)


@pytest.mark.parametrize(
    ("scheme", "port", "remote"),
    [
        ("http", 4873, "verdaccio"),
        ("https", 4873, "verdaccio"),
        ("http", 5000, "images"),
        ("https", 443, "wheels"),
        ("https", None, "wheels"),
        ("http", None, "gems"),
        ("", None, "gems"),
        ("http", 48, "gems"),
        ("http", 48730, "gems"),
    ],
)
def test_registries_on_one_host_differ_by_port(
    ports: Remotes, scheme: str, port: int | None, remote: str
) -> None:
    assert ports.identify("localhost", "/x", scheme=scheme, port=port).remote == remote


def test_ports_of_an_ipv6_address(ports: Remotes) -> None:
    found = ports.identify("::1", "/v2/a/manifests/1", scheme="http", port=5000)

    assert found.purl == "pkg:oci/a?repository_url=%5B::1%5D:5000/a&tag=1"
    assert ports.identify("::1", "/v2/a/manifests/1", scheme="http", port=5001) == UNKNOWN


@pytest.mark.parametrize(
    ("scheme", "port", "url"),
    [
        ("http", 5000, "ghcr.example:5000/a"),
        ("https", 443, "ghcr.example/a"),
        ("http", 80, "ghcr.example/a"),
        ("http", 443, "ghcr.example:443/a"),
        ("", None, "ghcr.example/a"),
    ],
)
def test_repository_url_has_a_port_that_is_not_the_default(
    scheme: str, port: int | None, url: str
) -> None:
    found = REMOTES.identify("ghcr.example", "/v2/a/manifests/1", scheme=scheme, port=port)

    assert found.purl == f"pkg:oci/a?repository_url={url}&tag=1"


def test_a_name_that_starts_with_a_dot_is_not_a_dot_segment() -> None:
    identity = Remotes.load().identify("pypi.example", "/packages/.x/demo-1.0-py3-none-any.whl")
    assert identity.purl == "pkg:pypi/demo@1.0"

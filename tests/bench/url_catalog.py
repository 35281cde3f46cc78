"""Generate the URLs of synthetic traffic: packages of several ecosystems and unknown hosts.

Names and URLs are made up, on hosts that end in `.example`. `configs/remotes.yaml` identifies them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from exporter import Settings, load_remotes

if TYPE_CHECKING:
    import random

NULL = r"\N"
_SECONDS_PER_DAY = 86_400
_EPOCH = 1_704_067_200  # the start of 2024, when every package has its first version
_PACKAGES = 400  # per ecosystem; requests follow Zipf's law: the n-th gets 1/n of the first's share
_OLDER_VERSIONS = 6
_MAX_BYTES = 2_000_000_000


class Ecosystem(NamedTuple):
    """A remote with its URL templates and its behavior. Sizes are medians in bytes."""

    share: float
    agent: str
    artifact: str
    listing: str
    sidecar: str
    size: int
    sidecar_size: int
    head_ms: float
    cache_source: str
    hit_share: float


# In the templates, {n} is the package, {u} the package in a wheel's file name, {a} its first letter,
# {v} the version, {h} a digest of both, and {h2} the digest as a path.
ECOSYSTEMS = (
    Ecosystem(
        share=26,
        agent="npm/10.8.2 node/v20.17.0 linux x64 workspaces/false ci/gitlab",
        artifact="https://nexus.corp.example/repository/npm-proxy/{n}/-/{n}-{v}.tgz",
        listing="https://nexus.corp.example/repository/npm-proxy/{n}",
        sidecar="https://nexus.corp.example/repository/npm-proxy/-/npm/v1/security/advisories/bulk",
        size=42_000,
        sidecar_size=900,
        head_ms=9,
        cache_source="cache-status",
        hit_share=0.86,
    ),
    Ecosystem(
        share=5,
        agent="npm/10.8.2 node/v20.17.0 linux x64 workspaces/false",
        artifact="https://registry.npmjs.example/{n}/-/{n}-{v}.tgz",
        listing="https://registry.npmjs.example/{n}",
        sidecar="https://registry.npmjs.example/-/npm/v1/keys",
        size=42_000,
        sidecar_size=900,
        head_ms=38,
        cache_source="cf-cache-status",
        hit_share=0.93,
    ),
    Ecosystem(
        share=22,
        agent='pip/25.0 {{"ci":true,"cpu":"x86_64","distro":{{"name":"Debian GNU/Linux","version":"12"}}}}',
        artifact="https://files.pythonhosted.example/packages/{h2}/{u}-{v}-py3-none-any.whl",
        listing="https://pypi.example/simple/{n}/",
        sidecar="https://files.pythonhosted.example/packages/{h2}/{u}-{v}-py3-none-any.whl.metadata",
        size=180_000,
        sidecar_size=11_000,
        head_ms=31,
        cache_source="x-cache",
        hit_share=0.95,
    ),
    Ecosystem(
        share=14,
        agent="Debian APT-HTTP/1.3 (2.6.1)",
        artifact="http://deb.debian.example/debian/pool/main/{a}/{n}/{n}_{v}-1_amd64.deb",
        listing="http://deb.debian.example/debian/dists/bookworm/InRelease",
        sidecar="http://deb.debian.example/debian/dists/bookworm/main/binary-amd64/by-hash/SHA256/{h}",
        size=350_000,
        sidecar_size=90_000,
        head_ms=22,
        cache_source="age",
        hit_share=0.8,
    ),
    Ecosystem(
        share=11,
        agent="Apache-Maven/3.9.9 (Java 21.0.4; Linux 6.1.0)",
        artifact="https://repo.maven.apache.example/maven2/org/{n}/{n}/{v}/{n}-{v}.jar",
        listing="https://repo.maven.apache.example/maven2/org/{n}/{n}/maven-metadata.xml",
        sidecar="https://repo.maven.apache.example/maven2/org/{n}/{n}/{v}/{n}-{v}.jar.sha1",
        size=260_000,
        sidecar_size=40,
        head_ms=44,
        cache_source="x-cache",
        hit_share=0.9,
    ),
    Ecosystem(
        share=7,
        agent="Go-http-client/2.0",
        artifact="https://proxy.golang.example/github.com/corp/{n}/@v/v{v}.zip",
        listing="https://proxy.golang.example/github.com/corp/{n}/@v/list",
        sidecar="https://proxy.golang.example/github.com/corp/{n}/@v/v{v}.mod",
        size=210_000,
        sidecar_size=1_200,
        head_ms=27,
        cache_source="age",
        hit_share=0.7,
    ),
    Ecosystem(
        share=5,
        agent="cargo/1.81.0 (2dbb1af80 2024-08-20)",
        artifact="https://static.crates.example/crates/{n}/{n}-{v}.crate",
        listing="https://index.crates.example/{a}/{n}",
        sidecar="https://index.crates.example/config.json",
        size=95_000,
        sidecar_size=700,
        head_ms=25,
        cache_source="x-cache",
        hit_share=0.97,
    ),
    Ecosystem(
        share=4,
        agent="containerd/1.7.22",
        artifact="https://registry-1.docker.example/v2/library/{n}/manifests/{v}",
        listing="https://registry-1.docker.example/v2/library/{n}/tags/list",
        sidecar="https://registry-1.docker.example/v2/library/{n}/blobs/sha256:{h}",
        size=1_600,
        sidecar_size=9_000_000,
        head_ms=60,
        cache_source="cf-cache-status",
        hit_share=0.5,
    ),
    Ecosystem(
        share=2,
        agent="RubyGems/3.5.16 x86_64-linux Ruby/3.3.5",
        artifact="https://rubygems.example/gems/{n}-{v}.gem",
        listing="https://rubygems.example/info/{n}",
        sidecar="https://rubygems.example/versions",
        size=60_000,
        sidecar_size=60_000,
        head_ms=35,
        cache_source="x-cache",
        hit_share=0.9,
    ),
    Ecosystem(
        share=3,
        agent="NuGet .NET Core MSBuild Task/6.11.0 (Linux, Debian 12)",
        artifact="https://api.nuget.example/v3-flatcontainer/{n}/{v}/{n}.{v}.nupkg",
        listing="https://api.nuget.example/v3-flatcontainer/{n}/index.json",
        sidecar="https://api.nuget.example/v3/index.json",
        size=400_000,
        sidecar_size=4_000,
        head_ms=40,
        cache_source="x-cache",
        hit_share=0.85,
    ),
    Ecosystem(
        share=1,
        agent="curl/8.5.0",
        artifact="https://github.example/corp/{n}/releases/download/v{v}/{n}-linux-amd64.tar.gz",
        listing="https://api.github.example/repos/corp/{n}/releases/latest",
        sidecar="https://objects.githubusercontent.example/github-production-release-asset/{h2}/{h}",
        size=0,
        sidecar_size=18_000_000,
        head_ms=80,
        cache_source="",
        hit_share=0.0,
    ),
)
_GITHUB = len(ECOSYSTEMS) - 1

# (URL, share, bytes sent): telemetry of a build, a license server, an address without a name.
_UNKNOWN = (
    ("https://telemetry.vendor.example/v2/events", 50, 2_400),
    ("https://errors.vendor.example/api/4711/envelope/", 20, 9_000),
    ("https://licence.tools.example/check", 15, 300),
    ("http://203.0.113.77:8443/upload", 1, 1_500_000),
    ("https://paste.example/raw/abc", 2, 0),
    ("https://fonts.cdn.example/css2", 12, 0),
)
_INTERNAL_PACKAGES = (
    "corp-billing",
    "corp-auth-client",
    "corp-ui-kit",
    "corp-deploy",
    "corp-secrets",
)
_WORDS = [
    "amber",
    "birch",
    "cobalt",
    "delta",
    "ember",
    "flint",
    "grove",
    "harbor",
    "iris",
    "jade",
    "kestrel",
    "lotus",
    "maple",
    "nova",
    "onyx",
]


class Target(NamedTuple):
    """One URL: its columns as COPY text, and the properties of its responses. Sizes in bytes."""

    request_columns: str  # user_agent to http_version
    failed_tls_columns: str  # the same if the client rejected the proxy's certificate
    identity_columns: str  # remote to purl
    kind: str  # artifact_kind, or redirect, absent, unknown
    remote: str
    purl: str | None
    fetchable: bool  # an artifact, which counts in the table of artifacts once it is complete
    sha256: str
    size: int
    sent: int
    content_type: str
    head_ms: float
    server_ip: str
    tls: str
    cache_source: str
    hit_share: float


class UrlCatalog:
    """Picks random targets. Requests follow Zipf's law, and packages get new versions over time."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._remotes = load_remotes(Settings())
        self._targets: dict[tuple[str, int, int, int], Target] = {}
        self._shares = list(accumulate(e.share for e in ECOSYSTEMS))
        self._unknown_shares = list(accumulate(share for _, share, _ in _UNKNOWN))

    def pick(self, seconds: float) -> Target:
        """Pick a target that is requested at this Unix time."""
        draw = self._rng.random
        kind_draw = draw()
        if kind_draw < 0.025:
            index = bisect(self._unknown_shares, draw() * self._unknown_shares[-1])
            return self._target("unknown", 0, index, 0)
        ecosystem = bisect(self._shares, draw() * self._shares[-1])
        if kind_draw < 0.035:
            return self._target("absent", ecosystem, int(draw() * len(_INTERNAL_PACKAGES)), 0)
        package = int(_PACKAGES ** draw()) - 1
        if kind_draw < 0.33:
            return self._target("index", ecosystem, package, 0)
        version = max(0, _newest(package, seconds) - int(_OLDER_VERSIONS * draw() ** 3))
        return self._target(
            "artifact" if kind_draw < 0.9 else "sidecar", ecosystem, package, version
        )

    def _target(self, kind: str, ecosystem: int, package: int, version: int) -> Target:
        key = kind, ecosystem, package, version
        target = self._targets.get(key)
        if target is None:
            target = self._targets[key] = self._make(kind, ecosystem, package, version)
        return target

    def _make(self, kind: str, index: int, package: int, version: int) -> Target:
        if kind == "unknown":
            url, _, sent = _UNKNOWN[package]
            return self._of_url(url, kind, ECOSYSTEMS[_GITHUB], size=250, sent=sent)
        ecosystem = ECOSYSTEMS[index]
        if kind == "absent":
            name = _INTERNAL_PACKAGES[package]
            url = ecosystem.listing
        else:
            name = f"{_WORDS[package % 15]}-{_WORDS[package // 15 % 15]}{package}"
            url = {
                "artifact": ecosystem.artifact,
                "index": ecosystem.listing,
                "sidecar": ecosystem.sidecar,
            }[kind]
        release = f"{1 + version // 50}.{version // 10 % 5}.{version % 10}"
        artifact_url = _fill(ecosystem.artifact, name, release)
        if index == _GITHUB and kind == "artifact":
            return self._of_url(artifact_url, "redirect", ecosystem, ecosystem.size)
        if (
            index == _GITHUB and kind == "sidecar"
        ):  # the target of the redirect, identified by its source
            return self._of_url(
                _fill(url, name, release),
                "artifact",
                ecosystem,
                self._size(ecosystem.sidecar_size),
                identified_by=artifact_url,
            )
        size = {
            "artifact": ecosystem.size,
            "index": 14_000,
            "sidecar": ecosystem.sidecar_size,
            "absent": 160,
        }[kind]
        return self._of_url(_fill(url, name, release), kind, ecosystem, self._size(size))

    def _size(self, median: int) -> int:
        return min(_MAX_BYTES, int(median * self._rng.lognormvariate(0, 1.2)) + 1)

    def _of_url(
        self,
        url: str,
        kind: str,
        ecosystem: Ecosystem,
        size: int,
        sent: int = 0,
        identified_by: str = "",
    ) -> Target:
        parts = urlsplit(url)
        host = parts.hostname or ""
        source = urlsplit(identified_by or url)
        identity = self._remotes.identify(source.hostname or "", source.path)
        method = "POST" if sent else "GET"
        port = parts.port or (443 if parts.scheme == "https" else 80)
        query = "X-Amz-Signature=REDACTED" if identified_by else NULL
        version = "HTTP/2.0" if parts.scheme == "https" else "HTTP/1.1"
        digest = hashlib.sha256(url.encode()).digest()
        identity_columns = (
            identity.remote,
            identity.artifact_kind,
            identity.ecosystem,
            identity.package,
            identity.version,
            identity.filename,
            identity.purl,
        )
        return Target(
            request_columns="\t".join(
                (
                    ecosystem.agent.format(),
                    method,
                    parts.scheme,
                    host,
                    str(port),
                    parts.path,
                    query,
                    version,
                )
            ),
            failed_tls_columns="\t".join((NULL, NULL, "https", host, str(port), NULL, NULL, NULL)),
            identity_columns="\t".join(
                NULL if value is None else value for value in identity_columns
            ),
            kind=(identity.artifact_kind or "api") if kind in {"artifact", "sidecar"} else kind,
            remote=identity.remote or host,
            purl=identity.purl,
            fetchable=identity.artifact_kind == "artifact" and identity.purl is not None,
            sha256=rf"\\x{digest.hex()}",
            size=size,
            sent=sent,
            content_type="application/json" if kind == "index" else "application/octet-stream",
            head_ms=ecosystem.head_ms,
            server_ip=f"198.51.100.{digest[0] % 32 + 1}",
            tls="TLSv1.3" if parts.scheme == "https" else NULL,
            cache_source=ecosystem.cache_source if identity.remote else "",
            hit_share=ecosystem.hit_share,
        )


def _newest(package: int, seconds: float) -> int:
    """Return the newest version at this Unix time. A package releases every 3 to 61 days."""
    return int(max(0.0, seconds - _EPOCH) / _SECONDS_PER_DAY / (3 + package * 7 % 59))


def _fill(template: str, name: str, version: str) -> str:
    digest = hashlib.sha256(f"{template}{name}{version}".encode()).hexdigest()
    return template.format(
        n=name,
        u=name.replace("-", "_"),
        v=version,
        h=digest,
        h2=f"{digest[:2]}/{digest[2:4]}/{digest[4:]}",
        a=name[0],
    )

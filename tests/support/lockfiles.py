"""Read lock files, and derive the path and the Package URL of each file that they list.

`exporter/lockfiles/` reads the formats that `artifactapi verify` knows; the others are read here. Paths
follow the documentation of each registry, and Package URLs follow purl-spec. Nothing here depends on
`configs/remotes.yaml`, and nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import yaml
from packageurl import PackageURL

from exporter.lockfiles import FORMATS, LockedPackage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class Locked(NamedTuple):
    """One file of a lock file: its path and its package."""

    path: str  # relative to the registry's base
    purl: str  # canonical


class Registry(NamedTuple):
    """A lock file, and the registry that serves its files."""

    file: str  # in tests/data/locks
    read: Callable[[str, str], Iterator[Locked]]  # arguments: text of the file, base
    base: str  # host and folder of the registry
    mirror: str  # name of such a repository in a mirror


def _purl(  # one parameter for each component of a purl
    kind: str,
    namespace: str | None,
    name: str,
    version: str,
    qualifiers: Mapping[str, str] | None = None,
) -> str:
    return PackageURL(kind, namespace, name, version, dict(qualifiers or {})).to_string()


def cargo(text: str, _base: str) -> Iterator[Locked]:
    """Without markers, `dl` means {crate}/{version}/download (Cargo book, "Index Format")."""
    for package in _packages("cargo", text):
        crate = PackageURL.from_string(package.purl)
        path = f"{crate.name}/{crate.version}/download"
        yield Locked(f"/crates/{path}", package.purl)
        yield Locked(f"/crates/{crate.name}/{package.files[0].name}", package.purl)
        yield Locked(f"/api/v1/crates/{path}", package.purl)


def composer_dist(text: str, _base: str) -> Iterator[Locked]:
    """Composer's `dist` is a commit on the source host."""
    for package in _packages("composer", text):
        yield Locked(_path(package), package.aliases[-1])


def composer_mirror(text: str, _base: str) -> Iterator[Locked]:
    """Nexus stores archives as VENDOR/NAME/VERSION/VENDOR-NAME-VERSION.zip."""
    for package in _packages("composer", text):
        purl = PackageURL.from_string(package.purl)
        vendor, name, version = purl.namespace, purl.name, purl.version
        path = f"/{vendor}/{name}/{version}/{vendor}-{name}-{version}.zip"
        yield Locked(path, package.purl)


def conda(text: str, _base: str) -> Iterator[Locked]:
    """conda-lock has the URL of each file."""
    return _with_urls("conda-lock", text)


def cran(text: str, _base: str) -> Iterator[Locked]:
    """CRAN has the newest version in src/contrib and older ones in src/contrib/Archive."""
    for package in json.loads(text)["Packages"].values():
        name, version = package["Package"], package["Version"]
        purl = _purl("cran", None, name, version)
        yield Locked(f"/src/contrib/{name}_{version}.tar.gz", purl)
        yield Locked(f"/src/contrib/Archive/{name}/{name}_{version}.tar.gz", purl)
        yield Locked(f"/bin/windows/contrib/4.3/{name}_{version}.zip", purl)


def deb(text: str, _base: str) -> Iterator[Locked]:
    """Debian's Packages has the path; the file name omits the epoch (policy 5.6.12)."""
    for paragraph in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines())
        version = fields["Version"].partition(":")[2] or fields["Version"]
        arch = {"arch": fields["Architecture"]}
        purl = _purl("deb", "debian", fields["Package"], version, arch)
        yield Locked(f"/debian/{fields['Filename']}", purl)


def apk(text: str, _base: str) -> Iterator[Locked]:
    """Apko's lock file has package, version, architecture and URL."""
    for package in json.loads(text)["contents"]["packages"]:
        arch = {"arch": package["architecture"]}
        purl = _purl("apk", "alpine", package["name"], package["version"], arch)
        yield Locked(urlsplit(package["url"]).path, purl)


def rpm(text: str, _base: str) -> Iterator[Locked]:
    """rpms.lock.yaml has epoch, version and release; the file name omits the epoch."""
    for arch in yaml.safe_load(text)["arches"]:
        for package in arch["packages"]:
            version = package["evr"].rpartition(":")[2]
            purl = _purl("rpm", "fedora", package["name"], version, {"arch": package["arch"]})
            yield Locked(urlsplit(package["url"]).path, purl)


def gem(text: str, _base: str) -> Iterator[Locked]:
    """All gems are in one folder."""
    for package in _packages("bundler", text):
        yield Locked(f"/gems/{package.files[0].name}", package.purl)


def golang(text: str, _base: str) -> Iterator[Locked]:
    """A path has ! and the lower-case letter for a capital (Go modules reference, "GOPROXY protocol")."""
    modules = [line.split()[:2] for line in text.splitlines()]
    archives = [(module, version) for module, version in modules if "/go.mod" not in version]
    for (module, version), package in zip(archives, _packages("go", text), strict=True):
        path, escaped = (
            re.sub("[A-Z]", lambda c: "!" + c[0].lower(), s) for s in (module, version)
        )
        yield Locked(f"/{path}/@v/{escaped}.zip", package.purl)


def hackage(text: str, _base: str) -> Iterator[Locked]:
    """Hackage has the tarball in the folder of the package (Hackage API)."""
    for name, version in re.findall(r"any\.(\S+) ==([\d.]+)", text):
        purl = _purl("hackage", None, name, version)
        yield Locked(f"/package/{name}-{version}/{name}-{version}.tar.gz", purl)


def stack(text: str, _base: str) -> Iterator[Locked]:
    """Stack requests the tarball without the folder of the package."""
    for package in yaml.safe_load(text)["packages"]:
        name, _, version = package["original"]["hackage"].rpartition("-")
        yield Locked(f"/package/{name}-{version}.tar.gz", _purl("hackage", None, name, version))


def helm(text: str, base: str) -> Iterator[Locked]:
    """`helm package` writes NAME-VERSION.tgz; `helm repo index` expects it next to the index."""
    for package in _packages("helm", text):
        chart = PackageURL.from_string(package.purl)
        purl = _purl("helm", None, chart.name, chart.version or "", {"repository_url": base})
        yield Locked(f"/{package.files[0].name}", purl)


def hexpm(text: str, _base: str) -> Iterator[Locked]:
    """Packages of an organization are in /repos/NAME (Hex specifications, "Endpoints")."""
    for package in _packages("mix", text):
        owner = PackageURL.from_string(package.purl).namespace
        folder = f"/repos/{owner}" if owner else ""
        yield Locked(f"{folder}/tarballs/{package.files[0].name}", package.purl)


def maven(text: str, _base: str) -> Iterator[Locked]:
    """GROUP/ARTIFACT/VERSION/ARTIFACT-VERSION[-CLASSIFIER].TYPE (Maven repository layout)."""
    for package in _packages("gradle", text):
        purl = PackageURL.from_string(package.purl)
        group = (purl.namespace or "").replace(".", "/")
        path = f"/{group}/{purl.name}/{purl.version}/{package.files[0].name}"
        yield Locked(path, package.purl)


def npm(text: str, _base: str) -> Iterator[Locked]:
    """The lock file of npm has the URL of each file."""
    return _with_urls("npm", text)


def nuget(text: str, _base: str) -> Iterator[Locked]:
    """NuGet's package content resource uses lower-case names and versions."""
    for package in _packages("nuget", text):
        purl = package.purl.lower()
        name, _, version = purl.rpartition("/")[2].partition("@")
        yield Locked(f"/v3-flatcontainer/{name}/{version}/{name}.{version}.nupkg", purl)


def oci(text: str, base: str) -> Iterator[Locked]:
    """Manifests are pulled by digest (OCI distribution spec, "Pulling manifests")."""
    for image in yaml.safe_load(text)["images"]:
        repository, _, digest = image["image"].partition("/")[2].partition("@")
        name = repository.rpartition("/")[2]
        qualifiers = {"repository_url": f"{base}/{repository}"}
        purl = _purl("oci", None, name, digest, qualifiers)
        yield Locked(f"/v2/{repository}/manifests/{digest}", purl)


def pub(text: str, _base: str) -> Iterator[Locked]:
    """`archive_url` of the Hosted Pub Repository Specification v2, and the older path."""
    for package in _packages("pub", text):
        purl = PackageURL.from_string(package.purl)
        yield Locked(f"/api/archives/{purl.name}-{purl.version}.tar.gz", package.purl)
        yield Locked(f"/packages/{purl.name}/versions/{purl.version}.tar.gz", package.purl)


def pypi(text: str, _base: str) -> Iterator[Locked]:
    """pylock.toml has the URL of each file (PEP 751)."""
    return _with_urls("pylock", text)


def terraform(text: str, _base: str) -> Iterator[Locked]:
    """HOST/NAMESPACE/TYPE and the name of the archive (Provider Network Mirror Protocol)."""
    for package in _packages("terraform", text):
        provider = PackageURL.from_string(package.purl)
        folder = f"/registry.terraform.example/{provider.namespace}/{provider.name}"
        file = f"terraform-provider-{provider.name}_{provider.version}_linux_amd64.zip"
        yield Locked(f"{folder}/{file}", package.purl)


def terraform_release(text: str, _base: str) -> Iterator[Locked]:
    """The registry redirects to these paths for HashiCorp's own providers."""
    for package in _packages("terraform", text):
        provider = PackageURL.from_string(package.purl)
        if provider.namespace == "hashicorp":
            name, version = provider.name, provider.version
            for target in ("linux_amd64", "darwin_arm64", "windows_386"):
                file = f"terraform-provider-{name}_{version}_{target}.zip"
                yield Locked(f"/terraform-provider-{name}/{version}/{file}", package.purl)


def _packages(format_name: str, text: str) -> list[LockedPackage]:
    """Return the packages of a lock file that the product can read."""
    entries = FORMATS[format_name].read(text.encode())
    return [entry for entry in entries if isinstance(entry, LockedPackage)]


def _with_urls(format_name: str, text: str) -> Iterator[Locked]:
    """Yield the files of a lock file that has their URLs."""
    for package in _packages(format_name, text):
        for file in package.files:
            assert file.path
            yield Locked(file.path, package.purl)


def _path(package: LockedPackage) -> str:
    path = package.files[0].path
    assert path
    return path


REGISTRIES = {
    "apk": Registry("apko.lock.json", apk, "dl-cdn.alpinelinux.example", "alpine"),
    "cargo": Registry("Cargo.lock", cargo, "static.crates.example", "cargo"),
    "composer": Registry("composer.lock", composer_mirror, "repo.packagist.example", "composer"),
    "composer-dist": Registry("composer.lock", composer_dist, "api.github.example", "github"),
    "conda": Registry("conda-lock.yml", conda, "conda.anaconda.example", "conda"),
    "cran": Registry("renv.lock", cran, "cran.r-project.example", "cran"),
    "deb": Registry("Packages", deb, "deb.debian.example", "debian"),
    "gem": Registry("Gemfile.lock", gem, "rubygems.example", "rubygems"),
    "golang": Registry("go.sum", golang, "proxy.golang.example", "go"),
    "hackage": Registry("cabal.project.freeze", hackage, "hackage.haskell.example", "hackage"),
    "helm": Registry("Chart.lock", helm, "charts.example/stable", "helm"),
    "hex": Registry("mix.lock", hexpm, "repo.hex.example", "hex"),
    "maven": Registry("verification-metadata.xml", maven, "repo1.maven.example/maven2", "maven"),
    "npm": Registry("npm.lock.json", npm, "registry.npmjs.example", "npm"),
    "nuget": Registry("packages.lock.json", nuget, "api.nuget.example", "nuget"),
    "oci": Registry("images.lock.yml", oci, "registry-1.docker.example", "docker"),
    "pub": Registry("pubspec.lock", pub, "pub.example", "pub"),
    "pypi": Registry("pylock.toml", pypi, "files.pythonhosted.example", "pypi"),
    "rpm": Registry("rpms.lock.yaml", rpm, "dl.fedoraproject.example", "fedora"),
    "stack": Registry("stack.yaml.lock", stack, "hackage.haskell.example", "hackage"),
    "terraform": Registry(
        "terraform.lock.hcl", terraform, "registry.terraform.example", "terraform"
    ),
    "terraform-release": Registry(
        "terraform.lock.hcl", terraform_release, "releases.hashicorp.example", "terraform"
    ),
}

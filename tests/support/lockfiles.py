"""Read lock files, and derive the path and the Package URL of each file that they list.

Paths follow the documentation of each registry, and Package URLs follow purl-spec. Nothing here
depends on `configs/remotes.yaml`, and nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import tomllib
import xml.etree.ElementTree as ET  # parses only our own files
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import yaml
from packageurl import PackageURL

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
    for crate in tomllib.loads(text)["package"]:
        name, version = crate["name"], crate["version"]
        purl = _purl("cargo", None, name, version)
        yield Locked(f"/crates/{name}/{version}/download", purl)
        yield Locked(f"/crates/{name}/{name}-{version}.crate", purl)
        yield Locked(f"/api/v1/crates/{name}/{version}/download", purl)


def composer_dist(text: str, _base: str) -> Iterator[Locked]:
    """Composer's `dist` is a commit on the source host."""
    for package in json.loads(text)["packages"]:
        source = package["source"]
        owner, repository = urlsplit(source["url"]).path.removesuffix(".git").strip("/").split("/")
        purl = _purl("github", owner, repository, source["reference"])
        yield Locked(urlsplit(package["dist"]["url"]).path, purl)


def composer_mirror(text: str, _base: str) -> Iterator[Locked]:
    """Nexus stores archives as VENDOR/NAME/VERSION/VENDOR-NAME-VERSION.zip."""
    for package in json.loads(text)["packages"]:
        (vendor, name), version = package["name"].split("/"), package["version"]
        path = f"/{vendor}/{name}/{version}/{vendor}-{name}-{version}.zip"
        yield Locked(path, _purl("composer", vendor, name, version))


def conda(text: str, _base: str) -> Iterator[Locked]:
    """conda-lock has the URL of each file; its folders are the channel and the subdir."""
    for package in yaml.safe_load(text)["package"]:
        path = urlsplit(package["url"]).path
        folder, _, file = path.rpartition("/")
        channel, _, subdir = folder.rpartition("/")
        kind = "conda" if file.endswith(".conda") else "tar.bz2"
        qualifiers = {
            "build": file.removesuffix(f".{kind}").rpartition("-")[2],
            "channel": channel.partition("/label/")[0].rpartition("/")[2],
            "subdir": subdir,
            "type": kind,
        }
        purl = _purl("conda", None, package["name"], package["version"], qualifiers)
        yield Locked(path, purl)


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
    """In Bundler, the part of a version after the first - is the platform."""
    for name, version, platform in re.findall(
        r"^ {4}(\S+) \(([^-)]+)(?:-(.+))?\)$", text, re.MULTILINE
    ):
        full = "-".join(filter(None, (name, version, platform)))
        qualifiers = {"platform": platform} if platform else {}
        yield Locked(f"/gems/{full}.gem", _purl("gem", None, name, version, qualifiers))


def golang(text: str, _base: str) -> Iterator[Locked]:
    """A path has ! and the lower-case letter for a capital (Go modules reference, "GOPROXY protocol").

    In a purl, namespace and name are in lower case, the version is unchanged (purl-spec, golang).
    """
    for line in text.splitlines():
        module, version, _ = line.split()
        if version.endswith("/go.mod"):
            continue
        path, escaped = (
            re.sub("[A-Z]", lambda c: "!" + c[0].lower(), s) for s in (module, version)
        )
        namespace, _, name = module.lower().rpartition("/")
        purl = _purl("golang", namespace, name, version)
        yield Locked(f"/{path}/@v/{escaped}.zip", purl)


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
    for chart in yaml.safe_load(text)["dependencies"]:
        name, version = chart["name"], chart["version"]
        purl = _purl("helm", None, name, version, {"repository_url": base})
        yield Locked(f"/{name}-{version}.tgz", purl)


def hexpm(text: str, _base: str) -> Iterator[Locked]:
    """Packages of an organization are in /repos/NAME (Hex specifications, "Endpoints")."""
    entry = r'^ +"\w+": \{:hex, :(\w+), "([^"]+)", "[0-9a-f]{64}", .*"(\w+)(?::(\w+))?", "[0-9a-f]{64}"\}'
    for name, version, repository, organization in re.findall(entry, text, re.MULTILINE):
        owner = organization or (None if repository == "hexpm" else repository)
        folder = f"/repos/{owner}" if owner else ""
        yield Locked(f"{folder}/tarballs/{name}-{version}.tar", _purl("hex", owner, name, version))


def maven(text: str, _base: str) -> Iterator[Locked]:
    """GROUP/ARTIFACT/VERSION/ARTIFACT-VERSION[-CLASSIFIER].TYPE (Maven repository layout)."""
    for component in ET.fromstring(text).iter("component"):  # noqa: S314  # our own file
        group, name, version = (component.attrib[key] for key in ("group", "name", "version"))
        folder = f"/{group.replace('.', '/')}/{name}/{version}"
        for artifact in component.iter("artifact"):
            rest = artifact.attrib["name"].removeprefix(f"{name}-{version}")
            classifier, _, extension = rest.removeprefix("-").partition(".")
            qualifiers = {"classifier": classifier, "type": "" if extension == "jar" else extension}
            purl = _purl("maven", group, name, version, qualifiers)
            yield Locked(f"{folder}/{artifact.attrib['name']}", purl)


def npm(text: str, _base: str) -> Iterator[Locked]:
    """The lock file of npm has the URL of each file."""
    for folder, package in json.loads(text)["packages"].items():
        if folder:
            full = folder.removeprefix("node_modules/")
            namespace, _, name = full.rpartition("/")
            purl = _purl("npm", namespace or None, name, package["version"])
            yield Locked(urlsplit(package["resolved"]).path, purl)


def nuget(text: str, _base: str) -> Iterator[Locked]:
    """NuGet's package content resource uses lower-case names and versions."""
    for packages in json.loads(text)["dependencies"].values():
        for name, package in packages.items():
            n, v = name.lower(), package["resolved"].lower()
            yield Locked(f"/v3-flatcontainer/{n}/{v}/{n}.{v}.nupkg", _purl("nuget", None, n, v))


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
    for package in yaml.safe_load(text)["packages"].values():
        if package["source"] == "hosted":
            name, version = package["description"]["name"], package["version"]
            purl = _purl("pub", None, name, version)
            yield Locked(f"/api/archives/{name}-{version}.tar.gz", purl)
            yield Locked(f"/packages/{name}/versions/{version}.tar.gz", purl)


def pypi(text: str, _base: str) -> Iterator[Locked]:
    """pylock.toml has the URL of each file (PEP 751)."""
    for package in tomllib.loads(text)["packages"]:
        purl = _purl("pypi", None, package["name"], package["version"])
        for file in (*package.get("wheels", ()), *filter(None, (package.get("sdist"),))):
            yield Locked(urlsplit(file["url"]).path, purl)


def terraform(text: str, _base: str) -> Iterator[Locked]:
    """HOST/NAMESPACE/TYPE and the name of the archive (Provider Network Mirror Protocol)."""
    for namespace, name, version in _providers(text):
        file = f"terraform-provider-{name}_{version}_linux_amd64.zip"
        purl = _purl("terraform", namespace, name, version)
        yield Locked(f"/registry.terraform.example/{namespace}/{name}/{file}", purl)


def terraform_release(text: str, _base: str) -> Iterator[Locked]:
    """The registry redirects to these paths for HashiCorp's own providers."""
    for namespace, name, version in _providers(text):
        if namespace == "hashicorp":
            purl = _purl("terraform", namespace, name, version)
            for target in ("linux_amd64", "darwin_arm64", "windows_386"):
                file = f"terraform-provider-{name}_{version}_{target}.zip"
                yield Locked(f"/terraform-provider-{name}/{version}/{file}", purl)


def _providers(text: str) -> Iterator[tuple[str, str, str]]:
    entry = r'provider "[^/]+/([^/]+)/([^"]+)" \{\s+version += "([^"]+)"'
    yield from re.findall(entry, text)


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

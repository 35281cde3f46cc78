"""Read lock files of Go, Ruby, PHP, .NET, Gradle, Conda, Dart, Elixir, Terraform and Helm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from exporter.lockfiles import Digest, LockFile, LockFileError, read_lock_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

type Read = Callable[[str, str], LockFile]

A, B = "a" * 64, "b" * 64
INNER = "e" * 64  # a checksum of the files within an archive
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write a lock file and read it."""

    def write_and_read(name: str, text: str) -> LockFile:
        path = tmp_path / name
        path.write_text(text)
        return read_lock_file(path)

    return write_and_read


def purls(lock_file: LockFile) -> list[str]:
    return [package.purl for package in lock_file.packages]


def reasons(lock_file: LockFile) -> dict[str, str]:
    return {each.name: each.reason for each in lock_file.unchecked}


def test_go(read: Read) -> None:
    lock_file = read(
        "go.sum",
        "example.org/Big/Module/v2 v2.0.0+incompatible h1:abc=\n"
        "example.org/Big/Module/v2 v2.0.0+incompatible/go.mod h1:def=\n"
        "example.org/only v1.0.0-20260101000000-abcdefabcdef/go.mod h1:ghi=\n",
    )
    assert purls(lock_file) == ["pkg:golang/example.org/big/module/v2@v2.0.0%2Bincompatible"]
    assert lock_file.packages[0].files[0].digests == (Digest("h1", "abc="),)
    assert lock_file.packages[0].registries == ()


def test_bundler(read: Read) -> None:
    lock_file = read(
        "Gemfile.lock",
        f"""GIT
  remote: https://git.example/tool.git
  revision: 1234
  specs:
    tool (0.1.0)
      rack (>= 2)

PATH
  remote: .
  specs:
    here (0.1.0)

GEM
  remote: https://gems.example/
  remote: https://user:secret@ours.example/
  specs:
    nokogiri (1.15.5-x86_64-linux-gnu)
      racc (~> 1.4)
    rack (3.0.0.rc1)

PLATFORMS
  ruby

DEPENDENCIES
  rack (= 3.0.0.rc1)

CHECKSUMS
  nokogiri (1.15.5-x86_64-linux-gnu) sha256={A}
  rack (3.0.0.rc1) sha256={B}
  here (0.1.0)

BUNDLED WITH
   2.6.0
""",
    )
    nokogiri, rack = lock_file.packages
    assert nokogiri.purl == "pkg:gem/nokogiri@1.15.5?platform=x86_64-linux-gnu"
    assert nokogiri.registries == ("gems.example", "ours.example")
    assert nokogiri.optional == "only for some platforms"
    assert nokogiri.files[0].name == "nokogiri-1.15.5-x86_64-linux-gnu.gem"
    assert nokogiri.files[0].digests == (Digest("sha256", A),)
    assert (rack.purl, rack.files[0].digests) == ("pkg:gem/rack@3.0.0.rc1", (Digest("sha256", B),))
    assert reasons(lock_file) == {"tool": "from git", "here": "from a folder"}


def test_composer(read: Read) -> None:
    lock_file = read(
        "composer.lock",
        """{"packages": [
  {"name": "acme/tool", "version": "v1.2.0",
   "source": {"type": "git", "url": "https://github.example/acme-inc/tool.git", "reference": "COMMIT"},
   "dist": {"type": "zip", "url": "https://api.github.example/repos/acme-inc/tool/zipball/COMMIT",
            "reference": "COMMIT", "shasum": ""}},
  {"name": "acme/here", "version": "dev-main", "dist": {"type": "path", "url": "../here"}},
  {"name": "acme/git", "version": "dev-main", "source": {"type": "git", "url": "x", "reference": "y"}}],
 "packages-dev": [
  {"name": "acme/private", "version": "2.0.0",
   "dist": {"type": "zip", "url": "https://ours.example/dist/acme-private-2.0.0.zip",
            "reference": null, "shasum": "0123456789abcdef0123456789abcdef01234567"}}]}
""".replace("COMMIT", COMMIT),
    )
    tool, private = lock_file.packages
    assert tool.purl == "pkg:composer/acme/tool@v1.2.0"
    assert tool.aliases == ("pkg:composer/acme/tool", f"pkg:github/acme-inc/tool@{COMMIT}")
    assert {file.name for file in tool.files} == {
        f"{COMMIT}.zip",
        f"{COMMIT}.tar",
        "acme-tool-v1.2.0.zip",
    }
    assert tool.registries == ("api.github.example",)
    assert private.optional == "only for development"
    assert private.files[0].digests == (Digest("sha1", COMMIT),)
    assert reasons(lock_file) == {"acme/here": "from a folder", "acme/git": "from git"}


def test_nuget(read: Read) -> None:
    lock_file = read(
        "packages.lock.json",
        """{"version": 2, "dependencies": {"net8.0": {
  "Newtonsoft.Json": {"type": "Direct", "requested": "[13.0.3, )", "resolved": "13.0.3", "contentHash": "abc=="},
  "ours": {"type": "Project", "dependencies": {"x": "1"}}},
 "net8.0/linux-x64": {"Runtime.Linux": {"type": "Transitive", "resolved": "1.0.0"}}}}""",
    )
    assert purls(lock_file) == ["pkg:nuget/Newtonsoft.Json@13.0.3", "pkg:nuget/Runtime.Linux@1.0.0"]
    assert lock_file.packages[0].files[0].digests == (Digest("contentHash", "abc=="),)
    assert reasons(lock_file) == {"ours": "from a folder"}


GRADLE = f"""<?xml version="1.0" encoding="UTF-8"?>
<verification-metadata xmlns="https://schema.gradle.example/dependency-verification">
   <configuration>
      <verify-metadata>true</verify-metadata>
      <trusted-artifacts><trust group="com.acme" name="tool" regex="true"/></trusted-artifacts>
   </configuration>
   <components>
      <component group="org.slf4j" name="slf4j-api" version="2.0.9">
         <artifact name="slf4j-api-2.0.9.jar">
            <sha256 value="{A}" origin="Generated by Gradle"><also-trust value="{B}"/></sha256>
            <pgp value="1234"/>
         </artifact>
         <artifact name="slf4j-api-2.0.9-jdk1.8.tar.gz"><sha512 value="{"c" * 128}"/></artifact>
         <artifact name="slf4j-api-2.0.9.pom"><md5 value="{"d" * 32}"/></artifact>
      </component>
   </components>
</verification-metadata>
"""


def test_gradle(read: Read) -> None:
    lock_file = read("verification-metadata.xml", GRADLE)
    assert purls(lock_file) == [
        "pkg:maven/org.slf4j/slf4j-api@2.0.9",
        "pkg:maven/org.slf4j/slf4j-api@2.0.9?classifier=jdk1.8&type=tar.gz",
        "pkg:maven/org.slf4j/slf4j-api@2.0.9?type=pom",
    ]
    jar, archive, pom = (package.files[0] for package in lock_file.packages)
    assert (jar.name, jar.digests) == (
        "slf4j-api-2.0.9.jar",
        (Digest("sha256", A), Digest("sha256", B)),
    )
    assert archive.digests == (Digest("sha512", "c" * 128),)
    assert pom.digests == (Digest("md5", "d" * 32),)
    assert reasons(lock_file) == {"com.acme:tool:*": "trusted without verification"}


def test_xml_entities_are_rejected(read: Read) -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b SYSTEM "file:///etc/passwd">]><x>&a;&b;</x>'
    with pytest.raises(LockFileError, match=r"has a DOCTYPE, which this format never needs\.$"):
        read("verification-metadata.xml", bomb)
    with pytest.raises(LockFileError, match=r"has the root element 'x', expected 'verification-"):
        read("verification-metadata.xml", "<x/>")


def test_conda_lock(read: Read) -> None:
    lock_file = read(
        "conda-lock.yml",
        f"""
version: 1
metadata: {{channels: [{{url: conda-forge}}]}}
package:
- name: python
  version: 3.10
  manager: conda
  platform: linux-64
  url: https://conda.example/t/secret/conda-forge/label/main/linux-64/python-3.10-h1_0.conda
  hash: {{md5: {"d" * 32}, sha256: {A}}}
- name: six
  version: 1.16.0
  manager: pip
  platform: osx-arm64
  url: https://files.example/six-1.16.0-py3-none-any.whl
  hash: {{sha256: {B}}}
- name: tool
  version: '1'
  manager: pip
  platform: osx-arm64
  url: git+https://git.example/tool@1234
  hash: {{}}
""",
    )
    python, six = lock_file.packages
    assert python.purl == (
        "pkg:conda/python@3.10?build=h1_0&channel=conda-forge&subdir=linux-64&type=conda"
    )
    assert python.files[0].digests == (Digest("md5", "d" * 32), Digest("sha256", A))
    assert (python.registries, python.optional) == (("conda.example",), "for linux-64")
    assert (six.purl, six.registries) == ("pkg:pypi/six@1.16.0", ("files.example",))
    assert reasons(lock_file) == {"tool": "from a folder or from git"}


PIXI_6 = f"""
version: 6
environments:
  default:
    channels: [{{url: https://conda.example/conda-forge/}}]
    packages:
      linux-64:
      - conda: https://conda.example/conda-forge/noarch/tz-2026a-h1_0.conda
      - pypi: https://files.example/six-1.16.0-py3-none-any.whl
      osx-arm64:
      - conda: https://conda.example/conda-forge/noarch/tz-2026a-h1_0.conda
      - pypi: ./here
packages:
- conda: https://conda.example/conda-forge/noarch/tz-2026a-h1_0.conda
  sha256: {A}
  md5: {"d" * 32}
- pypi: https://files.example/six-1.16.0-py3-none-any.whl
  name: six
  version: 1.16.0
  sha256: {B}
- pypi: ./here
  name: here
  version: 0.1.0
"""
PIXI_5 = PIXI_6.replace("version: 6", "version: 5")
for _kind in ("conda", "pypi"):
    _head, _, _tail = PIXI_5.partition("\npackages:\n")
    _tail = _tail.replace(f"- {_kind}: ", f"- kind: {_kind}\n  url: ")
    PIXI_5 = f"{_head}\npackages:\n{_tail}"


@pytest.mark.parametrize("text", [PIXI_5, PIXI_6])
def test_pixi(read: Read, text: str) -> None:
    lock_file = read("pixi.lock", text)
    tz, six = lock_file.packages
    assert tz.purl == "pkg:conda/tz@2026a?build=h1_0&channel=conda-forge&subdir=noarch&type=conda"
    assert tz.files[0].digests == (Digest("sha256", A), Digest("md5", "d" * 32))
    assert tz.optional is None
    assert six.purl == "pkg:pypi/six@1.16.0"
    assert six.optional == "only for some platforms or environments"
    assert reasons(lock_file) == {"here": "from a folder or from git"}


def test_pub(read: Read) -> None:
    lock_file = read(
        "pubspec.lock",
        f"""
packages:
  async:
    dependency: "direct dev"
    description: {{name: async, sha256: "{A}", url: "https://pub.example"}}
    source: hosted
    version: "2.10"
  flutter:
    dependency: "direct main"
    description: flutter
    source: sdk
    version: "0.0.0"
  tool:
    dependency: "direct main"
    description: {{path: ".", ref: main, resolved-ref: "1234", url: "https://git.example/tool"}}
    source: git
    version: "1.0.0"
sdks: {{dart: ">=3.0.0 <4.0.0"}}
""",
    )
    (package,) = lock_file.packages
    assert (package.purl, package.registries) == ("pkg:pub/async@2.10", ("pub.example",))
    assert package.files[0].digests == (Digest("sha256", A),)
    assert package.optional == "only for development"
    assert reasons(lock_file) == {"flutter": "from sdk", "tool": "from git"}


def test_mix(read: Read) -> None:
    lock_file = read(
        "mix.lock",
        f"""%{{
  "bypass": {{:hex, :bypass, "2.1.0", "{INNER}", [:mix], [{{:plug, "~> 1.7", [hex: :plug]}}], "hexpm", "{A}"}},
  "old": {{:hex, :old, "1.0.0", "{INNER}", [:mix], []}},
  "ours": {{:hex, :ours_app, "0.1.0", "{INNER}", [:mix], [], "hexpm:acme", "{B}"}},
  "tool": {{:git, "https://git.example/tool.git", "1234", [branch: "main"]}},
}}
""",
    )
    assert purls(lock_file) == [
        "pkg:hex/bypass@2.1.0",
        "pkg:hex/old@1.0.0",
        "pkg:hex/acme/ours_app@0.1.0",
    ]
    bypass, old, _ = lock_file.packages
    assert bypass.files[0].digests == (Digest("sha256", A),)
    assert bypass.files[0].name == "bypass-2.1.0.tar"
    assert old.files[0].digests == ()
    assert reasons(lock_file) == {"tool": "from git"}


def test_terraform(read: Read) -> None:
    lock_file = read(
        ".terraform.lock.hcl",
        f"""# This file is maintained automatically by "terraform init".
# Manual edits may be lost in future updates.

provider "Registry.example/hashicorp/aws" {{
  version     = "5.31.0"
  constraints = "~> 5.0"
  hashes = [
    "h1:abc=",
    "zh:{A}",
    "zh:{B}",
  ]
}}
""",
    )
    (package,) = lock_file.packages
    assert (package.purl, package.registries) == (
        "pkg:terraform/hashicorp/aws@5.31.0",
        ("registry.example",),
    )
    assert [file.digests for file in package.files] == [
        (Digest("h1", "abc="),),
        (Digest("sha256", A),),
        (Digest("sha256", B),),
    ]


@pytest.mark.parametrize("text", ['provider "a/b/c" {\n', "locals {}\n", 'provider "a/b/c" {\n}\n'])
def test_unusual_terraform_file_is_an_error(read: Read, text: str) -> None:
    with pytest.raises(LockFileError):
        read(".terraform.lock.hcl", text)


def test_helm(read: Read) -> None:
    lock_file = read(
        "Chart.lock",
        """
dependencies:
- {name: redis, repository: "https://charts.example:8443/stable/", version: 1.10.0}
- {name: alias, repository: "@ours", version: 2.0.0}
- {name: image, repository: "oci://images.example/charts", version: 3.0.0}
- {name: here, repository: "file://../here", version: 4.0.0}
digest: sha256:1234
generated: "2026-01-01T00:00:00Z"
""",
    )
    redis, alias = lock_file.packages
    assert redis.purl == "pkg:helm/redis@1.10.0?repository_url=charts.example:8443/stable"
    assert redis.registries == ("charts.example",)
    assert (alias.purl, alias.registries) == ("pkg:helm/alias@2.0.0", ())
    assert reasons(lock_file) == {"image": "from an OCI registry", "here": "from a folder"}

"""Read lock files of every format: packages, hosts, digests, and what comes from no registry."""

from __future__ import annotations

import base64
import itertools
import os
import re
from pathlib import Path
from random import Random

import pytest

from exporter.lockfiles import FORMATS, Digest, LockFile, LockFileError, read_lock_file

pytestmark = pytest.mark.slow

A, B = "a" * 64, "b" * 64
SHA512 = "c" * 128
INTEGRITY = "sha512-" + base64.b64encode(bytes.fromhex(SHA512)).decode()


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return Read(tmp_path)


class Read:
    """Write a lock file and read it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str, text: str | bytes, format_name: str | None = None) -> LockFile:
        """Return what the lock file has."""
        path = self._folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_lock_file(path, format_name)

    def error(self, name: str, text: str | bytes, format_name: str | None = None) -> str:
        """Return the error, without the path."""
        with pytest.raises(LockFileError) as caught:
            self(name, text, format_name)
        sentence = str(caught.value)
        assert sentence.startswith(str(self._folder / name))
        assert sentence.endswith(".")
        assert "\n" not in sentence
        return sentence.removeprefix(f"{self._folder / name} ")


def purls(lock_file: LockFile) -> list[str]:
    return [package.purl for package in lock_file.packages]


def reasons(lock_file: LockFile) -> dict[str, str]:
    return {each.name: each.reason for each in lock_file.unchecked}


# --- Python

PYLOCK = f"""
lock-version = "1.0"
created-by = "hand"
[[packages]]
name = "zope-interface"
version = "6.1"
marker = "python_version < '3.13'"
index = "https://index.example/simple/"
sdist = {{ url = "https://files.example/zope.interface-6.1.tar.gz", hashes = {{ sha256 = "{A}" }} }}
[[packages.wheels]]
url = "https://u:p@Files.Example:8443/w/zope.interface-6.1-py3-none-any.whl?t=1"
hashes = {{ sha256 = "{B}", sha512 = "{SHA512}" }}
[[packages]]
name = "tool"
vcs = {{ type = "git", url = "https://git.example/tool", commit-id = "1234" }}
[[packages]]
name = "here"
directory = {{ path = "." }}
[[packages]]
name = "near"
version = "1"
wheels = [{{ path = "dist/near-1-py3-none-any.whl", hashes = {{ sha256 = "{A}" }} }}]
"""


def test_pylock(read: Read) -> None:
    lock_file = read("pylock.ci.toml", PYLOCK)
    (package,) = lock_file.packages
    assert package.purl == "pkg:pypi/zope-interface@6.1"
    assert package.registries == ("index.example",)
    assert package.optional == "only for some platforms"
    wheel, sdist = package.files
    assert (wheel.name, wheel.host) == ("zope.interface-6.1-py3-none-any.whl", "files.example")
    assert wheel.digests == (Digest("sha256", B), Digest("sha512", SHA512))
    assert (sdist.name, sdist.host) == ("zope.interface-6.1.tar.gz", "files.example")
    assert reasons(lock_file) == {
        "tool": "from git",
        "here": "from a folder",
        "near": "from a folder",
    }


UV = f"""
version = 1
revision = 3
[[package]]
name = "build"
source = {{ virtual = "." }}
[[package]]
name = "demo"
version = "1.0"
source = {{ registry = "https://index.example/simple" }}
resolution-markers = ["sys_platform == 'win32'"]
wheels = [{{ url = "https://files.example/demo-1.0-py3-none-any.whl", hash = "sha256:{B}" }}]
[package.sdist]
url = "https://files.example/demo-1.0.tar.gz"
hash = "sha256:{A}"
size = 9
upload-time = 2026-01-01T00:00:00Z
[[package]]
name = "tool"
version = "2"
source = {{ git = "https://git.example/tool?rev=1#1234" }}
[[package]]
name = "direct"
version = "3"
source = {{ url = "https://dl.example/direct-3-py3-none-any.whl" }}
wheels = [{{ url = "https://dl.example/direct-3-py3-none-any.whl", hash = "sha256:{B}" }}]
[[package]]
name = "flat"
version = "4"
source = {{ registry = "vendor" }}
wheels = [{{ path = "flat-4-py3-none-any.whl" }}]
"""


def test_uv(read: Read) -> None:
    lock_file = read("uv.lock", UV)
    demo, direct = lock_file.packages
    assert (demo.purl, demo.registries) == ("pkg:pypi/demo@1.0", ("index.example",))
    assert demo.optional == "only for some platforms"
    assert [file.name for file in demo.files] == ["demo-1.0-py3-none-any.whl", "demo-1.0.tar.gz"]
    assert {file.host for file in demo.files} == {"files.example"}
    assert [file.digests for file in demo.files] == [(Digest("sha256", B),), (Digest("sha256", A),)]
    assert (direct.purl, direct.registries) == ("pkg:pypi/direct@3", ("dl.example",))
    assert reasons(lock_file) == {
        "build": "from a folder",
        "tool": "from git",
        "flat": "from a folder",
    }


POETRY = f"""
[[package]]
name = "Demo_Package"
version = "1.0"
optional = true
files = [{{file = "demo_package-1.0-py3-none-any.whl", hash = "sha256:{A}"}}]
[[package]]
name = "private"
version = "2"
markers = {{main = "python_version < '3'"}}
files = []
[package.source]
type = "legacy"
url = "https://index.example/simple"
reference = "ours"
[[package]]
name = "tool"
version = "3"
[package.source]
type = "git"
url = "https://git.example/tool"
[[package]]
name = "here"
version = "3"
[package.source]
type = "directory"
url = "."
[metadata]
content-hash = "x"
[metadata.files]
private = [{{file = "private-2.tar.gz", hash = "md5:{"d" * 32}"}}]
"""


def test_poetry(read: Read) -> None:
    lock_file = read("poetry.lock", POETRY)
    demo, private = lock_file.packages
    assert (demo.purl, demo.registries, demo.optional) == (
        "pkg:pypi/demo-package@1.0",
        (),
        "optional",
    )
    assert demo.files[0].name == "demo_package-1.0-py3-none-any.whl"
    assert demo.files[0].host is None
    assert private.registries == ("index.example",)
    assert private.files[0].digests == (Digest("md5", "d" * 32),)
    assert private.optional == "only for some platforms"
    assert reasons(lock_file) == {"tool": "from git", "here": "from a folder"}


def test_pdm(read: Read) -> None:
    text = f"""
    [[package]]
    name = "demo"
    version = "1.0"
    marker = "os_name == 'nt'"
    files = [{{url = "https://files.example/demo-1.0.tar.gz", file = "demo-1.0.tar.gz", hash = "sha256:{A}"}}]
    [[package]]
    name = "tool"
    version = "1.0"
    git = "https://git.example/tool"
    """
    lock_file = read("pdm.lock", text)
    assert purls(lock_file) == ["pkg:pypi/demo@1.0"]
    assert lock_file.packages[0].files[0].host == "files.example"
    assert reasons(lock_file) == {"tool": "from git"}


PIPFILE = """
{"_meta": {"hash": {"sha256": "x"}, "sources": [
   {"name": "main", "url": "https://index.example/simple", "verify_ssl": true},
   {"name": "ours", "url": "https://user:${TOKEN}@ours.example/simple"}]},
 "default": {
   "demo": {"hashes": ["sha256:A1", "sha256:B1"], "index": "ours", "version": "==1.0"},
   "tool": {"git": "https://git.example/tool", "ref": "1234"}},
 "develop": {"extra": {"hashes": [], "version": "==2"},
             "here": {"editable": true, "path": "."},
             "direct": {"file": "https://dl.example/direct.zip"}}}
""".replace("A1", A).replace("B1", B)


def test_pipfile(read: Read) -> None:
    lock_file = read("Pipfile.lock", PIPFILE)
    demo, extra = lock_file.packages
    assert (demo.purl, demo.registries, demo.optional) == (
        "pkg:pypi/demo@1.0",
        ("ours.example",),
        None,
    )
    assert [file.digests for file in demo.files] == [(Digest("sha256", A),), (Digest("sha256", B),)]
    assert extra.registries == ("index.example", "ours.example")
    assert extra.optional == "only in develop"
    assert set(reasons(lock_file)) == {"tool", "here", "direct"}


def test_a_version_that_is_not_locked_is_unchecked(read: Read) -> None:
    lock_file = read("Pipfile.lock", '{"_meta": {}, "default": {"loose": {"version": "*"}}}')
    assert reasons(lock_file) == {"loose": "without one version"}


def test_a_merge_conflict_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "Gemfile.lock"
    path.write_text("GEM\n  specs:\n<<<<<<< HEAD\n    a (1.0)\n=======\n    a (1.1)\n>>>>>>> b\n")
    with pytest.raises(LockFileError, match="has a merge conflict; resolve it first"):
        read_lock_file(path)


REQUIREMENTS = f"""
# made by hand
--index-url https://user:secret@index.example/simple  # comment
--extra-index-url=https://ours.example/simple
-r other.txt
-e ./here
Demo.Package[extra]==1.0 ; python_version < "3.13" \\
    --hash=sha256:{A} \\
    --hash sha256:{B}
    # via something
# a comment ends with a backslash \\
plain===2.0
loose>=3
prefix==3.*
git+https://user:secret@git.example/tool@1234#egg=tool
direct @ https://dl.example/direct-4-py3-none-any.whl#sha256={A}
https://dl.example/bare-5.tar.gz
tool @ git+https://git.example/tool
./wheels/local.whl
"""


def test_requirements(read: Read) -> None:
    lock_file = read("dev-requirements.txt", REQUIREMENTS)
    assert purls(lock_file) == [
        "pkg:pypi/demo-package@1.0",
        "pkg:pypi/plain@2.0",
        "pkg:pypi/direct@4",
        "pkg:pypi/bare@5",
    ]
    demo, plain, direct, bare = lock_file.packages
    assert demo.registries == ("index.example", "ours.example")
    assert [file.digests for file in demo.files] == [(Digest("sha256", A),), (Digest("sha256", B),)]
    assert demo.optional == "only for some platforms"
    assert (plain.files, plain.optional) == ((), None)
    assert direct.files[0].digests == (Digest("sha256", A),)
    assert direct.registries == bare.registries == ("dl.example",)
    assert reasons(lock_file) == {
        "other.txt": "another file; name it too",
        "./here": "from a folder or from git",
        "loose": "without one version",
        "prefix": "without one version",
        "git+https://git.example/tool@1234": "from a folder or from git",
        "tool": "from a folder or from git",
        "./wheels/local.whl": "from a folder or from git",
    }
    assert "secret" not in repr(lock_file)


# --- JavaScript

NPM_1 = """
{"lockfileVersion": 1, "dependencies": {
  "a": {"version": "1.0.0", "resolved": "https://registry.example/a/-/a-1.0.0.tgz", "integrity": "INTEGRITY",
        "dependencies": {"b": {"version": "2.0.0", "dev": true,
           "resolved": "https://registry.example/b/-/b-2.0.0.tgz", "integrity": "sha1-qqqqqqqqqqqqqqqqqqqqqqqqqqo="}}},
  "inner": {"version": "1.0.0", "bundled": true},
  "alias": {"version": "npm:@scope/real@3.0.0", "resolved": false},
  "here": {"version": "file:here"},
  "tool": {"version": "git+ssh://git@git.example/tool.git#1234", "from": "tool@git"},
  "direct": {"version": "https://dl.example/direct.tgz"}}}
""".replace("INTEGRITY", INTEGRITY)

NPM_3 = """
{"lockfileVersion": 3, "packages": {
  "": {"name": "build", "version": "1.0.0"},
  "node_modules/a": {"version": "1.0.0", "resolved":
    "https://registry.example/a/-/a-1.0.0.tgz", "integrity": "INTEGRITY"},
  "node_modules/a/node_modules/@scope/b": {"version": "2.0.0", "optional": true, "os": ["linux"]},
  "node_modules/alias": {"name": "real", "version": "3.0.0", "dev": true,
    "resolved": "https://registry.example/real/-/real-3.0.0.tgz"},
  "node_modules/work": {"resolved": "packages/work", "link": true},
  "packages/work": {"version": "0.0.1"},
  "node_modules/inner": {"version": "1.0.0", "inBundle": true},
  "node_modules/tool": {"version": "1.0.0", "resolved": "git+ssh://git@git.example/tool.git#1234"}}}
""".replace("INTEGRITY", INTEGRITY)


def test_npm_version_1(read: Read) -> None:
    lock_file = read("npm-shrinkwrap.json", NPM_1)
    assert purls(lock_file) == ["pkg:npm/a@1.0.0", "pkg:npm/%40scope/real@3.0.0", "pkg:npm/b@2.0.0"]
    a, real, b = lock_file.packages
    assert a.files[0].digests == (Digest("sha512", SHA512),)
    assert a.registries == ("registry.example",)
    assert (real.registries, real.files[0].name) == ((), "real-3.0.0.tgz")
    assert b.files[0].digests == (Digest("sha1", "aa" * 20),)
    assert b.optional == "only for development"
    assert set(reasons(lock_file)) == {"here", "tool", "direct"}


@pytest.mark.parametrize("version", [2, 3])
def test_npm_versions_2_and_3(read: Read, version: int) -> None:
    text = NPM_3.replace('"lockfileVersion": 3', f'"lockfileVersion": {version}')
    lock_file = read("package-lock.json", text)
    assert purls(lock_file) == ["pkg:npm/a@1.0.0", "pkg:npm/%40scope/b@2.0.0", "pkg:npm/real@3.0.0"]
    a, b, real = lock_file.packages
    assert (a.files[0].name, a.files[0].host) == ("a-1.0.0.tgz", "registry.example")
    assert (b.files[0].name, b.files[0].host, b.optional) == ("b-2.0.0.tgz", None, "optional")
    assert real.optional == "only for development"
    assert set(reasons(lock_file)) == {"work", "tool"}


@pytest.mark.parametrize(
    ("version", "keys"),
    [
        (
            "5.4",
            ("/a/1.0.0", "/@scope/b/2.0.0_peer@1.0.0", "git.example/me/tool/1234", "file:here"),
        ),
        (
            "'6.0'",
            ("/a@1.0.0", "/@scope/b@2.0.0(peer@1.0.0)", "git.example/me/tool/1234", "file:here"),
        ),
        ("'9.0'", ("a@1.0.0", "'@scope/b@2.0.0'", "tool@git.example#1234", "here@file:here")),
    ],
)
def test_pnpm(read: Read, version: str, keys: tuple[str, ...]) -> None:
    a, b, tool, here = keys
    lock_file = read(
        "pnpm-lock.yaml",
        f"""
lockfileVersion: {version}
settings: {{autoInstallPeers: true}}
packages:
  {a}:
    resolution: {{integrity: {INTEGRITY}}}
    dev: true
  {b}:
    resolution: {{integrity: {INTEGRITY}, tarball: https://mirror.example/b/-/b-2.0.0.tgz}}
    os: [linux]
  {tool}:
    resolution: {{type: git, commit: '1234', repo: https://git.example/me/tool}}
  {here}:
    resolution: {{directory: here, type: directory}}
""",
    )
    assert purls(lock_file) == ["pkg:npm/a@1.0.0", "pkg:npm/%40scope/b@2.0.0"]
    first, second = lock_file.packages
    assert first.files[0].digests == (Digest("sha512", SHA512),)
    assert (first.registries, first.files[0].name) == ((), "a-1.0.0.tgz")
    assert first.optional == "only for development"
    assert (second.registries, second.optional) == (("mirror.example",), "only for some platforms")
    assert sorted(reasons(lock_file).values()) == ["from a folder", "from git"]


def test_pnpm_with_a_document_about_itself(read: Read) -> None:
    """Since version 11, pnpm writes its own version and its plugins into a document before the lock file."""
    documents = [
        f"""---
lockfileVersion: '9.0'
packages:
  {name}:
    resolution: {{integrity: {INTEGRITY}}}
"""
        for name in ("pnpm@12.4.0", "a@1.0.0")
    ]
    lock_file = read("pnpm-lock.yaml", "\n".join(documents))
    assert purls(lock_file) == ["pkg:npm/pnpm@12.4.0", "pkg:npm/a@1.0.0"]


def test_yarn_1(read: Read) -> None:
    sha1 = "e" * 40
    lock_file = read(
        "yarn.lock",
        f"""# THIS IS AN AUTOGENERATED FILE.
# yarn lockfile v1


"@scope/b@^2.0.0", "@scope/b@^2.0.1":
  version "2.0.1"
  resolved "https://registry.example/@scope/b/-/b-2.0.1.tgz#{sha1}"
  integrity {INTEGRITY}
  dependencies:
    version "^9.9.9"

a@^1.0.0:
  version "1.0.0"
  resolved "https://registry.example/a/-/a-1.0.0.tgz#{sha1}"

"@acme/c@^1.0.0":
  version "1.0.0"
  resolved "https://npm.pkg.github.example/download/@acme/c/1.0.0/{sha1}#{sha1}"

"alias@npm:real@^3.0.0":
  version "3.0.0"
  resolved "https://registry.example/real/-/real-3.0.0.tgz#{sha1}"

"tool@git+https://git.example/tool":
  version "1.0.0"
  resolved "git+https://git.example/tool#1234"

"tool2@https://git.example/tool2.git":
  version "1.0.0"
  resolved "https://git.example/tool2.git#1234"

"here@file:here":
  version "1.0.0"
""",
    )
    assert purls(lock_file) == [
        "pkg:npm/%40scope/b@2.0.1",
        "pkg:npm/a@1.0.0",
        "pkg:npm/%40acme/c@1.0.0",
        "pkg:npm/real@3.0.0",
    ]
    b, a, *_ = lock_file.packages
    assert b.files[0].digests == (Digest("sha512", SHA512),)
    assert (a.files[0].name, a.files[0].host) == ("a-1.0.0.tgz", "registry.example")
    assert a.files[0].digests == (Digest("sha1", sha1),)
    assert set(reasons(lock_file)) == {"tool", "tool2", "here"}


def test_yarn_berry(read: Read) -> None:
    lock_file = read(
        "yarn.lock",
        f"""
__metadata:
  version: 8
  cacheKey: 10c0

"@scope/b@npm:^2.0.0":
  version: 2.10
  resolution: "@scope/b@npm:2.10"
  checksum: 10c0/{SHA512}
  languageName: node
  linkType: hard

"a@npm:^1.0.0":
  version: 1.0.0
  resolution: "a@npm:1.0.0::__archiveUrl=https%3A%2F%2Fmirror.example%2Fa%2F-%2Fa-1.0.0.tgz"
  conditions: os=linux
  linkType: hard

"a@patch:a@npm%3A^1.0.0#./fix.patch":
  version: 1.0.0
  resolution: "a@patch:a@npm%3A1.0.0#./fix.patch::version=1.0.0"
  linkType: hard

"build@workspace:.":
  version: 0.0.0-use.local
  resolution: "build@workspace:."
  linkType: soft

"tool@https://git.example/tool.git":
  version: 1.0.0
  resolution: "tool@https://git.example/tool.git#commit=1234"
  linkType: hard
""",
    )
    assert purls(lock_file) == ["pkg:npm/%40scope/b@2.10", "pkg:npm/a@1.0.0"]
    b, a = lock_file.packages
    assert b.files[0].digests == (Digest("yarn", SHA512),)
    assert (a.registries, a.optional) == (("mirror.example",), "only for some platforms")
    assert reasons(lock_file) == {"build": "from a folder", "tool": "from git or a URL"}


# --- Rust


def test_cargo(read: Read) -> None:
    lock_file = read(
        "Cargo.lock",
        f"""
version = 4
[[package]]
name = "build"
version = "0.1.0"
[[package]]
name = "demo"
version = "1.0.4+build.5"
source = "registry+https://github.example/rust-lang/crates.example-index"
checksum = "{A}"
[[package]]
name = "ours"
version = "2.0.0"
source = "sparse+https://index.example/api/"
[[package]]
name = "tool"
version = "3.0.0"
source = "git+https://git.example/tool#1234"
[metadata]
"checksum ours 2.0.0 (sparse+https://index.example/api/)" = "{B}"
""",
    )
    demo, ours = lock_file.packages
    assert demo.purl == "pkg:cargo/demo@1.0.4%2Bbuild.5"
    assert (demo.registries, demo.files[0].digests) == (("crates.example",), (Digest("sha256", A),))
    assert (ours.registries, ours.files[0].digests) == (("index.example",), (Digest("sha256", B),))
    assert reasons(lock_file) == {"build": "from a folder", "tool": "from git"}


# --- hostile and broken files

each_format = pytest.mark.parametrize("format_name", FORMATS)


@each_format
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\xff\xfe",
        b"{",
        b"]" * 10_000,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"a: " * 50_000,
        b"- " * 50_000,
        b"{a: " * 50_000,
        b"a = " + b"[" * 100_000,
        b"<a>" * 100_000,
        b'"' * 100_000,
        b"\\\n" * 100_000,
        b" " * 1_000_000,
        b"x" * 1_000_000,
        b"x==1 --hash=" * 100_000,
        b"(" * 100_000,
        b'"a' + b"\\" * 100_000,
        b'{"packages": 1, "dependencies": [], "lockfileVersion": "x", "_meta": null}',
        b"a" + b".a" * 500_000 + b" = 1",
        b'"a" . ' * 100_000 + b"b = 1",
        b"a = " + b"1" * 10_000,
        b"a==1 ; " + b"(" * 100_000 + b"os_name == 'x'",
        b'[[packages]]\nname = "a"\nmarker = "' + b"(" * 100_000 + b"os_name == 'x'\"\n",
        b'package = 3\npackages = "x"\nversion = []\nlock-version = "99"\n',
        b"packages: [1, 2]\nlockfileVersion: []\n__metadata: 1\nb: []\n",
    ],
    ids=itertools.count(),
)
def test_broken_file_gives_one_sentence_or_nothing(
    tmp_path: Path, format_name: str, data: bytes
) -> None:
    path = tmp_path / "lock"
    path.write_bytes(data)
    try:
        lock_file = read_lock_file(path, format_name)
    except LockFileError as e:
        error = str(e)
    else:
        assert lock_file.packages == []
        return
    assert error.startswith(str(path))
    assert error.endswith(".")
    assert "\n" not in error
    assert len(error) < len(str(path)) + 500


def test_yaml_aliases_are_rejected(read: Read) -> None:
    bomb = "a: &a [x]\nb: &b [*a, *a]\nlockfileVersion: '9.0'\n"
    assert read.error("pnpm-lock.yaml", bomb) == "has the YAML alias 'a', expected none."


def test_yaml_scalars_stay_text(read: Read) -> None:
    text = "lockfileVersion: '9.0'\npackages:\n  a@1.10:\n    resolution: {integrity: ''}\n"
    assert purls(read("pnpm-lock.yaml", text)) == ["pkg:npm/a@1.10"]


def test_wrong_type_names_its_place(read: Read) -> None:
    text = '{"lockfileVersion": 3, "packages": {"node_modules/a": {"version": 1}}}'
    error = read.error("package-lock.json", text)
    assert "has an unexpected value (expected" in error
    assert "$.packages" in error


def test_wrong_digest_is_an_error(read: Read) -> None:
    text = "demo==1.0 --hash=sha256:1234\n"
    expected = "has the sha256 digest '1234', expected 64 hex digits."
    assert read.error("requirements.txt", text) == expected


def test_unknown_name_is_an_error_that_lists_the_formats(read: Read) -> None:
    assert "name its format with --format: pylock, uv" in read.error("my.lock", "")
    assert read("my.lock", "", "requirements").packages == []


def test_missing_file_folder_and_pipe_are_errors(tmp_path: Path) -> None:
    with pytest.raises(LockFileError, match=r"cannot be read: No such file or directory\.$"):
        read_lock_file(tmp_path / "uv.lock")
    with pytest.raises(LockFileError, match=r"cannot be read: Is a directory\.$"):
        read_lock_file(tmp_path, "uv")
    os.mkfifo(tmp_path / "poetry.lock")
    with pytest.raises(LockFileError, match=r"is not a regular file\.$"):
        read_lock_file(tmp_path / "poetry.lock")


def test_endless_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "go.sum").symlink_to("/dev/zero")
    with pytest.raises(LockFileError, match=r"is not a regular file\.$"):
        read_lock_file(tmp_path / "go.sum", "npm")


def test_large_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "uv.lock"
    with path.open("wb") as file:
        file.truncate(33 * 1024 * 1024)
    with pytest.raises(LockFileError, match=r"is larger than 32 MiB\.$"):
        read_lock_file(path)


# --- damage

LOCKS = Path(__file__).parents[1] / "data" / "locks"
SAMPLES = {
    "pylock": PYLOCK,
    "uv": UV,
    "poetry": POETRY,
    "pipfile": PIPFILE,
    "requirements": REQUIREMENTS,
    "npm": NPM_3,
    "cargo": "Cargo.lock",
    "go": "go.sum",
    "bundler": "Gemfile.lock",
    "composer": "composer.lock",
    "nuget": "packages.lock.json",
    "gradle": "verification-metadata.xml",
    "conda-lock": "conda-lock.yml",
    "pub": "pubspec.lock",
    "mix": "mix.lock",
    "terraform": "terraform.lock.hcl",
    "helm": "Chart.lock",
}
_VALUES = (
    '""',
    "1",
    "-1",
    "1e999",
    "[]",
    "{}",
    "null",
    "true",
    '"a"',
    '"\\u0000"',
    '"%:/[@"',
    "~",
    "é",
)


def damaged(text: str, random: Random) -> str:
    """Return a text with one to three changes: a value of another type, or characters lost or moved."""
    for _ in range(random.randint(1, 3)):
        start = random.randrange(len(text))
        end = start + random.randint(1, 40)
        values = [found.span() for found in re.finditer(r'"[^"\n]*"|\b\d+\b', text)]
        kind = random.randrange(4)
        if kind == 0 and values:
            start, end = random.choice(values)
            text = text[:start] + random.choice(_VALUES) + text[end:]
        elif kind == 1:
            text = text[:start] + text[end:]
        elif kind == 2:
            text = text[:start] + text[start:end] * 3 + text[end:]
        else:
            text = (
                text[:start] + random.choice("\"'[]{}()<>:,=.\\#@/\n \x00\x1b") + text[start + 1 :]
            )
    return text


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_file_gives_packages_or_one_sentence(tmp_path: Path, name: str) -> None:
    sample = SAMPLES[name]
    is_file = "\n" not in sample
    text = (LOCKS / sample).read_text(encoding="utf-8") if is_file else sample
    path, random, errors = tmp_path / "lock", Random(name), []
    for _ in range(60):
        path.write_text(damaged(text, random), encoding="utf-8")
        try:
            read_lock_file(path, name)
        except LockFileError as e:
            errors.append(str(e).removeprefix(f"{path} "))
    assert errors
    assert [error for error in errors if not re.fullmatch(r"[^\n/]+[^\n]*\.", error)] == []

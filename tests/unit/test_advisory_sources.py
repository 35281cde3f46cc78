"""Advisories and lists are read from files, folders, zip files and pipes, whatever they hold."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from exporter.advisories import limits
from exporter.advisories.limits import SourceError
from exporter.advisories.names import purl_type
from exporter.advisories.sources import SourceReader, total_bytes
from tests.support.wait import eventually

if TYPE_CHECKING:
    from exporter.advisories.sources import SourceSummary

_REMOTES = Path(__file__).parents[2] / "configs" / "remotes.yaml"

_MEBIBYTE = limits.MEBIBYTE


def advisory(number: int = 1, **changes: Any) -> dict[str, Any]:
    affected = {
        "package": {"ecosystem": "npm", "name": "left-pad"},
        "ranges": [{"type": "SEMVER", "events": [{"introduced": "1.0.0"}, {"fixed": "1.3.1"}]}],
    }
    found = {"id": f"TEST-{number}", "modified": "2026-01-01T00:00:00Z", "affected": [affected]}
    return {**found, **changes}


def package(ecosystem: str, name: str, *versions: str, **more: Any) -> dict[str, Any]:
    return {"package": {"ecosystem": ecosystem, "name": name}, "versions": list(versions), **more}


def read(path: Path | str, *, default_type: str | None = None, **options: Any) -> SourceReader:
    reader = SourceReader(default_type=default_type, **options)
    reader.read(str(path))
    return reader


def read_text(tmp_path: Path, name: str, text: str | bytes, **options: Any) -> SourceReader:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(path, **options)


def ids(reader: SourceReader, purl: str) -> list[str]:
    return sorted(match.advisory.id for match in reader.advisories.match(purl))


def verdict(reader: SourceReader, purl: str) -> str:
    return " ".join(match.verdict for match in reader.advisories.match(purl)) or "none"


def counts(summary: SourceSummary) -> tuple[int, int, int]:
    return summary.files, summary.advisories, summary.packages


# --- OSV


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(advisory()),
        json.dumps(advisory(), indent=2),
        "\ufeff" + json.dumps(advisory()),
        "\n\n" + json.dumps(advisory()) + "\n\n",
        json.dumps([advisory()]),
        json.dumps({"vulns": [advisory()]}),
        json.dumps([advisory()], indent=1),
    ],
)
def test_osv_json_in_every_form(tmp_path: Path, text: str) -> None:
    reader = read_text(tmp_path, "a.json", text)
    assert counts(reader.summary) == (1, 1, 1)
    assert ids(reader, "pkg:npm/left-pad@1.3.0") == ["TEST-1"]
    assert ids(reader, "pkg:npm/left-pad@1.3.1") == []


def test_json_lines(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(advisory(number)) for number in range(1, 4))
    reader = read_text(tmp_path, "a.jsonl", text)
    assert counts(reader.summary) == (1, 3, 1)
    assert ids(reader, "pkg:npm/left-pad@1.3.0") == ["TEST-1", "TEST-2", "TEST-3"]


def test_yaml_keeps_versions_as_text(tmp_path: Path) -> None:
    text = """
id: PYSEC-1
modified: 2026-01-01T00:00:00Z
withdrawn:
affected:
- package: {ecosystem: PyPI, name: Demo_Parser}
  ranges:
  - type: ECOSYSTEM
    events:
    - introduced: 1.10
    - fixed: 1.20
  versions: [2.10, 3]
"""
    reader = read_text(tmp_path, "a.yaml", text)
    found = {
        v: verdict(reader, f"pkg:pypi/demo-parser@{v}")
        for v in ("1.1", "1.10", "1.2", "2.1", "2.10", "3.0")
    }
    assert found == {
        "1.1": "none",
        "1.10": "affected",
        "1.2": "none",
        "2.1": "none",
        "2.10": "affected",
        "3.0": "affected",
    }


def test_withdrawn_advisories_are_counted_or_used(tmp_path: Path) -> None:
    text = json.dumps(advisory(withdrawn="2026-02-01T00:00:00Z"))
    reader = read_text(tmp_path, "a.json", text)
    assert reader.summary.skipped == {"withdrawn": 1}
    assert ids(reader, "pkg:npm/left-pad@1.3.0") == []
    reader = read_text(tmp_path, "a.json", text, include_withdrawn=True)
    (match,) = reader.advisories.match("pkg:npm/left-pad@1.3.0")
    assert match.advisory.withdrawn == "2026-02-01T00:00:00Z"


def test_git_ranges_and_unknown_ecosystems_are_counted(tmp_path: Path) -> None:
    git = {"type": "GIT", "repo": "https://git.example/a", "events": [{"introduced": "0"}]}
    affected = [
        package("npm", "only-git", ranges=[git]),
        package("npm", "both", "1.0.0", ranges=[git]),
        {"ranges": [git]},
        package("Linux", "Kernel", "6.1"),
        package(
            "Future", "x", "1", package={"ecosystem": "Future", "name": "x", "purl": "pkg:future/x"}
        ),
    ]
    reader = read_text(tmp_path, "a.json", json.dumps(advisory(affected=affected)))
    assert reader.summary.skipped == {
        "ranges of Git commits": 3,
        "packages of an ecosystem that a proxy does not see": 1,
    }
    assert verdict(reader, "pkg:npm/only-git@1.0.0") == "none"
    assert verdict(reader, "pkg:npm/both@1.0.0") == "affected"
    assert verdict(reader, "pkg:future/x@1") == "affected"


def test_what_an_advisory_does_not_name_is_counted(tmp_path: Path) -> None:
    everything = [{"type": "SEMVER", "events": [{"introduced": "0"}]}]
    affected = [{"ranges": everything}, package("npm", " ", ranges=everything)]
    texts = [json.dumps(advisory(affected=each)) for each in (affected, [], None)]
    reader = read_text(tmp_path, "a.jsonl", "\n".join(texts))
    assert counts(reader.summary) == (1, 0, 0)
    assert reader.summary.skipped == {
        "packages without a valid name": 2,
        "advisories that name no package": 2,
    }


_RUST_SUFFIX = ".io"  # of the host that OSV names the ecosystem after


@pytest.mark.parametrize(
    ("ecosystem", "name", "purl"),
    [
        ("PyPI", "Foo_Bar", "pkg:pypi/foo-bar@1.0"),
        ("npm", "@scope/name", "pkg:npm/%40scope/name@1.0"),
        ("Go", "github.com/BurntSushi/toml", "pkg:golang/github.com/BurntSushi/toml@v1.0"),
        ("Maven", "org.slf4j:slf4j-api", "pkg:maven/org.slf4j/slf4j-api@1.0"),
        ("Maven:https://repo.example/", "a:b", "pkg:maven/a/b@1.0"),
        ("NuGet", "Newtonsoft.Json", "pkg:nuget/Newtonsoft.Json@1.0"),
        ("RubyGems", "rack", "pkg:gem/rack@1.0"),
        (f"crates{_RUST_SUFFIX}", "serde_json", "pkg:cargo/serde_json@1.0"),
        ("Packagist", "Symfony/HTTP-kernel", "pkg:composer/symfony/http-kernel@1.0"),
        ("Debian:12", "curl", "pkg:deb/debian/curl@1.0?arch=amd64"),
        ("Ubuntu:22.04:LTS", "curl", "pkg:deb/ubuntu/curl@1.0?arch=amd64"),
        ("Alpine:v3.20", "busybox", "pkg:apk/alpine/busybox@1.0?arch=x86_64"),
        ("Hex", "phoenix", "pkg:hex/phoenix@1.0"),
        ("Pub", "http_parser", "pkg:pub/http_parser@1.0"),
        ("pip", "Foo_Bar", "pkg:pypi/foo-bar@1.0"),
        ("GitHub Actions", "actions/cache/save", "pkg:github/actions/cache@1.0"),
        ("GitHub Actions", "actions/checkout", "pkg:github/actions/checkout@1.0"),
        ("Hackage", "aeson", "pkg:hackage/aeson@1.0"),
        ("CRAN", "readxl", "pkg:cran/readxl@1.0"),
    ],
)
def test_ecosystems_are_package_url_types(
    tmp_path: Path, ecosystem: str, name: str, purl: str
) -> None:
    affected = [package(ecosystem, name, "1.0")]
    reader = read_text(tmp_path, "a.json", json.dumps(advisory(affected=affected)))
    assert ids(reader, purl) == ["TEST-1"]
    assert ids(reader, purl.replace("1.0", "1.1")) == []


def test_every_type_that_the_log_can_have_is_known() -> None:
    templates = re.findall(r"\bpurl: *'pkg:([a-z]+)/", _REMOTES.read_text(encoding="utf-8"))
    assert len(set(templates)) > 30
    assert [kind for kind in templates if purl_type(kind) != kind] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"summary": "Short\x1b[2J"}, ("Short\x1b[2J", "")),  # made printable where it is shown
        ({"details": "First line\nSecond"}, ("First line", "")),
        ({"summary": "x" * 999}, ("x" * 300, "")),
        ({"severity": [{"type": "CVSS_V3", "score": "CVSS:3.1/AV:N"}]}, ("", "CVSS:3.1/AV:N")),
        ({"database_specific": {"severity": "HIGH"}}, ("", "high")),
        ({"id": "MAL-2026-1"}, ("", "malicious")),
        ({"database_specific": ["odd"], "severity": None, "summary": None}, ("", "")),
    ],
)
def test_summary_and_severity(
    tmp_path: Path, changes: dict[str, Any], expected: tuple[str, str]
) -> None:
    reader = read_text(tmp_path, "a.json", json.dumps(advisory(**changes)))
    (match,) = reader.advisories.match("pkg:npm/left-pad@1.3.0")
    assert (match.advisory.summary, match.advisory.severity) == expected


# --- lists


def test_a_list_of_package_urls(tmp_path: Path) -> None:
    text = """
# from the vendor's post
pkg:npm/left-pad@1.3.0
pkg:npm/%40scope/a@2.0.0   # worm
pkg:pypi/whole
"""
    reader = read_text(tmp_path, "bad.txt", text)
    assert counts(reader.summary) == (1, 1, 3)
    assert ids(reader, "pkg:npm/left-pad@1.3.0") == ["bad.txt"]
    assert ids(reader, "pkg:npm/left-pad@1.3.1") == []
    assert ids(reader, "pkg:npm/%40scope/a@2.0.0") == ["bad.txt"]
    assert ids(reader, "pkg:pypi/whole@9") == ["bad.txt"]


@pytest.mark.parametrize(
    ("default_type", "line", "purls"),
    [
        ("npm", "left-pad@1.3.0", ["pkg:npm/left-pad@1.3.0"]),
        ("npm", "@scope/a@1.3.0, 1.3.1", ["pkg:npm/%40scope/a@1.3.0", "pkg:npm/%40scope/a@1.3.1"]),
        ("npm", "left-pad", ["pkg:npm/left-pad@0.0.1"]),
        ("npm", "@scope/a", ["pkg:npm/%40scope/a@0.0.1"]),
        ("npm", "left-pad (1.3.0, 1.3.1)", ["pkg:npm/left-pad@1.3.1"]),
        ("PyPI", "Demo_Parser==2.4.1", ["pkg:pypi/demo-parser@2.4.1"]),
        ("pip", "demo-parser 2.4", ["pkg:pypi/demo-parser@2.4.0"]),
        ("maven", "org.x:y:1.0", ["pkg:maven/org.x/y@1.0"]),
        ("go", "example.com/a/b@v1.2.3", ["pkg:golang/example.com/a/b@v1.2.3"]),
        ("rust", "a_b@1.0.0", ["pkg:cargo/a-b@1.0.0"]),
        ("npm", "left-pad,1.3.0,1.3.1", ["pkg:npm/left-pad@1.3.0", "pkg:npm/left-pad@1.3.1"]),
        ("npm", '"@scope/a","1.3.0"', ["pkg:npm/%40scope/a@1.3.0"]),
        ("npm", "left-pad\t1.3.0", ["pkg:npm/left-pad@1.3.0"]),
        ("npm", "left-pad\u00a01.3.0", ["pkg:npm/left-pad@1.3.0"]),
        ("npm", "@scope/a: 1.3.0", ["pkg:npm/%40scope/a@1.3.0"]),
        ("npm", "- `left-pad@1.3.0`", ["pkg:npm/left-pad@1.3.0"]),
        ("npm", '  "left-pad": "1.3.0",', ["pkg:npm/left-pad@1.3.0"]),
        ("npm", "npm:@scope/a@1.3.0", ["pkg:npm/%40scope/a@1.3.0"]),
        ("npm", "left-pad@1.3.0 and 1.3.1.", ["pkg:npm/left-pad@1.3.0", "pkg:npm/left-pad@1.3.1"]),
        ("composer", "pkg:composer/a/b@1.x-dev", ["pkg:composer/a/b@1.x-dev"]),
        ("npm", "Package (npm),Versions affected\na,1.3.0", ["pkg:npm/a@1.3.0"]),
        ("npm", "| @scope/a | 1.3.0 |", ["pkg:npm/%40scope/a@1.3.0"]),
        ("npm", "pkg:npm/@scope/a@1.3.0,", ["pkg:npm/%40scope/a@1.3.0"]),
        ("npm", "pkg:npm/a@1.0.0, pkg:npm/b@1.0.0", ["pkg:npm/a@1.0.0", "pkg:npm/b@1.0.0"]),
        ("maven", "org.x:y-z:1.0-rc1", ["pkg:maven/org.x/y-z@1.0-rc1"]),
        ("github", "owner/action/folder@v4", ["pkg:github/owner/action@v4"]),
        ("Debian", "hello@2.10-3", ["pkg:deb/debian/hello@2.10-3"]),
        ("ubuntu", "hello 2.10-3", ["pkg:deb/ubuntu/hello@2.10-3"]),
        ("brew", "hello@2.10", ["pkg:brew/hello@2.10"]),
    ],
)
def test_names_with_versions(
    tmp_path: Path, default_type: str, line: str, purls: list[str]
) -> None:
    reader = read_text(tmp_path, "l.txt", line, default_type=default_type)
    assert [ids(reader, purl) for purl in purls] == [["l.txt"]] * len(purls)
    assert not reader.advisories.match("pkg:npm/other@1.3.0")


@pytest.mark.parametrize(
    "text",
    [
        "Package,Version\nleft-pad,= 1.3.0 || = 1.3.1\n@scope/a,1.0.0\n",
        'package_name,package_versions,sources\nleft-pad,"1.3.0, 1.3.1",blog\n@scope/a,1.0.0,\n',
        "ecosystem;name;affected version(s)\nnpm;left-pad;1.3.0|1.3.1\nnpm;@scope/a;v1.0.0\n",
        "|Package|Version|\n|---|:--|\n| left-pad | 1.3.0, 1.3.1 |\n| `@scope/a` | 1.0.0 |\n",
        'Package,Version\n`left-pad`,"1.3.0\t1.3.1"\nnpm:@scope/a@1.0.0,\n',
        "# list\npurl\tnote\npkg:npm/left-pad@1.3.0\tx\npkg:npm/left-pad@1.3.1\t\npkg:npm/%40scope/a@1.0.0\n",
    ],
)
def test_csv_with_a_header(tmp_path: Path, text: str) -> None:
    reader = read_text(tmp_path, "l.csv", text, default_type="npm")
    assert counts(reader.summary) == (1, 1, 2)
    purls = (
        "left-pad@1.3.0",
        "left-pad@1.3.1",
        "left-pad@1.3.2",
        "%40scope/a@1.0.0",
        "%40scope/a@1.3.0",
    )
    assert [bool(ids(reader, f"pkg:npm/{purl}")) for purl in purls] == [
        True,
        True,
        False,
        True,
        False,
    ]


def test_csv_can_name_advisories(tmp_path: Path) -> None:
    reader = read_text(tmp_path, "l.csv", "id,purl\nMAL-1,pkg:npm/a@1.0.0\nMAL-2,pkg:npm/b@1.0.0\n")
    assert ids(reader, "pkg:npm/a@1.0.0") == ["MAL-1"]
    assert reader.summary.advisories == 2


@pytest.mark.parametrize(
    ("text", "default_type", "message"),
    [
        ("left-pad@1.3.0", None, "l.txt, line 1: the ecosystem of 'left-pad@1.3.0' is not known"),
        ("pkg:npm/a@1\npkg:", None, "l.txt, line 2: 'pkg:' is not a Package URL"),
        ("a@1.0.0\nb@^1.2", "npm", "l.txt, line 2: '^1.2' is a range"),
        # Nothing that was not understood may look like a name or version that nobody fetched.
        ("a@~1.3.0", "npm", "'~1.3.0' is a range"),
        ("a@1.3.x", "npm", "'1.3.x' is a range"),
        ("a@1.2.0-1.4.0", "npm", "'1.2.0-1.4.0' is a range"),
        ("pkg:npm/a@%3E=1.2", None, "'>=1.2' is a range"),
        ("a@1.2.0 - 1.4.0", "npm", "'-' is not an exact version"),
        ("a@latest", "npm", "'latest' is not an exact version"),
        ("a@1.3.0:bad", "npm", "'1.3.0:bad' is not an exact version"),
        ("a@1.3.0\u200b", "npm", "is not an exact version"),
        ("a@1.0.0 b@1.0.0", "npm", "'b@1.0.0' is not an exact version"),
        ("a>=1.2", "npm", "'a>=1.2' is not a package"),
        ("a/1.3.0", "npm", "'a/1.3.0' is not a package"),
        ("a-1.3.0.tgz", "npm", "'a-1.3.0.tgz' is not a package"),
        ("a\u200bb@1.0.0", "npm", "is not a package"),
        ("npm thing,release\na,1.0\n", "npm", "line 1: 'thing' is not an exact version"),
        ("Package,Version\na,1.0, 1.1\n", "npm", "line 2: more cells than the header"),
        ('Package,Version\na,"1.0\n1.1"\n', "npm", "line 2: 'a,\"1.0' has a control character, or"),
        ("a@1.0\rb@1.0", "npm", "has a control character"),
        ("curl@1", "deb", "the type 'deb' names no ecosystem"),
        ("curl@1", "nmp", "the type 'nmp' names no ecosystem"),
        ("Ecosystem,Package\nnode,a\n", None, "l.txt, line 2: the type 'node' names no ecosystem"),
        ("Package,Version\n,1.0\n", "npm", "l.txt, line 2: the name of the package is missing"),
        (b"\xff\xfe\x00a", "npm", "l.txt, line 1: not UTF-8 text"),
        (b"x" * (limits.MAX_LIST_LINE_BYTES + 1), "npm", "line 1: longer than 64 KiB"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, text: str | bytes, default_type: str | None, message: str
) -> None:
    with pytest.raises(SourceError) as caught:
        read_text(tmp_path, "l.txt", text, default_type=default_type)
    assert message in str(caught.value)


# --- folders, zip files, pipes


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_folder_with_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "db"
    (folder / "npm").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.json").write_text("{")
    (folder / "README.md").write_text("# advisories")
    (folder / "package.json").write_text('{"name": "x"}')
    (folder / "config.yaml").write_text("key: value")
    (folder / "npm" / "1.json").write_text(json.dumps(advisory(1)))
    (folder / "npm" / "2.yml").write_text(json.dumps(advisory(2)))
    (folder / "LICENSE.txt").write_text(
        "MIT License\n\nPermission is hereby granted, free of charge"
    )
    (folder / "list.txt").write_text("pkg:npm/tiny-parser@0.9.0\n")
    (folder / "list.csv").write_text("ecosystem,package,version\nnpm,other,1.0.0\n")
    reader = read(folder)
    assert ids(reader, "pkg:npm/left-pad@1.3.0") == ["TEST-1", "TEST-2"]
    assert len(ids(reader, "pkg:npm/tiny-parser@0.9.0")) == 1
    assert len(ids(reader, "pkg:npm/other@1.0.0")) == 1
    assert reader.summary.skipped == {
        "files of other types": 1,
        "text files that are not lists": 1,
        "JSON files of other kinds": 1,
        "YAML files of other kinds": 1,
    }


def test_links_out_of_a_folder_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "1.json").write_text(json.dumps(advisory(1)))
    folder = tmp_path / "db"
    folder.mkdir()
    (folder / "2.json").write_text(json.dumps(advisory(2)))
    (folder / "out.json").symlink_to(outside / "1.json")
    (folder / "dir").symlink_to(outside)
    (folder / "in.json").symlink_to("2.json")
    (folder / "gone.json").symlink_to("nowhere.json")
    os.mkfifo(folder / "pipe.json")
    reader = read(folder)
    assert ids(reader, "pkg:npm/left-pad@1.3.0") == ["TEST-2"]
    assert reader.summary.skipped == {
        "links out of the folder": 1,
        "files that are not regular": 1,
        "links to nothing": 1,
    }


def test_a_zip_file(tmp_path: Path) -> None:
    inner = write_zip(tmp_path / "inner.zip", {"x.json": json.dumps(advisory(9)).encode()})
    members = {f"npm/{n}.json": json.dumps(advisory(n)).encode() for n in (1, 2)}
    members |= {"README.md": b"x", "nested.json": inner.read_bytes()}
    path = write_zip(tmp_path / "all.zip", members)
    reader = read(path)
    assert ids(reader, "pkg:npm/left-pad@1.3.0") == ["TEST-1", "TEST-2"]
    assert reader.summary.skipped == {"files of other types": 1, "zip files in other sources": 1}
    assert total_bytes([str(path)]) == sum(map(len, members.values()))


def test_links_in_a_zip_file_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("a.json")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert read(path).summary.skipped == {"links in a zip file": 1}


@pytest.mark.parametrize("is_zip", [False, True])
def test_standard_input(tmp_path: Path, *, is_zip: bool) -> None:
    data = json.dumps(advisory()).encode()
    if is_zip:
        data = write_zip(tmp_path / "a.zip", {"1.json": data}).read_bytes()
    reader = SourceReader()
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as out:
        out.write(data)
    with os.fdopen(read_end, "rb") as stdin:
        reader.read("-", stdin)
    assert ids(reader, "pkg:npm/left-pad@1.3.0") == ["TEST-1"]
    assert total_bytes(["-"]) is None


def test_a_named_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    keep_open = os.open(pipe, os.O_RDWR)  # so that opening does not wait for the other side
    write_end = os.open(pipe, os.O_WRONLY)
    os.write(write_end, json.dumps(advisory()).encode())
    assert total_bytes([str(pipe)]) is None
    reader = SourceReader()
    thread = threading.Thread(target=reader.read, args=(str(pipe),))
    thread.start()
    eventually(lambda: reader.summary.files == 1)
    os.close(write_end)
    os.close(keep_open)
    thread.join(10)
    assert ids(reader, "pkg:npm/left-pad@1.3.0") == ["TEST-1"]


# --- hostile sources


def test_a_zip_bomb_is_rejected(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bomb.zip", {"a.json": b'{"id": "' + b"0" * (20 * _MEBIBYTE)})
    with pytest.raises(SourceError, match=r"bomb.zip, 'a.json': unpacks to more than 200 times"):
        read(path)


def test_a_zip_whose_sizes_lie_is_rejected(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "lie.zip", {"a.json": b'{"id": "' + b"0" * (2 * _MEBIBYTE)})
    data = bytearray(path.read_bytes())
    size = (8 + 2 * _MEBIBYTE).to_bytes(4, "little")
    while (at := data.find(size)) >= 0:
        data[at : at + 4] = (100).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"lie\.zip"):
        read(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", b'{"id": "x", "affected": ' + b"[" * 1_000_000, "nested too deeply"),
        ("a.json", b"[" * 1_000_000, "nested too deeply"),
        (
            "a.json",
            b'{"id": "x", "database_specific": ' + b'{"a":' * 1_000_000,
            "nested too deeply",
        ),
        ("a.json", b'{"id": "x", "affected": 7}', "not a valid document"),
        ("a.json", b'{"id": "x", "affected": [], "summary": "\xff"}', "not a valid document"),
        ("a.json", b'{"id": "x"', "not a valid document"),
        ("a.json", b'{"name": "not an advisory"}', "neither an OSV advisory nor an SBOM"),
        # libyaml has a limit as well; which of them is reached first depends on its version.
        ("a.yaml", b"id: x\naffected: " + b"[" * 100_000, "a.yaml: "),
        ("a.yaml", b"id: x\naffected: " + b"[" * 60 + b"]" * 60, "nested too deeply"),
        ("a.yaml", b"id: &a x\naffected: [*a, *a]", "aliases are not allowed"),
        (
            "a.yaml",
            b"id: !!python/object/apply:os.system [id]\naffected: []",
            "not a valid document",
        ),
        ("a.yaml", b"key: value", "neither an OSV advisory nor SPDX"),
        ("a.zip", b"PK\x03\x04 and nothing else", "not a valid zip file"),
    ],
    ids=itertools.count(),
)
def test_a_hostile_document_is_one_clear_error(
    tmp_path: Path, name: str, text: bytes, message: str
) -> None:
    with pytest.raises(SourceError) as caught:
        read_text(tmp_path, name, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.slow
def test_a_line_of_100_megabytes_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="a line is longer than 64 MiB;"):
        read_text(tmp_path, "a.jsonl", b'{"id": "' + b"0" * 100_000_000)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = "\n".join(f"pkg:npm/a{number}@1.0.0" for number in range(20))
    monkeypatch.setattr(limits, "MAX_PACKAGES", 10)
    with pytest.raises(SourceError, match="name more than 10 packages"):
        read_text(tmp_path, "l.txt", many)
    monkeypatch.setattr(limits, "MAX_TOTAL_BYTES", 100)
    with pytest.raises(SourceError, match="hold more than"):
        read_text(tmp_path, "l.txt", many)
    monkeypatch.setattr(limits, "MAX_DOCUMENT_BYTES", 50)
    with pytest.raises(SourceError, match="a document is larger than"):
        read_text(tmp_path, "a.json", "{\n" + " \n" * 40)


@pytest.mark.parametrize("source", ["nowhere.json", "/dev/null/x", "-"])
def test_a_missing_source_is_named(source: str) -> None:
    with pytest.raises(SourceError, match=r"no such file or folder|no standard input"):
        read(source)


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[int] = []
    text = "\n".join(json.dumps(advisory(n, details="x" * 100_000)) for n in range(100))
    read_text(tmp_path, "a.jsonl", text, on_progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) > 1


def test_an_empty_source_names_nothing() -> None:
    reader = SourceReader()
    reader.read("-", io.BufferedReader(io.BytesIO()))
    assert counts(reader.summary) == (1, 0, 0)

"""Files of remotes: how they extend the shipped one, and the messages for errors in them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from exporter.rows.packages.identity import SHIPPED, Remotes, RemotesError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def write_remotes(tmp_path: Path) -> Callable[[str], Path]:
    """Write a user's file of remotes and return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# content of the file, line of the error, part of the message
ERRORS = [
    ("formats: [", 1, "is not valid YAML"),
    ("- formats", 1, "the file must be a mapping"),
    ("formats: {}\nformat: {}", 2, "the file has the key format, expected one of formats, remotes"),
    ("formats: {}\nformats: {}", 2, "the file has the key formats twice"),
    ("formats: []", 1, "formats must be a mapping"),
    ("remotes: {}", 1, "remotes must be a list"),
    ("formats:\n  any:\n    - {re: a, kind: api}", 3, "the format name any is reserved"),
    ("formats:\n  mine: {re: a}", 2, "format mine must be a list"),
    ("formats:\n  mine: []", 2, "format mine has no rules"),
    ("formats:\n  mine: theirs", 2, "format mine refers to theirs, expected the name of a format"),
    ("formats:\n  mine: go", 2, "format mine refers to go, expected the name of a format"),
    ("formats:\n  mine:\n    - {kind: api}", 3, "rule mine#1 is missing re"),
    ("formats:\n  mine:\n    - {re: a, kind: api}\n    - re: b", 4, "rule mine#2 is missing kind"),
    ("formats:\n  mine:\n    - {re: a, kind: api, name: b}", 3, "rule mine#1 has the key name"),
    ("formats:\n  mine:\n    - {re: a, kind: files}", 3, "rule mine#1 has the kind files"),
    ("formats:\n  mine:\n    - {re: a, kind: api, any: maybe}", 3, "rule mine#1 has any: maybe"),
    (
        "formats:\n  mine:\n    - {re: [a], kind: api}",
        3,
        "re of rule mine#1 must be a non-empty string",
    ),
    ("formats:\n  mine:\n    - {re: '(a', kind: api}", 3, "missing ): (a"),
    ("formats:\n  mine:\n    - {re: '(?=a)', kind: api}", 3, "invalid perl operator"),
    ("formats:\n  mine:\n    - {re: '(?P<a>b)(?P=a)', kind: api}", 3, "invalid perl operator"),
    ("formats:\n  mine:\n    - {re: '(((a{99}){99}){99})', kind: api}", 3, "invalid pattern"),
    (
        "formats:\n  mine:\n    - {re: '(?P<name>a)', kind: index, purl: 'pkg:npm/{nam}'}",
        3,
        "purl of rule mine#1 uses {nam}, which is not a group of its pattern",
    ),
    (
        "formats:\n  mine:\n    - {re: '(?P<name>a)', kind: index, purl: 'npm/{name}'}",
        3,
        "purl of rule mine#1 is not valid: it does not start with pkg:",
    ),
    ("formats:\n  mine:\n    - {re: a, kind: index, purl: 'pkg:npm'}", 3, "it has no name"),
    (
        "formats:\n  mine:\n    - {re: a, kind: index, purl: 'pkg:/a'}",
        3,
        "it has no valid type after pkg:",
    ),
    ("formats:\n  mine:\n    - {re: a, kind: index, purl: 'pkg:npm/a?1=b'}", 3, "qualifier"),
    ("formats:\n  mine:\n    - {re: a, kind: index, purl: 'pkg:npm/{a'}", 3, "unbalanced brace"),
    ("formats:\n  mine:\n    - {re: a, kind: index, purl: 'pkg:npm/{A b}'}", 3, "{A b}"),
    (
        "formats:\n  mine:\n    - {re: '(?P<a>b)', kind: index, purl: 'pkg:npm/{a|upper}'}",
        3,
        "the filter upper, expected one of commit, dots, gomod, lower, notjar, pep503",
    ),
    (
        "formats:\n  mine:\n    - {re: '(?P<a>b)', kind: api, then: {group: b, re: c}}",
        3,
        "then of rule mine#1 uses {b}, which is not a group of its pattern (a)",
    ),
    (
        "formats:\n  it:\n    - {re: '(?P<a>b)', kind: api, then: {group: a, after: '{c}', re: d}}",
        3,
        "then of rule it#1 uses {c}",
    ),
    (
        "formats:\n  mine:\n    - {re: a, kind: api, then: {re: c}}",
        3,
        "then of rule mine#1 is missing",
    ),
    ("formats:\n  mine:\n    - {re: '(?P<a>b)', kind: api, then: {group: a, re: '['}}", 3, "then"),
    ("remotes:\n  - {name: a}", 2, "a remote is missing host"),
    ("remotes:\n  - {host: a}", 2, "a remote is missing name"),
    ("remotes:\n  - {name: a, host: b, url: c}", 2, "a remote has the key url"),
    ("remotes:\n  - {name: a, host: b}\n  - {name: a, host: c}", 3, "remote a is defined twice"),
    ("remotes:\n  - {name: a, host: b, format: c}", 2, "remote a has the format c, expected one"),
    (
        "remotes:\n  - {name: a, host: b/c}",
        2,
        "remote a has the host 'b/c', expected a lower-case name",
    ),
    ("remotes:\n  - {name: a, host: ['b', 'c d']}", 2, "remote a has the host 'c d'"),
    ("remotes:\n  - {name: a, host: 'b:0'}", 2, "remote a has the host 'b:0', expected a port"),
    ("remotes:\n  - {name: a, host: 'b:65536'}", 2, "expected a port from 1 to 65535"),
    ("remotes:\n  - {name: a, host: 'x:1:2'}", 2, "remote a has the host 'x:1:2'"),
    ("remotes:\n  - {name: a, host: 'b:*'}", 2, "remote a has the host 'b:*'"),
    ("formats:\n  mine:\n    - {re: '%{x}', kind: api}", 3, "uses %{x}, which is not one of"),
    (
        "patterns: {x: '%{y}', y: '%{x}'}\nformats:\n  mine:\n    - {re: '%{x}', kind: api}",
        4,
        "uses named patterns that contain themselves",
    ),
    ("patterns: {a-b: c}", 1, "the pattern name a-b must have only letters, digits and _"),
    ("remotes:\n  - {name: a, host: b, guess: perhaps}", 2, "guess of remote a is perhaps"),
    ("remotes:\n  - {name: a, host: b, response: npm}", 2, "remote a has response: npm"),
    ("remotes:\n  - {name: a, host: b, path: '/(c'}", 2, "missing ): /(c"),
    ("remotes:\n  - {name: '{repo}', host: b}", 2, "name of remote {repo} uses {repo}"),
    ("remotes:\n  - {name: '{r}', host: b, path: /c}", 2, "name of remote {r} uses {r}"),
    (
        "remotes:\n  - {name: a, host: b, format: deb}",
        2,
        "remote a has no vendor, which purls of its format require",
    ),
    ("remotes:\n  - {name: a, host: b, format: apt}", 2, "remote a has no vendor"),
]


@pytest.mark.parametrize(("text", "line", "sentence"), ERRORS)
def test_error_is_one_sentence_with_file_and_line(
    write_remotes: Callable[[str], Path], text: str, line: int, sentence: str
) -> None:
    path = write_remotes(text)

    with pytest.raises(RemotesError) as caught:
        Remotes.load(path)

    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{path}, line {line}: ")
    assert sentence in lines[0]
    assert lines[0].endswith(".")


def test_all_errors_are_reported_together(write_remotes: Callable[[str], Path]) -> None:
    path = write_remotes(
        "formats:\n  a: b\nremotes:\n  - {name: x}\n  - {name: y, host: z, format: q}\n"
    )

    with pytest.raises(RemotesError) as caught:
        Remotes.load(path)

    assert re.findall(r", line (\d+): ", str(caught.value)) == ["4", "2", "5"]


def test_patterns_that_need_too_much_memory_are_rejected(
    write_remotes: Callable[[str], Path],
) -> None:
    rule = "    - {re: 'x%d(?:[a-z]{0,60}y){0,10}', kind: api}\n"
    path = write_remotes("formats:\n  mine:\n" + "".join(rule % number for number in range(500)))

    with pytest.raises(
        RemotesError, match=r"mine\.yaml, line 1: the patterns together are too large"
    ):
        Remotes.load(path)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RemotesError, match=r"nowhere\.yaml: can't be read \(No such file"):
        Remotes.load(tmp_path / "nowhere.yaml")


def test_file_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(RemotesError, match=r"mine\.yaml: is not UTF-8 text"):
        Remotes.load(path)


def test_control_characters_are_not_valid_yaml(write_remotes: Callable[[str], Path]) -> None:
    with pytest.raises(RemotesError, match="is not valid YAML"):
        Remotes.load(write_remotes("a: \x01"))


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "formats: {}\nremotes: []"])
def test_empty_file_adds_nothing(write_remotes: Callable[[str], Path], text: str) -> None:
    identity = Remotes.load(write_remotes(text)).identify("pypi.example", "/simple/attrs/")

    assert identity.purl == "pkg:pypi/attrs"


def test_user_remotes_are_tried_first(write_remotes: Callable[[str], Path]) -> None:
    path = write_remotes(
        "remotes:\n  - {name: ours, host: pypi.example, path: /team, format: pypi}"
    )
    remotes = Remotes.load(path)

    assert remotes.identify("pypi.example", "/team/simple/attrs/").remote == "ours"
    assert remotes.identify("pypi.example", "/simple/attrs/").remote == "pypi"


def test_user_remote_may_have_a_shipped_name(write_remotes: Callable[[str], Path]) -> None:
    path = write_remotes("remotes:\n  - {name: pypi, host: wheels.corp.example, format: pypi}")

    identity = Remotes.load(path).identify("wheels.corp.example", "/simple/attrs/")

    assert identity[:2] == ("pypi", "index")


def test_user_format_is_added(write_remotes: Callable[[str], Path]) -> None:
    path = write_remotes(
        r"""
        formats:
          wheelhouse:
            - {re: '^/(?P<name>\w+)/(?P<file>(?P<version>[\d.]+)\.bin)$', kind: artifact,
               purl: 'pkg:generic/{name}@{version}'}
        remotes:
          - {name: house, host: 'house.**', format: wheelhouse}
        """
    )
    remotes = Remotes.load(path)

    assert remotes.identify("house.a.example", "/tool/1.2.bin") == (
        "house",
        "artifact",
        "generic",
        "tool",
        "1.2",
        "1.2.bin",
        "pkg:generic/tool@1.2",
        "wheelhouse#1",
    )
    assert remotes.identify("nexus.example", "/repository/zzz/tool/1.2.bin").ecosystem == "generic"


def test_user_format_replaces_the_shipped_one_with_its_name(
    write_remotes: Callable[[str], Path],
) -> None:
    path = write_remotes("formats:\n  pypi:\n    - {re: '^/only-this$', kind: api}")
    remotes = Remotes.load(path)

    assert remotes.identify("pypi.example", "/simple/attrs/") == remotes.identify(
        "pypi.example", ""
    )
    assert remotes.identify("pypi.example", "/only-this").rule == "pypi#1"


def test_two_instances_share_no_cache(write_remotes: Callable[[str], Path]) -> None:
    extended = Remotes.load(write_remotes("remotes:\n  - {name: ours, host: pypi.example}"))

    assert Remotes.load().identify("pypi.example", "/simple/attrs/").remote == "pypi"
    assert extended.identify("pypi.example", "/simple/attrs/").remote == "ours"


@pytest.mark.parametrize(
    ("glob", "host", "matches"),
    [
        ("a.example", "a.example", True),
        ("a.example", "A.Example.", True),
        ("a.example", "b.a.example", False),
        ("a.example", "axexample", False),
        ("*.example", "a.example", True),
        ("*.example", "example", False),
        ("*.example", "b.a.example", False),
        ("a.*", "a.example", True),
        ("a.*", "a.b.example", False),
        ("a-*.example", "a-1.example", True),
        ("**.example", "a.example", True),
        ("**.example", "b.a.example", True),
        ("**.example", "example", False),
        ("a.**", "a.b.example", True),
        ("a.**", "a", True),
        ("a.**", "ab", False),
        ("a.**:80", "a", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
    ],
)
def test_one_star_matches_one_label_and_two_match_several(
    write_remotes: Callable[[str], Path], glob: str, host: str, *, matches: bool
) -> None:
    remotes = Remotes.load(write_remotes(f"remotes:\n  - {{name: ours, host: '{glob}'}}"))

    assert (remotes.identify(host, "/").remote == "ours") is matches


@pytest.mark.parametrize(
    ("folder", "path", "remote"),
    [
        ("/team", "/team/x", "ours"),
        ("/team", "/team", "ours"),
        ("/team", "/teams/x", None),
        ("/team/", "/team/x", "ours"),
        ("/", "/x", "ours"),
        ("/t[a-z]+", "/team/x", "ours"),
        ("/t[a-z]", "/team/x", None),
        ("^/(?:a|b)", "/b/x", "ours"),
        ("/a b", "/a%20b/x", "ours"),
    ],
)
def test_folder_matches_whole_segments_only(
    write_remotes: Callable[[str], Path], folder: str, path: str, remote: str | None
) -> None:
    file = write_remotes(f"remotes:\n  - {{name: ours, host: h.example, path: '{folder}'}}")

    assert Remotes.load(file).identify("h.example", path).remote == remote


def test_shipped_remotes_match_any_top_level_domain() -> None:
    """So they also work for copies of a registry under another domain."""
    hosts = re.findall(r"host: ('[^']+'|\[[^\]]+\])", SHIPPED.read_text(encoding="utf-8"))

    names = [name for entry in hosts for name in re.findall(r"'([^']+)'", entry)]
    assert len(names) > 200
    assert [name for name in names if not re.search(r"\*(:\d+)?$", name)] == []


def test_no_pattern_is_written_twice() -> None:
    text = SHIPPED.read_text(encoding="utf-8")

    for key in ("re", "path"):
        values = re.findall(rf"\b{key}: '([^']{{40,}})'", text)
        assert len(values) > 5
        twice = {value for value in values if values.count(value) > 1}
        # A tag with the digest of the response, and without; two ways to tell a group from an artifact.
        expected = {r"^/v2/%{image}/manifests/(?P<tag>\w[\w.-]{0,127})$"}
        expected |= {value for value in twice if "(?P<last>" in value}
        assert twice <= expected, f"{key}: name the pattern in `patterns`"


def test_there_are_at_least_31_shipped_remotes() -> None:
    text = SHIPPED.read_text(encoding="utf-8")

    assert len(re.findall(r"^  - \{?name: ", text, re.MULTILINE)) >= 31


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        (
            "remotes:\n  - {name: ours, host: nexus.corp.example, format: npm}",
            2,
            "so that these remotes after it are not tried there: nexus:{repo}.",
        ),
        (
            "remotes:\n  - {name: ours, host: '*.docker.*', path: [/a, /], format: npm}",
            2,
            "not tried there: docker-packages, dockerhub",
        ),
        (
            "remotes:\n  - {name: ours, host: h.example}\n  - {name: npm, host: h.example, path: /a}",
            2,
            "not tried there: npm.",
        ),
        (
            "remotes:\n  - {name: ours, host: h.example, path: /v2, format: docker}",
            2,
            "remote ours never matches, because the format oci expects /v2 after the path.",
        ),
        (
            "remotes:\n  - {name: ours, host: h.example, path: [/x, /mirror/v2/], format: oci}",
            2,
            "Leave it out of the path /mirror/v2.",
        ),
    ],
)
def test_remote_without_effect_gives_a_warning(
    write_remotes: Callable[[str], Path], text: str, line: int, sentence: str
) -> None:
    path = write_remotes(text)
    (warning,) = Remotes.load(path).warnings

    assert warning.startswith(f"{path}, line {line}: remote ours ")
    assert sentence in warning


@pytest.mark.parametrize(
    "remote",
    [
        "{name: ours, host: pypi.example, format: pypi}",  # as the shipped one
        "{name: ours, host: pypi.example, path: /team, format: npm}",
        "{name: ours, host: nexus.corp.example, format: npm, guess: true}",
        "{name: ours, host: 'nexus.corp.example:8081', path: /npm, format: npm}",
        "{name: ours, host: mirror.corp.example, format: any}",
        "{name: ours, host: h.example, path: /v2x, format: oci}",
        "{name: ours, host: h.example, path: /v2, format: npm}",
        "{name: ours, path: /v9, format: oci}",
    ],
)
def test_ordinary_remote_gives_no_warning(
    write_remotes: Callable[[str], Path], remote: str
) -> None:
    assert Remotes.load(write_remotes(f"remotes: [{remote}]")).warnings == ()


def test_shipped_remotes_give_no_warning() -> None:
    assert Remotes.load().warnings == ()

"""The output of `artifactapi identify`: one line per URL, without secrets."""

from __future__ import annotations

import json
import time
from itertools import count, islice
from typing import TYPE_CHECKING

import pytest

from addon.cli.identify import explain_urls, identify_urls
from exporter.rows.packages.identity import Identity, Remotes

if TYPE_CHECKING:
    from pathlib import Path

REMOTES = Remotes.load()


def test_text_line_has_remote_kind_rule_and_purl() -> None:
    lines = list(identify_urls(["https://pypi.example/simple/Attrs/"], REMOTES, as_json=False))

    assert [line.split() for line in lines] == [["pypi", "index", "pypi#9", "pkg:pypi/attrs"]]


def test_text_lines_are_aligned() -> None:
    urls = ["https://pypi.example/simple/attrs/", "https://ghcr.example/v2/a/manifests/1", "x"]
    lines = list(identify_urls(urls, REMOTES, as_json=False))

    assert lines[0].index("pkg:") == lines[1].index("pkg:") == lines[2].rindex("-")


def test_json_line_has_url_and_all_identity_fields() -> None:
    url = "https://files.pythonhosted.example/packages/source/a/attrs/attrs-23.1.0.tar.gz"
    (line,) = identify_urls([url], REMOTES, as_json=True)

    assert json.loads(line) == {
        "url": url,
        **Identity(
            "pypi",
            "artifact",
            "pypi",
            "attrs",
            "23.1.0",
            "attrs-23.1.0.tar.gz",
            "pkg:pypi/attrs@23.1.0",
            "pypi#2",
        )._asdict(),
    }


def test_url_without_scheme_is_read_as_host_and_path() -> None:
    (line,) = identify_urls(["pypi.example:8080/simple/attrs/"], REMOTES, as_json=True)

    assert json.loads(line)["purl"] == "pkg:pypi/attrs"
    assert json.loads(line)["url"] == "pypi.example:8080/simple/attrs/"


def test_secrets_in_url_are_not_printed() -> None:
    url = "https://CANARY:CANARY@ghcr.example/v2/a/manifests/1?token=CANARY#CANARY"

    for as_json in (False, True):
        (line,) = identify_urls([url], REMOTES, as_json=as_json)
        assert "pkg:oci/a?" in line
        assert "CANARY" not in line


def test_invalid_url_gives_unknown_identity_and_blank_line_gives_nothing() -> None:
    urls = ["http://[::1/a", "", "  ", "http://[x]/", "\x00", "::", "https://pypi.example/simple/a"]
    lines = [json.loads(line) for line in identify_urls(urls, REMOTES, as_json=True)]

    assert [line["remote"] for line in lines] == [None, None, None, None, "pypi"]


def test_urls_are_read_lazily() -> None:
    endless = (f"https://pypi.example/simple/a{number}/\n" for number in count())

    assert len(list(islice(identify_urls(endless, REMOTES, as_json=False), 3))) == 3


@pytest.mark.slow
def test_100_000_urls_take_seconds() -> None:
    urls = (f"https://pypi.example/p/foo-{n}.0-py3-none-any.whl?token=x" for n in range(100_000))
    started = time.thread_time()

    assert sum(1 for _ in identify_urls(urls, REMOTES, as_json=False)) == 100_000
    assert time.thread_time() - started < 30  # about 4 on an idle machine


def explained(url: str, remotes: Remotes = REMOTES) -> list[str]:
    return list(explain_urls([url], remotes))


def test_explanation_ends_with_the_identity() -> None:
    lines = explained("https://pypi.example/simple/Attrs/?token=CANARY")

    assert lines == [
        "remote pypi: matches /; the rules see /simple/Attrs/",
        "  re does not match: pypi#1 2 3 4 5 6 7 8",
        "  pypi#9: index pkg:pypi/attrs",
        "pypi                 index    pypi#9         pkg:pypi/attrs",
    ]


@pytest.mark.parametrize(
    ("url", "line"),
    [
        (
            "https://registry.npmjs.example/a/-/b-1.0.0.tgz",
            "  npm#1: then does not match 'b-1.0.0.tgz', which must start with 'a-' and go on",
        ),
        ("https://nexus.example/repository/a/pool/c/x_1-1_all.deb", "  deb#4: no value for vendor"),
        ("https://repo1.maven.example/x/a-1.0.jar", "remote maven: has no format"),
        ("https://dl.google.example/x", "remote google-maven: its path does not match"),
        ("https://unknown.example/a", "no remote has the host unknown.example"),
        ("https://unknown.example:8443/a", "no remote has the host unknown.example:8443"),
        ("https://unknown.example/v2/a/manifests/1", "remote of any host unknown.example: needs"),
        ("https://unknown.example/repository/a/b", "  no rule matches, so that it is not this"),
        ("https://pypi.example/a/%2e%2e/simple/attrs", "path: too long, not printable, or ambig"),
        ("https://pypi.example/./simple/attrs", "path: /simple/attrs"),
        (
            "https://repo1.maven.example/maven2/org/x/maven-metadata.xml",
            "  maven#7: then does not match 'x', which must start with 'org' and go on",
        ),
        (
            "https://repo1.maven.example/maven2/org/x-y/maven-metadata.xml",
            "  maven#6: a value for its purl is missing, or a filter rejects it",
        ),
    ],
)
def test_explanation_says_why_each_remote_and_rule_fails(url: str, line: str) -> None:
    assert [each for each in explained(url) if each.startswith(line)]


@pytest.mark.parametrize("line", ["http://[::1/a", "http://a.example:99999/"])
def test_invalid_url_is_not_explained(line: str) -> None:
    assert [each.split() for each in explained(line)] == [["-", "-", "-", "-"]]


def test_port_of_the_url_is_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("remotes: [{name: verdaccio, host: 'localhost:4873', format: npm}]")
    remotes = Remotes.load(path)
    urls = ["http://localhost:4873/left-pad", "http://localhost:4874/left-pad"]

    lines = list(identify_urls(urls, remotes, as_json=False))

    assert [line.split()[0] for line in lines] == ["verdaccio", "-"]

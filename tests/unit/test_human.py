"""Formatting of numbers, and of text from clients, for people."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.read.human import (
    duration,
    noun_for,
    package,
    package_text,
    plural,
    printable,
    printable_json,
    share,
    size,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (5_432_100_000, "5.4 GB"),
        (10**19, "10000.0 PB"),
    ],
)
def test_sizes(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (None, "-"),
        (0, "0.0 ms"),
        (9.94, "9.9 ms"),
        (12.3, "12 ms"),
        (999.4, "999 ms"),
        (999.6, "1.0 s"),
        (59_900, "59.9 s"),
        (59_960, "1m"),
        (190_000, "3m 10s"),
        (1_800_000, "30m"),
        (7_500_000, "2h 05m"),
        (7_200_000, "2h"),
        (90_000_000, "25h"),
    ],
)
def test_durations(milliseconds: float | None, text: str) -> None:
    assert duration(milliseconds) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "-"),
        (0, 5, "0.0 %"),
        (1, 100_000, "<0.1 %"),
        (1, 3, "33.3 %"),
        (99_999, 100_000, ">99.9 %"),
        (5, 5, "100.0 %"),
    ],
)
def test_only_exact_shares_show_as_0_and_100_percent(part: int, whole: int, text: str) -> None:
    assert share(part, whole) == text


@pytest.mark.slow
def test_every_character_becomes_printable_and_json_keeps_its_meaning() -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    assert printable(text).isprintable()
    escaped = printable_json(json.dumps(text, ensure_ascii=False))
    assert escaped.isprintable()
    assert json.loads(escaped) == text


@pytest.mark.parametrize(
    ("purl", "ecosystem", "name"),
    [
        (
            "pkg:deb/debian/g%2B%2B-12@12.2.0-14%2Bdeb12u1?arch=amd64",
            "deb",
            "g++-12 12.2.0-14+deb12u1",
        ),
        ("pkg:rpm/fedora/curl@7.87.0-7.fc38?arch=x86_64", "rpm", "curl 7.87.0-7.fc38"),
        ("pkg:apk/alpine/curl@8.2.1-r0", "apk", "curl 8.2.1-r0"),
        ("pkg:npm/%40babel/core@7.23.0", "npm", "@babel/core 7.23.0"),
        ("pkg:pypi/torch@2.1.0%2Bcpu", "pypi", "torch 2.1.0+cpu"),
        ("pkg:pypi/requests", "pypi", "requests"),
        ("pkg:golang/github.example/a/b@v1#c", "golang", "github.example/a/b v1"),
        (
            "pkg:maven/org.apache.commons/commons-lang3@3.12.0?type=pom",
            "maven",
            "org.apache.commons/commons-lang3 3.12.0",
        ),
        ("pkg:oci/harbor?repository_url=h.example/x/harbor&tag=1.3.8", "oci", "harbor 1.3.8"),
        ("pkg:oci/harbor@sha256%3Aab?tag=1.3.8", "oci", "harbor 1.3.8"),
        ("pkg:oci/harbor@sha256%3Aab", "oci", "harbor sha256:ab"),
        ("pkg:generic/a%1B%5B31mb@%E2%80%AE1", "generic", "a\\x1b[31mb \\u202e1"),
    ],
)
def test_package_is_decoded(purl: str, ecosystem: str, name: str) -> None:
    assert package(purl) == (ecosystem, name)
    assert package_text(purl) == f"{ecosystem} {name}"


@pytest.mark.parametrize("text", ["", "pkg:", "demo", "<script>\x1b"])
def test_text_that_names_no_package_is_shown_as_it_is(text: str) -> None:
    assert package(text) is None
    assert package_text(text) == printable(text)


@given(st.text() | st.text().map(lambda text: f"pkg:{text}") | st.text().map("pkg:npm/{}".format))
def test_any_text_as_package_is_printable(text: str) -> None:
    assert package_text(text).isprintable()


def test_singular_and_plural() -> None:
    assert plural(0, "request") == "0 requests"
    assert plural(1, "request") == "1 request"
    assert plural(2000, "row") == "2,000 rows"
    assert [noun_for(count, "user") for count in (0, 1, 2)] == ["users", "user", "users"]

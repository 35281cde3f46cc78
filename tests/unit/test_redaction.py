"""Secrets of known forms are redacted, and harmless text stays unchanged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.rows.redaction import (
    MAX_PARAMETERS,
    PathPatterns,
    redact_error,
    redact_path,
    redact_query,
)

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl-_x"


@pytest.mark.parametrize(
    ("query", "policy", "expected"),
    [
        ("a=1&b=2", "keys", "a=REDACTED&b=REDACTED"),
        ("a=1&a=2&c=", "keys", "a=REDACTED&a=REDACTED&c="),
        ("s3cret", "keys", "REDACTED"),
        ("a=b=c", "keys", "a=REDACTED"),
        (f"{JWT}=1", "keys", "REDACTED=REDACTED"),
        ("n" * 200 + "=1", "keys", "REDACTED=REDACTED"),
        ("a=1&X-Amz-Signature=s&page=2", "signed", "a=1&X-Amz-Signature=REDACTED&page=2"),
        (
            "access_token=s&apikey=s&sig=s",
            "signed",
            "access_token=REDACTED&apikey=REDACTED&sig=REDACTED",
        ),
        (f"redirect={JWT}", "signed", "redirect=REDACTED"),
        ("a=1", "drop", None),
        ("a=1", "full", "a=1"),
    ],
)
def test_query_is_redacted_by_policy(query: str, policy: str, expected: str | None) -> None:
    assert redact_query(query, policy) == expected  # type: ignore[arg-type]


def test_query_with_too_many_parameters_is_cut() -> None:
    assert (
        redact_query("&".join(["a=1"] * 100_000), "keys")
        == "&".join(["a=REDACTED"] * MAX_PARAMETERS) + "&..."
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"/priv/{JWT}/x.whl", "/priv/REDACTED/x.whl"),
        ("/ghp_0123456789abcdefABCD/x", "/REDACTED/x"),
        ("/glpat-0123456789abcdefABCD/x", "/REDACTED/x"),
        ("/npm_0123456789abcdefABCD0123456789abcdef", "/REDACTED"),
        ("/fetch/http://me:s3cret@host.example/x", "/fetch/http://REDACTED@host.example/x"),
        ("/AKIAIOSFODNN7EXAMPLE/x", "/REDACTED/x"),
        ("/https%3A%2F%2Fu%3As3cret%40host/x", "/https://REDACTED@host/x"),
        ("/%67hp_0123456789abcdefABCD/x", "/REDACTED/x"),
        ("/x%3Ftoken%3Ds3cret", "/x?token=REDACTED"),
        ("/a;jsessionid=s3cret/b;v=1", "/a;jsessionid=REDACTED/b;v=REDACTED"),
        ("/a%3Btoken%3Ds3cret/b", "/a;token=REDACTED/b"),
        ("/@babel%2fcore", "/@babel%2fcore"),
        ("/curl_7.88.1-10%2Bdeb12u4_amd64.deb", "/curl_7.88.1-10%2Bdeb12u4_amd64.deb"),
        ("/@scope/pkg/-/pkg-1.0.0.tgz", "/@scope/pkg/-/pkg-1.0.0.tgz"),
        ("/simple/pypi-simple/", "/simple/pypi-simple/"),
        ("/simple/ask-sdk-model-runtime/", "/simple/ask-sdk-model-runtime/"),
        ("/adsk-platform-httpclient", "/adsk-platform-httpclient"),
        ("/sk-proj-0123456789abcdefABCDEF", "/REDACTED"),
        ("/x?pypi-AgEIcHlwaS5vcmcCJDAx", "/x?REDACTED"),
        ("/packages/eyJ/eyJson-1.0.tar.gz", "/packages/eyJ/eyJson-1.0.tar.gz"),
    ],
)
def test_path_keeps_everything_but_secrets(path: str, expected: str) -> None:
    assert redact_path(path) == expected


@pytest.mark.parametrize(
    "error",
    [
        "unexpected server response: b'HTTP/1.1 200\\r\\nSet-Cookie: s3cret'",
        'Cannot parse HTTP response: "x" b"s3cret',
        "h2 said bytearray(b's3cret')",
        "GET http://me:s3cret@host.example/x?token=s3cret failed",
        "Authorization: Basic s3cret==",
        "Proxy-Authorization=Bearer s3cret",
        "Cookie: a=s3cret; b=s3cret",
        "Location: https://x.example/?sig=s3cret",
        "password=s3cret",
        "sent Bearer s3cret123 along",
        "Cannot parse HTTP response: invalid content-length header: 's3cret'",
        'invalid transfer-encoding header: "it\'s s3cret"',
        "'127.0.0.1 s3cret'",
    ],
)
def test_secret_in_error_message_is_redacted(error: str) -> None:
    assert "s3cret" not in redact_error(error)


def test_harmless_error_message_is_unchanged() -> None:
    for error in (
        "[Errno 111] Connect call failed ('127.0.0.1', 1)",
        "[Errno 111] Connect call failed ('::1', 1, 0, 0)",
        "Request body exceeds mitmproxy's body_size_limit.",
        "Client disconnected.",
        "Certificate verify failed: x",
    ):
        assert redact_error(error) == error


@given(st.text(max_size=300))
def test_any_text_is_accepted_and_no_value_survives(text: str) -> None:
    redact_path(text)
    redact_error(text)
    kept = redact_query(f"name={text.replace('&', '')}CANARY", "keys")
    assert kept is not None
    assert "CANARY" not in kept


@pytest.mark.parametrize(
    ("pattern", "host", "path", "expected"),
    [
        (r"^dl\.vendor\.example/([^/]+)/", "dl.vendor.example", "/s3cret/x.deb", "/REDACTED/x.deb"),
        (r"^dl\.vendor\.example/([^/]+)/", "other.example", "/s3cret/x.deb", "/s3cret/x.deb"),
        (r"k-[0-9]+", "k-1.example", "/a/k-23/k-4", "/a/REDACTED/REDACTED"),
        (r"(b)?c", "h", "/abc/c", "/aREDACTEDc/c"),
    ],
)
def test_user_patterns_redact_paths(pattern: str, host: str, path: str, expected: str) -> None:
    assert PathPatterns([pattern]).redact(host, path) == expected


@pytest.mark.parametrize(
    "path",
    [
        "/fetch/https:/user:hunter2@host.example/x",
        "/fetch/https%3A/user%3Ahunter2%40host.example/x",
        "/git/user:hunter2@host.example/x",
        "/fetch/https%253A%252F%252Fuser%253Ahunter2%2540host.example",
        "/x%253Bsid%253Dhunter2",
        "/x%25253Bsid%25253Dhunter2",
    ],
)
def test_encoded_credentials_are_redacted(path: str) -> None:
    assert "hunter2" not in redact_path(path)


@pytest.mark.parametrize(
    "path",
    ["/@scope/name", "/npm/react@18.2.0/index.js", "/v2/a/manifests/sha256:0123", "/a%20b/100%25"],
)
def test_path_without_credentials_is_unchanged(path: str) -> None:
    assert redact_path(path) == path

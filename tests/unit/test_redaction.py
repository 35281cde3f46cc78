"""Secrets of known forms are redacted, and harmless text stays unchanged."""

from __future__ import annotations

import base64
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from exporter.rows.redaction import (
    MAX_PARAMETERS,
    PathPatterns,
    redact,
    redact_error,
    redact_path,
    redact_query,
)
from tests.support.lockfiles import REGISTRIES
from tests.support.secrets import SECRET_URLS, TOKENS, SecretUrl

if TYPE_CHECKING:
    from collections.abc import Callable

LOCKS = Path(__file__).parents[1] / "data" / "locks"
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


# What a client, or a proxy on its way, may do to a URL.
VARIANTS: list[Callable[[str], str]] = [
    str,
    str.upper,
    str.lower,
    quote,
    lambda text: quote(text, safe=""),
    lambda text: quote(quote(text, safe=""), safe=""),
    lambda text: "".join(f"%{ord(character):02x}" for character in text),
]

each_secret_url = pytest.mark.parametrize("url", SECRET_URLS, ids=lambda url: url.host)


@each_secret_url
def test_secret_is_redacted_by_its_place_in_a_url(url: SecretUrl) -> None:
    assert redact_path(url.path, url.host) == url.redacted_path
    assert redact(f"tool/1.0 (see http://{url.host}{url.path} )") == (
        f"tool/1.0 (see http://{url.host}{url.redacted_path} )"
    )
    for text in ("({})", "<{}>", '"{}"', "['{}']", "{}, {}", "to={};"):
        assert url.secret not in redact(text.replace("{}", f"http://{url.host}{url.path}"))


@each_secret_url
@pytest.mark.parametrize("folder", ["", "/mirror/a-1.0/", "/fetch/https:/", "/fetch/https://"])
def test_secret_in_a_url_is_redacted_however_it_is_written(url: SecretUrl, folder: str) -> None:
    for variant in VARIANTS:
        if folder:
            redacted = redact_path(folder + variant(f"{url.host}{url.path}"), "proxy.example")
        else:
            redacted = redact_path("/" + variant(url.path[1:]), url.host)
        assert url.secret.casefold() not in unquote(unquote(redacted)).casefold()


@given(token=TOKENS)
def test_token_is_redacted_wherever_it_is(token: str) -> None:
    assert redact(f"tool/1.0 {token} rest") == "tool/1.0 REDACTED rest"
    for text in (
        token,
        f"/simple/{token}/",
        f"/packages/demo-1.0-{token}.tar.gz",
        f"/a_{token}",
        f"{token}.registry.example",
        f"text/html; boundary={token}",
        f"failed:\\r\\n{token}",
        f"%{ord(token[0]):02X}{token[1:]}",
        quote(quote(f"/a/{token}", safe=""), safe=""),
    ):
        assert token not in unquote(unquote(redact(text)))


@pytest.mark.parametrize(
    "text",
    [
        "build-42",
        "ci@example.com",
        "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
        "0123456789abcdef0123456789abcdef01234567",
        "0123456789abcdef" * 4,
        "runner-7f8b9c-project-1234-concurrent-0",
        "01ARZ3NDEKTSV4RRFFQ69G5FAV",
        'pip/25.0 {"ci":true,"cpu":"x86_64","python":"3.13.0"}',
        "npm/10.9.0 node/v22.11.0 linux x64 workspaces/false",
        "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
        "text/html; charset=utf-8",
        "multipart/form-data; boundary=------------------------0123456789abcdef",
        "application/vnd.docker.distribution.manifest.v2+json",
        "HTTP/1.1",
    ],
)
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "login",
    [
        "ghp_0123456789abcdefghijABCDEFGHIJ012345",
        "glpat-0123456789abcdefABCD",
        "npm_0123456789abcdefABCD0123456789abcdef",
        "46e98d3dbf2378bb26e2107867652ee734eb098ea5b96f35",
        "NpmToken.3f2504e0-4f89-41d3-9a0c-0305e82c3301",
        JWT,
    ],
)
def test_token_as_login_is_redacted(login: str) -> None:
    assert redact(login) == "REDACTED"


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        (
            "tool/1 (https://x.example/?t=s3cret&s3cret)",
            "tool/1 (https://x.example/?t=REDACTED&REDACTED)",
        ),
        ("tool/1 http://x.example/a?b=c#d", "tool/1 http://x.example/a?b=REDACTED#d"),
        ("tool/1 http://x.example/a?", "tool/1 http://x.example/a?"),
        ("really? see http://x.example/", "really? see http://x.example/"),
        ("tool/1 X-Api-Key: s3cret, x", "tool/1 X-Api-Key: REDACTED, x"),
        ("tool/1 password:s3cret", "tool/1 password:REDACTED"),
    ],
)
def test_secret_in_a_user_agent_is_redacted(agent: str, expected: str) -> None:
    assert redact(agent) == expected


@pytest.mark.parametrize(
    "token", ["dGhpcyBpcyBhIHNlY3JldCB0b2tlbiBmb3IgdGVzdHM", "aB3dE6gH9jK2mN5pQ8sTuV1xaB3dE6gH"]
)
def test_random_token_is_redacted_without_a_known_form(token: str) -> None:
    assert redact_path(f"/{token}/simple/demo/") == "/REDACTED/simple/demo/"
    assert redact(token) == "REDACTED"


def test_most_tokens_of_32_bytes_are_redacted() -> None:
    tokens = [base64.urlsafe_b64encode(hashlib.sha256(b"%d" % n).digest()) for n in range(1000)]
    texts = [token.decode().rstrip("=") for token in tokens]
    assert sum(redact(text) == "REDACTED" for text in texts) > 975


@pytest.mark.parametrize("length", [32, 40, 60, 64, 96, 128])
def test_checksum_is_unchanged(length: int) -> None:
    """Whatever it begins with."""
    for start in range(0x10000):
        checksum = f"{start:04x}" + hashlib.sha512(b"%d" % start).hexdigest()[4:length]
        if start % 16 == 0 or checksum.startswith(("4b1d", "da2")):
            for text in (
                f"/packages/84/70/{checksum}/demo-1.0.tar.gz",
                f"/v2/a/blobs/sha256:{checksum}",
            ):
                assert redact_path(text) == text


@pytest.mark.parametrize(
    "path",
    [
        "/org/springframework/boot/AbstractSingletonProxyFactoryBeanTest2/x.jar",
        "/packages/MyVeryLongCamelCasePackageNameForHTTP2AndTLS13Support/1.0",
        "/nar/1w8hba6v5h3qgc3gf8vq5mwlyz5wfyk6pzrbh8jqx4xrhaqf0nkk.nar.xz",
        "/x/01ARZ3NDEKTSV4RRFFQ69G5FAV01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "/Microsoft.NETCore.App.Runtime.linux-x64/8.0.11/x.nupkg",
    ],
)
def test_long_name_is_unchanged(path: str) -> None:
    assert redact_path(path, "registry.example") == path


@pytest.mark.parametrize("name", sorted(REGISTRIES))
def test_path_of_a_locked_file_is_unchanged(name: str) -> None:
    registry = REGISTRIES[name]
    text = (LOCKS / registry.file).read_text(encoding="utf-8")
    host, slash, folder = registry.base.partition("/")
    for locked in registry.read(text, registry.base):
        path = f"{slash}{folder}{locked.path}"
        assert redact_path(path, host) == path
        assert redact(locked.purl) == locked.purl


@pytest.mark.parametrize(
    "path",
    [
        "/debian/pool/main/t/telepathy-mission-control-5/telepathy-mission-control-5_5.16.6-4_amd64.deb",
        "/maven2/com/google/auth/google-auth-library-oauth2-http/1.19.0/google-auth-library-1.19.0.jar",
        "/adnanh/webhook/archive/0123456789abcdef0123456789abcdef01234567.tar.gz",
        "/adnanh/webhook/tar.gz/0123456789abcdef0123456789abcdef01234567",
        "/github.com/adnanh/webhook/@v/v0.0.0-20240101000000-0123456789ab.zip",
        "/v2/org/webhook/manifests/sha256:" + "0123456789abcdef" * 4,
        "/@octokit/webhooks-types/-/webhooks-types-7.3.1.tgz",
        "/packages/xai-feature-selection-1.0.tar.gz",
        "/packages/hf_clean_benchmarks-0.0.1-py3-none-any.whl",
        "/packages/azure_cli_cognitiveservices-0.2.10-py2.py3-none-any.whl",
        "/simple/sk-linearregression/",
        "/token/-/token-1.0.0.tgz",
        "/api/v1/crates/secrets/1.2.0/download",
        "/t/tar/tar_1.34.deb",
    ],
)
def test_path_with_a_name_like_a_secret_is_unchanged(path: str) -> None:
    assert redact_path(path, "registry.example") == path


@given(st.text(max_size=200))
@example("/t/REDACTED/x/noarch/y")
@example("%2525252525")
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "piece",
    [
        "/",
        "%",
        "%25",
        "%3A",
        "a@",
        "/a:",
        "eyJ",
        "/t/",
        "/hooks/",
        "ghp_",
        "token=",
        "%2F%40:",
        "é",
    ],
)
def test_time_is_linear_in_the_length_of_a_hostile_path(piece: str) -> None:
    def seconds(length: int) -> float:
        text = (piece * length)[:length]
        start = time.perf_counter()
        redact_path(text, "registry.example")
        return time.perf_counter() - start

    seconds(1000)
    assert min(seconds(64_000) for _ in range(3)) < max(0.5, 40 * seconds(8000))

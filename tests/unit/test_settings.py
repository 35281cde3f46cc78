"""Settings: the example file has the defaults, and errors are one clear sentence."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from exporter import Settings, SettingsError, load_settings, resolve_dsn
from exporter.settings import listen_address

CONFIGS = Path(__file__).parents[2] / "configs"
_LISTEN = "an address and a port in quotes, such as '127.0.0.1:9464', '[::1]:9464', or ':9464' for all addresses"


def test_example_file_lists_every_setting_at_its_default() -> None:
    path = CONFIGS / "artifactapi.yaml"
    assert load_settings(path) == Settings()
    assert yaml.safe_load(path.read_text()) == msgspec.json.decode(msgspec.json.encode(Settings()))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bufer: {}", "bufer is not a setting; remove it or correct its name."),
        ("buffer: {max: 3}", "buffer.max is not a setting; remove it or correct its name."),
        ("1: 2", "1 is not a setting; remove it or correct its name."),
        ("batch: {on: 2}", "batch.true is not a setting; remove it or correct its name."),
        ('"a\\nb": 1', "'a\\nb' is not a setting; remove it or correct its name."),
        (
            "buffer: {max_entries: many}",
            "buffer.max_entries is 'many', expected a whole number, at least 1.",
        ),
        (
            "buffer: {max_entries: 0}",
            "buffer.max_entries is 0, expected a whole number, at least 1.",
        ),
        (
            "spool: {max_bytes: 1e9}",
            "spool.max_bytes is '1e9', expected a whole number of bytes, at least 0.",
        ),
        (
            "batch: {max_entries: 10001}",
            "batch.max_entries is 10001, expected a whole number, from 1 to 10000.",
        ),
        (
            "batch: {max_seconds: -1}",
            "batch.max_seconds is -1, expected a number of seconds, above 0 and at most 3600.",
        ),
        (
            "batch: {max_seconds: 2s}",
            "batch.max_seconds is '2s', expected a number of seconds, above 0 and at most 3600.",
        ),
        (
            "shutdown: {drain_seconds: 61}",
            "shutdown.drain_seconds is 61, expected a number of seconds, from 0 to 60.",
        ),
        (
            "page: {query_seconds: .nan}",
            "page.query_seconds is nan, expected a number of seconds, from 0.1 to 60.",
        ),
        ("artifact: {sha256: 1}", "artifact.sha256 is 1, expected true or false."),
        (
            "redact: {query: all}",
            "redact.query is 'all', expected one of drop, full, keys, signed.",
        ),
        (
            "redact: {query: no}",
            "redact.query is false, expected one of drop, full, keys, signed.",
        ),
        ("database: {dsn: 5}", "database.dsn is ***, expected text in quotes."),
        ("read: {dsn: 5}", "read.dsn is ***, expected text in quotes."),
        ("node: 5", "node is 5, expected text in quotes."),
        *(
            (f"metrics: {{listen: {text}}}", f"metrics.listen is {shown}, expected {_LISTEN}.")
            for text, shown in [
                ("9464", "9464"),
                ("'9464'", "'9464'"),
                ("'::1:9464'", "'::1:9464'"),
                ("'[127.0.0.1]:9464'", "'[127.0.0.1]:9464'"),
                ("'[]:9464'", "'[]:9464'"),
                ("metrics.example:9464", "'metrics.example:9464'"),
                ("127.0.0.1:65536", "'127.0.0.1:65536'"),
                ("'127.0.0.1:'", "'127.0.0.1:'"),
                ("127.0.0.1:http", "'127.0.0.1:http'"),
                ("127.0.0.1:\u0661", "'127.0.0.1:\u0661'"),
                ("http://127.0.0.1:9464", "***"),
            ]
        ),
        ("node:", "node is empty, expected text in quotes."),
        ("node: 2026-01-01", "node is 2026-01-01, expected text in quotes."),
        (
            "redact: {paths: ['(']}",
            "redact.paths has '(', expected a valid RE2 pattern: missing ): (.",
        ),
        (
            'redact: {paths: ["\\uDC00"]}',
            "redact.paths has '\\udc00', expected a valid RE2 pattern: it is not valid Unicode.",
        ),
        ("buffer: 5", "buffer is 5, expected its settings, indented below buffer:."),
        ("batch:", "batch is empty, expected its settings, indented below batch:."),
        ("[1, 2]", "the file is a list, expected settings such as node: proxy-1."),
        ("redact: {paths: x}", "redact.paths is 'x', expected a list such as ['a', 'b']."),
        ("redact: {paths: [5]}", "redact.paths[0] is 5, expected text in quotes."),
        (
            "database: 'postgresql://u:s3cret@h/x'",
            "database is ***, expected its settings, indented below database:.",
        ),
        ("node: 2026-99-99", "is not valid YAML (ValueError)."),
        ("[" * 5000, "is not valid YAML (RecursionError)."),
        ("a: [", "is not valid YAML: expected the node content, but found '<stream end>', line 1."),
        (
            "database: {retry_min_seconds: 9, retry_max_seconds: 3}",
            "database.retry_max_seconds is 3.0, expected at least retry_min_seconds (9.0).",
        ),
    ],
)
def test_error_names_file_key_value_and_what_was_expected(
    tmp_path: Path, text: str, sentence: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert str(caught.value) == f"{path}: {sentence}"


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("batch.max_seconds: 1", "write batch: and below it, indented, max_seconds: 1."),
        ("max_seconds: 1", "write batch: and below it, indented, max_seconds: 1."),
        ("buffer: {max_seconds: 1}", "write batch: and below it, indented, max_seconds: 1."),
        ("redact.query: drop", "write redact: and below it, indented, query: 'drop'."),
        ("max_entries: 9", "write buffer: or batch: and below it, indented, max_entries: 9."),
        ("read.dsn: postgresql://u:s3cret@h", "write read: and below it, indented, dsn: ..."),
        ("paths: [s3cret]", "write redact: and below it, indented, paths: ..."),
        ("batch.seconds: 1", "remove it or correct its name."),
        ("a.b.c: 1", "remove it or correct its name."),
    ],
)
def test_setting_outside_its_section_is_explained(tmp_path: Path, text: str, advice: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert str(caught.value).endswith(f" is not a setting; {advice}")
    assert "s3cret" not in str(caught.value)


def test_key_that_appears_twice_is_an_error(tmp_path: Path) -> None:
    """YAML readers keep the last one, and the settings under the first one would be lost."""
    path = tmp_path / "mine.yaml"
    path.write_text("batch: {max_entries: 9}\nnode: a\nbatch: {max_seconds: 1}\n")
    with pytest.raises(
        SettingsError, match=r"mine\.yaml: .*the key batch appears twice, line 3\.$"
    ):
        load_settings(path)


def test_invalid_pattern_leaves_stderr_to_the_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("redact: {paths: ['[z-a]']}")
    with pytest.raises(SettingsError, match="invalid character class range: z-a"):
        load_settings(path)
    assert capfd.readouterr().err == ""


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.dates()
)
_KEYS = st.sampled_from(
    [*Settings.__struct_fields__, "dsn", "max_seconds", "paths", "query", "batch.max_seconds", 1]
)
_DOCUMENTS = st.recursive(
    _VALUES,
    lambda part: st.lists(part, max_size=2) | st.dictionaries(_KEYS, part, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(_KEYS, _DOCUMENTS, max_size=3) | _DOCUMENTS)
def test_any_document_gives_settings_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, document: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(document))
    sentence = "."
    try:
        load_settings(path)
    except SettingsError as e:
        sentence = str(e)
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="can't be read"):
        load_settings(tmp_path / "none.yaml")


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_settings(tmp_path / "empty.yaml") == Settings()


def test_dsn_option_wins_over_environment_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings().with_dsn("dbname=file")
    assert resolve_dsn("", Settings()) == ""
    assert resolve_dsn("", settings) == "dbname=file"
    monkeypatch.setenv("ARTIFACTAPI_DSN", "dbname=environment")
    assert resolve_dsn("", settings) == "dbname=environment"
    assert resolve_dsn("dbname=option", settings) == "dbname=option"


def test_reading_uses_read_dsn_and_else_the_proxys_database() -> None:
    both = msgspec.convert({"database": {"dsn": "a=1"}, "read": {"dsn": "b=2"}}, Settings)
    assert both.for_reading().database.dsn == "b=2"
    assert Settings().with_dsn("a=1").for_reading().database.dsn == "a=1"
    assert Settings().for_reading() == Settings()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        (":9464", ("", 9464)),
        ("192.0.2.1:9464", ("192.0.2.1", 9464)),
        ("localhost:0", ("127.0.0.1", 0)),
    ],
)
def test_metrics_listen_is_an_address_and_a_port(
    tmp_path: Path, text: str, address: tuple[str, int]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"metrics: {{listen: '{text}'}}")
    assert listen_address(load_settings(path).metrics.listen) == address

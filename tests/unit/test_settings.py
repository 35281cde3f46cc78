"""Settings: the example file has the defaults, and errors are one clear sentence."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml

from exporter import Settings, SettingsError, load_settings, resolve_dsn

CONFIGS = Path(__file__).parents[2] / "configs"


def test_example_file_lists_every_setting_at_its_default() -> None:
    path = CONFIGS / "artifactapi.yaml"
    assert load_settings(path) == Settings()
    assert yaml.safe_load(path.read_text()) == msgspec.json.decode(msgspec.json.encode(Settings()))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bufer: {}", "bufer is not a setting; remove it or correct its name."),
        ("buffer: {max: 3}", "buffer.max is not a setting; remove it or correct its name."),
        ("buffer: {max_entries: many}", "buffer.max_entries is 'many', expected int."),
        ("buffer: {max_entries: 0}", "buffer.max_entries is 0, expected int >= 1."),
        ("batch: {max_seconds: -1}", "batch.max_seconds is -1, expected float > 0.0."),
        (
            "redact: {query: all}",
            "redact.query is 'all', expected one of drop, full, keys, signed.",
        ),
        ("database: {dsn: 5}", "database.dsn is ***, expected str."),
        (
            "redact: {paths: ['(']}",
            "redact.paths has '(', expected a valid RE2 pattern.",
        ),
        ("buffer: 5", "buffer is 5, expected object."),
        ("[1, 2]", "the file is a list, expected object."),
        ("redact: {paths: [5]}", "redact.paths[0] is 5, expected str."),
        ("database: 'postgresql://u:s3cret@h/x'", "database is ***, expected object."),
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

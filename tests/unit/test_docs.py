"""The docs name what the code has and nothing else. The README is a front page that leads to every page."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import yaml

from addon.cli.main import main
from exporter import Exporter, Settings
from exporter.lockfiles import FORMATS
from exporter.metrics.families import LogCollector
from exporter.postgres.schema import MIGRATIONS, SCHEMA
from exporter.read.selection import ERROR_TYPES
from exporter.read.session import COLUMN_NAMES
from exporter.settings import SpoolSettings
from exporter.write.gaps import Reason

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE_SPAN = re.compile(r"`([^`]+)`")
_FOLDERS = ("addon", "exporter", "configs", "docs", "tests")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its code blocks."""
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def names_in_code(page: Path) -> set[str]:
    """The names in a page's backticks, without the value of a setting such as `a.b: false`."""
    return {span.partition(":")[0] for span in _CODE_SPAN.findall(prose_of(page))}


def first_column(page: str, header: str) -> list[str]:
    """What stands in backticks in the first column of the table whose first header cell is `header`."""
    (table,) = re.findall(
        rf"^\| {re.escape(header)} \|.*\n\|---.*\n((?:\|.*\n)+)", text_of(page), re.MULTILINE
    )
    rows = table.replace(r"\|", "or").splitlines()
    return [name for row in rows for name in _CODE_SPAN.findall(row.split(" | ")[0])]


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[tuple[Path, str]]:
    """The local files and anchors that a page links to."""
    found = []
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def in_schema(kind: str) -> set[str]:
    """The names of all tables, views or functions of the schema."""
    create = rf"^ *CREATE (?:OR REPLACE )?{kind} (?:IF NOT EXISTS )?(\w+)"
    rename = rf"^ *ALTER {kind} (\w+) RENAME TO (\w+)"
    texts = [
        path.read_text(encoding="utf-8")
        for path in (SCHEMA, SCHEMA.with_name("migration_table.sql"), *MIGRATIONS.glob("*.sql"))
    ]
    names = {name for text in texts for name in re.findall(create, text, re.MULTILINE)}
    renamed = dict(pair for text in texts for pair in re.findall(rename, text, re.MULTILINE))
    return {renamed.get(name, name) for name in names}


def all_settings() -> dict[str, Any]:
    """Every setting with its default. Another test compares this file with the code."""
    return dict(_leaves(yaml.safe_load(text_of("configs/artifactapi.yaml"))))


def _leaves(document: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in document.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


# --- the code


def test_importing_the_exporter_loads_no_mitmproxy() -> None:
    code = "import sys, exporter; print([m for m in sys.modules if m.startswith('mitmproxy')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert done.stdout.strip() == b"[]"


def test_nothing_in_the_scripts_folder_hides_a_module() -> None:
    """The folder stays on sys.path while mitmproxy runs."""
    names = {path.stem for path in (ROOT / "addon").glob("[!_]*") if path.suffix in {"", ".py"}}
    assert {"artifactapi", "flow", "web", "cli"} <= names
    assert not names & sys.stdlib_module_names
    code = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *names], cwd="/", check=True, capture_output=True
    )
    assert done.stdout.strip() == b"[]"


# --- the pages


def test_readme_is_a_front_page() -> None:
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 170
    assert re.search(r"!\[.+\]\(docs/\S+\.png\)", readme)
    assert "pkg:pypi/" in readme


def test_readme_gives_the_two_commands() -> None:
    readme = text_of("README.md")
    assert "\n    pip install uv && uv run mitmdump -s addon/artifactapi.py\n" in readme
    assert "\n    pip install uv && uv run just test\n" in readme


@every_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page.name}: #{anchor}"


def test_readme_leads_to_every_page() -> None:
    reached, new = set(), {README}
    while new:
        reached |= new
        new = {path for page in new for path, _ in links(page) if path.suffix == ".md"} - reached
    assert reached >= {*PAGES, ROOT / "CHANGELOG.md"}


# --- the tables


def test_settings_are_documented_with_their_defaults() -> None:
    settings = all_settings()
    assert first_column("docs/settings.md", "setting") == list(settings)
    page = text_of("docs/settings.md")
    for name, default in settings.items():
        shown = "empty" if default == "" else f"`{json.dumps(default).strip('"')}`"
        assert f"| `{name}` | {shown} |" in page


def test_columns_are_documented() -> None:
    assert first_column("docs/schema.md", "column") == list(COLUMN_NAMES)


def test_tables_views_and_functions_are_documented() -> None:
    page = "docs/schema.md"
    assert {"access_log", *first_column(page, "table")} == in_schema("TABLE")
    assert set(first_column(page, "view")) == in_schema("VIEW")
    helpers = {name.partition("(")[0] for name in first_column(page, "function")}
    internal = {
        *("access_log_ensure_partition", "artifact_record", "access_log_run_record"),
        "access_log_run_confirm",
        *("artifact_add", "access_log_size"),
        *("access_log_roll_up", "access_log_has_grown", "access_log_duration_bucket"),
    }
    assert helpers == in_schema("FUNCTION") - in_schema("VIEW") - internal


def test_error_types_are_documented() -> None:
    assert set(first_column("docs/schema.md", "`error_type`")) == set(ERROR_TYPES)


def test_gap_reasons_are_documented() -> None:
    assert set(first_column("docs/operations.md", "`reason`")) == set(get_args(Reason))


def test_artifact_kinds_are_documented() -> None:
    (listed,) = re.findall(r"artifact_kind IS '(.*); NULL", SCHEMA.read_text(encoding="utf-8"))
    assert first_column("docs/packages.md", "`artifact_kind`") == re.split(", | or ", listed)


def test_counters_are_documented() -> None:
    nowhere = Settings(spool=SpoolSettings(max_bytes=0)).with_dsn("host=/nowhere")
    exporter = Exporter(nowhere)
    exporter.stop()
    documented = set(first_column("docs/mitmweb.md", "counter"))
    assert documented == set(exporter.status())


def test_metrics_are_documented() -> None:
    exporter = Exporter(Settings(spool=SpoolSettings(max_bytes=0)).with_dsn("host=/nowhere"))
    exporter.stop()
    at = "2026-11-27T19:29:32.916+00:00"
    status = {**exporter.status(), "last_written_at": at, "last_error_at": at}
    suffixes = {"counter": "_total", "info": "_info"}
    names = {it.name + suffixes.get(it.type, "") for it in LogCollector(lambda: status).collect()}
    assert set(first_column("docs/monitoring.md", "metric")) == names


def test_alerts_are_documented() -> None:
    (group,) = yaml.safe_load(text_of("configs/prometheus-alerts.yml"))["groups"]
    documented = first_column("docs/monitoring.md", "alert")
    assert documented == [rule["alert"] for rule in group["rules"]]


def test_options_of_the_addon_are_documented() -> None:
    (options,) = re.findall(
        r"^_OPTIONS = \{.*?^\}", text_of("addon/artifactapi.py"), re.MULTILINE | re.DOTALL
    )
    documented = first_column("docs/mitmweb.md", "option")
    assert documented == re.findall(r'^    "(artifactapi_\w+)":', options, re.MULTILINE)


def test_formats_of_lock_files_are_documented() -> None:
    assert set(first_column("docs/cli.md", "`--format`")) == set(FORMATS)


def test_subcommands_and_their_options_are_documented() -> None:
    first = first_column("docs/cli.md", "command")
    assert {name.split()[1] for name in first} == set(main.commands)
    options = {
        option
        for command in (main, *main.commands.values())
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    options -= {"-h", "--version", "--lines", "--follow"}
    text = prose_of(ROOT / "docs" / "cli.md")
    documented = {
        option
        for span in _CODE_SPAN.findall(text)
        for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", span)
    }
    assert documented - {"--help", "-s"} == options


def test_packages_are_documented() -> None:
    documented = {name.rstrip("/") for name in first_column("docs/architecture.md", "package")}
    packages = {
        str(path.parent.relative_to(ROOT))
        for top in ("addon", "exporter")
        for path in (ROOT / top).rglob("__init__.py")
    }
    modules = {"addon/artifactapi.py", "exporter/__init__.py"}
    assert documented == packages - {"addon", "exporter"} | modules


# --- the text


@every_page
def test_named_settings_exist(page: Path) -> None:
    settings = all_settings()
    sections = {name.partition(".")[0] for name in settings if "." in name}
    named = {
        name
        for name in names_in_code(page)
        if name.partition(".")[0] in sections and re.fullmatch(r"\w+\.\w+", name)
    }
    assert named - {"remotes.yaml"} <= set(settings)


@every_page
def test_named_tables_views_and_functions_exist(page: Path) -> None:
    named = {name.partition("(")[0] for name in names_in_code(page)}
    named = {name for name in named if re.fullmatch(r"access_log\w*", name)}
    assert named <= in_schema("TABLE") | in_schema("VIEW") | in_schema("FUNCTION")


@every_page
def test_named_files_exist(page: Path) -> None:
    for span in _CODE_SPAN.findall(prose_of(page)):
        if re.fullmatch(rf"(?:{'|'.join(_FOLDERS)})/[\w./-]*", span) and "what_it_does" not in span:
            assert (ROOT / span).exists(), span


def test_named_recipes_exist_and_all_are_named() -> None:
    recipes = set(re.findall(r"^([\w-]+)(?: [*\w]\S*)*:", text_of("Justfile"), re.MULTILINE))
    named = {
        name
        for page in PAGES
        for name in re.findall(r"\bjust ([a-z][\w-]+)", page.read_text(encoding="utf-8"))
    }
    assert named == recipes - {"default", "run"}


def test_variables_are_named_in_code_and_docs() -> None:
    pattern = re.compile(r"\bARTIFACTAPI_\w+")
    used = {
        name
        for folder in ("addon", "exporter", "tests/support")
        for path in (ROOT / folder).rglob("*.py")
        for name in pattern.findall(path.read_text(encoding="utf-8"))
    }
    named = {name for page in PAGES for name in pattern.findall(page.read_text(encoding="utf-8"))}
    assert named == used


@every_page
def test_shown_log_messages_exist(page: Path) -> None:
    shown = re.findall(r"^    (artifactapi: .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    patterns = [
        re.sub(r"%[-.\d]*[sdf]", "(.*)", re.escape(constant).replace("%\\.", "%."))
        for folder in ("addon", "exporter")
        for path in (ROOT / folder).rglob("*.py")
        for constant in _texts(path)
        if constant.startswith("artifactapi: ")
    ]
    for message in shown:
        assert any(re.fullmatch(pattern, message) for pattern in patterns), message


def _texts(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of mitmproxy's use of pyparsing
def test_example_filter_works() -> None:
    from mitmproxy import flowfilter  # noqa: PLC0415 - warns while it is imported
    from mitmproxy.test import tflow  # noqa: PLC0415

    found = re.search(r"artifactapi_filter='([^']+)'", text_of("docs/mitmweb.md"))
    assert found
    matches = flowfilter.parse(found[1])
    flow = tflow.tflow()
    for url, logged in {
        "http://app.example/health": False,
        "http://mitm.it/cert/pem": False,
        "http://app.example/healthy.txt": True,
    }.items():
        flow.request.url = url
        assert bool(matches(flow)) is logged, url

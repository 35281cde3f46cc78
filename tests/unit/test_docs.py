"""The docs say what the code does, the README is a front page, and every page can be reached from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from exporter import Exporter, Settings
from exporter.postgres.schema import SCHEMA
from exporter.read.session import COLUMN_NAMES
from exporter.settings import SpoolSettings
from exporter.write.gaps import Reason

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def first_cells(page: str) -> list[str]:
    """Everything in backticks in the first cell of each table row of a page."""
    rows = [line for line in text_of(page).splitlines() if line.startswith("| ")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


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


def test_importing_the_exporter_loads_no_mitmproxy() -> None:
    code = "import sys, exporter; print([m for m in sys.modules if m.startswith('mitmproxy')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert done.stdout.strip() == b"[]"


def test_nothing_in_the_script_s_folder_hides_a_module() -> None:
    """The folder stays on sys.path while mitmproxy runs."""
    names = {path.stem for path in (ROOT / "addon").glob("[!_]*") if path.suffix in {"", ".py"}}
    assert {"artifactapi", "flow", "web", "cli"} <= names
    assert not names & sys.stdlib_module_names
    code = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *names], cwd="/", check=True, capture_output=True
    )
    assert done.stdout.strip() == b"[]"


def test_the_readme_is_a_front_page() -> None:
    assert len(text_of("README.md").splitlines()) <= 170
    assert "pkg:" in text_of("README.md")


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda it: it.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page.name}: #{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, new = set(), {README}
    while new:
        reached |= new
        new = {path for page in new for path, _ in links(page) if path.suffix == ".md"} - reached
    assert reached >= {*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"}


def test_the_readme_gives_the_two_commands() -> None:
    readme = text_of("README.md")
    assert "\n    pip install uv && uv run mitmdump -s addon/artifactapi.py\n" in readme
    assert "\n    pip install uv && uv run just test\n" in readme


def test_every_setting_is_documented_with_its_default() -> None:
    document = yaml.safe_load(text_of("configs/artifactapi.yaml"))
    settings = dict(_leaves(document))
    page = text_of("docs/settings.md")
    for name, default in settings.items():
        row = next((it for it in page.splitlines() if it.startswith(f"| `{name}` |")), "")
        assert row, f"docs/settings.md does not document {name}"
        shown = "empty" if default == "" else f"`{json.dumps(default).strip('"')}`"
        assert shown in row, f"docs/settings.md has another default of {name} than {default}"
    assert set(first_cells("docs/settings.md")) == set(settings)


def test_every_column_is_documented() -> None:
    page = text_of("docs/schema.md")
    table = page[page.index("## The table") : page.index("| `error_type` | meaning")]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert rows == list(COLUMN_NAMES)


def test_every_view_is_documented() -> None:
    views = set(re.findall(r"CREATE VIEW (\w+)", SCHEMA.read_text(encoding="utf-8")))
    functions = set(
        re.findall(r"CREATE OR REPLACE FUNCTION (\w+)", SCHEMA.read_text(encoding="utf-8"))
    )
    assert views <= set(first_cells("docs/schema.md"))
    for function in functions:
        assert f"`{function}(" in text_of("docs/schema.md")


def test_every_error_type_and_gap_reason_is_documented() -> None:
    (listed,) = re.findall(
        r"access_log.error_type IS 'NULL = no error; else (.*)'", SCHEMA.read_text()
    )
    error_types = set(re.split(r", | or ", listed))
    page = text_of("docs/schema.md")
    table = page[page.index("| `error_type` | meaning") : page.index("## Other tables")]
    named = {
        name
        for row in table.splitlines()[2:]
        for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])
    }
    assert named == error_types
    assert set(get_args(Reason)) <= set(first_cells("docs/operations.md"))


def test_every_status_counter_is_documented() -> None:
    nowhere = Settings(spool=SpoolSettings(max_bytes=0)).with_dsn("host=/nowhere")
    exporter = Exporter(nowhere)
    exporter.stop()
    assert set(exporter.status()) <= set(first_cells("docs/mitmweb.md"))


def test_every_option_and_subcommand_is_documented() -> None:
    for name in ("artifactapi_config", "artifactapi_dsn", "artifactapi_filter"):
        assert name in first_cells("docs/mitmweb.md")
    done = subprocess.run(
        [Path(sys.executable).with_name("artifactapi"), "--help"],
        check=True,
        capture_output=True,
        text=True,
    )
    listed = done.stdout[done.stdout.index("Commands:") :].splitlines()[1:]
    for line in listed:
        if line.startswith("  ") and not line.startswith("   "):
            assert f"| `artifactapi {line.split()[0]}" in text_of("docs/cli.md"), line


def _leaves(document: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in document.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of mitmproxy's use of pyparsing
def test_the_example_filter_works() -> None:
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

"""What the parts may know of each other, and that the README says what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from exporter.rows.entry import AccessLogEntry

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_importing_the_exporter_loads_no_mitmproxy() -> None:
    code = "import sys, exporter; print([m for m in sys.modules if m.startswith('mitmproxy')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert done.stdout.strip() == b"[]"


def test_no_file_of_the_addon_hides_a_module() -> None:
    """The folder stays on sys.path while mitmproxy runs."""
    names = {path.stem for path in (ROOT / "addon").glob("*.py")} - {"__init__"}
    assert not names & sys.stdlib_module_names
    code = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *names], cwd="/", check=True, capture_output=True
    )
    assert done.stdout.strip() == b"[]"


def test_the_readme_gives_the_two_commands() -> None:
    assert "\n    pip install uv && uv run mitmdump -s addon/artifactapi.py\n" in README
    assert "\n    pip install uv && uv run just test\n" in README


def test_the_readme_lists_each_setting_with_its_default() -> None:
    document = yaml.safe_load((ROOT / "configs" / "artifactapi.yaml").read_text(encoding="utf-8"))
    for name, default in _leaves(document):
        row = next((it for it in README.splitlines() if it.startswith(f"| `{name}` |")), "")
        assert row, f"README says nothing of {name}"
        shown = "empty" if default == "" else f"`{json.dumps(default).strip('"')}`"
        assert shown in row, f"README gives another default of {name} than {default}"


def test_the_readme_lists_each_column() -> None:
    table = README[README.index("## The table") :]
    for column in (*AccessLogEntry._fields, "logged_at"):
        assert f"`{column}`" in table, f"README says nothing of the column {column}"


def test_the_readme_names_each_option_and_subcommand() -> None:
    for name in ("artifactapi_config", "artifactapi_dsn", "artifactapi_filter"):
        assert f"`{name}`" in README
    done = subprocess.run(
        [Path(sys.executable).with_name("artifactapi"), "--help"],
        check=True,
        capture_output=True,
        text=True,
    )
    listed = done.stdout[done.stdout.index("Commands:") :].splitlines()[1:]
    for line in listed:
        if line.startswith("  ") and not line.startswith("   "):
            assert f"`artifactapi {line.split()[0]}" in README, line


def _leaves(document: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in document.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of mitmproxy's use of pyparsing
def test_the_readme_s_filter_is_one() -> None:
    from mitmproxy import flowfilter  # noqa: PLC0415 - warns while it is imported
    from mitmproxy.test import tflow  # noqa: PLC0415

    found = re.search(r"artifactapi_filter='([^']+)'", README)
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

"""Run real package clients through one proxy and compare the rows with each client's lock file or report.

The registries run on this machine, a remotes file names them, and a build ID is the proxy login.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

import psycopg
import pytest

from tests.support.access_log import SCRIPT, AccessLog, Row, temporary_schema
from tests.support.certificates import certificate
from tests.support.packages import pip_command
from tests.support.proxy import Mitm
from tests.support.registries import (
    REMOTES,
    SIGNATURE,
    Registry,
    Served,
    add_crate,
    add_debs,
    add_npm,
    add_repository,
    add_wheels,
)
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.postgres import Postgres

BUILD = "build-42"
SECRET = "x-the-password"


class Artifact(NamedTuple):
    """The facts about one download that a row and the client's own report share."""

    package: str
    version: str | None
    filename: str | None
    size: int


@dataclass
class ClientSetup:
    """The proxy, its access log, and the registries behind it."""

    log: AccessLog
    proxy: Mitm
    secure: Registry
    plain: Registry

    @property
    def proxy_url(self) -> str:
        """The proxy URL with the login, as a build would set it."""
        return self.proxy.url.replace("://", f"://{BUILD}:{SECRET}@")

    def run(self, home: Path, *command: str, **env: str) -> str:
        """Run a client in a clean environment, as a build would; return its output."""
        home.mkdir(exist_ok=True)
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "LC_ALL": "C.UTF-8",
            "http_proxy": self.proxy_url,
            "https_proxy": self.proxy_url,
            **env,
        }
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            cwd=home,
            env=variables,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def start_recording(self) -> Recording:
        """Start to record what registries serve and which rows appear."""
        return Recording(self, len(self.secure.served), len(self.plain.served), self._now())

    def artifacts(self, pattern: str) -> dict[str, tuple[int, int, str]]:
        """Return fetches, bytes and first user from the view `artifact`, by purl.

        Args:
            pattern: A LIKE pattern for the purl.
        """
        sql = "SELECT purl, fetches, bytes, first_user FROM artifact WHERE purl LIKE %s"
        with psycopg.connect(self.log.dsn) as connection:
            rows = connection.execute(sql, (pattern,)).fetchall()
        return {purl: (fetches, size, user) for purl, fetches, size, user in rows}

    def _now(self) -> object:
        with psycopg.connect(self.log.dsn) as connection:
            row = connection.execute("SELECT clock_timestamp()").fetchone()
        assert row
        return row[0]


class Recording(NamedTuple):
    """Everything that happened after one moment.

    Attributes:
        secure: The number of responses that the HTTPS registry had served before.
        plain: The same for the HTTP registry.
        started_at: The server's time at that moment.
    """

    setup: ClientSetup
    secure: int
    plain: int
    started_at: object

    def served(self) -> list[Served]:
        """Return what the registries have served since."""
        return [
            *self.setup.secure.served[self.secure :],
            *self.setup.plain.served[self.plain :],
        ]

    def rows(self, agent: str) -> list[Row]:
        """Wait for the rows since then; return those with a response from a registry.

        Checks that the rows agree with what the registries served, that all come from `agent`, and
        that each has the build ID, except for the 407 responses that asked the client to log in.
        """
        served = Counter(self.served())
        condition = "started_at >= %s AND response_source = 'upstream'"
        rows = self.setup.log.wait_rows(served.total(), condition, self.started_at)
        of_rows = [
            Served(row["method"], row["path"], row["status_code"], row["response_bytes"])
            for row in rows
        ]
        assert Counter(of_rows) == served
        everything = self.setup.log.rows("started_at >= %s", self.started_at)
        challenged = [row for row in everything if row["error_type"] == "proxy_auth"]
        assert len(everything) == len(rows) + len(challenged), everything
        for row in challenged:
            assert (row["status_code"], row["proxy_user"]) == (407, None)
            assert row["purl"] is None
        assert {row["proxy_user"] for row in rows} == {BUILD}
        assert all(row["user_agent"].startswith(agent) for row in everything), everything
        assert {row["error_type"] for row in rows} == {None}
        return rows

    def challenges(self) -> list[Row]:
        """Return the rows of requests that got a 407."""
        return self.setup.log.rows(
            "started_at >= %s AND error_type = 'proxy_auth'", self.started_at
        )


@pytest.fixture(scope="module")
def setup(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientSetup]:
    folder = tmp_path_factory.mktemp("clients")
    pem = certificate(folder)
    remotes, settings = folder / "remotes.yaml", folder / "settings.yaml"
    remotes.write_text(REMOTES)
    settings.write_text(
        f"batch: {{max_seconds: 0.1}}\nremotes: {{file: {json.dumps(str(remotes))}}}\n"
    )
    arguments = ("--proxyauth", "any", "--set", f"artifactapi_config={settings}")
    with (
        temporary_schema(postgres) as dsn,
        Registry(pem) as secure,
        Registry() as plain,
        Mitm(
            folder / "mitm",
            *arguments,
            *("--set", f"ssl_verify_upstream_trusted_ca={pem}"),
            scripts=[SCRIPT],
            env={"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(folder / "home")},
        ) as proxy,
    ):
        yield ClientSetup(AccessLog(dsn), proxy, secure, plain)
        assert proxy.terminate() == 0
        assert "Traceback" not in proxy.output()


def find_program(name: str, package: str) -> str:
    """Return the path of a client; skip the test and name the package if it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: install {package}")
    return path


def _version(path: str) -> tuple[int, ...]:
    # rustup puts a `cargo` on the path even if no toolchain is installed.
    done = subprocess.run([path, "--version"], check=False, capture_output=True, text=True)
    found = re.search(r"\d+(?:\.\d+)+", done.stdout) if done.returncode == 0 else None
    return tuple(int(number) for number in found[0].split(".")) if found else (0,)


def count_downloads(rows: Sequence[Row]) -> Counter[Artifact]:
    """Count the artifacts that reached the client, according to the rows."""
    return Counter(
        Artifact(row["package"], row["version"], row["filename"], row["response_bytes"])
        for row in rows
        if row["artifact_kind"] == "artifact" and row["status_code"] == 200
    )


def count_kinds(rows: Sequence[Row]) -> Counter[str | None]:
    return Counter(row["artifact_kind"] for row in rows)


def test_pip_downloads_match_the_install_report(setup: ClientSetup, tmp_path: Path) -> None:
    try:
        pip = pip_command()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    wheels = add_wheels(
        setup.secure,
        tmp_path / "made",
        ("Demo_Package", "1.2.3"),
        ("zope.thing", "2.0rc1.post3"),
        ("local_build", "1.0+corp.7"),
    )
    recording, report = setup.start_recording(), tmp_path / "report.json"
    common = ("--cert", str(setup.proxy.ca_path), "--no-cache-dir")
    index = ("--index-url", f"{setup.secure.url}/pypi/simple/", "--pre", "--only-binary", ":all:")
    # `pip --isolated` ignores this machine's pip settings, but still uses the proxy variables.
    names = ("Demo_Package", "zope.thing", "local_build")
    setup.run(
        tmp_path / "home",
        *(*pip, *common, "install", *index, "--report", str(report)),
        *("--target", str(tmp_path / "target"), "--no-compile", *names),
    )
    expected: Counter[Artifact] = Counter()
    for item in json.loads(report.read_text())["install"]:
        file = unquote(urlsplit(item["download_info"]["url"]).path.rpartition("/")[2])
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        size = (tmp_path / "made" / file).stat().st_size
        expected[Artifact(name, item["metadata"]["version"], file, size)] += 1
    rows = recording.rows("pip/")
    assert count_downloads(rows) == expected
    assert len(expected) == len(wheels)
    assert count_kinds(rows) == {"index": 3, "sidecar": 3, "artifact": 3}
    assert {row["remote"] for row in rows} == {"our-wheels"}
    sidecars = [row["filename"] for row in rows if row["artifact_kind"] == "sidecar"]
    assert sorted(sidecars) == sorted(f"{wheel.name}.metadata" for wheel in wheels)

    setup.run(
        tmp_path / "home",
        *(*pip, *common, "download", *index, "--no-deps", "--dest", str(tmp_path / "got")),
        "zope.thing",
    )
    (downloaded,) = (tmp_path / "got").iterdir()
    second_download = Artifact(
        "zope-thing", "2.0rc1.post3", downloaded.name, downloaded.stat().st_size
    )
    assert count_downloads(recording.rows("pip/")) == expected + Counter([second_download])
    assert setup.artifacts("pkg:pypi/%") == {
        f"pkg:pypi/{name}": (count, count * wheel.stat().st_size, BUILD)
        for name, count, wheel in zip(
            ("demo-package@1.2.3", "zope-thing@2.0rc1.post3", "local-build@1.0%2Bcorp.7"),
            (1, 2, 1),
            wheels,
            strict=True,
        )
    }


def test_npm_downloads_match_the_lock_file(setup: ClientSetup, tmp_path: Path) -> None:
    npm = find_program("npm", "npm")
    home = tmp_path / "home"
    home.mkdir()
    sizes = {
        name: len(add_npm(setup.secure, name, version, needs))
        for name, version, needs in (
            ("@demo/core", "1.0.0-rc.1", {"left-padding": "^2.1.0", "lodash.thing": "*"}),
            ("left-padding", "2.1.0", {"@demo/x.y_z": "*"}),
            ("lodash.thing", "4.0.1", {}),
            ("@demo/x.y_z", "0.0.7-beta.11", {}),
        )
    }
    dependencies = {"@demo/core": "1.0.0-rc.1", "@demo/x.y_z": "0.0.7-beta.11"}
    manifest = {"name": "build", "version": "1.0.0", "dependencies": dependencies}
    (home / "package.json").write_text(json.dumps(manifest))
    settings = {
        "npm_config_registry": f"{setup.secure.url}/npm/",
        "npm_config_cafile": str(setup.proxy.ca_path),
        "npm_config_update_notifier": "false",
        "npm_config_audit": "false",
    }
    recording = setup.start_recording()
    setup.run(home, npm, "install", "--package-lock-only", "--ignore-scripts", **settings)
    index_rows = recording.rows("npm/")
    assert {row["purl"] for row in index_rows} == {
        "pkg:npm/%40demo/core",
        "pkg:npm/%40demo/x.y_z",
        "pkg:npm/left-padding",
        "pkg:npm/lodash.thing",
    }
    assert set(count_kinds(index_rows)) == {"index"}
    assert "/npm/@demo%2fcore" in {row["path"] for row in index_rows}

    recording = setup.start_recording()
    setup.run(home, npm, "ci", "--cache", str(tmp_path / "empty"), **settings)
    lock = json.loads((home / "package-lock.json").read_text())["packages"]
    expected = Counter(
        Artifact(name, entry["version"], entry["resolved"].rpartition("/")[2], sizes[name])
        for path, entry in lock.items()
        if (name := path.removeprefix("node_modules/"))
    )
    rows = recording.rows("npm/")
    assert count_downloads(rows) == expected
    assert len(expected) == 4
    assert {row["remote"] for row in rows} == {"our-npm"}
    assert setup.artifacts("pkg:npm/%") == {
        f"pkg:npm/{artifact.package.replace('@', '%40')}@{artifact.version}": (
            1,
            artifact.size,
            BUILD,
        )
        for artifact in expected
    }


def test_apt_downloads_match_the_printed_uris(setup: ClientSetup, tmp_path: Path) -> None:
    apt = find_program("apt-get", "apt")
    find_program("dpkg-deb", "dpkg")
    debs = add_debs(
        setup.plain,
        tmp_path / "made",
        ("demo-tool", "1:3.0-1+b1", "all"),
        ("libdemo++1", "2.0~rc1+dfsg-2", "amd64"),
    )
    home = tmp_path / "home"
    for folder in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d", "log"):
        (home / folder).mkdir(parents=True)
    (home / "sources.list").write_text(f"deb [trusted=yes] {setup.plain.url}/apt stable main\n")
    (home / "status").touch()
    (home / "apt.conf").write_text(
        f'Dir "{home}/"; Dir::Etc "{home}/etc"; Dir::Etc::parts "{home}/etc/apt.conf.d";\n'
        f'Dir::Etc::sourcelist "{home}/sources.list"; Dir::Etc::sourceparts "/dev/null";\n'
        'Dir::Etc::preferencesparts "/dev/null";\n'
        f'Dir::State "{home}/state"; Dir::State::status "{home}/status";\n'
        f'Dir::Cache "{home}/cache"; Dir::Log "{home}/log";\n'
        'APT::Architecture "amd64"; APT::Architectures { "amd64"; }; APT::Sandbox::User "";\n'
        'Acquire::Languages "none"; Acquire::Retries "0"; Acquire::By-Hash "no";\n'
    )
    recording, conf = setup.start_recording(), {"APT_CONFIG": str(home / "apt.conf")}
    setup.run(home, apt, "update", **conf)
    rows = recording.rows("Debian APT-HTTP/")
    assert set(count_kinds(rows)) == {"index"}
    assert {row["purl"] for row in rows} == {None}

    recording, names = setup.start_recording(), ("demo-tool", "libdemo++1")
    plan = setup.run(home, apt, "download", "--print-uris", *names, **conf)
    setup.run(home, apt, "download", *names, **conf)
    expected: Counter[Artifact] = Counter()
    for line in plan.splitlines():  # 'URL' NAME_VERSION_ARCH.deb SIZE HASH, with apt's quoting
        found = re.fullmatch(r"'(?P<url>[^']+)' (?P<file>\S+) (?P<size>\d+) .*", line)
        assert found
        name, version, _ = unquote(found["file"]).split("_")
        file = unquote(found["url"].rpartition("/")[2])
        assert (home / found["file"]).stat().st_size == int(found["size"])
        assert ":" not in unquote(file)  # the epoch is from the index
        expected[Artifact(name, version, file, int(found["size"]))] += 1
    rows = recording.rows("Debian APT-HTTP/")
    by_row = Counter(
        {
            a._replace(package=a.package.removeprefix("acme/")): n
            for a, n in count_downloads(rows).items()
        }
    )
    assert by_row == expected
    assert len(expected) == len(debs)
    assert setup.artifacts("pkg:deb/%") == {
        "pkg:deb/acme/demo-tool@1:3.0-1%2Bb1?arch=all": (1, debs[0].stat().st_size, BUILD),
        "pkg:deb/acme/libdemo%2B%2B1@2.0~rc1%2Bdfsg-2?arch=amd64": (
            1,
            debs[1].stat().st_size,
            BUILD,
        ),
    }


def test_cargo_downloads_from_redirect_target_match_the_lock_file(
    setup: ClientSetup, tmp_path: Path
) -> None:
    cargo = find_program("cargo", "cargo 1.68 or newer")
    if _version(cargo) < (1, 68):  # the first version with sparse indexes
        pytest.skip("cargo is too old: install cargo 1.68 or newer")
    home = tmp_path / "home"
    (home / "src").mkdir(parents=True)
    (home / "src" / "lib.rs").touch()
    sizes = {
        (name, version): len(add_crate(setup.secure, name, version, needs))
        for name, version, needs in (
            ("demo-crate", "0.3.0", {"tiny_dep": "1.0.0", "abc": "2.0.0-alpha.1"}),
            ("tiny_dep", "1.0.4+build.5", {}),
            ("abc", "2.0.0-alpha.1", {}),
        )
    }
    (home / "Cargo.toml").write_text(
        '[package]\nname = "build"\nversion = "1.0.0"\nedition = "2021"\n'
        '[dependencies]\ndemo-crate = { version = "0.3", registry = "local" }\n'
    )
    store = tmp_path / "cargo"
    store.mkdir()
    (store / "config.toml").write_text(
        f'[registries.local]\nindex = "sparse+{setup.secure.url}/cargo/index/"\n'
        f'[http]\ncainfo = "{setup.proxy.ca_path}"\n'
    )
    toolchains = Path(os.environ.get("RUSTUP_HOME", Path.home() / ".rustup"))
    env = {"CARGO_HOME": str(store)}
    if toolchains.exists():
        env["RUSTUP_HOME"] = str(toolchains)
    recording = setup.start_recording()
    setup.run(home, cargo, "fetch", **env)
    locked = re.findall(
        r'name = "(.+)"\nversion = "(.+)"\nsource = .*\nchecksum', (home / "Cargo.lock").read_text()
    )
    cached = {file.name: file.stat().st_size for file in store.glob("registry/cache/*/*.crate")}
    assert {f"{name}-{version}.crate": sizes[name, version] for name, version in locked} == cached
    rows = recording.rows("cargo")
    assert count_downloads(rows) == Counter(
        Artifact(name, version, None, sizes[name, version]) for name, version in locked
    )
    assert len(locked) == 3
    files = [row for row in rows if row["path"].startswith("/storage/")]
    assert {(row["host"], row["remote"]) for row in files} == {("127.0.0.1", "our-crates")}
    redirects = [row for row in rows if row["status_code"] == 302]
    assert sorted(row["purl"] for row in redirects) == sorted(row["purl"] for row in files)
    assert count_kinds(rows) == {"index": 4, "artifact": 6}
    assert setup.artifacts("pkg:cargo/%") == {
        f"pkg:cargo/{name}@{version.replace('+', '%2B')}": (1, sizes[name, version], BUILD)
        for name, version in locked
    }


def test_git_clone_is_logged_with_one_login_challenge(setup: ClientSetup, tmp_path: Path) -> None:
    git = find_program("git", "git")
    commit = add_repository(setup.secure, tmp_path / "repositories" / "acme", "tool")
    setup.secure.repositories = tmp_path / "repositories"
    home, recording = tmp_path / "home", setup.start_recording()
    setup.run(
        home,
        *(git, "clone", "-q", f"{setup.secure.url}/git/acme/tool.git"),
        GIT_SSL_CAINFO=str(setup.proxy.ca_path),
        GIT_CONFIG_NOSYSTEM="1",
        GIT_TERMINAL_PROMPT="0",
    )
    assert setup.run(home, git, "-C", "tool", "rev-parse", "HEAD").strip() == commit
    rows = recording.rows("git/")
    assert {row["purl"] for row in rows} == {"pkg:github/acme/tool"}
    assert count_kinds(rows) == {"index": 1, "blob": len(rows) - 1}
    (pack,) = (home / "tool/.git/objects/pack").glob("*.pack")
    assert max(row["response_bytes"] for row in rows) >= pack.stat().st_size
    assert [(row["method"], row["status_code"]) for row in recording.challenges()] == [
        ("CONNECT", 407)
    ]
    assert setup.artifacts("pkg:github/acme/tool%") == {}


def test_redirected_release_keeps_its_purl(
    setup: ClientSetup, tmp_path: Path, postgres: Postgres
) -> None:
    curl = find_program("curl", "curl")
    data = os.urandom(123_456)
    stored = setup.secure.put("/production-release-asset/1234/5f3c", data)
    query = f"X-Amz-Expires=300&X-Amz-Signature={SIGNATURE}"
    asset = "/releases/acme/widget/releases/download/v1.2.3/widget-1.2.3.tar.gz"
    setup.secure.redirect(asset, f"{setup.secure.other_url}{stored}?{query}")
    home, recording = tmp_path / "home", setup.start_recording()
    output = setup.run(
        home,
        *(curl, "-sSfL", "-o", "widget.tar.gz", "-w", "%{size_download} %{num_redirects}"),
        *("--cacert", str(setup.proxy.ca_path), setup.secure.url + asset),
    )
    assert output == f"{len(data)} 1"
    assert (home / "widget.tar.gz").read_bytes() == data
    first, second = recording.rows("curl/")
    purl = "pkg:github/acme/widget@v1.2.3"
    assert (first["status_code"], first["host"], first["purl"]) == (302, "localhost", purl)
    assert (second["status_code"], second["host"], second["purl"]) == (200, "127.0.0.1", purl)
    assert second["query"] == "X-Amz-Expires=REDACTED&X-Amz-Signature=REDACTED"
    assert {first["remote"], second["remote"]} == {"our-releases"}
    assert setup.artifacts("pkg:github/acme/widget%") == {purl: (1, len(data), BUILD)}
    dump = postgres.run("pg_dump", "-d", postgres.dsn())
    assert purl in dump
    assert SIGNATURE not in dump
    assert SECRET not in dump


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_curl_login_challenge_is_logged(setup: ClientSetup, tmp_path: Path, scheme: str) -> None:
    curl = find_program("curl", "curl")
    registry = setup.secure if scheme == "https" else setup.plain
    path = registry.put(f"/plain/{scheme}", b"hello")
    url, recording = registry.url + path, setup.start_recording()
    output = setup.run(
        tmp_path / "home",
        *(curl, "-sSf", "--proxy-anyauth", "--cacert", str(setup.proxy.ca_path), url),
    )
    assert output == "hello"
    (row,) = recording.rows("curl/")
    assert (row["path"], row["response_bytes"]) == (path, 5)
    assert (row["remote"], row["purl"]) == (None, None)
    (challenge,) = recording.challenges()
    assert challenge["method"] == ("CONNECT" if scheme == "https" else "GET")
    assert challenge["host"] == "localhost"


def test_proxy_password_is_not_in_the_log(setup: ClientSetup) -> None:
    eventually(lambda: setup.log.rows("proxy_user = %s", BUILD))
    assert SECRET not in repr(setup.log.rows())

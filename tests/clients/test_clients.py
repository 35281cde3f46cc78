"""Real package clients through one proxy: the rows against what each client's lock file or log says.

Registries on this machine, a user's own table of remotes, and a build id as the proxy's login.
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
    """What both a row and a client's own record say of one download."""

    package: str
    version: str | None
    filename: str | None
    size: int


@dataclass
class World:
    """The proxy, its table, and the registries behind it."""

    log: AccessLog
    proxy: Mitm
    secure: Registry
    plain: Registry

    @property
    def proxy_url(self) -> str:
        """As a build would set it."""
        return self.proxy.url.replace("://", f"://{BUILD}:{SECRET}@")

    def run(self, home: Path, *command: str, **env: str) -> str:
        """Run a client as a build would, with nothing of this machine's settings; its output."""
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

    def begin(self) -> Mark:
        """From here on."""
        return Mark(self, len(self.secure.served), len(self.plain.served), self._now())

    def artifacts(self, pattern: str) -> dict[str, tuple[int, int, str]]:
        """Fetches, bytes and first user of each purl like this, of the table `artifact`."""
        sql = "SELECT purl, fetches, bytes, first_user FROM artifact WHERE purl LIKE %s"
        with psycopg.connect(self.log.dsn) as connection:
            rows = connection.execute(sql, (pattern,)).fetchall()
        return {purl: (fetches, size, user) for purl, fetches, size, user in rows}

    def _now(self) -> object:
        with psycopg.connect(self.log.dsn) as connection:
            row = connection.execute("SELECT clock_timestamp()").fetchone()
        assert row
        return row[0]


class Mark(NamedTuple):
    """A moment before a client ran."""

    world: World
    secure: int
    plain: int
    at: object

    def served(self) -> list[Served]:
        """What the registries have answered since."""
        return [
            *self.world.secure.served[self.secure :],
            *self.world.plain.served[self.plain :],
        ]

    def rows(self, agent: str) -> list[Row]:
        """The rows since, once there is one for each thing that the registries served.

        They say what the registries say, their client is this, and each bears the build's id, but
        for those that asked for it.
        """
        served = Counter(self.served())
        condition = "started_at >= %s AND response_source = 'upstream'"
        rows = self.world.log.wait_rows(served.total(), condition, self.at)
        of_rows = [
            Served(row["method"], row["path"], row["status_code"], row["response_bytes"])
            for row in rows
        ]
        assert Counter(of_rows) == served
        everything = self.world.log.rows("started_at >= %s", self.at)
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
        """Requests that were asked to log in first."""
        return self.world.log.rows("started_at >= %s AND error_type = 'proxy_auth'", self.at)


@pytest.fixture(scope="module")
def world(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
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
        yield World(AccessLog(dsn), proxy, secure, plain)
        assert proxy.terminate() == 0
        assert "Traceback" not in proxy.output()


def program(name: str, package: str) -> str:
    """Where a client is; else the test says what it wants, and does not run."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: install {package}")
    return path


def _version(path: str) -> tuple[int, ...]:
    # rustup puts a cargo on the path that may have none behind it.
    done = subprocess.run([path, "--version"], check=False, capture_output=True, text=True)
    found = re.search(r"\d+(?:\.\d+)+", done.stdout) if done.returncode == 0 else None
    return tuple(int(number) for number in found[0].split(".")) if found else (0,)


def downloads(rows: Sequence[Row]) -> Counter[Artifact]:
    """The artifacts that reached the client, by the rows."""
    return Counter(
        Artifact(row["package"], row["version"], row["filename"], row["response_bytes"])
        for row in rows
        if row["artifact_kind"] == "artifact" and row["status_code"] == 200
    )


def kinds(rows: Sequence[Row]) -> Counter[str | None]:
    return Counter(row["artifact_kind"] for row in rows)


def test_pip_installs_what_the_rows_say(world: World, tmp_path: Path) -> None:
    try:
        pip = pip_command()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    wheels = add_wheels(
        world.secure,
        tmp_path / "made",
        ("Demo_Package", "1.2.3"),
        ("zope.thing", "2.0rc1.post3"),
        ("local_build", "1.0+corp.7"),
    )
    mark, report = world.begin(), tmp_path / "report.json"
    common = ("--cert", str(world.proxy.ca_path), "--no-cache-dir")
    index = ("--index-url", f"{world.secure.url}/pypi/simple/", "--pre", "--only-binary", ":all:")
    # --isolated, which keeps pip from this machine's settings, leaves it the proxy's variable.
    names = ("Demo_Package", "zope.thing", "local_build")
    world.run(
        tmp_path / "home",
        *(*pip, *common, "install", *index, "--report", str(report)),
        *("--target", str(tmp_path / "target"), "--no-compile", *names),
    )
    said: Counter[Artifact] = Counter()
    for item in json.loads(report.read_text())["install"]:
        file = unquote(urlsplit(item["download_info"]["url"]).path.rpartition("/")[2])
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        size = (tmp_path / "made" / file).stat().st_size
        said[Artifact(name, item["metadata"]["version"], file, size)] += 1
    rows = mark.rows("pip/")
    assert downloads(rows) == said
    assert len(said) == len(wheels)
    assert kinds(rows) == {"index": 3, "sidecar": 3, "artifact": 3}
    assert {row["remote"] for row in rows} == {"our-wheels"}
    sidecars = [row["filename"] for row in rows if row["artifact_kind"] == "sidecar"]
    assert sorted(sidecars) == sorted(f"{wheel.name}.metadata" for wheel in wheels)

    world.run(
        tmp_path / "home",
        *(*pip, *common, "download", *index, "--no-deps", "--dest", str(tmp_path / "got")),
        "zope.thing",
    )
    (got,) = (tmp_path / "got").iterdir()
    again = Artifact("zope-thing", "2.0rc1.post3", got.name, got.stat().st_size)
    assert downloads(mark.rows("pip/")) == said + Counter([again])
    assert world.artifacts("pkg:pypi/%") == {
        f"pkg:pypi/{name}": (count, count * wheel.stat().st_size, BUILD)
        for name, count, wheel in zip(
            ("demo-package@1.2.3", "zope-thing@2.0rc1.post3", "local-build@1.0%2Bcorp.7"),
            (1, 2, 1),
            wheels,
            strict=True,
        )
    }


def test_npm_ci_fetches_what_its_lock_file_says(world: World, tmp_path: Path) -> None:
    npm = program("npm", "npm")
    home = tmp_path / "home"
    home.mkdir()
    sizes = {
        name: len(add_npm(world.secure, name, version, needs))
        for name, version, needs in (
            ("@demo/core", "1.0.0-rc.1", {"left-padding": "^2.1.0", "lodash.thing": "*"}),
            ("left-padding", "2.1.0", {"@demo/x.y_z": "*"}),
            ("lodash.thing", "4.0.1", {}),
            ("@demo/x.y_z", "0.0.7-beta.11", {}),
        )
    }
    wants = {"@demo/core": "1.0.0-rc.1", "@demo/x.y_z": "0.0.7-beta.11"}
    manifest = {"name": "build", "version": "1.0.0", "dependencies": wants}
    (home / "package.json").write_text(json.dumps(manifest))
    settings = {
        "npm_config_registry": f"{world.secure.url}/npm/",
        "npm_config_cafile": str(world.proxy.ca_path),
        "npm_config_update_notifier": "false",
        "npm_config_audit": "false",
    }
    mark = world.begin()
    world.run(home, npm, "install", "--package-lock-only", "--ignore-scripts", **settings)
    asked = mark.rows("npm/")
    assert {row["purl"] for row in asked} == {
        "pkg:npm/%40demo/core",
        "pkg:npm/%40demo/x.y_z",
        "pkg:npm/left-padding",
        "pkg:npm/lodash.thing",
    }
    assert set(kinds(asked)) == {"index"}
    assert "/npm/@demo%2fcore" in {row["path"] for row in asked}

    mark = world.begin()
    world.run(home, npm, "ci", "--cache", str(tmp_path / "empty"), **settings)
    lock = json.loads((home / "package-lock.json").read_text())["packages"]
    said = Counter(
        Artifact(name, entry["version"], entry["resolved"].rpartition("/")[2], sizes[name])
        for path, entry in lock.items()
        if (name := path.removeprefix("node_modules/"))
    )
    rows = mark.rows("npm/")
    assert downloads(rows) == said
    assert len(said) == 4
    assert {row["remote"] for row in rows} == {"our-npm"}
    assert world.artifacts("pkg:npm/%") == {
        f"pkg:npm/{each.package.replace('@', '%40')}@{each.version}": (1, each.size, BUILD)
        for each in said
    }


def test_apt_fetches_what_it_says_it_would(world: World, tmp_path: Path) -> None:
    apt = program("apt-get", "apt")
    program("dpkg-deb", "dpkg")
    debs = add_debs(
        world.plain,
        tmp_path / "made",
        ("demo-tool", "1:3.0-1+b1", "all"),
        ("libdemo++1", "2.0~rc1+dfsg-2", "amd64"),
    )
    home = tmp_path / "home"
    for folder in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d", "log"):
        (home / folder).mkdir(parents=True)
    (home / "sources.list").write_text(f"deb [trusted=yes] {world.plain.url}/apt stable main\n")
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
    mark, conf = world.begin(), {"APT_CONFIG": str(home / "apt.conf")}
    world.run(home, apt, "update", **conf)
    rows = mark.rows("Debian APT-HTTP/")
    assert set(kinds(rows)) == {"index"}
    assert {row["purl"] for row in rows} == {None}

    mark, names = world.begin(), ("demo-tool", "libdemo++1")
    plan = world.run(home, apt, "download", "--print-uris", *names, **conf)
    world.run(home, apt, "download", *names, **conf)
    said: Counter[Artifact] = Counter()
    for line in plan.splitlines():  # 'URL' NAME_VERSION_ARCH.deb SIZE HASH, quoted as apt does
        found = re.fullmatch(r"'(?P<url>[^']+)' (?P<file>\S+) (?P<size>\d+) .*", line)
        assert found
        name, version, _ = unquote(found["file"]).split("_")
        file = unquote(found["url"].rpartition("/")[2])
        assert (home / found["file"]).stat().st_size == int(found["size"])
        # What is asked for has no epoch, so neither has the row.
        said[Artifact(name, version.rpartition(":")[2], file, int(found["size"]))] += 1
    rows = mark.rows("Debian APT-HTTP/")
    by_row = Counter(
        {a._replace(package=a.package.removeprefix("acme/")): n for a, n in downloads(rows).items()}
    )
    assert by_row == said
    assert len(said) == len(debs)
    assert world.artifacts("pkg:deb/%") == {
        "pkg:deb/acme/demo-tool@3.0-1%2Bb1?arch=all": (1, debs[0].stat().st_size, BUILD),
        "pkg:deb/acme/libdemo%2B%2B1@2.0~rc1%2Bdfsg-2?arch=amd64": (
            1,
            debs[1].stat().st_size,
            BUILD,
        ),
    }


def test_cargo_fetches_what_its_lock_file_says_from_the_storage_it_is_sent_to(
    world: World, tmp_path: Path
) -> None:
    cargo = program("cargo", "cargo 1.68 or newer")
    if _version(cargo) < (1, 68):  # which first knew sparse indexes
        pytest.skip("cargo is too old: install cargo 1.68 or newer")
    home = tmp_path / "home"
    (home / "src").mkdir(parents=True)
    (home / "src" / "lib.rs").touch()
    sizes = {
        (name, version): len(add_crate(world.secure, name, version, needs))
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
        f'[registries.local]\nindex = "sparse+{world.secure.url}/cargo/index/"\n'
        f'[http]\ncainfo = "{world.proxy.ca_path}"\n'
    )
    toolchains = Path(os.environ.get("RUSTUP_HOME", Path.home() / ".rustup"))
    env = {"CARGO_HOME": str(store)}
    if toolchains.exists():
        env["RUSTUP_HOME"] = str(toolchains)
    mark = world.begin()
    world.run(home, cargo, "fetch", **env)
    locked = re.findall(
        r'name = "(.+)"\nversion = "(.+)"\nsource = .*\nchecksum', (home / "Cargo.lock").read_text()
    )
    kept = {file.name: file.stat().st_size for file in store.glob("registry/cache/*/*.crate")}
    assert {f"{name}-{version}.crate": sizes[name, version] for name, version in locked} == kept
    rows = mark.rows("cargo")
    assert downloads(rows) == Counter(
        Artifact(name, version, None, sizes[name, version]) for name, version in locked
    )
    assert len(locked) == 3
    files = [row for row in rows if row["path"].startswith("/storage/")]
    assert {(row["host"], row["remote"]) for row in files} == {("127.0.0.1", "our-crates")}
    hops = [row for row in rows if row["status_code"] == 302]
    assert sorted(row["purl"] for row in hops) == sorted(row["purl"] for row in files)
    assert kinds(rows) == {"index": 4, "artifact": 6}
    assert world.artifacts("pkg:cargo/%") == {
        f"pkg:cargo/{name}@{version.replace('+', '%2B')}": (1, sizes[name, version], BUILD)
        for name, version in locked
    }


def test_git_clones_and_logs_in_only_when_it_is_asked_to(world: World, tmp_path: Path) -> None:
    git = program("git", "git")
    commit = add_repository(world.secure, tmp_path / "repositories" / "acme", "tool")
    world.secure.repositories = tmp_path / "repositories"
    home, mark = tmp_path / "home", world.begin()
    world.run(
        home,
        *(git, "clone", "-q", f"{world.secure.url}/git/acme/tool.git"),
        GIT_SSL_CAINFO=str(world.proxy.ca_path),
        GIT_CONFIG_NOSYSTEM="1",
        GIT_TERMINAL_PROMPT="0",
    )
    assert world.run(home, git, "-C", "tool", "rev-parse", "HEAD").strip() == commit
    rows = mark.rows("git/")
    assert {row["purl"] for row in rows} == {"pkg:github/acme/tool"}
    assert kinds(rows) == {"index": 1, "blob": len(rows) - 1}
    (pack,) = (home / "tool/.git/objects/pack").glob("*.pack")
    assert max(row["response_bytes"] for row in rows) >= pack.stat().st_size
    assert [(row["method"], row["status_code"]) for row in mark.challenges()] == [("CONNECT", 407)]
    assert world.artifacts("pkg:github/acme/tool%") == {}


def test_a_release_keeps_its_identity_on_the_way_to_its_storage(
    world: World, tmp_path: Path, postgres: Postgres
) -> None:
    curl = program("curl", "curl")
    data = os.urandom(123_456)
    stored = world.secure.put("/production-release-asset/1234/5f3c", data)
    query = f"X-Amz-Expires=300&X-Amz-Signature={SIGNATURE}"
    asset = "/releases/acme/widget/releases/download/v1.2.3/widget-1.2.3.tar.gz"
    world.secure.redirect(asset, f"{world.secure.other_url}{stored}?{query}")
    home, mark = tmp_path / "home", world.begin()
    told = world.run(
        home,
        *(curl, "-sSfL", "-o", "widget.tar.gz", "-w", "%{size_download} %{num_redirects}"),
        *("--cacert", str(world.proxy.ca_path), world.secure.url + asset),
    )
    assert told == f"{len(data)} 1"
    assert (home / "widget.tar.gz").read_bytes() == data
    first, second = mark.rows("curl/")
    purl = "pkg:github/acme/widget@v1.2.3"
    assert (first["status_code"], first["host"], first["purl"]) == (302, "localhost", purl)
    assert (second["status_code"], second["host"], second["purl"]) == (200, "127.0.0.1", purl)
    assert second["query"] == "X-Amz-Expires=REDACTED&X-Amz-Signature=REDACTED"
    assert {first["remote"], second["remote"]} == {"our-releases"}
    assert world.artifacts("pkg:github/acme/widget%") == {purl: (1, len(data), BUILD)}
    dump = postgres.run("pg_dump", "-d", postgres.dsn())
    assert purl in dump
    assert SIGNATURE not in dump
    assert SECRET not in dump


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_curl_that_waits_to_be_asked_leaves_a_row_of_the_challenge(
    world: World, tmp_path: Path, scheme: str
) -> None:
    curl = program("curl", "curl")
    registry = world.secure if scheme == "https" else world.plain
    path = registry.put(f"/plain/{scheme}", b"hello")
    url, mark = registry.url + path, world.begin()
    told = world.run(
        tmp_path / "home",
        *(curl, "-sSf", "--proxy-anyauth", "--cacert", str(world.proxy.ca_path), url),
    )
    assert told == "hello"
    (row,) = mark.rows("curl/")
    assert (row["path"], row["response_bytes"]) == (path, 5)
    assert (row["remote"], row["purl"]) == (None, None)
    (challenge,) = mark.challenges()
    assert challenge["method"] == ("CONNECT" if scheme == "https" else "GET")
    assert challenge["host"] == "localhost"


def test_no_password_of_the_proxy_is_in_its_log(world: World) -> None:
    eventually(lambda: world.log.rows("proxy_user = %s", BUILD))
    assert SECRET not in repr(world.log.rows())

"""Run a small local server that works as a registry for real package clients, and record what it served.

Each `add_*` function creates packages and the indexes that the client needs, under a separate path.
`REMOTES` maps each path to a remote and a format, as a user would for a mirror.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote

from .http_server import HttpServer, QuietHandler
from .packages import make_wheel, noise

if TYPE_CHECKING:
    from pathlib import Path

REMOTES = """
remotes:
  - {name: our-wheels, host: localhost, path: /pypi, format: pypi}
  - {name: our-npm, host: localhost, path: /npm, format: npm}
  - {name: our-crates, host: localhost, path: /cargo, format: cargo}
  - {name: our-gems, host: localhost, path: /gem, format: gem}
  - {name: our-php, host: localhost, path: /composer, format: composer}
  - {name: our-debs, host: localhost, path: /apt, format: deb, vendor: acme}
  - {name: our-git, host: localhost, path: /git, format: github}
  - {name: our-releases, host: localhost, path: /releases, format: github}
"""

# The indexes of `gem` (RubyGems, `Gem::Indexer`) for one gem.
_GEM_INDEXES = """
require "rubygems/package"
spec = Gem::Package.new(ARGV[0]).spec
row = [[spec.name, spec.version, spec.platform.to_s]]
{"specs" => !spec.version.prerelease?, "prerelease_specs" => spec.version.prerelease?}.each do |name, listed|
  File.binwrite("#{name}.4.8.gz", Gem::Util.gzip(Marshal.dump(listed ? row : [])))
end
File.binwrite("rz", Zlib::Deflate.deflate(Marshal.dump(spec)))
"""

OLD, NEW = "1.2.2", "1.2.3"  # versions of packages of which a registry has two

SIGNATURE = "5ecre7" * 10  # of a signed storage URL; must never be stored


class Served(NamedTuple):
    """One response that the server sent."""

    method: str
    path: str  # as received, without the query
    status: int
    size: int  # of the body, in bytes


class _Reply(NamedTuple):
    body: bytes
    content_type: str
    status: int = 200
    location: str | None = None
    digest: str | None = None


class Registry(HttpServer):
    """An HTTP/1.1 server that listens on loopback inside its `with` block. Add its content first.

    Args:
        certificate: A PEM file with a certificate and its key; turns on TLS.

    Attributes:
        served: The responses sent so far, in order.
        repositories: The folder of the git repositories.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.served: list[Served] = []
        self.repositories: Path | None = None
        self._replies: dict[str, _Reply] = {}
        outer = self

        class Handler(_RegistryHandler):
            registry = outer

        super().__init__(Handler, certificate)

    @property
    def other_url(self) -> str:
        """The base URL with the host `127.0.0.1`, which clients and remotes treat as another host."""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def put(self, path: str, body: bytes, content_type: str = "application/octet-stream") -> str:
        """Serve these bytes at a path, in any quoting; return the path."""
        self._replies[unquote(path)] = _Reply(body, content_type)
        return path

    def put_manifest(self, path: str, manifest: dict[str, Any], tag: str | None = None) -> str:
        """Serve an image manifest or index by its digest, and by a tag; return its descriptor's digest."""
        body = json.dumps(manifest).encode()
        digest = f"sha256:{_sha256(body)}"
        for reference in (digest, tag):
            if reference:
                reply = _Reply(body, manifest["mediaType"], digest=digest)
                self._replies[f"{path}/manifests/{reference}"] = reply
        return digest

    def redirect(self, path: str, location: str) -> None:
        """Respond to a path with a redirect."""
        self._replies[unquote(path)] = _Reply(b"", "text/plain", 302, location)

    def reply(self, path: str) -> _Reply:
        """Return the response for a path; a 404 for an unknown one."""
        return self._replies.get(unquote(path)) or _Reply(b"not here\n", "text/plain", 404)


class _RegistryHandler(QuietHandler):
    protocol_version = "HTTP/1.1"
    registry: Registry

    def do_GET(self) -> None:  # noqa: N802 - the base class requires this name
        path, _, query = self.path.partition("?")
        if path.startswith("/git/"):
            self._send_reply(path, self._git(path, query))
        else:
            self._send_reply(path, self.registry.reply(path))

    do_HEAD = do_GET  # noqa: N815 - the base class requires these names
    do_POST = do_GET  # noqa: N815

    def _send_reply(self, path: str, reply: _Reply) -> None:
        sent = b"" if self.command == "HEAD" else reply.body
        # Record it before sending, so that the record exists when the client has the response.
        self.registry.served.append(Served(self.command, path, reply.status, len(sent)))
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        if reply.location is not None:
            self.send_header("Location", reply.location)
        if reply.digest is not None:
            self.send_header("Docker-Content-Digest", reply.digest)
        self.end_headers()
        self.wfile.write(sent)

    def _git(self, path: str, query: str) -> _Reply:
        """Return the response of git-http-backend(1), a CGI program (RFC 3875)."""
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        variables = {
            "GIT_PROJECT_ROOT": str(self.registry.repositories),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path.removeprefix("/git"),
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "PATH": os.environ["PATH"],
        }
        done = subprocess.run(
            ["git", "http-backend"], input=body, env=variables, capture_output=True, check=True
        )
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        lines = (line.partition(": ") for line in head.decode().split("\r\n"))
        fields = {name.lower(): value for name, _, value in lines}
        status = int(fields.get("status", "200").split()[0])
        return _Reply(content, fields.get("content-type", "text/plain"), status)


def add_wheels(
    registry: Registry, folder: Path, *packages: tuple[str, str], root: str = "/pypi"
) -> list[Path]:
    """Add wheels with a simple index (PEP 503) and separate metadata files (PEP 658) at the path `root`."""
    wheels = []
    for name, version in packages:
        wheel = make_wheel(folder, name, version)
        wheels.append(wheel)
        project = name.lower().replace("_", "-").replace(".", "-")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
        path = f"{root}/packages/{project}/{quote(wheel.name)}"
        registry.put(path, wheel.read_bytes())
        registry.put(f"{path}.metadata", metadata)
        link = (
            f'<a href="{path}#sha256={_sha256(wheel.read_bytes())}"'
            f' data-core-metadata="sha256={_sha256(metadata)}">{wheel.name}</a>'
        )
        page = f"<!DOCTYPE html><html><body>{link}</body></html>"
        registry.put(f"{root}/simple/{project}/", page.encode(), "text/html")
    return wheels


def add_npm(
    registry: Registry,
    name: str,
    version: str,
    needs: dict[str, str] | None = None,
    *,
    folder: str = "/npm",
    url: str | None = None,
) -> bytes:
    """Add an npm package with its packument; return its tarball. `url` is that of the host, if another."""
    manifest: dict[str, Any] = {"name": name, "version": version, "dependencies": needs or {}}
    files = {"package/package.json": json.dumps(manifest).encode(), "package/data": noise(20_000)}
    tarball = _tar_gz(files)
    path = f"{folder}/{name}/-/{name.rpartition('/')[2]}-{version}.tgz"
    registry.put(path, tarball)
    integrity = base64.b64encode(hashlib.sha512(tarball).digest()).decode()
    dist = {"tarball": (url or registry.url) + path, "integrity": f"sha512-{integrity}"}
    packument = {
        "name": name,
        "dist-tags": {"latest": version},
        "versions": {version: {**manifest, "dist": dist}},
    }
    registry.put(f"{folder}/{name}", json.dumps(packument).encode(), "application/json")
    return tarball


def add_image(registry: Registry, repository: str, tag: str) -> tuple[str, dict[str, int]]:
    """Add an image for two platforms; return the digest of its tag, and the size of each blob by its path."""
    root, platforms, sizes = f"/v2/{repository}", [], {}
    registry.put("/v2/", b"{}", "application/json")
    for architecture in ("amd64", "arm64"):
        layer = _tar_gz({"data": noise(40_000) + architecture.encode()})
        config: dict[str, Any] = {"architecture": architecture, "os": "linux", "config": {}}
        config["rootfs"] = {
            "type": "layers",
            "diff_ids": [f"sha256:{_sha256(gzip.decompress(layer))}"],
        }
        descriptors = []
        for kind, body in (
            ("config.v1+json", json.dumps(config).encode()),
            ("layer.v1.tar+gzip", layer),
        ):
            digest = f"sha256:{_sha256(body)}"
            sizes[registry.put(f"{root}/blobs/{digest}", body)] = len(body)
            media_type = f"application/vnd.oci.image.{kind}"
            descriptors.append({"mediaType": media_type, "digest": digest, "size": len(body)})
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptors[0],
            "layers": descriptors[1:],
        }
        platforms.append(
            {
                "mediaType": manifest["mediaType"],
                "digest": registry.put_manifest(root, manifest),
                "size": len(json.dumps(manifest)),
                "platform": {"architecture": architecture, "os": "linux"},
            }
        )
    media_type = "application/vnd.oci.image.index.v1+json"
    index = {"schemaVersion": 2, "mediaType": media_type, "manifests": platforms}
    return registry.put_manifest(root, index, tag), sizes


def add_crate(
    registry: Registry, name: str, version: str, needs: dict[str, str] | None = None
) -> bytes:
    """Add a crate to a sparse index; return it. Its download redirects to a signed URL on another host."""
    dependencies = "".join(f'{other} = "{which}"\n' for other, which in (needs or {}).items())
    manifest = (
        f'[package]\nname = "{name}"\nversion = "{version}"\nedition = "2021"\n'
        f"[dependencies]\n{dependencies}"
    )
    root = f"{name}-{version}"
    crate = _tar_gz(
        {
            f"{root}/Cargo.toml": manifest.encode(),
            f"{root}/src/lib.rs": b"// nothing\n",
            f"{root}/data": noise(30_000),
        }
    )
    stored = registry.put(f"/storage/{_sha256(crate)[:20]}", crate)
    storage_url = (
        f"{registry.other_url}{stored}?X-Amz-Credential=AKIDSIGNED&X-Amz-Signature={SIGNATURE}"
    )
    registry.redirect(f"/cargo/api/v1/crates/{name}/{version}/download", storage_url)
    config = json.dumps({"dl": f"{registry.url}/cargo/api/v1/crates"})
    registry.put("/cargo/index/config.json", config.encode(), "application/json")
    common = {"features": [], "optional": False, "default_features": True, "target": None}
    deps = [
        {"name": other, "req": f"^{which}", "kind": "normal", **common}
        for other, which in (needs or {}).items()
    ]
    line = {
        "name": name,
        "vers": version,
        "deps": deps,
        "cksum": _sha256(crate),
        "features": {},
        "yanked": False,
    }
    registry.put(f"/cargo/index/{_index_folder(name)}/{name}", f"{json.dumps(line)}\n".encode())
    return crate


def add_gem(
    registry: Registry, folder: Path, name: str, version: str, *, root: str = "/gem"
) -> bytes:
    """Add a gem with a compact index (RubyGems, "Compact Index API"); return it. Needs Ruby's `gem`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").write_bytes(noise(10_000))
    specification = folder / f"{name}.gemspec"
    specification.write_text(
        f'Gem::Specification.new do |s|\n  s.name = "{name}"\n  s.version = "{version}"\n'
        '  s.summary = "A test"\n  s.authors = ["Tests"]\n  s.files = ["data"]\n'
        '  s.homepage = "https://acme.example"\n  s.license = "MIT"\nend\n'
    )
    file = f"{name}-{version}.gem"
    build = ["gem", "build", "-q", specification.name, "-o", file]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    gem = (folder / file).read_bytes()
    registry.put(f"{root}/gems/{file}", gem)
    subprocess.run(["ruby", "-e", _GEM_INDEXES, file], check=True, capture_output=True, cwd=folder)
    for index in ("specs.4.8.gz", "prerelease_specs.4.8.gz"):
        registry.put(f"{root}/{index}", (folder / index).read_bytes())
    registry.put(
        f"{root}/quick/Marshal.4.8/{name}-{version}.gemspec.rz", (folder / "rz").read_bytes()
    )
    info = f"---\n{version} |checksum:{_sha256(gem)}\n".encode()
    registry.put(f"{root}/info/{name}", info, "text/plain")
    checksum = hashlib.md5(info, usedforsecurity=False).hexdigest()
    versions = f"created_at: 2026-01-01T00:00:00Z\n---\n{name} {version} {checksum}\n"
    registry.put(f"{root}/versions", versions.encode(), "text/plain")
    return gem


def add_composer(
    registry: Registry, name: str, version: str, *, root: str = "/composer", url: str | None = None
) -> bytes:
    """Add a Composer repository with one package, in one file (Composer, "Repositories"); return its archive.

    `url` is that of the host, if another.
    """
    manifest = {"name": name, "version": version}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("composer.json", json.dumps(manifest))
        archive.writestr("data", noise(10_000))
    data = buffer.getvalue()
    path = f"{root}/{name}/{version}/{name.replace('/', '-')}-{version}.zip"
    registry.put(path, data)
    shasum = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    dist = {"type": "zip", "url": (url or registry.url) + path, "reference": None, "shasum": shasum}
    packages = {"packages": {name: {version: {**manifest, "dist": dist}}}}
    registry.put(f"{root}/packages.json", json.dumps(packages).encode(), "application/json")
    return data


def add_go_module(registry: Registry, root: str, module: str, version: str) -> bytes:
    """Add a module to a module proxy (Go Modules Reference, "GOPROXY protocol"); return its archive."""
    buffer, manifest = io.BytesIO(), f"module {module}\n\ngo 1.19\n".encode()
    name = module.rpartition("/")[2].lower()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{module}@{version}/go.mod", manifest)
        archive.writestr(f"{module}@{version}/{name}.go", f"package {name}\n")
        archive.writestr(f"{module}@{version}/data", noise(20_000))
    data = buffer.getvalue()
    escaped = re.sub("[A-Z]", lambda match: f"!{match[0].lower()}", module)
    info = json.dumps({"Version": version, "Time": "2026-01-01T00:00:00Z"}).encode()
    for suffix, body in ((".info", info), (".mod", manifest), (".zip", data)):
        registry.put(f"{root}/{escaped}/@v/{version}{suffix}", body)
    return data


def add_cpan(registry: Registry, root: str, author: str, name: str, version: str) -> bytes:
    """Add a CPAN mirror with one distribution; return it. Its module has the name with `::` for dashes."""
    module, folder = name.replace("-", "::"), f"{name}-{version}"
    source = f"package {module}; our $VERSION = '{version}'; 1;\n".encode()
    makefile = (
        "use ExtUtils::MakeMaker;\n"
        f"WriteMakefile(NAME => '{module}', VERSION => '{version}', MIN_PERL_VERSION => '5.006');\n"
    )
    files = {
        f"{folder}/Makefile.PL": makefile.encode(),
        f"{folder}/MANIFEST": f"Makefile.PL\nlib/{name.replace('-', '/')}.pm\n".encode(),
        f"{folder}/lib/{name.replace('-', '/')}.pm": source,
        f"{folder}/data": noise(10_000),
    }
    data = _tar_gz(files)
    path = f"{author[0]}/{author[:2]}/{author}/{folder}.tar.gz"
    registry.put(f"{root}/authors/id/{path}", data)
    index = f"Line-Count: 1\n\n{module} {version} {path}\n".encode()
    registry.put(f"{root}/modules/02packages.details.txt.gz", gzip.compress(index))
    return data


def add_rock(registry: Registry, root: str, name: str, version: str) -> bytes:
    """Add a LuaRocks server with one source rock; return it."""
    rockspec = (
        f'package = "{name}"\nversion = "{version}"\nsource = {{url = "{name}.lua"}}\n'
        f'build = {{type = "builtin", modules = {{["{name}"] = "{name}.lua"}}}}\n'
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{name}-{version}.rockspec", rockspec)
        archive.writestr(f"{name}.lua", "return {}\n")
    data = buffer.getvalue()
    registry.put(f"{root}/{name}-{version}.src.rock", data)
    manifest = f'commands = {{}}\nmodules = {{}}\nrepository = {{{name} = {{["{version}"] = {{{{arch = "src"}}}}}}}}\n'
    for lua in ("", "-5.1", "-5.2", "-5.3", "-5.4"):
        registry.put(f"{root}/manifest{lua}", manifest.encode())
    return data


def add_debs(registry: Registry, folder: Path, *packages: tuple[str, str, str]) -> list[Path]:
    """Add an apt repository with packages (name, version, architecture) in the component `main` of `stable`."""
    debs, stanzas = [], []
    for name, version, arch in packages:
        root = folder / name
        (root / "DEBIAN").mkdir(parents=True)
        control = (
            f"Package: {name}\nVersion: {version}\nArchitecture: {arch}\n"
            f"Maintainer: Tests <tests@acme.example>\nDescription: {name}\n"
        )
        (root / "DEBIAN" / "control").write_text(control)
        (root / "data").write_bytes(noise(25_000))
        deb = folder / f"{name}_{version.partition(':')[2] or version}_{arch}.deb"
        build = ["dpkg-deb", "--root-owner-group", "-b", str(root), str(deb)]
        subprocess.run(build, check=True, capture_output=True)
        data = deb.read_bytes()
        path = f"pool/main/{name[0]}/{name}/{deb.name}"
        registry.put(f"/apt/{path}", data)
        stanzas.append(f"{control}Filename: {path}\nSize: {len(data)}\nSHA256: {_sha256(data)}\n")
        debs.append(deb)
    listing = "\n".join(stanzas).encode()
    inner = "main/binary-amd64/Packages"
    registry.put(f"/apt/dists/stable/{inner}", listing)
    release = (
        "Origin: acme\nSuite: stable\nCodename: stable\nArchitectures: amd64 all\nComponents: main\n"
        "Date: Mon, 04 May 2026 10:00:00 UTC\n"
        f"SHA256:\n {_sha256(listing)} {len(listing)} {inner}\n"
    )
    registry.put("/apt/dists/stable/Release", release.encode())
    return debs


def add_repository(registry: Registry, folder: Path, name: str) -> str:
    """Add a git repository with one commit; return the commit's hash."""
    registry.repositories = folder
    bare, work = folder / f"{name}.git", folder / "work"
    git = ["git", "-c", "user.name=Tests", "-c", "user.email=tests@acme.example"]
    for command in (["init", "-q", "-b", "main", str(work)], ["init", "-q", "--bare", str(bare)]):
        _run([*git, *command])
    (work / "data").write_bytes(noise(40_000))
    git_in_work = [*git, "-C", str(work)]
    _run([*git_in_work, "add", "data"])
    _run([*git_in_work, "commit", "-q", "-m", "First"])
    _run([*git_in_work, "push", "-q", str(bare), "main"])
    _run(["git", "-C", str(bare), "symbolic-ref", "HEAD", "refs/heads/main"])
    return _run([*git_in_work, "rev-parse", "HEAD"]).strip()


def _run(command: list[str]) -> str:
    env = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def _index_folder(name: str) -> str:
    """Return the index folder of a crate (Cargo book, "Index Format", "Index files").

    Supports names with three letters or more.
    """
    return f"3/{name[0]}" if len(name) == 3 else f"{name[:2]}/{name[2:4]}"


def _tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

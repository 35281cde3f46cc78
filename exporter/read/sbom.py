"""Make a CycloneDX document of the artifacts that builds fetched. Needs the extra `sbom`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.dependency import Dependency
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from psycopg import sql

from .archived import rows_loaded
from .session import read_only

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

    from ..postgres.connection import DeadlineConnection
    from .selection import Selection

_STATEMENT_SECONDS = 600.0
MAX_COMPONENTS = 50_000  # these take a minute and 1.3 GB of memory

_FETCHED_ARTIFACTS = sql.SQL("""
    SELECT purl, min(version), array_agg(DISTINCT remote) FILTER (WHERE remote IS NOT NULL),
           array_agg(DISTINCT proxy_user) FILTER (WHERE proxy_user IS NOT NULL),
           array_agg(DISTINCT ARRAY[coalesce(filename, purl), encode(sha256, 'hex')])
             FILTER (WHERE sha256 IS NOT NULL),
           count(*), min(started_at), max(started_at)
    FROM access_log_fetches WHERE {where}
    GROUP BY purl ORDER BY purl LIMIT %(limit)s
""")


class TooManyError(Exception):
    """There are too many artifacts for one document. The message says what to do."""


class FetchedArtifact(NamedTuple):
    """All fetches of one artifact."""

    purl: str
    version: str | None
    remotes: list[str] | None
    users: list[str] | None
    files: list[list[str]] | None  # name and SHA-256 of each file with a known hash
    fetches: int
    first_at: datetime
    last_at: datetime


def sbom(connection: DeadlineConnection, selection: Selection, archive: Path | None = None) -> str:
    """Return a CycloneDX 1.6 document in JSON of the artifacts that the selected requests fetched.

    Args:
        connection: In autocommit mode.
        selection: Which requests.
        archive: The folder of archived days to search as well.

    Raises:
        ArchiveError: the archive cannot be read.
        TooManyError: there are more than MAX_COMPONENTS artifacts.
        psycopg.Error, DeadlineExceededError: the query failed, took too long, or lost its connection.
    """
    where, values = selection.where()
    with (
        rows_loaded(connection, archive, selection, only_fetches=True),
        read_only(connection, _STATEMENT_SECONDS),
    ):
        rows = connection.execute(
            _FETCHED_ARTIFACTS.format(where=where), {**values, "limit": MAX_COMPONENTS + 1}
        ).fetchall()
    if len(rows) > MAX_COMPONENTS:
        raise TooManyError(
            f"There are more than {MAX_COMPONENTS} artifacts; select fewer with --who or --since."
        )
    subject = Component(
        name=selection.user or selection.who or "all builds", type=ComponentType.APPLICATION
    )
    tool = Component(name="artifactapi", type=ComponentType.APPLICATION)
    components = [_component(FetchedArtifact(*row)) for row in rows]
    dependencies = [Dependency(component.bom_ref) for component in components]
    bom = Bom(
        components=components,
        metadata=BomMetaData(component=subject, tools=ToolRepository(components=[tool])),
        dependencies=[Dependency(subject.bom_ref, dependencies), *dependencies],
    )
    # The dependencies above are complete. The library would check each of them against all components,
    # in quadratic time.
    bom.register_dependency = lambda *_, **__: None  # type: ignore[method-assign]
    return JsonV1Dot6(bom).output_as_string(indent=2)


def _component(artifact: FetchedArtifact) -> Component:
    purl = PackageURL.from_string(artifact.purl)
    files = [
        Component(name=name, type=ComponentType.FILE, hashes=[_sha256(digest)])
        for name, digest in artifact.files or ()
    ]
    return Component(
        name=purl.name,
        group=purl.namespace,
        version=artifact.version or purl.version,
        purl=purl,
        bom_ref=artifact.purl,
        # A package can have several files, such as wheels. Then each hash belongs to a file.
        hashes=files[0].hashes if len(files) == 1 else (),
        components=files if len(files) > 1 else (),
        properties=_properties(artifact),
    )


def _properties(artifact: FetchedArtifact) -> Iterator[Property]:
    for name, values in (("remote", artifact.remotes), ("user", artifact.users)):
        for value in values or ():
            yield Property(name=f"artifactapi:{name}", value=value)
    yield Property(name="artifactapi:fetches", value=str(artifact.fetches))
    yield Property(name="artifactapi:first_at", value=artifact.first_at.isoformat())
    yield Property(name="artifactapi:last_at", value=artifact.last_at.isoformat())


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)

"""The script that mitmproxy loads: options, life cycle and the status command. addon/flow/ reads the flows."""

from __future__ import annotations

import functools
import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

# mitmproxy runs this file by its path, outside any package. The folder above holds both packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mitmproxy import command, ctx, exceptions, flowfilter, hooks, http

from addon.cli.invocation import command_line, database_options
from addon.flow import handoff
from addon.flow.streaming import Streaming
from addon.flow.tracker import FlowTracker
from addon.log_flush import FlushHandler, flush_messages
from addon.web import content_view
from addon.web.content_view import RecentExchanges
from addon.web.query_pool import QueryPool
from exporter import (
    Exporter,
    Settings,
    SettingsError,
    check_dsn,
    has_password,
    load_remotes,
    load_settings,
    resolve_dsn,
)

logger = logging.getLogger(__name__)

_PREFIX = "artifactapi_"
_OPTIONS = {
    "artifactapi_config": "YAML file with all settings of the access log. Empty: the defaults.",
    "artifactapi_dsn": (
        "Database of the access log: a libpq connection string or URI, without a password (use ~/.pgpass, "
        "PGPASSWORD or a service file). Empty: ARTIFACTAPI_DSN, then database.dsn in the settings file, "
        "then an embedded PostgreSQL."
    ),
    "artifactapi_filter": "Filter expression: only flows that match are logged. Empty: all.",
}


class ArtifactApi:
    """Owns the exporter from `running` to `done`."""

    name = "artifactapi"

    def __init__(self) -> None:
        self.flows = FlowTracker()
        # The tracker's hooks become ours: mitmproxy takes 2 us per flow to look into a nested addon.
        for name in hooks.all_hooks.keys() & vars(FlowTracker).keys():
            setattr(self, name, getattr(self.flows, name))
        self.query_pool: QueryPool | None = None  # for the page in mitmweb
        self._recent = RecentExchanges()
        self._settings: Settings | None = None
        self._command_options: list[str] = []  # with these our command reads this log
        self._exporter: Exporter | None = None
        self._flush_handler: FlushHandler | None = None

    def load(self, loader) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001 - as mitmproxy's own
        """Declare our options. All are text: mitmproxy rejects a script's bad number silently (#8013)."""
        for name, text in _OPTIONS.items():
            loader.add_option(name, str, "", text)

    def configure(self, updated: set[str]) -> None:
        """Apply changed options; reject a wrong one with one sentence."""
        try:
            if "artifactapi_filter" in updated:
                self.flows.filter = _filter(ctx.options.artifactapi_filter)
            if updated & {"artifactapi_config", "artifactapi_dsn"}:
                self._apply(_settings(ctx.options.artifactapi_config, ctx.options.artifactapi_dsn))
        except SettingsError as e:
            if self._exporter is not None:
                raise exceptions.OptionsError(str(e)) from e  # type: ignore[no-untyped-call]
            # During startup an ERROR record stops mitmproxy; an exception would add a traceback.
            logger.error("artifactapi: %s", e)  # noqa: TRY400
        if self._settings is not None:
            self.flows.streaming = Streaming(
                may_begin_late=bool(ctx.options.stream_large_bodies),
                digests=self._settings.artifact.sha256,
            )
            self.flows.reads_indexes = self._settings.artifact.debian_epochs

    def running(self) -> None:
        """Start the exporter. Not in `load`: if startup fails after that, mitmproxy never calls `done`."""
        if self._settings is None:
            return
        self._flush_handler = flush_messages()
        for name in ctx.options.deferred:
            if name.startswith(_PREFIX):
                logger.warning(
                    "artifactapi: unknown option %s; it has no effect. The options are %s.",
                    name,
                    ", ".join(_OPTIONS),
                )
        if has_password(ctx.options.artifactapi_dsn):
            logger.warning(
                "artifactapi: artifactapi_dsn holds a password, which mitmweb shows to its users; "
                "move it to ~/.pgpass, PGPASSWORD or a service file."
            )
        exporter, flows = handoff.claim()
        if exporter is not None:
            exporter.reconfigure(self._settings)
        self._exporter = exporter or Exporter(self._settings)
        self.flows.begin = self._exporter.begin
        self.flows.skip = self._exporter.skip
        self.flows.log_access = self._exporter.log_access
        self.flows.wait_for_room = self._exporter.wait_for_room
        self.flows.count_unreadable = self._exporter.count_unreadable
        self.flows.take_over(flows)
        self._exporter.watch(self.flows.open_count, self.flows.oldest_open_at)
        self._log_database(self._exporter, "logging to")
        self._start_views(self._exporter)
        if exporter is None:
            _exempt_from_collections()

    def done(self) -> None:
        """Write what is left, including open flows, within shutdown.drain_seconds.

        During a reload this does not wait: the next instance of the script takes over the exporter.
        """
        exporter, self._exporter = self._exporter, None
        if exporter is None:
            return
        if self.query_pool is not None:
            self.query_pool.close()
            self.query_pool = None
        stop = functools.partial(_stop, gaps_command=command_line(["gaps"], self._command_options))
        if ctx.master.should_exit.is_set():
            self.flows.end_all()
            stop(exporter)
        else:  # the script is being reloaded or removed
            handoff.offer(handoff.Handoff(exporter, self.flows.hand_over()), stop)
        self.flows.begin = self.flows.skip = self.flows.log_access = None
        if self._flush_handler is not None:
            self._flush_handler.stop()

    @command.command("artifactapi.status")  # type: ignore[untyped-decorator]
    def status(self) -> str:
        """Counters of the access log as one JSON object: seen, written, dropped, rejected, waiting and more."""
        if self._exporter is None:
            raise exceptions.CommandError("The access log is not running.")
        return json.dumps(self._exporter.status())

    def counters(self) -> dict[str, Any] | None:
        """The values of `status`; None while nothing is logged."""
        return self._exporter.status() if self._exporter is not None else None

    def row_of(self, flow: http.HTTPFlow) -> str:
        """The row of this flow as text, for the content view."""
        return self._recent.row(flow, self._settings or Settings())

    def _start_views(self, exporter: Exporter) -> None:
        """Offer the content view in mitmweb and the console, and the page in mitmweb.

        The page uses mitmweb internals. If they changed, only the page is missing.
        """
        if not hasattr(ctx.master, "view"):
            return
        self.flows.log_access = self._recent.recording(exporter.log_access)
        content_view.register()
        if not hasattr(ctx.master, "web_url"):
            return
        try:
            from addon.web import log_page  # noqa: PLC0415 - only mitmweb needs it

            address = log_page.register(ctx.master)
        except Exception as e:  # noqa: BLE001
            logger.warning(
                "artifactapi: no access log page in this mitmweb; logging continues: %s (%s)",
                e,
                type(e).__name__,
            )
            return
        self.query_pool = QueryPool(self._settings or Settings())
        logger.info("artifactapi: access log page at %s", address)
        try:
            from addon.web import index_link  # noqa: PLC0415

            index_link.register(ctx.master)
        except Exception as e:  # noqa: BLE001
            logger.warning(
                "artifactapi: no link to the access log page in this mitmweb: %s (%s)",
                e,
                type(e).__name__,
            )

    def _apply(self, settings: Settings) -> None:
        self._settings = settings
        self._command_options = database_options(settings, _path(ctx.options.artifactapi_config))
        if self.query_pool is not None:
            self.query_pool.settings = settings
        if self._exporter is not None:
            self._exporter.reconfigure(settings)
            self._log_database(self._exporter, "now logging to")

    def _log_database(self, exporter: Exporter, verb: str) -> None:
        """Log where the rows go, and the command that shows them."""
        tail = command_line(["tail", "-f"], self._command_options)
        settings = self._settings or Settings()
        if settings.read.dsn or not settings.database.dsn:
            logger.info(
                "artifactapi: %s %s; show the rows with: %s", verb, exporter.database_name, tail
            )
        else:  # the role may be unable to read
            logger.info("artifactapi: %s %s", verb, exporter.database_name)
            exporter.log_command_to_read(tail)


def _settings(config: str, dsn: str) -> Settings:
    settings = load_settings(_path(config))
    for warning in load_remotes(settings).warnings:
        logger.warning("artifactapi: %s", warning)
    settings = settings.with_dsn(resolve_dsn(dsn, settings))
    check_dsn(settings.database.dsn)
    check_dsn(settings.read.dsn, "read.dsn")
    return settings


def _path(config: str) -> Path | None:
    return Path(config).expanduser() if config else None


def _filter(expression: str) -> flowfilter.TFilter | None:
    try:
        return flowfilter.parse(expression) if expression else None
    except ValueError as e:
        raise SettingsError(f"artifactapi_filter: {e}.") from None


def _exempt_from_collections() -> None:
    """Let full garbage collections leave out what is loaded by now, because it stays until the end.

    They took 2 % of mitmdump's CPU time, and more with us than without.
    """
    gc.collect()  # what is garbage already would stay, too
    gc.freeze()


def _stop(exporter: Exporter, gaps_command: str) -> None:
    """Write what is left, and log the result. `gaps_command` lists the gaps."""
    exporter.stop()
    status = exporter.status()
    written = f"{status['written']} {'row' if status['written'] == 1 else 'rows'} written"
    spooled = status["spooled"]
    kept = f", {spooled} kept on disk for the next run" if spooled else ""
    lost = status["dropped"] + status["rejected"] + status["waiting"]
    if lost:
        reason = status["last_error"] or f"see {gaps_command}"
        logger.warning("artifactapi: stopped; %s%s, %d lost: %s", written, kept, lost, reason)
    else:
        logger.info("artifactapi: stopped; %s%s, none lost.", written, kept)


addons = [ArtifactApi()]

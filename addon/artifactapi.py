"""The script mitmproxy loads: options, life cycle and the status command; reading flows is flows.py's job."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

# mitmproxy runs this file by its path, with no package around it: the folder above holds both packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mitmproxy import command, ctx, exceptions, flowfilter, hooks, http

from addon.flow import handoff
from addon.flow.streaming import Streaming
from addon.flow.tracker import FlowTracker
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
        "Where the access log goes: a libpq connection string or URI, without a password (use ~/.pgpass, "
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
        # As our own: of an addon within an addon mitmproxy takes 2 us more for each flow to find the hooks.
        for name in hooks.all_hooks.keys() & vars(FlowTracker).keys():
            setattr(self, name, getattr(self.flows, name))
        self.query_pool: QueryPool | None = None  # where the page in mitmweb asks
        self._recent = RecentExchanges()
        self._settings: Settings | None = None
        self._exporter: Exporter | None = None

    def load(self, loader) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001 - as mitmproxy's own
        """Declare our options. All are text: a script's bad number is refused in silence (#8013)."""
        for name, text in _OPTIONS.items():
            loader.add_option(name, str, "", text)

    def configure(self, updated: set[str]) -> None:
        """Take over changed options; a wrong one is refused with one sentence."""
        try:
            if "artifactapi_filter" in updated:
                self.flows.filter = _filter(ctx.options.artifactapi_filter)
            if updated & {"artifactapi_config", "artifactapi_dsn"}:
                self._take(_settings(ctx.options.artifactapi_config, ctx.options.artifactapi_dsn))
        except SettingsError as e:
            if self._exporter is not None:
                raise exceptions.OptionsError(str(e)) from e  # type: ignore[no-untyped-call]
            # An ERROR before mitmproxy runs stops it; an exception would show a traceback too.
            logger.error("%s", e)  # noqa: TRY400
        if self._settings is not None:
            self.flows.streaming = Streaming(
                may_begin_late=bool(ctx.options.stream_large_bodies),
                digests=self._settings.artifact.sha256,
            )

    def running(self) -> None:
        """Start writing, and say where to. Here and not in `load`: only now will `done` be called."""
        if self._settings is None:
            return
        for name in ctx.options.deferred:
            if name.startswith(_PREFIX):
                logger.warning("There is no option %s; there are %s.", name, ", ".join(_OPTIONS))
        if has_password(ctx.options.artifactapi_dsn):
            logger.warning(
                "artifactapi_dsn holds a password, and mitmweb shows options to its users; "
                "put it into ~/.pgpass, PGPASSWORD or a service file."
            )
        exporter, flows = handoff.claim()
        if exporter is not None:
            exporter.reconfigure(self._settings)
        self._exporter = exporter or Exporter(self._settings)
        self.flows.log_access = self._exporter.log_access
        self.flows.wait_for_room = self._exporter.wait_for_room
        self.flows.count_unreadable = self._exporter.count_unreadable
        self.flows.take_over(flows)
        logger.info(
            "Access log: rows go to %s. See them with: artifactapi tail -f",
            self._exporter.database_name,
        )
        self._show_to_users(self._exporter)

    def done(self) -> None:
        """Write what is left, within shutdown.drain_seconds, flows still under way included.

        On a reload nothing is waited for: the next instance goes on with the same exporter.
        """
        exporter, self._exporter = self._exporter, None
        if exporter is None:
            return
        if self.query_pool is not None:
            self.query_pool.close()
            self.query_pool = None
        if ctx.master.should_exit.is_set():
            self.flows.end_all()
            _end(exporter)
        else:  # the script is being edited, or taken away
            handoff.offer(handoff.Handoff(exporter, self.flows.hand_over()), _end)
        self.flows.log_access = None

    @command.command("artifactapi.status")  # type: ignore[untyped-decorator]
    def status(self) -> str:
        """Counters of the access log as one JSON object: what was seen, written, dropped, rejected, waits."""
        if self._exporter is None:
            raise exceptions.CommandError("The access log is not running.")
        return json.dumps(self._exporter.status())

    def counters(self) -> dict[str, Any] | None:
        """As `status`; None while nothing is logged."""
        return self._exporter.status() if self._exporter is not None else None

    def row_of(self, flow: http.HTTPFlow) -> str:
        """What the log says of this flow, for the content view."""
        return self._recent.row(flow, self._settings or Settings())

    def _show_to_users(self, exporter: Exporter) -> None:
        """The content view where there are users, the page in mitmweb.

        The page builds on what is no public interface: whatever is wrong there costs the page alone.
        """
        if not hasattr(ctx.master, "view"):
            return
        self.flows.log_access = self._recent.remembering(exporter.log_access)
        content_view.register()
        if not hasattr(ctx.master, "web_url"):
            return
        try:
            from addon.web import log_page  # noqa: PLC0415 - of no use but in mitmweb

            address = log_page.register(ctx.master)
        except Exception as e:  # noqa: BLE001
            logger.warning("Access log: no page in this mitmweb (%s: %s).", type(e).__name__, e)
            return
        self.query_pool = QueryPool(self._settings or Settings())
        logger.info("Access log: its page is %s", address)

    def _take(self, settings: Settings) -> None:
        self._settings = settings
        if self.query_pool is not None:
            self.query_pool.settings = settings
        if self._exporter is not None:
            self._exporter.reconfigure(settings)
            logger.info("Access log: rows now go to %s.", self._exporter.database_name)


def _settings(config: str, dsn: str) -> Settings:
    settings = load_settings(Path(config).expanduser() if config else None)
    load_remotes(settings)
    settings = settings.with_dsn(resolve_dsn(dsn, settings))
    check_dsn(settings.database.dsn)
    check_dsn(settings.page.dsn, "page.dsn")
    return settings


def _filter(expression: str) -> flowfilter.TFilter | None:
    try:
        return flowfilter.parse(expression) if expression else None
    except ValueError as e:
        raise SettingsError(f"artifactapi_filter: {e}.") from None


def _end(exporter: Exporter) -> None:
    """Write what is left and say what became of it."""
    exporter.stop()
    status = exporter.status()
    spooled = status["spooled"]
    kept = f", {spooled} kept on disk for the next run" if spooled else ""
    lost = status["dropped"] + status["rejected"] + status["waiting"]
    if lost:
        why = status["last_error"] or "artifactapi gaps says when and why"
        logger.warning(
            "Access log: %d entries written%s, %d lost: %s", status["written"], kept, lost, why
        )
    else:
        logger.info("Access log: %d entries written%s, none lost.", status["written"], kept)


addons = [ArtifactApi()]

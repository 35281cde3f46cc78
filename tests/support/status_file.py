"""A mitmproxy script that writes the status of artifactapi to a file, five times a second.

It adds `open`: how many flows the addon follows at that moment.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitmproxy import ctx, exceptions

if TYPE_CHECKING:
    from mitmproxy.addonmanager import Loader

_INTERVAL_SECONDS = 0.2


class StatusFile:
    """Runs the command `artifactapi.status`, as a user would."""

    def load(self, loader: Loader) -> None:
        """Declare the option for the file."""
        loader.add_option("status_file", str, "", "The status file: one line of JSON each time.")

    def running(self) -> None:
        """Start writing."""
        self._write_status()

    def _write_status(self) -> None:
        try:
            status = json.loads(ctx.master.commands.call("artifactapi.status"))
            addon: Any = ctx.master.addons.lookup["artifactapi"]
            status["open"] = addon.flows.open_count
        except exceptions.CommandError:
            pass  # mitmproxy is reloading the script
        else:
            with Path(ctx.options.status_file).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"at": time.monotonic(), **status}) + "\n")
        asyncio.get_running_loop().call_later(_INTERVAL_SECONDS, self._write_status)


addons = [StatusFile()]

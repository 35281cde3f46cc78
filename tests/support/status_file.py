"""A script for mitmproxy that writes the counters of the access log to a file, some lines a second."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mitmproxy import ctx, exceptions

if TYPE_CHECKING:
    from mitmproxy.addonmanager import Loader

_TICK_SECONDS = 0.2


class StatusFile:
    """Asks for the counters by the command a user would take."""

    def load(self, loader: Loader) -> None:
        """Declare where the lines go."""
        loader.add_option("status_file", str, "", "Where the counters go, a line each time.")

    def running(self) -> None:
        """Begin."""
        self._tick()

    def _tick(self) -> None:
        try:
            status = json.loads(ctx.master.commands.call("artifactapi.status"))
        except exceptions.CommandError:
            pass  # the script is just being loaded anew
        else:
            with Path(ctx.options.status_file).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"at": time.monotonic(), **status}) + "\n")
        asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)


addons = [StatusFile()]

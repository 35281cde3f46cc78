"""Run the `artifactapi` command, and kill the process at a given line of the archive or of pruning.

python -m tests.support.kill_at_line count FILE ARGUMENTS...   writes the lines that ran, with how often, as JSON
python -m tests.support.kill_at_line PATH:LINE HIT ARGUMENTS...  SIGKILL before the line runs for the HIT-th time
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addon.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = (str(_ROOT / "exporter" / "archive"), str(_ROOT / "exporter" / "retention"))

type Trace = Callable[[FrameType, str, Any], Trace | None]


def _trace(on_line: Callable[[str], None]) -> Trace:
    def local(frame: FrameType, event: str, _: Any) -> Trace:
        if event == "line":
            path = Path(frame.f_code.co_filename).relative_to(_ROOT)
            on_line(f"{path}:{frame.f_lineno}")
        return local

    def enter(frame: FrameType, _event: str, _: Any) -> Trace | None:
        return local if frame.f_code.co_filename.startswith(_FOLDERS) else None

    return enter


def _run() -> None:
    mode, argument, *arguments = sys.argv[1:]
    hits: Counter[str] = Counter()

    def count(line: str) -> None:
        hits[line] += 1
        if line == mode and hits[line] == int(argument):
            os.kill(os.getpid(), signal.SIGKILL)

    trace = _trace(count)
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        main(arguments, standalone_mode=True)
    finally:
        sys.settrace(None)
        if mode == "count":
            Path(argument).write_text(json.dumps(hits), encoding="utf-8")


if __name__ == "__main__":
    _run()

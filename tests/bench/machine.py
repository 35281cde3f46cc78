"""Describe the machine without host names and paths, and read the CPU time of other processes."""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import psycopg

_GIB = 1 << 30
_CPUCLOCK_SCHED = 2  # include/linux/posix-timers.h: the CPU clock of a process, by its pid


def describe_machine(dsn: str) -> str:
    """Return one line with the processor, the memory and the versions."""
    with psycopg.connect(dsn) as connection:
        server = connection.info.server_version
    memory = round(psutil.virtual_memory().total / _GIB)
    parts = (
        f"{psutil.cpu_count()} cores of {_processor()}",
        f"{memory} GiB",
        f"{platform.system()} {platform.release().split('-')[0]}",
        f"Python {platform.python_version()}",
        f"mitmproxy {version('mitmproxy')}",
        f"PostgreSQL {server // 10_000}.{server % 10_000} with fsync, on the same machine",
        f"psycopg {version('psycopg')}",
    )
    return ", ".join(parts)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of another process, including threads that have ended."""
    if sys.platform == "linux":
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].replace("(R)", "").split())
    except OSError:
        pass
    return platform.processor() or platform.machine()

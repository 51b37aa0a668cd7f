"""Resident memory of this process: now, and at its highest since a point in time."""

import re
from pathlib import Path

import psutil


def resident_bytes() -> int:
    """What is in RAM now."""
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> None:
    """Begin anew. Linux only; elsewhere the peak covers everything since the process began."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The most that was in RAM since reset_peak()."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

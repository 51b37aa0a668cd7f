"""Resident memory of this process, GiB (2**30 bytes), from /proc (Linux).

The kernel's high-water mark also covers loading, where a checkpoint may be in memory twice. Writing 5 to
clear_refs sets the mark back (man 5 proc_pid_clear_refs), so that it then shows the scoring alone.
"""

from pathlib import Path

_STATUS = Path("/proc/self/status")


def _status_gib(field: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 2**20


def now_gib() -> float:
    """What is resident now."""
    return _status_gib("VmRSS")


def forget_peak() -> None:
    """From here on peak_gib() counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """The most that was resident since the start or since forget_peak()."""
    return _status_gib("VmHWM")

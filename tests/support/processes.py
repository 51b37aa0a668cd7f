"""Waiting for, and looking at, the processes of a run."""

import time
from collections.abc import Callable
from pathlib import Path

HANGS_AFTER_SECONDS = 60.0


def children(pid: int) -> list[int]:
    """Processes that a process has started and that are still there."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def wait_for(condition: Callable[[], object], seconds: float = HANGS_AFTER_SECONDS) -> None:
    """Return when the condition holds; fail where it never does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("waited too long")
        time.sleep(0.05)

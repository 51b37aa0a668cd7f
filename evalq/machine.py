"""The machine and its software, as kept in every record."""

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from evalq.version import __version__

GIB = 2**30


@cache
def environment() -> dict[str, Any]:
    """GPUs, driver, CUDA, CPU, RAM, system, Python and evalq versions. Sizes are in GiB."""
    gpus, driver, cuda = _nvidia()
    return {
        "gpus": gpus,
        "driver": driver,
        "cuda": cuda,
        "cpu": _cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / GIB, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "evalq": __version__,
    }


def _nvidia() -> tuple[list[dict[str, Any]], str | None, str | None]:
    """GPUs, driver and the CUDA version it supports; empty where there is no nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        ).stdout.splitlines()
        header = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [], None, None
    rows = [[part.strip() for part in line.split(",")] for line in lines if line.count(",") == 2]
    gpus = [{"name": name, "memory_gib": round(float(mib) / 1024, 1)} for name, mib, _ in rows]
    cuda = header.split("CUDA Version:")[1].split()[0] if "CUDA Version:" in header else None
    return gpus, rows[0][2] if rows else None, cuda


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    if named:
        return named
    if sys.platform == "darwin":
        run = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return run.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()

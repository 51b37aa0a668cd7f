"""The machine and its software: what every record keeps, and what models can be loaded into.

GPUs are those that nvidia-smi lists (https://docs.nvidia.com/deploy/nvidia-smi/), which needs no torch.
"""

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from evalq.version import __version__

GIB = 2**30
_SECONDS_MAX = 20
_FIELDS = ("name", "memory.total", "driver_version", "compute_cap")


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Args:
        name: as nvidia-smi calls it.
        memory_bytes: of its own, None where it shares the machine's.
        driver: version.
        capability: CUDA's (major, minor), None where the driver is too old to say.
    """

    name: str
    memory_bytes: int | None
    driver: str
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class Machine:
    """What models can be loaded into.

    Args:
        ram_bytes: installed memory.
        gpus: that nvidia-smi lists, none without it.
    """

    ram_bytes: int
    gpus: tuple[Gpu, ...]

    @property
    def memory_bytes(self) -> int:
        """Of all GPUs together, else the RAM."""
        return sum(gpu.memory_bytes or 0 for gpu in self.gpus) or self.ram_bytes


@cache
def this_machine() -> Machine:
    """Ask the system and nvidia-smi."""
    listed = _ask_nvidia(_FIELDS)
    # Drivers before 510 do not know the compute capability, and then answer nothing at all.
    text = _ask_nvidia(_FIELDS[:-1]) if listed is None else listed
    return Machine(int(psutil.virtual_memory().total), parse_gpus(text or ""))


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Rows of nvidia-smi, "NVIDIA H200, 143771, 570.86.15, 9.0" (MiB); rows of another form are left out."""
    gpus = []
    for line in text.splitlines():
        name, *fields = [part.strip() for part in line.split(",")]
        if len(fields) not in (2, 3) or not name:
            continue
        mib, capability = re.fullmatch(r"\d+", fields[0]), re.fullmatch(r"(\d+)\.(\d+)", fields[-1])
        gpus.append(
            Gpu(
                name=name,
                memory_bytes=int(mib[0]) * 2**20 if mib else None,
                driver=fields[1],
                capability=(int(capability[1]), int(capability[2])) if capability and fields[2:] else None,
            )
        )
    return tuple(gpus)


@cache
def environment() -> dict[str, Any]:
    """GPUs, driver, CUDA, CPU, RAM, system, Python and evalq versions. Sizes are in GiB."""
    machine = this_machine()
    ram = machine.ram_bytes
    return {
        "gpus": [{"name": gpu.name, "memory_gib": _gib(gpu.memory_bytes or ram)} for gpu in machine.gpus],
        "driver": machine.gpus[0].driver if machine.gpus else None,
        "cuda": _cuda() if machine.gpus else None,
        "cpu": _cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": _gib(ram),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "evalq": __version__,
    }


def _ask_nvidia(fields: tuple[str, ...] = ()) -> str | None:
    """What nvidia-smi says, the fields or its whole table; None where it is not there or refuses."""
    query = (f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits") if fields else ()
    try:
        run = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, timeout=_SECONDS_MAX, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return run.stdout


def _cuda() -> str | None:
    """The CUDA version that the driver supports, which only the table of nvidia-smi tells."""
    found = re.search(r"CUDA Version:\s*(\d[\d.]*)", _ask_nvidia() or "")
    return found[1] if found else None


def _gib(count: int) -> float:
    return round(count / GIB, 1)


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

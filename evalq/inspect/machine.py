"""GPUs and memory of this machine, as far as they decide what can run."""

import subprocess
from dataclasses import dataclass
from functools import cache

import psutil

_QUERY = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; `capability` is CUDA's (major, minor)."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


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
        return sum(gpu.memory_bytes for gpu in self.gpus) or self.ram_bytes


@cache
def this_machine() -> Machine:
    """Ask the system and nvidia-smi, which needs no torch."""
    try:
        run = subprocess.run(_QUERY, capture_output=True, text=True, timeout=20, check=True)
        gpus = parse_gpus(run.stdout)
    except (OSError, subprocess.SubprocessError):
        gpus = ()
    return Machine(int(psutil.virtual_memory().total), gpus)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Rows of nvidia-smi, "NVIDIA H200, 9.0, 143771" (MiB); rows of another form are left out."""
    gpus = []
    for line in text.splitlines():
        name, _, rest = line.partition(", ")
        try:
            capability, mib = rest.split(", ")
            major, minor = map(int, capability.split("."))
            gpus.append(Gpu(name.strip(), (major, minor), int(mib) * 2**20))
        except ValueError:
            continue
    return tuple(gpus)

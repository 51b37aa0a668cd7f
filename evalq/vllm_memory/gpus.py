"""GPU names -> the memory an engine sees on them.

The figure is CUDA's total (`torch.cuda.mem_get_info()[1]`), the one vLLM multiplies with its utilization. It
is less than the name says by what ECC and the driver keep, and moves by about 0.1 GiB between drivers:
`evalq plan --gpu-memory` takes your own.
"""

from dataclasses import dataclass

from evalq.errors import SpecError


@dataclass(frozen=True)
class PlannedGpu:
    """A kind of GPU.

    Args:
        name: what a person calls it.
        total_gib: CUDA's total memory.
        source: where the figure was seen; "" for the vendor's size less what cards like it keep.
    """

    name: str
    total_gib: float
    source: str = ""

    @property
    def has_large_defaults(self) -> bool:
        """Whether vLLM takes 1024 sequences and 16384 tokens per step, as on an H100, not 256 and 8192.

        vLLM `EngineArgs.get_batch_defaults`: 70 GiB or more, and no A100.
        """
        return self.total_gib >= 70 and "A100" not in self.name.upper()


# What ECC and the driver keep of the size that nvidia-smi names: 0.47 on an H100, 0.60 on an H200.
DRIVER_GIB = 0.55
_VLLM = "https://github.com/vllm-project/vllm/issues/"
GPUS = (
    PlannedGpu("H200", 139.80, "measured"),
    PlannedGpu("H100", 79.18, "measured"),
    PlannedGpu("A100-80GB", 79.15, _VLLM + "4408"),
    PlannedGpu("A100-40GB", 39.49, "measured"),
    PlannedGpu("B200", 178.35, "https://github.com/pytorch/ao/pull/4002"),
    PlannedGpu("L40S", 44.4),
    PlannedGpu("L4", 22.05, "https://github.com/pytorch/pytorch/issues/175666"),
    PlannedGpu("A10", 21.99, "https://github.com/zai-org/CogVLM/issues/236"),
    PlannedGpu("T4", 14.58, "https://github.com/datawhalechina/self-llm/issues/162"),
    PlannedGpu("V100-32GB", 31.74, "https://github.com/liucongg/ChatGLM-Finetuning/issues/73"),
    PlannedGpu("RTX-3090", 23.69, _VLLM + "2140"),
    PlannedGpu("RTX-4090", 23.52, "https://github.com/Soul-AILab/SoulX-FlashTalk/issues/5"),
    PlannedGpu("RTX-5090", 31.4),
    PlannedGpu("RTX-A6000", 47.4),
    PlannedGpu("RTX-PRO-6000", 94.9),
)
# Spellings without the memory, for the size most people have.
_ALIASES = {"a100": "A100-80GB", "v100": "V100-32GB"}


def gpu_named(name: str) -> PlannedGpu:
    """A GPU by name, whatever its case and punctuation ("rtx 4090", "NVIDIA H100").

    Raises:
        SpecError: with the list, for a name that is not in it.
    """
    wanted = _plain(name)
    for gpu in GPUS:
        if wanted in (_plain(gpu.name), _plain(gpu.name.removeprefix("RTX-"))):
            return gpu
    if wanted in _ALIASES:
        return gpu_named(_ALIASES[wanted])
    known = ", ".join(gpu.name for gpu in GPUS)
    raise SpecError(f'unknown GPU "{name}"', f"one of {known}; or its memory with --gpu-memory GIB")


def gpu_reported(name: str, driver_gib: float) -> PlannedGpu:
    """A GPU by the driver's words ("NVIDIA H100 80GB HBM3", 79.65), with the memory CUDA sees of it."""
    for gpu in GPUS:
        family = _plain(gpu.name.removeprefix("RTX-").split("-")[0])
        if family in _plain(name) and 0.98 < gpu.total_gib / driver_gib <= 1:
            return gpu
    return PlannedGpu(name, driver_gib - DRIVER_GIB)


def _plain(name: str) -> str:
    letters = "".join(c for c in name.lower() if c.isalnum())
    for word in ("nvidia", "geforce", "tesla"):
        letters = letters.removeprefix(word)
    return letters.removesuffix("gb")

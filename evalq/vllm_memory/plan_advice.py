"""What would fit instead: more GPUs, other formats."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from evalq.checkpoint.shape import ModelShape
from evalq.vllm_memory.gpus import PlannedGpu
from evalq.vllm_memory.plan import plan
from evalq.vllm_memory.plan_result import VllmPlan
from evalq.vllm_memory.plan_settings import PlanSettings, divides

TP_MAX = 64
# Bits per weight of linear layers with their scales, at the usual row length of some thousands.
FORMATS = (
    ("BF16", 16.0),
    ("FP8 or INT8", 8.01),
    ("NVFP4", 4.5),
    ("MXFP4", 4.25),
    ("INT4 g128", 4.125),
)


@dataclass(frozen=True)
class FormatPlan:
    """The same model with its linear layers stored otherwise, embeddings and head as they are.

    Args:
        name: of the format.
        bits: per weight of the linear layers, scales included.
        weights_gib: per GPU.
        fits: with the length asked for.
        longest: the longest sequence that fits, 0 when none does.
    """

    name: str
    bits: float
    weights_gib: float
    fits: bool
    longest: int


@dataclass(frozen=True)
class Advice:
    """What a person can change.

    Args:
        smallest_tp: fewest GPUs of this kind with which it fits, None when 64 are too few.
        bits: per weight of the linear layers as they are.
        formats: larger ones first.
    """

    smallest_tp: int | None
    bits: float | None
    formats: tuple[FormatPlan, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def advise(shape: ModelShape, gpu: PlannedGpu, settings: PlanSettings, planned: VllmPlan) -> Advice:
    """Look for the smallest tensor parallelism, and try the other formats on the GPUs given."""
    choices = [n for n in range(1, TP_MAX + 1) if divides(shape, n) and shape.intermediate % n == 0]
    # Fewer GPUs than the weights alone need cannot do.
    free = [n for n in choices if planned.weights_gib * settings.tp / n <= 2 * gpu.total_gib]
    smallest = next((n for n in free if plan(shape, gpu, _measured_free(settings, n)).fits), None)
    linear = planned.weights
    bits = 8 * linear.linear / linear.linear_weights if linear.linear_weights else None
    formats = []
    for name, format_bits in FORMATS if bits else ():
        tried = plan(shape, gpu, settings, format_bits)
        formats.append(FormatPlan(name, format_bits, tried.weights_gib, tried.fits, tried.longest))
    return Advice(smallest, bits, tuple(formats))


def _measured_free(settings: PlanSettings, tp: int) -> PlanSettings:
    """The same with another tensor parallelism: what was measured with one does not hold for it."""
    if tp == settings.tp:
        return settings
    return replace(settings, tp=tp, non_torch_gib=None)

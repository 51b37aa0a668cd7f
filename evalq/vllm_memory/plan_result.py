"""The outcome of a plan: figures, status, the verdict in one line."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from evalq.vllm_memory.activation import GIB, GibRange
from evalq.vllm_memory.gpus import PlannedGpu
from evalq.vllm_memory.plan_settings import PlanSettings
from evalq.vllm_memory.pool import KvPool
from evalq.vllm_memory.weights import RankWeights

# What CUDA and the driver hold before anything is loaded: 0.61 of 79.18 GiB, 0.51 of 139.80 measured.
CONTEXT_GIB = 0.6

Status = Literal["fits", "fits_shorter", "no_kv_memory", "does_not_load", "offload_unsupported"]
_CATEGORIES: dict[Status, str | None] = {
    "fits": None,
    "fits_shorter": "max_len_too_large",
    "no_kv_memory": "no_kv_memory",
    "does_not_load": "oom_load",
    "offload_unsupported": "offload_unsupported",
}


@dataclass(frozen=True)
class VllmPlan:
    """What vLLM would do with a model. Memory is GiB per GPU.

    Args:
        model: its name.
        gpu: kind of GPU.
        settings: as given.
        max_len: that was planned for.
        weights: their parts, in bytes.
        weights_gib: that stay on the GPU, after offloading.
        activation: peak.
        non_torch: as above.
        graphs: as above.
        kv_gib: left for the KV cache; negative where something is missing.
        kv_bytes_per_token: that every further token takes, over the layers of one GPU.
        state_bytes: per sequence, over the same layers.
        pool: how the KV memory is cut.
        status: the outcome with the expected figures.
        status_best: with the low ends of the ranges.
        status_worst: with the high ends.
        longest: the longest sequence that fits, 0 when none does.
    """

    model: str
    gpu: PlannedGpu
    settings: PlanSettings
    max_len: int
    weights: RankWeights
    weights_gib: float
    activation: GibRange
    non_torch: GibRange
    graphs: GibRange
    kv_gib: GibRange
    kv_bytes_per_token: int
    state_bytes: int
    pool: KvPool
    status: Status
    status_best: Status
    status_worst: Status
    longest: int

    @property
    def fits(self) -> bool:
        """Whether it starts with the length asked for."""
        return self.status == "fits"

    @property
    def is_certain(self) -> bool:
        """Whether both ends of the ranges come out the same."""
        return self.status == self.status_best == self.status_worst

    @property
    def category(self) -> str | None:
        """Key of `evalq.engine.failures.CATEGORIES` that vLLM's own error would have; None when it fits."""
        return _CATEGORIES[self.status]

    @property
    def budget_gib(self) -> float:
        """Utilization x GPU."""
        return self.settings.budget_share * self.gpu.total_gib

    @property
    def kv_tokens(self) -> int:
        """Capacity of the KV cache as vLLM would report it."""
        return self.pool.tokens(self.kv_gib.expected * GIB, self.max_len, self.settings.version)

    @property
    def sequences(self) -> float:
        """How many sequences of `max_len` tokens the KV cache holds."""
        return self.pool.sequences(self.kv_gib.expected * GIB, self.max_len)

    @property
    def verdict(self) -> str:
        """The outcome and its figures in one line."""
        parts = (
            f"{self.weights_gib:.2f} GiB of weights, {self.activation.expected:.2f} of activations and "
            f"{self.non_torch.expected + self.graphs.expected:.2f} of other memory"
        )
        budget = f"the {self.budget_gib:.2f} GiB that utilization {self.settings.budget_share:g} allows"
        if self.status == "does_not_load":
            return (
                f"does not load: {self.weights_gib:.2f} GiB of weights per GPU and "
                f"{self.activation.expected:.2f} of activations; of the {self.gpu.total_gib:.2f} GiB of "
                f"the {self.gpu.name} about {self.gpu.total_gib - CONTEXT_GIB:.1f} are free"
            )
        if self.status == "offload_unsupported":
            return (
                f"loads with {self.weights_gib:.2f} GiB on the GPU and then fails: vLLM does not offload "
                "models that mix attention and recurrent layers"
            )
        if self.status == "no_kv_memory":
            return f"no memory for the KV cache: {parts}; together more than {budget}"
        held = f"leave {self.kv_gib.expected:.2f} of {budget} for the KV cache"
        if self.status == "fits_shorter":
            return (
                f"fits up to {self.longest:,} tokens, not {self.max_len:,}: {parts} {held}, and one "
                f"sequence of {self.max_len:,} needs {self._needed_gib():.2f}"
            )
        return (
            f"fits: {parts} {held}: {self.kv_tokens:,} tokens, "
            f"{self.sequences:,.1f} sequences of {self.max_len:,}"
        )

    def _needed_gib(self) -> float:
        return self.pool.blocks_for(self.max_len) * self.pool.block_bytes / GIB

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        settings = asdict(self.settings) | {
            "version": ".".join(map(str, self.settings.version)),
            "utilization": self.settings.budget_share,
            "max_len": self.max_len,
        }
        parts = {name: round(value / GIB, 4) for name, value in asdict(self.weights).items()}
        parts.pop("linear_weights")
        return {
            "model": self.model,
            "gpu": self.gpu.name,
            "gpu_total_gib": self.gpu.total_gib,
            "settings": settings,
            "status": self.status,
            "category": self.category,
            "fits": self.fits,
            "certain": self.is_certain,
            "verdict": self.verdict,
            "budget_gib": round(self.budget_gib, 3),
            "weights_gib": round(self.weights_gib, 4),
            "weights_parts_gib": parts,
            "peak_activation_gib": self.activation.as_dict(),
            "non_torch_gib": self.non_torch.as_dict(),
            "cudagraph_gib": self.graphs.as_dict(),
            "kv_cache_gib": self.kv_gib.as_dict(),
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "state_bytes_per_sequence": self.state_bytes,
            "kv_cache_tokens": self.kv_tokens,
            "sequences": round(self.sequences, 2),
            "longest": self.longest,
        }

"""How vLLM would be started, as far as its memory is concerned, and what it would refuse at once."""

from dataclasses import asdict, dataclass

from evalq.checkpoint.shape import SIZE_MAX, ModelShape
from evalq.errors import SpecError
from evalq.vllm_memory.activation import EngineStep, Version
from evalq.vllm_memory.gpus import PlannedGpu

DEFAULT_VERSION: Version = (0, 26)
# 0.9 in every version up to 0.29, 0.92 in 0.32 and 0.33 (vLLM `CacheConfig.gpu_memory_utilization`).
_UTILIZATION_092_FROM: Version = (0, 30)
# vLLM `LoRAConfig.max_lora_rank`; other ranks take the next one.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class PlanSettings:
    """How vLLM would be started; names are its own where it has them.

    Args:
        tp: tensor_parallel_size.
        pp: pipeline_parallel_size.
        utilization: gpu_memory_utilization, None for the version's default.
        max_len: max_model_len, None for the model's positions.
        kv_dtype: kv_cache_dtype: "auto" (16 bits) or a name that starts with fp8.
        lora_rank: of the adapters, 0 without any.
        max_loras: adapters at once.
        cpu_offload_gib: cpu_offload_gb, which vLLM counts in GiB.
        eager: enforce_eager.
        max_num_seqs: None for vLLM's default on the GPU.
        max_num_batched_tokens: the same.
        version: of vLLM, (0, 26).
        activation_gib: a measured peak activation instead of the estimate.
        non_torch_gib: the same for non-torch memory.
        graphs_gib: the same for what CUDA graphs take from the budget.
    """

    tp: int = 1
    pp: int = 1
    utilization: float | None = None
    max_len: int | None = None
    kv_dtype: str = "auto"
    lora_rank: int = 0
    max_loras: int = 1
    cpu_offload_gib: float = 0.0
    eager: bool = False
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    version: Version = DEFAULT_VERSION
    activation_gib: float | None = None
    non_torch_gib: float | None = None
    graphs_gib: float | None = None

    @property
    def budget_share(self) -> float:
        """The utilization that applies."""
        if self.utilization is not None:
            return self.utilization
        return 0.92 if self.version >= _UTILIZATION_092_FROM else 0.9

    @property
    def max_lora_rank(self) -> int:
        """The slot an adapter takes: its rank, rounded up to one that vLLM knows."""
        return next((rank for rank in LORA_RANKS if rank >= self.lora_rank), 0) if self.lora_rank else 0

    def step(self, gpu: PlannedGpu) -> EngineStep:
        """One step's tokens and sequences; vLLM's defaults depend on the GPU (`get_batch_defaults`)."""
        tokens, sequences = (16384, 1024) if gpu.has_large_defaults else (8192, 256)
        return EngineStep(self.max_num_batched_tokens or tokens, self.max_num_seqs or sequences)


def check(shape: ModelShape, gpu: PlannedGpu, settings: PlanSettings) -> None:
    """Refuse what vLLM would refuse, in one line.

    Raises:
        SpecError: tp or pp that do not divide, a length beyond the model's, a rank without a slot, a number
            that no machine has.
    """
    for name, value in (asdict(settings) | {"gpu_memory": gpu.total_gib}).items():
        if isinstance(value, int | float) and value > SIZE_MAX:
            raise SpecError(f"--{name.replace('_', '-')} is larger than any machine", f"at most {SIZE_MAX}")
    tp, pp = settings.tp, settings.pp
    if not divides(shape, tp):
        choices = ", ".join(str(n) for n in range(1, 65) if divides(shape, n))
        raise SpecError(
            f"--tp {tp} does not divide the {shape.heads} heads ({shape.kv_heads} of keys) of {shape.name}",
            f"one of {choices}",
        )
    if pp > shape.layers:
        raise SpecError(
            f"--pp {pp} is more than the {shape.layers} layers of {shape.name}", "lower it, or use --tp"
        )
    if settings.max_len and shape.max_positions and settings.max_len > shape.max_positions:
        raise SpecError(
            f"--max-len {settings.max_len} is more than the {shape.max_positions} positions of {shape.name}",
            f"at most {shape.max_positions}",
        )
    if settings.lora_rank > LORA_RANKS[-1]:
        raise SpecError(f"--lora-rank {settings.lora_rank}: vLLM has slots up to {LORA_RANKS[-1]}")


def divides(shape: ModelShape, tp: int) -> bool:
    """Whether `tp` GPUs can share the model's layers: whole heads, of keys whole or repeated ones."""
    if not shape.heads or tp == 1:
        return True
    keys = 1 if shape.is_mla else shape.kv_heads
    return shape.heads % tp == 0 and (keys % tp == 0 or tp % keys == 0)

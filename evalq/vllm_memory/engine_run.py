"""One start of an engine: what it is, where its memory went, how it ended.

GiB are 2**30 bytes per GPU, as in vLLM's log (which called them GB until spring 2025). With tensor or
pipeline parallelism a figure is that of the worker with most; the KV cache is that of the worker with least,
because every worker gets the same number of blocks.
"""

from dataclasses import dataclass
from typing import Literal

from evalq.engine.failures import CATEGORIES

Status = Literal["success", "failed", "incomplete"]


@dataclass(frozen=True)
class MemoryBreakdown:
    """Where the memory of one GPU went, GiB.

    Args:
        weights_gib: of the model as loaded.
        peak_activation_gib: of PyTorch at the largest batch, above the weights.
        non_torch_gib: NCCL, CUDA context growth and the like.
        cudagraph_gib: of captured graphs; free memory before minus after, so it can be below 0.
        kv_cache_gib: what was left for it; below 0 where nothing was.
    """

    weights_gib: float | None = None
    peak_activation_gib: float | None = None
    non_torch_gib: float | None = None
    cudagraph_gib: float | None = None
    kv_cache_gib: float | None = None


@dataclass(frozen=True)
class WorkerRank:
    """One worker process as its log lines call it."""

    process: str
    memory: MemoryBreakdown
    load_seconds: float | None


@dataclass(frozen=True)
class StartedEngine:
    """What was started. None where the log does not say."""

    model: str
    version: str | None = None
    generation: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    max_model_len: int | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    data_parallel: int | None = None
    eager: bool = False


@dataclass(frozen=True)
class DeviceMemory:
    """The memory there was: of a GPU, or of a NUMA node for vLLM on a CPU.

    Args:
        kind: "cuda", "cpu", ...
        total_gib: as vLLM sees it.
        free_gib: at the start.
        utilization: the share of the total asked for (gpu_memory_utilization).
        requested_gib: that share.
    """

    kind: str | None = None
    total_gib: float | None = None
    free_gib: float | None = None
    utilization: float | None = None
    requested_gib: float | None = None


@dataclass(frozen=True)
class StartSeconds:
    """How long the steps of a start took."""

    load: float | None = None
    compile: float | None = None
    graph_capture: float | None = None
    init: float | None = None


@dataclass(frozen=True)
class KvCache:
    """The KV cache in tokens, and the values of --kv-cache-memory that vLLM recommends, bytes."""

    tokens: int | None = None
    sequences: float | None = None
    requested_bytes: int | None = None
    whole_gpu_bytes: int | None = None


@dataclass(frozen=True)
class RunFailure:
    """How a run ended, with the figures of the message.

    Args:
        category: a key of `evalq.engine.failures.CATEGORIES`.
        message: the engine's own words, one line.
        line: in its log; 0 where there is none.
        tried_gib: the allocation that did not fit.
        free_gib: what was free on the device then.
        in_use_gib: what the process held.
        pytorch_gib: of that, what PyTorch had allocated.
        needed_gib: KV cache that one sequence of max_model_len needs.
        available_gib: KV cache there was.
        longest: the longest sequence that fits, tokens.
    """

    category: str
    message: str
    line: int = 0
    tried_gib: float | None = None
    free_gib: float | None = None
    in_use_gib: float | None = None
    pytorch_gib: float | None = None
    needed_gib: float | None = None
    available_gib: float | None = None
    longest: int | None = None

    @property
    def meaning(self) -> str:
        """The category in words; stored results may hold one that this version does not know."""
        known = CATEGORIES.get(self.category)
        return known.meaning if known else "failed"


@dataclass(frozen=True)
class EngineRun:
    """One start of an engine; `predicted` is what evalq expected before it."""

    status: Status
    engine: StartedEngine
    memory: MemoryBreakdown = MemoryBreakdown()
    device: DeviceMemory = DeviceMemory()
    cache: KvCache = KvCache()
    seconds: StartSeconds = StartSeconds()
    failure: RunFailure | None = None
    recommendations: tuple[str, ...] = ()
    ranks: tuple[WorkerRank, ...] = ()
    source: str = ""
    line: int = 0
    predicted: MemoryBreakdown | None = None

    @property
    def category(self) -> str | None:
        """Of the failure, if it failed."""
        return self.failure.category if self.failure else None

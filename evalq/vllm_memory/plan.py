"""Will a model fit on a GPU with vLLM, and how long a text will it hold: arithmetic, nothing is started.

    KV cache = utilization * GPU - weights - peak activation - non-torch - CUDA graphs

Weights and bytes per token are exact (`evalq.vllm_memory.weights`, `kv`, `pool`); the other three are
estimates with a range (`evalq.vllm_memory.activation`), or what you measured.
"""

from dataclasses import dataclass, replace

from evalq.checkpoint.shape import ModelShape
from evalq.errors import SpecError
from evalq.vllm_memory.activation import GIB, GibRange, cuda_graphs, non_torch, peak_activation
from evalq.vllm_memory.gpus import PlannedGpu
from evalq.vllm_memory.kv import CacheLayer, cache_layers
from evalq.vllm_memory.plan_result import CONTEXT_GIB, Status, VllmPlan
from evalq.vllm_memory.plan_settings import PlanSettings, check
from evalq.vllm_memory.pool import KvPool, make_pool
from evalq.vllm_memory.weights import RankWeights, rank_weights, stages

__all__ = ["PlanSettings", "plan"]


def plan(
    shape: ModelShape, gpu: PlannedGpu, settings: PlanSettings, linear_bits: float | None = None
) -> VllmPlan:
    """Plan a model on a GPU.

    Args:
        shape: of the model.
        gpu: kind and memory; of several, each.
        settings: how vLLM would be started.
        linear_bits: store linear layers in so many bits per weight instead of as the files do.

    Raises:
        SpecError: settings that vLLM would refuse, or an architecture whose cache is not known.
    """
    check(shape, gpu, settings)
    max_len = settings.max_len or shape.max_positions
    if max_len is None:
        raise SpecError(f"{shape.name}: its config.json does not say how long a text may be", "add --max-len")
    layers, weights = _fullest_stage(shape, settings)
    if not any(cached.bytes for layer in layers for cached in layer):
        raise SpecError(
            f"{shape.name}: by its config.json no layer on the fullest GPU keeps a KV cache",
            "take the original config.json",
        )
    if linear_bits is not None:
        in_bits = round(weights.linear_weights * linear_bits / 8)
        weights = replace(weights, files=weights.files - weights.linear + in_bits)
        weights = replace(weights, layers=weights.layers - weights.linear + in_bits, linear=in_bits)
    step = settings.step(gpu)
    pool = make_pool(layers, step.tokens)
    offloaded = min(settings.cpu_offload_gib * GIB, weights.layers)
    weights_gib = (weights.total - offloaded) / GIB
    activation = _measured(settings.activation_gib) or peak_activation(
        shape, step, settings.tp, settings.version
    )
    other = _measured(settings.non_torch_gib) or non_torch(settings.tp * settings.pp)
    graphs = _measured(settings.graphs_gib) or cuda_graphs(settings.version, settings.eager)
    budget = settings.budget_share * gpu.total_gib - weights_gib
    kv = GibRange(
        low=budget - activation.high - other.high - graphs.high,
        expected=budget - activation.expected - other.expected - graphs.expected,
        high=budget - activation.low - other.low - graphs.low,
    )
    question = _Question(gpu.total_gib, weights_gib, pool, max_len, offloaded > 0 and pool.has_state)
    cached = [cache for layer in layers for cache in layer]
    return VllmPlan(
        model=shape.name,
        gpu=gpu,
        settings=settings,
        max_len=max_len,
        weights=weights,
        weights_gib=weights_gib,
        activation=activation,
        non_torch=other,
        graphs=graphs,
        kv_gib=kv,
        kv_bytes_per_token=_per_token(cached),
        state_bytes=sum(cache.bytes for cache in cached if cache.kind == "state"),
        pool=pool,
        status=_status(question, kv.expected, activation.expected),
        status_best=_status(question, kv.high, activation.low),
        status_worst=_status(question, kv.low, activation.high),
        longest=pool.longest(kv.expected * GIB, shape.max_positions or max_len),
    )


@dataclass(frozen=True)
class _Question:
    """What does not change between the ends of the ranges."""

    gpu_gib: float
    weights_gib: float
    pool: KvPool
    max_len: int
    offloads_hybrid: bool


def _status(asked: _Question, kv_gib: float, activation_gib: float) -> Status:
    """What happens first, in the order of vLLM's start."""
    if asked.weights_gib + activation_gib > asked.gpu_gib - CONTEXT_GIB:
        return "does_not_load"
    if asked.offloads_hybrid:
        return "offload_unsupported"
    if asked.pool.longest(kv_gib * GIB, 1) == 0:
        return "no_kv_memory"
    return "fits" if asked.pool.sequences(kv_gib * GIB, asked.max_len) >= 1 else "fits_shorter"


def _fullest_stage(shape: ModelShape, settings: PlanSettings) -> tuple[list[list[CacheLayer]], RankWeights]:
    """Caches and weights of the pipeline stage with most weights, which has least room."""
    element_bytes = 1 if settings.kv_dtype.startswith("fp8") else 2
    caches = cache_layers(shape, element_bytes, settings.tp)
    slots = (settings.max_lora_rank, settings.max_loras)
    weights = [rank_weights(shape, settings.tp, settings.pp, stage, *slots) for stage in range(settings.pp)]
    fullest = max(range(settings.pp), key=lambda stage: weights[stage].total)
    layers = stages(shape.layers, settings.pp)[fullest]
    return caches[layers.start : layers.stop], weights[fullest]


def _per_token(cached: list[CacheLayer]) -> int:
    """Bytes that every further token takes; of a model of windows only, those within the window."""
    full = sum(cache.bytes for cache in cached if cache.kind == "full")
    return full or sum(cache.bytes for cache in cached if cache.kind != "state")


def _measured(gib: float | None) -> GibRange | None:
    return None if gib is None else GibRange(gib, gib, gib)

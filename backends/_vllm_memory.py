"""What vLLM allocated, asked of its worker processes, and read from its log where they do not tell.

Attributes are looked up by name because they come and go between versions; what one lacks is left out.
Values are those of the worker that has most, in GiB (2**30 bytes) unless a name says otherwise.
"""

from typing import Any

from evalq.vllm_memory import figures
from evalq.vllm_memory.log import parse_line

GIB = 2**30


def used_memory(llm: Any, log: str) -> dict[str, float]:
    """Weights, activations, KV cache and what else a started engine reports.

    Args:
        llm: vllm.LLM.
        log: what it printed while it started.

    Keys: weights_gib, peak_activation_gib, non_torch_gib, cuda_graphs_gib, kv_cache_gib, kv_cache_tokens,
    requested_gib, device_total_gib. `kv_cache_memory_bytes` is the value that reserves the same cache again.
    """
    found = _logged(log)
    reported: dict[str, float] = {}
    for worker in llm.collective_rpc(_of_worker):
        for name, value in worker.items():
            reported[name] = max(value, reported.get(name, value))
    found |= reported
    cache = llm.llm_engine.vllm_config.cache_config
    tokens = getattr(cache, "kv_cache_size_tokens", None)
    if tokens is None and cache.num_gpu_blocks:
        tokens = cache.num_gpu_blocks * cache.block_size
    if tokens:
        found["kv_cache_tokens"] = float(tokens)
    if "kv_cache_gib" not in found and getattr(cache, "kv_cache_memory_bytes", None):
        found["kv_cache_gib"] = cache.kv_cache_memory_bytes / GIB
    if "kv_cache_gib" in found:
        found["kv_cache_memory_bytes"] = found["kv_cache_gib"] * GIB
    return found


def _logged(log: str) -> dict[str, float]:
    """The same from the lines of a log, where it has them."""
    lines = [parse_line(number, line) for number, line in enumerate(log.splitlines(), 1)]
    total = figures.over_processes(figures.collect(lines))
    parts = figures.breakdown(total)
    tokens = figures.cache(total, None).tokens
    found = {
        "weights_gib": parts.weights_gib,
        "peak_activation_gib": parts.peak_activation_gib,
        "non_torch_gib": parts.non_torch_gib,
        "cuda_graphs_gib": parts.cudagraph_gib,
        "kv_cache_gib": parts.kv_cache_gib,
        "kv_cache_tokens": tokens,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def peak_bytes(llm: Any) -> int:
    """Most bytes that torch allocated on all GPUs together, the KV cache included."""
    return sum(llm.collective_rpc(_peak_of_worker))


def _of_worker(worker: Any) -> dict[str, float]:
    runner = worker.model_runner
    # A CPU build does not say; what its packed kernels keep is in no parameter.
    weights = getattr(runner, "model_memory_usage", None) or None
    in_bytes = {
        "weights_gib": weights,
        "peak_activation_gib": getattr(worker, "peak_activation_memory", None),
        "non_torch_gib": getattr(worker, "non_torch_memory", None),
        "cuda_graphs_gib": getattr(worker, "cudagraph_memory_estimate", None),
        "kv_cache_gib": getattr(worker, "available_kv_cache_memory_bytes", None),
        "requested_gib": getattr(worker, "requested_memory", None),
        "device_total_gib": getattr(getattr(worker, "init_snapshot", None), "total_memory", None),
    }
    consumed = getattr(worker, "total_consumed", None)
    if in_bytes["non_torch_gib"] is None and consumed is not None and weights is not None:
        in_bytes["non_torch_gib"] = consumed - weights
    return {name: float(value) / GIB for name, value in in_bytes.items() if value is not None}


def _peak_of_worker(worker: Any) -> int:
    import torch

    return int(torch.cuda.max_memory_allocated())

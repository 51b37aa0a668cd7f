"""What to do about a run: the KV cache to reserve, or how to get a failed one to start.

vLLM recommends, in bytes per GPU, after its graphs are captured,

    --kv-cache-memory = KV cache - CUDA graphs - 150 MiB

within the requested memory, and the same plus (free at the start - requested) for the whole GPU: the KV cache
it made is requested - weights - activation - non-torch, the graphs come on top, and 150 MiB are left as a
margin (`compile_or_warm_up_model` in `vllm/v1/worker/gpu_worker.py`, from 0.10.2). Bytes that a log has are
shown as they are; where it has only the two figures, rounded to 0.01 GiB, the value is right within 0.01 GiB
(10.7 MB), which the margin covers.
"""

import math
import re
from shlex import quote

from evalq.engine.failures import CATEGORIES
from evalq.vllm_memory.engine_run import EngineRun

GIB = 2**30
BUFFER_BYTES = 150 * 2**20
ROUNDING_GIB = 0.01  # two figures, each within 0.005
BLOCK_TOKENS = 16
_FIRST_WITH_OPTION = (0, 10, 2)


def kv_cache_memory_bytes(kv_cache_gib: float, cudagraph_gib: float) -> int:
    """--kv-cache-memory that gives this KV cache again without profiling, bytes per GPU."""
    return int((kv_cache_gib - cudagraph_gib) * GIB) - BUFFER_BYTES


def recommendations(run: EngineRun) -> tuple[str, ...]:
    """One sentence each, the most specific first."""
    if run.failure is None:
        return _for_success(run)
    general = (CATEGORIES[run.failure.category].remedy,)
    if run.failure.category == "max_len_too_large":
        return _for_max_len(run) or general
    specific = {
        "oom_load": _for_oom_load,
        "oom_forward": _for_oom_forward,
        "no_kv_memory": _for_no_kv_memory,
        "gpu_busy": _for_busy,
    }.get(run.failure.category)
    return (*specific(run), *general) if specific else general


def _for_success(run: EngineRun) -> tuple[str, ...]:
    if run.cache.requested_bytes is not None and run.cache.whole_gpu_bytes is not None:
        return (
            _sentence(run.cache.requested_bytes, "fits into the requested memory", "", run),
            _sentence(run.cache.whole_gpu_bytes, "uses the whole GPU", "", run),
        )
    kv_cache = run.memory.kv_cache_gib
    graphs = 0.0 if run.engine.eager else run.memory.cudagraph_gib
    if run.device.kind == "cpu" or kv_cache is None or graphs is None or not _has_option(run.engine.version):
        return ()
    value = kv_cache_memory_bytes(kv_cache, graphs)
    about = f", from figures rounded to {ROUNDING_GIB} GiB"
    return (_sentence(value, "fits into the requested memory", about, run),)


def _sentence(value: int, what: str, about: str, run: EngineRun) -> str:
    """The option that vLLM's own message names, where there is something to reserve."""
    if value <= 0:
        return f"nothing is left to reserve that {what}"
    per_gpu = " per GPU" if (run.engine.tensor_parallel or 1) > 1 else ""
    return f"--kv-cache-memory={value} ({value / GIB:.2f} GiB{per_gpu}{about}) {what}"


def _has_option(version: str | None) -> bool:
    """An unknown version counts as a new one."""
    numbers = tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version or "")[:3])
    return not numbers or numbers >= _FIRST_WITH_OPTION


def _for_oom_load(run: EngineRun) -> tuple[str, ...]:
    total = f" --gpu-memory {run.device.total_gib:g}" if run.device.total_gib else ""
    if run.memory.weights_gib is None:
        return (f"evalq plan {quote(run.engine.model)}{total} says what it needs and which split fits",)
    return (
        f"the weights were loaded ({run.memory.weights_gib:.2f} GiB): lower max_num_batched_tokens or "
        "max_num_seqs, or set enforce_eager",
    )


def _for_oom_forward(run: EngineRun) -> tuple[str, ...]:
    share = f" (now {run.device.utilization:g})" if run.device.utilization else ""
    return (
        "lower max_num_batched_tokens, max_num_seqs or max_logprobs; a lower gpu_memory_utilization"
        f"{share} leaves more outside the KV cache",
    )


def _for_no_kv_memory(run: EngineRun) -> tuple[str, ...]:
    device, kv_cache = run.device, run.memory.kv_cache_gib
    if not (device.total_gib and device.requested_gib and kv_cache is not None and kv_cache <= 0):
        return ()
    share = (device.requested_gib - kv_cache) / device.total_gib
    limit = (device.free_gib or device.total_gib) / device.total_gib
    missing = f"{-kv_cache:.2f} GiB are missing before the first block"
    if share >= limit:
        return (f"{missing}, and no gpu_memory_utilization gives them",)
    least, most = math.ceil(share * 1000) / 1000, math.floor(limit * 1000) / 1000
    return (f"{missing}: gpu_memory_utilization must be above {least:.3f}; {most:.3f} is all that was free",)


def _for_max_len(run: EngineRun) -> tuple[str, ...]:
    failure, length = run.failure, run.engine.max_model_len
    assert failure is not None
    if failure.longest:
        return (f"max_model_len={failure.longest} is the longest that fits",)
    if not (failure.needed_gib and failure.available_gib and length):
        return ()
    # For full attention the cache grows with the length; with sliding windows more than this fits.
    longest = int(length * failure.available_gib / failure.needed_gib) // BLOCK_TOKENS * BLOCK_TOKENS
    return (f"max_model_len={longest} fits, from {failure.available_gib:g} of {failure.needed_gib:g} GiB",)


def _for_busy(run: EngineRun) -> tuple[str, ...]:
    device = run.device
    if not (device.free_gib and device.total_gib):
        return ()
    share = math.floor(device.free_gib / device.total_gib * 100) / 100
    return (f"gpu_memory_utilization={share:.2f} fits into the {device.free_gib:g} GiB that were free",)

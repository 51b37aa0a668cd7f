"""The figures in a run's lines: one pattern per wording, a named group per figure.

Wordings are those of vLLM 0.8 to 0.33 (`gpu_worker.py`, `cpu_worker.py` and `gpu_model_runner.py` of
`vllm/v1/worker/`, `vllm/worker/worker.py`, `vllm/v1/core/kv_cache_utils.py`, `vllm/utils/mem_utils.py`), with
what changed when:

    loading          "GB" until 0.8.1; "GiB memory and" from 0.11 (model runner V2: from 0.28)
    breakdown        V0: "model weights take"; V1: "Actual usage is" (DEBUG in 0.11 to 0.25); from 0.27
                     weights and non-torch in one "consumed" figure, and the graphs' estimate in the peak
    KV cache tokens  with the concurrency in one line from 0.28, "CPU" or "GPU" by device from 0.30

PyTorch's message about an allocation that failed: `c10/cuda/CUDACachingAllocator.cpp`.
"""

import re
from collections.abc import Sequence

from evalq.vllm_memory.engine_run import DeviceMemory, KvCache, MemoryBreakdown, StartSeconds, WorkerRank
from evalq.vllm_memory.log import NUMBER, LogLine, number

Figures = dict[str, float]
ByProcess = dict[str, Figures]

# Every figure stands beside one of these: a line without them is passed over.
_UNITS = ("GiB", " GB", "seconds", "tokens", "blocks", "--kv-cache-memory", " took ", " takes ")


def _figure(pattern: str) -> re.Pattern[str]:
    """<name> stands for a number that becomes the figure of this name."""
    return re.compile(re.sub(r"<(\w+)>", lambda name: f"(?P<{name[1]}>{NUMBER})", pattern))


_PATTERNS = tuple(
    _figure(pattern)
    for pattern in (
        r"Model loading took <weights> Gi?B(?: memory)? and <load> seconds",
        r"Loading model weights took <weights> GB",
        r"Loading weights took <read> seconds",
        r"total_gpu_memory \(<total>GiB\) x gpu_memory_utilization \(<utilization>\) = <requested>GiB",
        r"model weights take <weights_used>GiB; non_torch_memory takes <non_torch>GiB; "
        r"PyTorch activation peak memory takes <peak>GiB; "
        r"the rest of the memory reserved for KV Cache is <kv_cache>GiB",
        r"torch peak memory increase: <peak>GiB; (?:non-torch forward increase memory: <non_torch>GiB"
        r"|total consumed \(from mem_get_info\): <consumed>GiB); weights memory: <weights_used>GiB",
        r"Initial free memory:? <free> GiB",
        r"Requested memory: <utilization> \(util\), <requested> GiB",
        r"reserved <kv_cache> ?GiB memory for KV Cache as specified by kv_cache_memory_bytes",
        r"Available KV cache memory: <kv_cache> GiB",
        r"(?:Auto set|Explicitly set) \(<kv_cache>/<total>\) GiB for KV cache on node",
        r"KV cache size: <tokens> tokens",
        r"Maximum concurrency for <max_model_len> tokens per request: <sequences>x",
        r"# \w+ blocks: <blocks>, # CPU blocks: ",
        r"Graph capturing finished in <capture> secs, took <graphs> GiB",
        r"Estimated CUDA graph memory: <estimate> GiB total",
        r"CUDA graph pool memory: <graphs> GiB \(actual\), <estimate> GiB \(estimated\)",
        r"(?:Free memory on device(?: \S+)?|Available memory on node \d+) \(<free>/<total> GiB\) on startup",
        r"[Dd]esired [CG]PU memory utilization(?: is)? \(<utilization>, <requested> GiB\)",
        r"Actual usage is <weights_used> GiB for weight, <peak> GiB for peak activation, "
        r"<non_torch> GiB for non-torch memory, and <graphs> GiB for CUDAGraph memory",
        r"Actual usage is <consumed> GiB for consumed memory \(weights \+ non-torch\), "
        r"<peak_with_estimate> GiB for peak activation, and <graphs> GiB for CUDAGraph memory",
        r"`--kv-cache-memory=<requested_bytes>`.{0,200}?`--kv-cache-memory=<whole_gpu_bytes>`",
        r"torch.compile (?:takes|took) <compile> s in total",
        r"init engine \(profile, create kv cache, warmup model\) took <init> s",
        r"has a total capaci?ty of <total> GiB",
    )
)
_GRAPHS_IN_KV = "CUDA graph memory profiling is enabled"
# Of these the worker with least decides; of all others the one with most is shown.
_LEAST = ("kv_cache", "tokens", "sequences", "blocks", "free", "requested_bytes", "whole_gpu_bytes")


def collect(lines: Sequence[LogLine]) -> ByProcess:
    """The figures of each process; a later line replaces an earlier one, except where the least counts."""
    found: ByProcess = {}
    for line in lines:
        figures = found.setdefault(line.process, {})
        if _GRAPHS_IN_KV in line.message:
            figures["estimate_is_used"] = 1.0
        if not any(unit in line.message for unit in _UNITS):
            continue
        for pattern in _PATTERNS:
            match = pattern.search(line.message)
            for name, text in match.groupdict().items() if match else ():
                if text is not None:
                    value = number(text)
                    figures[name] = min(value, figures.get(name, value)) if name in _LEAST else value
    return {process: figures for process, figures in found.items() if figures}


def over_processes(by_process: ByProcess) -> Figures:
    """One value per figure: of the process with most, or with least."""
    joined: Figures = {}
    for figures in by_process.values():
        for name, value in figures.items():
            choose = min if name in _LEAST else max
            joined[name] = choose(value, joined.get(name, value))
    return joined


def ranks(by_process: ByProcess) -> tuple[WorkerRank, ...]:
    """The worker processes: those that loaded a part of the model or hold a part of the cache."""
    return tuple(
        WorkerRank(process, breakdown(figures), _load_seconds(figures))
        for process, figures in sorted(by_process.items())
        if figures.keys() & {"weights", "weights_used", "read", "kv_cache"}
    )


def breakdown(figures: Figures) -> MemoryBreakdown:
    """Where the memory went."""
    weights = figures.get("weights", figures.get("weights_used"))
    non_torch, peak = figures.get("non_torch"), figures.get("peak")
    if non_torch is None and weights is not None and "consumed" in figures:
        non_torch = round(figures["consumed"] - weights, 4)
    if "peak_with_estimate" in figures:
        # What the graphs were expected to take is counted as activation; their real size has its own column.
        counted = figures.get("estimate", 0.0) if "estimate_is_used" in figures else 0.0
        peak = round(figures["peak_with_estimate"] - counted, 4)
    graphs = figures.get("graphs", figures.get("estimate"))
    return MemoryBreakdown(weights, peak, non_torch, graphs, figures.get("kv_cache"))


def device(figures: Figures, kind: str | None) -> DeviceMemory:
    """The memory there was; the requested memory is the utilization times the total."""
    share, requested = figures.get("utilization"), figures.get("requested")
    total = figures.get("total")
    if total is None and share and requested is not None:
        total = round(requested / share, 2)
    return DeviceMemory(kind, total, figures.get("free"), share, requested)


def cache(figures: Figures, max_model_len: int | None) -> KvCache:
    """The KV cache in tokens. V0 counts blocks; their size follows from the concurrency beside them."""
    tokens, sequences = figures.get("tokens"), figures.get("sequences")
    blocks, length = figures.get("blocks"), figures.get("max_model_len", max_model_len)
    if tokens is None and blocks and sequences and length:
        tokens = blocks * round(sequences * length / blocks)
    return KvCache(
        None if tokens is None else int(tokens),
        sequences,
        _whole(figures.get("requested_bytes")),
        _whole(figures.get("whole_gpu_bytes")),
    )


def seconds(figures: Figures) -> StartSeconds:
    """How long the steps took."""
    return StartSeconds(
        _load_seconds(figures), figures.get("compile"), figures.get("capture"), figures.get("init")
    )


def _load_seconds(figures: Figures) -> float | None:
    """Of loading the model; vLLM on a CPU says only how long reading the weights took."""
    return figures.get("load", figures.get("read"))


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)

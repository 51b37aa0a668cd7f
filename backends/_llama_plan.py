"""What the gguf backend's options mean: the table, and llama.cpp's parameters made from them.

Parameters: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evalq.backends import _llama
from evalq.engine.backend import LoadRequest, Option, kv_cache_option
from evalq.engine.kv_cache import AUTO, KV_CACHE, CacheTypes, KvCache, cache_of, parse
from evalq.errors import ModelError

_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl")
CACHES = CacheTypes(
    "llama.cpp",
    ("f32", "fp16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"),
    more="quantized values need flash attention",
)
PLAIN_CACHE = KvCache("fp16", "fp16")
CACHE_OPTIONS = (KV_CACHE, "cache_type_k", "cache_type_v")
_SPLIT_MODES = ("none", "layer", "row")
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
# With fewer tokens per sequence in a pass, the CPU's flash attention takes another kernel, which accumulates
# in float16 (GGML_FA_TILE_Q in ggml/src/ggml-cpu). In the same kernel results do not depend on the pass.
FLASH_TILE_TOKENS = 64

OPTIONS: dict[str, Option] = {
    "n_gpu_layers": Option((int,), "layers on the GPU; default -1, all, when llama.cpp was built for one"),
    "main_gpu": Option((int,), 'the GPU that "split_mode": "none" uses; default 0'),
    "split_mode": Option((str,), "how several GPUs share the model; default layer", _SPLIT_MODES),
    "tensor_split": Option((list,), "share of the model per GPU, [3, 1]; default by free memory"),
    "use_mmap": Option((bool,), "map the file instead of reading it; default true"),
    "threads": Option((int,), "CPU threads; default the physical cores this process may use"),
    "batch_windows": Option((int,), "windows decoded side by side; default as many as fill one n_batch"),
    "n_batch": Option((int,), "tokens per llama_decode, which bounds the logits buffer; default n_ubatch"),
    "n_ubatch": Option((int,), "tokens per pass; default 512, on a CPU 256 for longer windows"),
    "flash_attn": Option((str, bool), 'default "auto": where supported', ("auto", True, False), numeric=True),
    KV_CACHE: kv_cache_option(CACHES),
    "cache_type_k": Option((str,), "older name of kv_cache's K; default f16", _CACHE_TYPES, numeric=True),
    "cache_type_v": Option((str,), "older name of kv_cache's V; default f16", _CACHE_TYPES, numeric=True),
}


@dataclass(frozen=True)
class Plan:
    """How the windows of one request are carried through llama.cpp, tokens and windows."""

    threads: int
    batch_windows: int
    n_batch: int
    n_ubatch: int
    n_gpu_layers: int
    sequence_tokens: int


def make_plan(request: LoadRequest) -> Plan:
    """Sizes for a request's windows. Raises ModelError("bad_option") on impossible numbers."""
    options = request.options
    for name in ("threads", "batch_windows", "n_batch", "n_ubatch"):
        if options.get(name, 1) < 1:
            raise ModelError(f'option "{name}" is {options[name]}, must be at least 1', "bad_option")
    llama_cpp = _llama.engine()
    offload = bool(llama_cpp.llama_supports_gpu_offload())
    layers = options.get("n_gpu_layers", -1) if offload else 0
    sequence_tokens = max(1, request.window_tokens - 1)
    side_by_side = options.get("batch_windows", 1)
    # On two CPU cores a window of 512 is some percent faster in one pass, one of 2048 in passes of 256.
    whole = layers or sequence_tokens <= 512
    passed_at_once = max(512 if whole else 256, 2 * FLASH_TILE_TOKENS * side_by_side)
    n_batch = options.get("n_batch", options.get("n_ubatch", passed_at_once))
    fitting = max(1, min(n_batch // sequence_tokens, request.n_windows, _MAX_SEQUENCES))
    batch_windows = options.get("batch_windows", fitting)
    if batch_windows > min(n_batch, _MAX_SEQUENCES):
        limit = f"n_batch ({n_batch}) and {_MAX_SEQUENCES}"
        raise ModelError(f'option "batch_windows" is {batch_windows}, above {limit}', "bad_option")
    n_ubatch = options.get("n_ubatch", n_batch)
    if n_ubatch > n_batch:
        raise ModelError(f'option "n_ubatch" is {n_ubatch}, above n_batch ({n_batch})', "bad_option")
    if request.step_tokens is not None:
        n_batch = min(n_batch, batch_windows * request.step_tokens)
    n_batch = max(batch_windows, n_batch // request.divide_work)
    return Plan(
        threads=options.get("threads", default_threads()),
        batch_windows=batch_windows,
        n_batch=n_batch,
        n_ubatch=min(n_ubatch, n_batch),
        n_gpu_layers=layers,
        sequence_tokens=sequence_tokens,
    )


def model_params(plan: Plan, options: dict[str, Any]) -> Any:
    """llama_model_params: where the weights go and how they are read. Raises ModelError("bad_option")."""
    llama_cpp = _llama.engine()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = plan.n_gpu_layers if plan.n_gpu_layers >= 0 else 2**31 - 1
    params.main_gpu = options.get("main_gpu", 0)
    params.split_mode = _SPLIT_MODES.index(options.get("split_mode", "layer"))
    if not options.get("use_mmap", True):
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    shares = options.get("tensor_split")
    if shares:
        limit = llama_cpp.llama_max_devices()
        if len(shares) > limit or not all(isinstance(s, int | float) and s >= 0 for s in shares):
            raise ModelError(f'option "tensor_split" takes up to {limit} numbers, not {shares}', "bad_option")
        params.tensor_split = (ctypes.c_float * limit)(*shares)
    return params


def cache_types(options: Mapping[str, Any]) -> KvCache:
    """Types of keys and values. Raises ModelError("bad_option") for two that cannot go together."""
    older = [name for name in CACHE_OPTIONS[1:] if name in options]
    found = cache_of(options)
    if found is not None and older:
        raise ModelError(f"kv_cache and {older[0]} say the same thing", "bad_option", f"remove {older[0]}")
    if found is None:
        found = KvCache(*(_type(options.get(f"cache_type_{side}", AUTO)) for side in "kv"))
    if found.v_bits < PLAIN_CACHE.bits and options.get("flash_attn") is False:
        raise ModelError(
            f"llama.cpp reads quantized values ({found.v}) with flash attention only",
            "bad_option",
            "remove flash_attn",
        )
    return found


def _type(name: str) -> str:
    """llama.cpp's name of a type as `kv_cache` spells it."""
    found = parse(name) or PLAIN_CACHE
    return found.k


def _ggml_type(name: str) -> int:
    """Number of a type in ggml.h, of which llama-cpp-python lacks some."""
    from gguf.constants import GGMLQuantizationType

    return int(GGMLQuantizationType["F16" if name == "fp16" else name.upper()])


def context_params(plan: Plan, options: dict[str, Any]) -> Any:
    """llama_context_params: one sequence per window of a batch, each with cells for all its tokens."""
    params = _params(plan, options, plan.batch_windows, plan.sequence_tokens)
    params.n_batch, params.n_ubatch = plan.n_batch, plan.n_ubatch
    return params


def generation_params(plan: Plan, options: dict[str, Any], n_sequences: int, n_tokens: int) -> Any:
    """llama_context_params for continuing prompts: cells for the tokens of each, llama.cpp's own steps.

    Raises:
        ModelError: bad_option, for more sequences than llama.cpp takes.
    """
    if n_sequences > _MAX_SEQUENCES:
        message = f"{n_sequences} prompts at once, llama.cpp takes at most {_MAX_SEQUENCES}"
        raise ModelError(message, "bad_option", "take a smaller batch")
    params = _params(plan, options, n_sequences, n_tokens)
    # A step holds a token of each sequence; a prompt goes in steps of llama.cpp's usual size unless a spec
    # names another.
    params.n_ubatch = max(n_sequences, options.get("n_ubatch", min(512, options.get("n_batch", 512))))
    params.n_batch = max(params.n_ubatch, options.get("n_batch", 2048))
    return params


def _params(plan: Plan, options: dict[str, Any], n_sequences: int, n_tokens: int) -> Any:
    llama_cpp = _llama.engine()
    params = llama_cpp.llama_context_default_params()
    # llama.cpp gives each sequence n_ctx / n_seq_max cells, rounded up to 256.
    params.n_ctx = n_sequences * -(-n_tokens // 256) * 256
    params.n_seq_max = n_sequences
    params.kv_unified = False  # with one buffer for all, a window would also pay for the others' cells
    params.swa_full = False  # nothing is rolled back, so a sliding window needs no full-size cache
    params.n_threads = params.n_threads_batch = plan.threads
    params.no_perf = True
    flash_attn = {"auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO, True: 1, False: 0}
    params.flash_attn_type = flash_attn[options.get("flash_attn", "auto")]
    types = cache_types(options)
    params.type_k, params.type_v = _ggml_type(types.k), _ggml_type(types.v)
    return params


def default_threads() -> int:
    """Physical cores this process may run on: hyper-threads and cores of others slow llama.cpp's barriers."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))

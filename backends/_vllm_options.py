"""What a model spec may tell vLLM, and the engine arguments that follow from it.

Names are vLLM's own: https://docs.vllm.ai/en/latest/configuration/engine_args/
"""

import math
from dataclasses import dataclass
from typing import Any

from evalq.backends import _vllm_columns
from evalq.backends._vllm_cache import CACHES, OLDER, most_step_tokens, type_argument
from evalq.backends._vllm_lora import lora_arguments
from evalq.engine.backend import LoadRequest, Option, kv_cache_option
from evalq.engine.kv_cache import KV_CACHE
from evalq.errors import ModelError

# Tokens per step: more are faster on a large GPU (3.4 times from 2048 to 16384 with a small model on an
# H200), but vLLM's first model runner makes the logits of a whole step at once and does not count them when
# it divides the GPU's memory. They get up to this share of it.
STEP_TOKENS = 2048
STEP_TOKENS_MAX = 16384
LOGITS_SHARE = 0.1
# Per token of a step and entry of the vocabulary: bf16 logits, float32 log-probabilities, a comparison.
LOGPROB_BYTES = 8
UTILIZATION_MAX = 0.9
GIB = 2**30

OPTIONS = {
    "dtype": Option(
        (str,),
        "of arithmetic and plain weights (default auto: the checkpoint's)",
        ("auto", "float32", "bfloat16", "float16"),
        numeric=True,
    ),
    "quantization": Option(
        (str,), "method, where the checkpoint does not name it or names it wrongly", numeric=True
    ),
    KV_CACHE: kv_cache_option(CACHES),
    OLDER: Option(
        (str,),
        "vLLM's own name of it, for types that kv_cache does not list; no steps",
        numeric=True,
    ),
    "linear_backend": Option(
        (str,), "kernel family of linear layers; emulation: the format's own numerics", numeric=True
    ),
    "moe_backend": Option((str,), "kernel family of expert layers", numeric=True),
    "attention_backend": Option(
        (str,), "attention kernel, FLASH_ATTN, FLASHINFER, ... (default: vLLM's choice)", numeric=True
    ),
    "max_model_len": Option((int,), "longest sequence (default: one more than the longest window)"),
    "max_num_batched_tokens": Option(
        (int,), "tokens per step (default: whole windows, up to 2048; up to 16384 on a large GPU)"
    ),
    "max_num_seqs": Option((int,), "windows per step (default: as many as fit into max_num_batched_tokens)"),
    "gpu_memory_utilization": Option(
        (int, float), "share of each GPU that vLLM takes (default 0.9, less where the logits need room)"
    ),
    "kv_cache_gib": Option((int,), "GiB of KV cache (default: a step's need on a CPU, the rest of the GPU)"),
    "tensor_parallel_size": Option((int,), "GPUs that share each layer (default 1)"),
    "pipeline_parallel_size": Option((int,), "groups of layers on GPUs of their own (default 1)"),
    "enable_expert_parallel": Option((bool,), "experts instead of slices of them on each GPU"),
    "distributed_executor_backend": Option((str,), "mp (one machine) or ray (several)", ("mp", "ray", "uni")),
    "disable_custom_all_reduce": Option((bool,), "NCCL only, for GPUs without peer access"),
    "cpu_offload_gb": Option((int, float), "GiB of weights per GPU kept in RAM (default 0)"),
    "swap_space": Option((int, float), "GiB of RAM for swapped sequences, older versions only"),
    "enforce_eager": Option(
        (bool,),
        "no torch.compile, no CUDA graphs (default true: neither pays for windows; to generate, false)",
    ),
    "load_format": Option((str,), "auto (default), safetensors, runai_streamer, ..."),
    "seed": Option((int,), "vLLM's (default 0); scoring draws no random numbers"),
    "threads": Option((int,), "CPU threads (default: one per core)"),
}
# Those that are not engine arguments.
_OWN = ("threads", "kv_cache_gib", KV_CACHE)


@dataclass(frozen=True)
class Hardware:
    """Where vLLM will run.

    Args:
        is_cpu: it is a CPU build.
        count: devices of this machine.
        memory_bytes: of each device.
        name: of the first.
        capability: CUDA's (major, minor), None elsewhere.
    """

    is_cpu: bool
    count: int
    memory_bytes: int
    name: str
    capability: tuple[int, int] | None


def engine_arguments(
    request: LoadRequest, hardware: Hardware, vocab_size: int, known: set[str], version: str
) -> dict[str, Any]:
    """Arguments of vllm.LLM for scoring windows, the spec's own on top.

    A step holds whole windows when they are short, so what is computed together is the same whichever
    windows are left to score.

    Args:
        request: path, longest window and options.
        hardware: to fit the defaults to.
        vocab_size: for the memory of a step's logits.
        known: names that this version accepts.
        version: vLLM's.

    Raises:
        ModelError: bad_option or window_too_long.
    """
    options = {name: value for name, value in request.options.items() if name not in _OWN}
    for name in options:
        if name not in known:
            raise ModelError(f"vLLM {version} has no option {name}", "bad_option", "remove it")
    if request.only_generates:
        generating = _generating(request, hardware) | options
        _check_devices(generating, hardware)
        return {name: value for name, value in generating.items() if name in known}
    tokens = request.window_tokens
    asked_tokens = options.pop("max_num_batched_tokens", None)
    step_tokens = (asked_tokens or step_tokens_for(hardware, vocab_size)) // request.divide_work
    step_tokens = most_step_tokens(step_tokens, request)
    fitting = max(1, step_tokens // tokens)
    arguments: dict[str, Any] = {
        **_always(request, hardware.is_cpu),
        "max_model_len": max(tokens + 1, request.longest_tokens),
        # Twice a step's: the next step is scheduled before the last one's windows are known to be done.
        "max_num_seqs": max(2 * fitting if tokens <= step_tokens else 1, request.generate),
        "max_num_batched_tokens": step_tokens if asked_tokens else min(step_tokens, fitting * tokens),
        "enforce_eager": True,
    }
    if not hardware.is_cpu:
        needed = step_bytes(vocab_size, step_tokens) + _vllm_columns.device_bytes(request)
        arguments["gpu_memory_utilization"] = utilization_for(hardware.memory_bytes, needed)
    arguments |= options
    # vLLM refuses a step with fewer tokens than sequences.
    arguments["max_num_batched_tokens"] = max(arguments["max_num_batched_tokens"], arguments["max_num_seqs"])
    _check(arguments, hardware, tokens)
    return {name: value for name, value in arguments.items() if name in known}


def _always(request: LoadRequest, is_cpu: bool) -> dict[str, Any]:
    """Arguments that are the same for scoring and for generating."""
    arguments: dict[str, Any] = {
        "model": str(request.path),
        "trust_remote_code": request.trust_remote_code,
        # Windows share their beginnings, and cached tokens have no log-probabilities; prompts that are timed
        # more than once have to be worked out again.
        "enable_prefix_caching": False,
        # Ids come in, numbers or ids go out.
        "skip_tokenizer_init": True,
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "seed": 0,
        **type_argument(request.options),
    }
    if "kv_cache_gib" in request.options and not is_cpu:
        arguments["kv_cache_memory_bytes"] = request.options["kv_cache_gib"] * GIB
    if request.adapter is not None:
        arguments |= lora_arguments(request.adapter)
    return arguments


def _generating(request: LoadRequest, hardware: Hardware) -> dict[str, Any]:
    """Arguments for a model that only continues prompts: vLLM's own defaults, but for what follows."""
    return {
        **_always(request, hardware.is_cpu),
        "max_model_len": request.longest_tokens,
        "max_num_seqs": request.generate,
        # On a GPU as vLLM serves, with CUDA graphs; on a CPU compiling takes longer than it saves.
        "enforce_eager": hardware.is_cpu,
    }


def step_tokens_for(hardware: Hardware, vocab_size: int) -> int:
    """A power of two times 2048 whose logits take no more than LOGITS_SHARE of a GPU; 2048 on a CPU."""
    tokens = STEP_TOKENS
    fitting = (
        0 if hardware.is_cpu else LOGITS_SHARE * hardware.memory_bytes / max(1, vocab_size * LOGPROB_BYTES)
    )
    while 2 * tokens <= min(fitting, STEP_TOKENS_MAX):
        tokens *= 2
    return tokens


def step_bytes(vocab_size: int, step_tokens: int) -> int:
    """What a step's log-probabilities take, which vLLM does not count."""
    return step_tokens * vocab_size * LOGPROB_BYTES


def utilization_for(memory_bytes: int, needed: int) -> float:
    """0.9, or less where the rest of the GPU would not hold the bytes that are needed beside vLLM's share."""
    return round(min(UTILIZATION_MAX, max(0.5, 0.97 - needed / memory_bytes)), 3)


def _check(arguments: dict[str, Any], hardware: Hardware, window_tokens: int) -> None:
    longest = arguments["max_model_len"] - 1
    if window_tokens > longest:
        raise ModelError(
            f"a window has {window_tokens} tokens and max_model_len is {longest + 1}: it must be longer",
            "window_too_long",
            f"remove max_model_len from the options, or set eval_len to {longest} or less",
        )
    _check_devices(arguments, hardware)


def _check_devices(arguments: dict[str, Any], hardware: Hardware) -> None:
    asked = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    one_machine = arguments.get("distributed_executor_backend") != "ray"
    if not hardware.is_cpu and one_machine and asked > hardware.count:
        raise ModelError(
            f"tensor_parallel_size x pipeline_parallel_size is {asked}, this machine has {hardware.count} "
            f"GPU{'s' if hardware.count != 1 else ''}",
            "bad_option",
            "lower them, or join machines with Ray",
        )


def cpu_kv_gib(config: dict[str, Any], tokens: int) -> int:
    """GiB of KV cache for some tokens in float32, an upper bound for the usual attention.

    2 (keys, values) * layers * KV heads * head size * 4 bytes per token, and half as much again for blocks
    that are not full.
    """
    text = config.get("text_config", config)
    layers = text.get("num_hidden_layers") or text.get("n_layer") or 0
    hidden = text.get("hidden_size") or text.get("n_embd") or 0
    heads = text.get("num_attention_heads") or text.get("n_head") or 1
    kv_heads = text.get("num_key_value_heads") or heads
    head_size = text.get("head_dim") or hidden // heads
    return max(1, math.ceil(1.5 * tokens * 2 * layers * kv_heads * head_size * 4 / GIB))

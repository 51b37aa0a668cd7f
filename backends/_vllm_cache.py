"""vLLM's KV cache: types by evalq's spelling, what it really holds, whether it is read.

vLLM stores keys and values in one type. With an FP8 cache it divides them by one scale per layer, which a
checkpoint calibrated for it brings (`k_scale`, `v_scale`); without, the scales are 1.0.

What a worker holds is looked up by name in its model runner, because names come and go between versions.

Source: https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache/
"""

from collections.abc import Mapping
from typing import Any

from evalq.engine.backend import LoadRequest
from evalq.engine.kv_cache import KV_CACHE, CacheTypes, KvCache, cache_of, parse
from evalq.errors import ModelError

CACHES = CacheTypes("vLLM", ("f32", "fp16", "bf16", "fp8", "fp8_e5m2"), alike=True)
OLDER = "kv_cache_dtype"
_DTYPES = {"float32": "f32", "float16": "fp16", "bfloat16": "bf16"}


def types_of(options: Mapping[str, Any]) -> KvCache | None:
    """Types by either option's name; None for the model's own, and for those that only vLLM names.

    Raises:
        ModelError: bad_option, for both names.
    """
    found = cache_of(options)
    older = options.get(OLDER, "auto")
    if found is not None and OLDER in options:
        raise ModelError(f"{KV_CACHE} and {OLDER} say the same thing", "bad_option", f"remove {OLDER}")
    if found is not None:
        return found
    try:
        return parse(_DTYPES.get(older, older))
    except ValueError:
        return None


def type_argument(options: Mapping[str, Any]) -> dict[str, Any]:
    """Engine argument for the types that `kv_cache` names. Raises ModelError (bad_option)."""
    cache = types_of(options)
    if KV_CACHE not in options or cache is None:
        return {}
    # An unquantized type is that of the arithmetic: check_type() sees to it.
    return {OLDER: cache.k if cache.quantized else "auto"}


def most_step_tokens(usual: int, request: LoadRequest) -> int:
    """Tokens of a step of the engine, so that no window has more in it than the request wants.

    Windows that one step would hold get two, so that something is left to read. (vLLM's own limit for each
    request, `long_prefill_token_threshold`, does not count for one that is alone.)

    Args:
        usual: without steps.
        request: its longest window and step_tokens.
    """
    if request.step_tokens is None:
        return usual
    return max(1, min(usual, request.step_tokens, request.window_tokens // 2))


def check_type(llm: Any, options: Mapping[str, Any]) -> float | None:
    """Bits per element that the cache has; None where vLLM's workers do not tell.

    Raises:
        ModelError: not_measured, where it is not of the type that was asked for.
    """
    sizes = {size for found in llm.collective_rpc(_element_bytes) for size in found}
    cache = cache_of(options)
    if len(sizes) != 1:
        return None
    bits: float = 8.0 * sizes.pop()
    dtype = str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")
    plain = cache is not None and not cache.quantized
    if cache is not None and (bits != cache.bits or (plain and _DTYPES.get(dtype) != cache.k)):
        raise ModelError(
            f"not measured: vLLM's KV cache has {bits:g} bits per element with dtype {dtype}, not {cache}",
            "not_measured",
            f'set "dtype" to that of the cache, or leave {KV_CACHE} out'
            if plain
            else "take another attention_backend or version of vLLM",
        )
    return bits


def scale_notes(llm: Any, bits: float | None) -> list[str]:
    """What a reader should know of an FP8 cache whose scales nobody calibrated."""
    scales = {scale for found in llm.collective_rpc(_scales) for scale in found}
    if bits != 8 or scales != {1.0}:
        return []
    dtype = str(llm.llm_engine.vllm_config.cache_config.cache_dtype)
    rounds = "e4m3 cuts off what exceeds 448 and keeps 3 bits of mantissa"
    if dtype == "fp8_e5m2":
        rounds = "e5m2 keeps 2 bits of mantissa"
    return [
        f"the FP8 KV cache has scales of 1.0, because the checkpoint brings none: {rounds}, so a model with "
        "large keys (Qwen2.5) can lose far more than 8 bits must cost; take a checkpoint with calibrated "
        "k_scale and v_scale, or a 16-bit cache"
    ]


def blank(llm: Any) -> None:
    """Overwrite with zeros what is cached."""
    llm.collective_rpc(_blank)


def _caches(worker: Any) -> list[Any]:
    """Tensors of attention layers; states of others are lists."""
    found = getattr(getattr(worker, "model_runner", None), "kv_caches", None) or []
    return [cache for cache in found if hasattr(cache, "element_size")]


def _element_bytes(worker: Any) -> list[int]:
    return sorted({int(cache.element_size()) for cache in _caches(worker)})


def _blank(worker: Any) -> None:
    for cache in _caches(worker):
        cache.zero_()


def _scales(worker: Any) -> list[float]:
    config = getattr(getattr(worker, "vllm_config", None), "compilation_config", None)
    layers = getattr(config, "static_forward_context", {}).values()
    found = (getattr(layer, name, None) for layer in layers for name in ("_k_scale_float", "_v_scale_float"))
    return sorted({float(scale) for scale in found if isinstance(scale, int | float)})

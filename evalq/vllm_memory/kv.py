"""KV cache: bytes per token and per sequence of every layer, from a configuration.

Formulas per layer and GPU, with b bytes per element (2, or 1 for an FP8 cache):

    attention (MHA, GQA, MQA)    2 * ceil(kv_heads / TP) * head_dim * b      per token
    sliding window, chunked      the same, for as many tokens as the window or chunk reaches
    MLA                          (kv_lora_rank + qk_rope_head_dim) * b       per token, not divided by TP
    gated delta net, Mamba 1/2   convolution and recurrent state             per sequence
    short convolution (LFM2)     hidden * (L - 1) * 2                        per sequence

State is kept in the model's 16-bit dtype unless the configuration names another (vLLM
`MambaStateDtypeCalculator`): for Qwen3-Next 37.7 MiB per sequence. The widely quoted 73.7 MiB assume FP32.

Sources: vLLM `v1/kv_cache_interface.py`, `model_executor/layers/mamba/mamba_utils.py`; the kind of each layer
where config.json does not list it: transformers' configuration classes.

The PyPI package kvfit 0.3.0 was tried first. It agrees on full, windowed, MLA and gated-delta bytes of Llama,
Qwen3, Mixtral, gpt-oss, DeepSeek-R1 and OPT. It is not used, because it

- takes every layer of Gemma 2 for a window (config.json does not list the layers): 0.41 GiB at 100,000 tokens
  where 13 of 26 layers keep them all, 5.16 GiB;
- counts the state of Qwen3-Next in FP32, twice what vLLM reserves (vLLM's 122,368 tokens in 11.94 GiB fit
  BF16 only);
- refuses Llama 4 (chunks), Gemma 3 without `layer_types`, GPT-2, Phi, SmolLM3, Jamba, Mamba 1/2, Falcon-H1;
- adds layers up, and how vLLM's allocator pads and groups them (`evalq.vllm_memory.pool`) needs their number.

Not covered here either, and refused: sparse attention with an index cache of its own (DeepSeek V3.2 and V4,
MiniMax), linear attention other than the above (Kimi, RWKV, MiniMax-Text-01), encoder-decoder models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from evalq.checkpoint.damage import clipped
from evalq.checkpoint.shape import LAYERS_MAX, ModelShape, integer, model_type
from evalq.errors import SpecError

Kind = Literal["full", "window", "chunk", "state"]
STATE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FULL = ("full_attention", "attention", "global_attention", "*")
_WINDOW = ("sliding_attention", "local_attention")
_CHUNK = ("chunked_attention",)
_STATE = ("linear_attention", "mamba", "mamba1", "mamba2", "conv", "M")
_BOTH = ("hybrid",)
_NONE = ("moe", "mlp", "E", "-")
_NOT_COVERED = ("index_head_dim", "sparse_attention_config", "linear_attn_config", "compress_ratios")
# model_type -> every n-th layer attends to everything, the others to a window.
_EVERY_NTH_FULL = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps on one GPU.

    Args:
        kind: which tokens it keeps; "state" keeps none but a fixed size per sequence.
        bytes: per token, for "state" per sequence.
        reach: tokens of the window or chunk, 0 for the others.
    """

    kind: Kind
    bytes: int
    reach: int = 0


def cache_layers(shape: ModelShape, element_bytes: int = 2, tp: int = 1) -> list[list[CacheLayer]]:
    """For every hidden layer what it caches on one GPU (nothing, one thing, or attention and state).

    Args:
        shape: of the model.
        element_bytes: of the attention's cache, 2 or 1.
        tp: GPUs that share each layer.

    Raises:
        SpecError: an architecture that is not covered, or a configuration that lacks a field.
    """
    found = next((key for key in _NOT_COVERED if shape.config.get(key) is not None), None)
    if found or shape.config.get("is_encoder_decoder") is True:
        architecture = clipped(model_type(shape.config))
        raise SpecError(
            f'{shape.name}: the cache of "{architecture}" ({found or "encoder-decoder"}) is not known',
            "start vLLM once and read its log with: evalq memory LOG",
        )
    names = layer_names(shape)
    attention = _attention_bytes(shape, element_bytes, tp) if shape.heads else 0
    return [_layer(shape, name, attention, tp) for name in names]


def _layer(shape: ModelShape, name: str, attention: int, tp: int) -> list[CacheLayer]:
    if name in _NONE:
        return []
    if name in _FULL:
        return [CacheLayer("full", attention)]
    if name in _WINDOW:
        return [CacheLayer("window", attention, _need(shape, "sliding_window"))]
    if name in _CHUNK:
        return [CacheLayer("chunk", attention, _need(shape, "attention_chunk_size"))]
    if name in _STATE:
        return [CacheLayer("state", _state_bytes(shape, tp))]
    if name in _BOTH:
        return [CacheLayer("full", attention), CacheLayer("state", _state_bytes(shape, tp))]
    raise SpecError(
        f'{shape.name}: the cache of a layer of type "{clipped(name)}" is not known',
        "start vLLM once and read its log with: evalq memory LOG",
    )


def _attention_bytes(shape: ModelShape, element_bytes: int, tp: int) -> int:
    if shape.is_mla:
        width = _need(shape, "kv_lora_rank") + (integer(shape.config, "qk_rope_head_dim") or 0)
        return width * element_bytes
    return 2 * -(-shape.kv_heads // tp) * shape.head_dim * element_bytes


def layer_names(shape: ModelShape) -> list[str]:
    """The type of every layer: as listed, else by the rule of its architecture, else full attention."""
    config, n = shape.config, shape.layers
    for key in ("layer_types", "layers_block_type"):
        listed = config.get(key)
        if isinstance(listed, list) and len(listed) >= n:
            return [name if isinstance(name, str) else "?" for name in listed[:n]]
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and len(pattern) == n:
        return list(pattern)
    architecture = model_type(config)
    if architecture in _EVERY_NTH_FULL:
        every = integer(config, "sliding_window_pattern") or _EVERY_NTH_FULL[architecture]
        return [_FULL[0] if i % every == every - 1 else _WINDOW[0] for i in range(n)]
    rule = _RULES.get(architecture)
    if rule is not None:
        return [rule(config, i) for i in range(n)]
    window = config.get("sliding_window") and config.get("use_sliding_window") is not False
    if window and architecture.startswith("qwen"):
        # Qwen's default is no window, and where there is one the first layers go without.
        first = integer(config, "max_window_layers") or n
        window = config.get("use_sliding_window") is True
        return [_WINDOW[0] if window and i >= first else _FULL[0] for i in range(n)]
    return [_WINDOW[0] if window else _FULL[0]] * n


def _llama4(config: dict[str, Any], i: int) -> str:
    """Layers with rotary positions attend to chunks; those without, every fourth, to everything."""
    listed = config.get("no_rope_layers")
    every = integer(config, "no_rope_layer_interval") or 4
    rotates = listed[i] if isinstance(listed, list) and i < len(listed) else (i + 1) % every
    return _CHUNK[0] if rotates and integer(config, "attention_chunk_size") else _FULL[0]


def _interval(config: dict[str, Any], i: int) -> str:
    every = integer(config, "full_attention_interval") or 4
    return _FULL[0] if (i + 1) % every == 0 else _STATE[0]


def _jamba(config: dict[str, Any], i: int) -> str:
    period, offset = integer(config, "attn_layer_period") or 8, config.get("attn_layer_offset", 4)
    return _FULL[0] if i % period == offset else _STATE[0]


def _listed_attention(config: dict[str, Any], i: int) -> str:
    indices = config.get("attn_layer_indices") or config.get("full_attn_idxs")
    return _FULL[0] if isinstance(indices, list) and i in indices[:LAYERS_MAX] else _STATE[0]


_RULES: dict[str, Callable[[dict[str, Any], int], str]] = {
    "llama4": _llama4,
    "llama4_text": _llama4,
    "qwen3_next": _interval,
    "qwen3_5_text": _interval,
    "qwen3_5_moe_text": _interval,
    "jamba": _jamba,
    "bamba": _listed_attention,
    "lfm2": _listed_attention,
    "falcon_h1": lambda config, i: _BOTH[0],
    "mamba": lambda config, i: _STATE[0],
    "mamba2": lambda config, i: _STATE[0],
    "falcon_mamba": lambda config, i: _STATE[0],
}


def _state_bytes(shape: ModelShape, tp: int) -> int:
    """Convolution and recurrent state of one sequence in one layer on one GPU."""
    config = shape.config
    named = config.get("mamba_ssm_dtype") or config.get("mamba_ssm_cache_dtype") or _state_default(shape)
    recurrent_bytes = STATE_BYTES.get(named, 2) if isinstance(named, str) else 2
    if "linear_num_value_heads" in config:
        keys = _need(shape, "linear_num_key_heads") * _need(shape, "linear_key_head_dim")
        heads, width = _need(shape, "linear_num_value_heads"), _need(shape, "linear_value_head_dim")
        channels, kernel = 2 * keys + heads * width, _need(shape, "linear_conv_kernel_dim")
        recurrent = heads * width * _need(shape, "linear_key_head_dim")
    elif "conv_L_cache" in config:
        channels, kernel, recurrent = shape.hidden, _need(shape, "conv_L_cache"), 0
    else:
        state = _need(shape, "mamba_d_state", "ssm_state_size", "state_size")
        kernel = _need(shape, "mamba_d_conv", "conv_kernel")
        mamba_heads = _optional(shape, "mamba_n_heads", "mamba_num_heads")
        if mamba_heads is None and config.get("model_type") == "mamba2":
            mamba_heads = _need(shape, "num_heads")
        if mamba_heads is not None:
            width = mamba_heads * _need(shape, "mamba_d_head", "mamba_head_dim", "head_dim")
            channels = width + 2 * _need(shape, "mamba_n_groups", "n_groups") * state
        else:
            expand = _optional(shape, "mamba_expand", "expand") or 2
            width = channels = expand * shape.hidden
        recurrent = width * state
    return (channels * (kernel - 1) * 2 + recurrent * recurrent_bytes) // tp


def _state_default(shape: ModelShape) -> str:
    return "float32" if shape.config.get("model_type") == "nemotron_h" else "bfloat16"


def _optional(shape: ModelShape, *keys: str) -> int | None:
    return next((value for key in keys if (value := integer(shape.config, key)) is not None), None)


def _need(shape: ModelShape, *keys: str) -> int:
    value = _optional(shape, *keys)
    if value is None:
        raise SpecError(
            f"{shape.name}: its config.json lacks {' or '.join(keys)}",
            "a plan needs these fields: take the original file",
        )
    return value

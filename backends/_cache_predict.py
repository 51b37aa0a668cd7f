"""GiB of the KV cache that windows go through, from headers and config.json alone."""

from collections.abc import Callable, Mapping
from typing import Any

from evalq.checkpoint.headers import Checkpoint
from evalq.checkpoint.shape import ModelShape
from evalq.engine.kv_cache import KvCache
from evalq.vllm_memory.kv import cache_layers

GIB = 2**30
_HALF_BYTES = 2  # what cache_layers() counts by


def cache_gib(shape: ModelShape, tokens: int, cache: KvCache) -> float:
    """Of the layers that keep every token.

    Args:
        shape: of the model.
        tokens: of all windows side by side.
        cache: its types.

    Raises:
        SpecError: an architecture whose cache is not known.
    """
    layers = (layer for layers in cache_layers(shape, _HALF_BYTES) for layer in layers)
    halves = sum(layer.bytes for layer in layers if layer.kind != "state")
    return tokens * halves / _HALF_BYTES * cache.bits / 8 / GIB


def gguf_cache_gib(checkpoint: Checkpoint, tokens: int, cache: KvCache) -> float | None:
    """The same of a GGUF model; None where its header does not say how wide keys and values are.

    Layers with a sliding window count as if they kept every token, so it is an upper bound.
    """
    number = _numbers(checkpoint)
    layers, heads = number("block_count"), number("attention.head_count")
    kv_heads = checkpoint.gguf_setting("attention.head_count_kv")
    hidden = number("embedding_length")
    if not layers or not heads or not hidden:
        return None
    per_layer = kv_heads if isinstance(kv_heads, list) else [kv_heads or heads] * layers
    if not all(isinstance(count, int) for count in per_layer):
        return None
    k_width = number("attention.key_length") or hidden // heads
    v_width = number("attention.value_length") or hidden // heads
    bits: float = sum(per_layer) * (k_width * cache.k_bits + v_width * cache.v_bits)
    return tokens * bits / 8 / GIB


def _numbers(checkpoint: Checkpoint) -> Callable[[str], int]:
    """Positive numbers of its header, 0 for what is none."""

    def number(name: str) -> int:
        found = checkpoint.gguf_setting(name)
        return found if type(found) is int and found > 0 else 0

    return number


def windows_side_by_side(options: Mapping[str, Any], tokens: int, at_once: int, n_windows: int) -> int:
    """As the spec says, else as many as fill what is computed at once."""
    return int(options.get("batch_windows", max(1, min(at_once // max(1, tokens), n_windows))))

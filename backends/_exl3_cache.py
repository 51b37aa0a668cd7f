"""ExLlamaV3's KV cache: windows run through it in steps, quantized or in float16.

A quantized cache stores what a step computes before its attention reads it, so every key and value is read as
it is stored. It holds layers that attend to everything; sliding windows and recurrent states have a store of
their own, in float16.

Axes in names: B windows, T tokens, R rows (scored positions of all windows), H hidden.
Source: `exllamav3/cache/` and `exllamav3/modules/attn.py` of https://github.com/turboderp-org/exllamav3
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from evalq.engine.backend import LoadRequest
from evalq.engine.kv_cache import STEP_TOKENS, CacheTypes, KvCache, cache_of, step_bounds
from evalq.errors import ModelError

PAGE_TOKENS = 256
PLAIN = KvCache("fp16", "fp16")
CACHES = CacheTypes(
    "exllamav3", ("fp16", *(str(bits) for bits in range(8, 1, -1))), more="a number is bits per element"
)
_SEQUENCES = 16  # exllamav3's default


@dataclass
class Steps:
    """How windows go through a cache.

    Args:
        cache: exllamav3's.
        plain: the same in float16, where the first one is quantized; None otherwise.
        step_tokens: of a window in one forward pass at most.
        window_tokens: room for each window, whole pages.
    """

    cache: Any
    plain: Any
    step_tokens: int
    window_tokens: int

    @property
    def pages_of_a_step(self) -> int:
        """Tokens of a step, rounded up to whole pages."""
        return min(self.window_tokens, -(-self.step_tokens // PAGE_TOKENS) * PAGE_TOKENS)

    @property
    def notes(self) -> list[str]:
        """What a reader should know of layers that it does not hold."""
        others = self.cache.num_recurrent_layers
        if not others or self.plain is None:
            return []
        return [f"{others} layers (sliding windows, recurrent states) have no quantized cache in exllamav3"]


def types_of(options: Mapping[str, Any]) -> KvCache | None:
    """Types that the options name, None for the engine's own. Raises ModelError (bad_option)."""
    found = cache_of(options)
    if found is None:
        return None
    if (found.k == PLAIN.k) != (found.v == PLAIN.v):
        raise ModelError(
            f"exllamav3 quantizes both keys and values or neither, not {found}",
            "bad_option",
            'give bits for both: "8/4"',
        )
    if options.get("streaming"):
        message = "streaming keeps one module at a time and no KV cache"
        raise ModelError(message, "bad_option", "remove streaming or kv_cache")
    return found


def steps_of(model: Any, request: LoadRequest, batch_windows: int, least_tokens: int) -> Steps | None:
    """Caches for a model that is about to be loaded; None for windows in one pass without one.

    Args:
        model: exllamav3's, which allocates the caches when it is loaded.
        request: its longest window, options and step_tokens.
        batch_windows: side by side.
        least_tokens: that a window is padded to.

    Raises:
        ModelError: bad_option.
    """
    types, most = types_of(request.options), request.step_tokens
    inputs = max(least_tokens, request.window_tokens - 1)
    if types is None and (most is None or inputs <= most or request.options.get("streaming")):
        return None
    from exllamav3 import Cache, CacheLayer_fp16, CacheLayer_quant

    room = -(-inputs // PAGE_TOKENS) * PAGE_TOKENS

    def made(types: KvCache) -> Any:
        kind: dict[str, Any] = {"layer_type": CacheLayer_fp16}
        if types.quantized:
            kind = {"layer_type": CacheLayer_quant, "k_bits": int(types.k), "v_bits": int(types.v)}
        return Cache(model, batch_windows * room, max_batch_size=max(_SEQUENCES, batch_windows), **kind)

    cache = made(types or PLAIN)
    plain = made(PLAIN) if types is not None and types.quantized else None
    return Steps(cache, plain, most or STEP_TOKENS, room)


def scored_rows(model: Any, steps: Steps, cache: Any, inputs_BT: Any, scored: slice) -> Any:
    """Hidden states before the head at the scored positions of each window, [R, H].

    Args:
        model: exllamav3's, whose forward() ends before the head.
        steps: sizes.
        cache: one of its caches; whatever it holds is overwritten.
        inputs_BT: token ids, on the CPU.
        scored: positions.
    """
    import torch

    n_windows, n_tokens = inputs_BT.shape
    states, kept = None, []
    for start, stop in pairwise(step_bounds(n_tokens, steps.step_tokens)):
        # forward() writes into the dictionary: a fresh one for every call.
        params: dict[str, Any] = {
            "attn_mode": "flash_attn",
            "cache": cache,
            "batch_shape": (n_windows, steps.window_tokens),
            "past_len": start,
        }
        if states is not None:
            params["recurrent_states"] = states
        hidden_BTH = model.forward(inputs_BT[:, start:stop].contiguous(), params)
        states = params.get("recurrent_states")
        kept.append(hidden_BTH[:, max(0, scored.start - start) : max(0, scored.stop - start)].clone())
    for state in states or ():
        cache.release_state(state)
    return torch.cat(kept, dim=1).flatten(0, 1).contiguous()

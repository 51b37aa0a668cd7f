"""transformers' KV cache: the model's own, or quantized with HQQ.

The quantized cache rounds what a step computed after it was used, 64 numbers of a head at a time with a scale
and a zero each, so a token reads the keys and values of its own step as they are and those of earlier steps
rounded. A window that one step holds reads nothing rounded, and is refused as not measured. At every step all
of it is unpacked and rounded again, as in generation.

transformers has a second one, of optimum-quanto, which compiles an extension at first use; it is not offered.

Source: https://huggingface.co/docs/transformers/kv_cache (QuantizedCache)
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

from evalq.engine.kv_cache import CacheTypes, cache_of
from evalq.errors import ModelError

CACHES = CacheTypes(
    "transformers",
    ("f32", "fp16", "bf16", "hqq8", "hqq4", "hqq3", "hqq2", "hqq1"),
    alike=True,
    more='hqqN: N bits by HQQ (pip install "evalq[hqq]")',
)
_DTYPES = {"torch.float32": "f32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
_PREFIX = "hqq"


def cache_bits(options: Mapping[str, Any], dtype: str) -> int | None:
    """Bits of HQQ's cache; None for an unquantized one, which is of the model's dtype.

    Args:
        options: checked.
        dtype: of the loaded model, "torch.bfloat16".

    Raises:
        ModelError: bad_option, engine_missing.
    """
    cache = cache_of(options)
    if cache is None:
        return None
    if not cache.k.startswith(_PREFIX):
        own = _DTYPES.get(dtype, dtype)
        if cache.k != own:
            message = f"keys and values of this model are {own}, not {cache}"
            raise ModelError(message, "bad_option", f'set "dtype", or "kv_cache": "{own}"')
        return None
    if importlib.util.find_spec(_PREFIX) is None:
        raise ModelError(f"a KV cache in {cache} needs HQQ", "engine_missing", 'pip install "evalq[hqq]"')
    return int(cache.k.removeprefix(_PREFIX))


def new_cache(model: Any, bits: int | None) -> Any:
    """An empty cache for some windows of one batch."""
    from transformers import DynamicCache, QuantizedCache

    if bits is None:
        # Of the model's own kinds of layers: full, sliding windows, states.
        return DynamicCache(config=model.config)
    # Groups lie along a head (axis 1); the rest of a step does not stay unquantized until there are 128.
    text = model.config.get_text_config()
    return QuantizedCache("hqq", text, nbits=bits, axis_key=1, axis_value=1, residual_length=1)

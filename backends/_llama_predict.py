"""What llama.cpp will need for a GGUF model, from its header; the engine is not imported."""

from evalq.backends._cache_predict import GIB, gguf_cache_gib, windows_side_by_side
from evalq.backends._llama import first_part
from evalq.backends._llama_plan import cache_types
from evalq.checkpoint.headers import open_checkpoint
from evalq.engine.backend import LoadRequest, Prediction

# As make_plan() and llama.cpp's context have them.
_AT_ONCE, _CELLS = 512, 256


def predict(request: LoadRequest) -> Prediction | None:
    """Weights and KV cache, GiB; None where the header does not say. Raises ModelError for a broken file."""
    checkpoint = open_checkpoint(first_part(request.path))
    tokens = max(1, request.window_tokens - 1)
    windows = windows_side_by_side(request.options, tokens, _AT_ONCE, request.n_windows)
    cells = windows * -(-tokens // _CELLS) * _CELLS
    cache = cache_types(request.options)
    kv_gib = gguf_cache_gib(checkpoint, cells, cache)
    if kv_gib is None:
        return None
    weights_gib = checkpoint.storage.disk_bytes / GIB
    verdict = f"{weights_gib:.2f} GiB of weights and {kv_gib:.2f} GiB of KV cache ({cache}, {cells:,} tokens)"
    memory = {"weights_gib": weights_gib, "kv_cache_gib": kv_gib, "kv_cache_tokens": float(cells)}
    return Prediction(verdict, None, memory)

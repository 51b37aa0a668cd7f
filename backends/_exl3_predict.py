"""What exllamav3 will need for a checkpoint; the engine is not imported."""

from evalq.backends._cache_predict import cache_gib, windows_side_by_side
from evalq.backends._exl3_cache import PAGE_TOKENS, PLAIN, types_of
from evalq.checkpoint.headers import open_checkpoint
from evalq.checkpoint.shape import read_shape
from evalq.engine.backend import LoadRequest, Machine, Prediction

# As the backend pads windows and fills batches.
_INPUTS_MIN, _BATCH_TOKENS = 256, 2048


def predict(request: LoadRequest, machine: Machine) -> Prediction | None:
    """Weights and KV cache against the GPU, or all that share the layers; None without a GPU.

    What a forward pass takes besides is not counted, so a model that does not fit is certain not to.

    Raises:
        SpecError: an architecture whose cache is not known.
    """
    options = request.options
    if not machine.gpus or options.get("streaming"):
        return None
    types, inputs = types_of(options), max(_INPUTS_MIN, request.window_tokens - 1)
    stepped = types is not None or (request.step_tokens is not None and inputs > request.step_tokens)
    windows = windows_side_by_side(options, inputs, _BATCH_TOKENS, _BATCH_TOKENS)
    tokens = windows * -(-inputs // PAGE_TOKENS) * PAGE_TOKENS if stepped else 0
    cache = types or PLAIN
    kv_gib = cache_gib(read_shape(str(request.path)), tokens, cache) if tokens else 0.0
    if cache.quantized:  # beside the float16 one of the check
        kv_gib += cache_gib(read_shape(str(request.path)), tokens, PLAIN)
    weights_gib = open_checkpoint(request.path).storage.vram_gb  # the embedding stays in RAM
    sizes = [gib for _, gib in machine.gpus]
    gpu_gib = sum(sizes) if "gpu_split" in options else max(sizes)
    needed = f"{weights_gib:.2f} GiB of weights and {kv_gib:.2f} GiB of KV cache"
    fits = weights_gib + kv_gib <= gpu_gib
    verdict = f"{needed} in {gpu_gib:.2f} GiB" if fits else f"does not load: {needed} on {gpu_gib:.2f} GiB"
    memory = {"weights_gib": weights_gib, "kv_cache_gib": kv_gib, "kv_cache_tokens": float(tokens)}
    return Prediction(verdict, None if fits else "oom_load", memory)

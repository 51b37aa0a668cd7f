"""What transformers will need for a checkpoint, with the batches that this backend makes."""

from evalq.backends._hf_memory import plan_transformers
from evalq.checkpoint.shape import read_shape
from evalq.engine.backend import LoadRequest, Machine, Prediction

GPU_BATCH_TOKENS = 8192
# Large enough that a matrix product is not slowed down, far below the [T, V] of any real vocabulary.
HEAD_CHUNK_MIB = 96


def predict(request: LoadRequest, machine: Machine) -> Prediction | None:
    """Weights, hidden states and logits against the GPU, or RAM where torch has none. Raises SpecError."""
    options, inputs = request.options, max(1, request.window_tokens - 1)
    device = options.get("device", "auto")
    on_cpu = device == "cpu" or not machine.gpus or machine.versions.get("torch", "").endswith("+cpu")
    gpus_gib = [gib for _, gib in machine.gpus]
    gpu_gib = sum(gpus_gib) if device == "balanced" else max(gpus_gib, default=0.0)
    batch = options.get("batch_windows", 1 if on_cpu else max(1, GPU_BATCH_TOKENS // inputs))
    planned = plan_transformers(
        read_shape(str(request.path)),
        machine.ram_gib if on_cpu else gpu_gib,
        batch * min(inputs, request.step_tokens or inputs),
        options.get("dtype", "auto"),
        options.get("head_chunk_mib", HEAD_CHUNK_MIB),
    )
    return Prediction(planned.verdict, planned.category, {"weights_gib": planned.weights_gib})

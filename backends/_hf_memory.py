"""What transformers takes of a model: weights, one batch of hidden states, one chunk of logits.

The backend runs whole windows without a KV cache, the head on scored rows in chunks. compressed-tensors
checkpoints are dequantized as they load; other formats stay packed.
"""

from dataclasses import dataclass

from evalq.checkpoint.shape import ModelShape
from evalq.vllm_memory.activation import GIB
from evalq.vllm_memory.weights import rank_weights

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Python, torch and its kernels, before any model: 0.4 to 0.6 GiB of RAM or of a GPU.
RUNTIME_GIB = 0.5


@dataclass(frozen=True)
class TransformersPlan:
    """What transformers would take, in GiB.

    Args:
        model: its name.
        available_gib: free memory of the GPU, or free RAM.
        weights_gib: in the dtype they run in.
        working_gib: hidden states of a batch, the chunk of logits, the runtime.
    """

    model: str
    available_gib: float
    weights_gib: float
    working_gib: float

    @property
    def fits(self) -> bool:
        """Whether both are available."""
        return self.weights_gib + self.working_gib <= self.available_gib

    @property
    def category(self) -> str | None:
        """Key of `evalq.engine.failures.CATEGORIES`; None when it fits."""
        return None if self.fits else "oom_load"

    @property
    def verdict(self) -> str:
        """The outcome and its figures in one line."""
        return (
            f"{'fits' if self.fits else 'does not load'}: {self.weights_gib:.2f} GiB of weights and "
            f"{self.working_gib:.2f} of hidden states and logits, {self.available_gib:.2f} GiB free"
        )


def plan_transformers(
    shape: ModelShape,
    available_gib: float,
    batch_tokens: int,
    dtype: str = "auto",
    head_chunk_mib: int = 96,
) -> TransformersPlan:
    """Plan a model for the transformers backend on one device.

    Args:
        shape: of the model.
        available_gib: free memory of the GPU, or free RAM.
        batch_tokens: windows of a batch x their length.
        dtype: the backend's option; auto is the checkpoint's.
        head_chunk_mib: the backend's option.
    """
    if dtype == "auto":
        named = shape.config.get("dtype") or shape.config.get("torch_dtype")
        dtype = named if isinstance(named, str) else "float32"
    element_bytes = _DTYPE_BYTES.get(dtype, 2)
    weights = rank_weights(shape)
    unpacks = shape.quantization.get("quant_method") in (None, "compressed-tensors")
    linear = weights.linear_weights * element_bytes if unpacks else weights.linear
    in_bytes = linear + (weights.files + weights.padding - weights.linear) / 2 * element_bytes
    widest = 3 * shape.intermediate + 4 * shape.hidden
    # Logits, their float32 copy and the exponentials are chunks of equal size.
    working = batch_tokens * widest * element_bytes + 3 * head_chunk_mib * 2**20
    return TransformersPlan(shape.name, available_gib, in_bytes / GIB, working / GIB + RUNTIME_GIB)

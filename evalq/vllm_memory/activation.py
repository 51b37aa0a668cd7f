"""What a vLLM worker takes beside weights and KV cache: estimates with a range, by version.

**Peak activation** is the most torch allocated in vLLM's profile run, one step of `max_num_batched_tokens`
tokens followed by sampling for `max_num_seqs` sequences. The larger of two moments counts:

    forward   tokens * (3 * MLP width / TP + 4 * hidden) * 2 bytes; with experts both widths top-k times
    sampler   sequences * vocabulary * B + tokens * hidden * 2 bytes

B, bytes per logit, is how the version samples: sorting the vocabulary until 0.16 (38: FP32 logits, a sorted
copy, 64-bit indices, probabilities; 40 in the benchmark of vLLM pull request 32558), a Triton kernel without
the sort from 0.17 on (14; pull request 33538), in place with the second model runner from 0.26 on (4).
Against the measurements, in brackets, with 1024 sequences and 16384 tokens: Llama-3.1-8B 4.77 (4.76),
Llama-3.3-70B 4.90 (4.84), Qwen3-0.6B 5.54 (5.56), gpt-oss-20b 7.38 (7.38) GiB on an H100; SmolLM2-135M with
0.26 on an H200 0.23 (BF16 0.24, INT4 0.21). Versions 0.17 to 0.25 rest on 0.8 to 3.9 seen with 0.19.
Custom workspaces of expert kernels (FlashInfer's take up to 11 GiB, vLLM issue 49476) are not in it.

**Non-torch** is NCCL and the CUDA context's growth: 0.13 to 0.22 measured on one GPU, 0.55 on two.
**CUDA graphs** count against the budget from 0.21 on (0.1 to 0.6 measured); before, they took what the
budget left free.
"""

from dataclasses import dataclass

from evalq.checkpoint.shape import ModelShape, integer
from evalq.vllm_memory.weights import EXPERT_COUNTS

GIB = 2**30
Version = tuple[int, int]


@dataclass(frozen=True)
class GibRange:
    """An estimate in GiB with the lowest and the highest value to expect."""

    low: float
    expected: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            "low": round(self.low, 3),
            "expected": round(self.expected, 3),
            "high": round(self.high, 3),
        }


@dataclass(frozen=True)
class _Sampler:
    since: Version
    low: float
    expected: float
    high: float


_SAMPLERS = (
    _Sampler((0, 26), 3, 4, 14),
    _Sampler((0, 17), 6, 14, 20),
    _Sampler((0, 0), 36, 38, 40),
)
_FORWARD_SPREAD = 0.3
# What torch reserves for cuBLAS at the first product in bfloat16, on Hopper and later.
_CUBLAS_GIB = 0.032
GRAPHS_COUNTED_FROM: Version = (0, 21)


@dataclass(frozen=True)
class EngineStep:
    """One step of the engine: `tokens` computed at once, `sequences` sampled at once."""

    tokens: int
    sequences: int


def peak_activation(shape: ModelShape, step: EngineStep, tp: int, version: Version) -> GibRange:
    """Peak activation of one GPU.

    Args:
        shape: of the model.
        step: max_num_batched_tokens and max_num_seqs.
        tp: GPUs that share each layer; logits are gathered, so they are not divided.
        version: of vLLM.
    """
    forward = step.tokens * _forward_width(shape, tp) * 2 / GIB
    hidden = step.tokens * shape.hidden * 2 / GIB
    logits = step.sequences * shape.vocab / GIB
    sampler = next(row for row in _SAMPLERS if version >= row.since)
    return GibRange(
        low=max(forward * (1 - _FORWARD_SPREAD), logits * sampler.low + hidden),
        expected=max(forward, logits * sampler.expected + hidden),
        high=max(forward * (1 + _FORWARD_SPREAD), logits * sampler.high + hidden) + _CUBLAS_GIB,
    )


def _forward_width(shape: ModelShape, tp: int) -> float:
    """Elements per token that the widest layer holds at once."""
    dense = 3 * shape.intermediate / tp + 4 * shape.hidden
    if not any(integer(shape.config, key) for key in EXPERT_COUNTS):
        return dense
    top_k = integer(shape.config, "num_experts_per_tok") or 1
    width = integer(shape.config, "moe_intermediate_size") or shape.intermediate
    experts = 3 * top_k * width / tp + (top_k + 4) * shape.hidden
    # Without leading dense layers, intermediate_size is that of the experts or of nothing.
    return max(dense, experts) if integer(shape.config, "first_k_dense_replace") else experts


def non_torch(n_gpus: int) -> GibRange:
    """Memory outside torch's allocator, on each of the GPUs that work together."""
    return GibRange(0.1, 0.14, 0.25) if n_gpus == 1 else GibRange(0.5, 0.55, 1.2)


def cuda_graphs(version: Version, eager: bool) -> GibRange:
    """What CUDA graphs take from the requested memory."""
    if eager or version < GRAPHS_COUNTED_FROM:
        return GibRange(0.0, 0.0, 0.0)
    return GibRange(0.1, 0.4, 1.0)

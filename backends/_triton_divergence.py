"""`compare_rows` as one kernel for NVIDIA GPUs: each row of both models is read twice and nothing is written.

In single torch operations the same work reads and writes every [R, V] tensor some fifteen times, which for a
large vocabulary takes longer than the model itself.

Axes in names: R rows, V vocabulary.
Source: https://triton-lang.org (Triton comes with the CUDA builds of torch)
"""

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    q_ptr, p_ptr, target_ptr, float_ptr, argmax_ptr, q_stride, p_stride, n_rows,
    q_vocab: tl.constexpr, p_vocab: tl.constexpr, shared: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    q_ptr += row * q_stride
    p_ptr += row * p_stride
    lane = tl.arange(0, BLOCK)
    q_max, q_sum, q_shared, best = -float("inf"), 0.0, 0.0, 0
    p_max, p_sum, p_shared = -float("inf"), 0.0, 0.0
    for start in range(0, q_vocab, BLOCK):
        at = start + lane
        q = tl.load(q_ptr + at, at < q_vocab, -float("inf")).to(tl.float32)
        top = tl.max(q, 0)
        best = tl.where(top > q_max, start + tl.argmax(q, 0), best)
        new = tl.maximum(q_max, top)
        scale, below = tl.exp(q_max - new), tl.exp(q - new)
        q_sum = q_sum * scale + tl.sum(below, 0)
        q_shared = q_shared * scale + tl.sum(tl.where(at < shared, below, 0.0), 0)
        q_max = new
    for start in range(0, p_vocab, BLOCK):
        at = start + lane
        p = tl.load(p_ptr + at, at < p_vocab, -float("inf")).to(tl.float32)
        new = tl.maximum(p_max, tl.max(p, 0))
        scale, below = tl.exp(p_max - new), tl.exp(p - new)
        p_sum = p_sum * scale + tl.sum(below, 0)
        p_shared = p_shared * scale + tl.sum(tl.where(at < shared, below, 0.0), 0)
        p_max = new
    ratio = q_shared / p_shared
    entropy, divergence, accepted = 0.0, 0.0, 0.0
    for start in range(0, q_vocab, BLOCK):
        at = start + lane
        q = tl.load(q_ptr + at, at < q_vocab, -float("inf")).to(tl.float32) - q_max
        p = tl.load(p_ptr + at, at < shared, -float("inf")).to(tl.float32) - p_max
        exp_q, exp_p = tl.exp(q), tl.exp(p)
        entropy += tl.sum(tl.where(exp_q > 0, exp_q * q, 0.0), 0)
        divergence += tl.sum(tl.where(exp_p > 0, exp_p * (p - q), 0.0), 0)
        accepted += tl.sum(tl.where(at < shared, tl.minimum(exp_p * ratio, exp_q), 0.0), 0)
    target = tl.load(target_ptr + row)
    q_own = tl.load(q_ptr + target).to(tl.float32) - q_max
    p_own = tl.load(p_ptr + target).to(tl.float32) - p_max
    tl.store(argmax_ptr + row, best)
    tl.store(float_ptr + row, q_own - tl.log(q_sum))
    tl.store(float_ptr + n_rows + row, p_own - tl.log(p_sum))
    tl.store(float_ptr + 2 * n_rows + row, 1 / q_sum)
    tl.store(float_ptr + 3 * n_rows + row, tl.log(q_sum) - entropy / q_sum)
    tl.store(float_ptr + 4 * n_rows + row, divergence / p_shared - tl.log(p_shared) + tl.log(q_shared))
    tl.store(float_ptr + 5 * n_rows + row, accepted / q_shared)


# Rows of the kernel's output.
NAMES = ("logprob", "reference_logprob", "max_prob", "entropy", "kld", "acceptance")


def compare(logits_RV: Any, reference_RV: Any, targets_R: Any) -> dict[str, Any]:
    """Every column of `_torch_divergence` by name, [R]; both tensors stay as they are.

    Args:
        logits_RV: of the model, any floating-point type, rows contiguous.
        reference_RV: of the reference, likewise; its V may differ.
        targets_R: int64, ids that both have.
    """
    n_rows, q_vocab = logits_RV.shape
    p_vocab = reference_RV.shape[1]
    floats = torch.empty((len(NAMES), n_rows), dtype=torch.float32, device=logits_RV.device)
    argmax = torch.empty(n_rows, dtype=torch.int32, device=logits_RV.device)
    with torch.cuda.device(logits_RV.device):
        _kernel[(n_rows,)](
            logits_RV, reference_RV, targets_R, floats, argmax,
            logits_RV.stride(0), reference_RV.stride(0), n_rows,
            q_vocab=q_vocab, p_vocab=p_vocab, shared=min(q_vocab, p_vocab), BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    found = dict(zip(NAMES, floats, strict=True))
    return found | {"argmax": argmax, "top1": argmax == targets_R}

"""What a model says beside its reference, over the whole vocabulary that both share.

p is the reference, q the model. A few rows at a time: everything about them is worked out while they are in
the cache.

Axes in names: R rows, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from evalq.engine.columns import (
    ACCEPTANCE,
    ARGMAX,
    ENTROPY,
    KLD,
    LOGPROB,
    MAX_PROB,
    REFERENCE_LOGPROB,
    TOP1,
)

# Logits of both models that are worked on at once, on a CPU.
_CACHE_BYTES = 2**21


def compare_rows(
    logits_RV: Any, reference_RV: Any, targets_R: Any, columns: Sequence[str], out: dict[str, Any]
) -> None:
    """Columns of each row, written into `out`; both tensors are overwritten.

    Args:
        logits_RV: of the model, in any floating-point type.
        reference_RV: of the reference, likewise. Its V may differ: the first columns of
            both are the same tokens, and what only one has is left out of KLD and acceptance.
        targets_R: int64.
        columns: names of OWN and BESIDE in `evalq.engine.columns`.
        out: name -> [R].
    """
    n_rows, n_vocab = logits_RV.shape
    if logits_RV.is_cuda and (kernel := _fused()) is not None:
        found = kernel(logits_RV, reference_RV, targets_R)
        for name in set(out) & set(found):
            out[name].copy_(found[name])
        return
    logits_RV, reference_RV = logits_RV.float(), reference_RV.float()
    at_once = n_rows if logits_RV.is_cuda else max(1, _CACHE_BYTES // (8 * n_vocab))
    for first in range(0, n_rows, at_once):
        rows = slice(first, first + at_once)
        found = _block(logits_RV[rows], reference_RV[rows], targets_R[rows], columns)
        for name, values in found.items():
            out[name][rows] = values


@functools.cache
def _fused() -> Callable[[Any, Any, Any], dict[str, Any]] | None:
    """All of it as one kernel, tried on a row; None where Triton or its compiler is missing."""
    import torch

    try:
        from evalq.backends._triton_divergence import compare

        logits, target = torch.zeros((1, 8), device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        same = compare(logits, logits, target)
        return compare if float(same["kld"][0]) == 0.0 else None
    except Exception:  # a compiler that is not there, a GPU that Triton does not know: it is only faster
        return None


def _block(q: Any, p: Any, targets: Any, columns: Sequence[str]) -> dict[str, Any]:
    """Every column asked for of some rows. `q` and `p` become logits below their row's maximum."""
    best = q.max(dim=-1)
    q.sub_(best.values[:, None])
    exp_q = q.exp()
    sum_q = exp_q.sum(dim=-1)
    log_q = sum_q.log()
    p.sub_(p.amax(dim=-1)[:, None])
    exp_p = p.exp()
    sum_p = exp_p.sum(dim=-1)
    found = {
        LOGPROB.name: _own(q, targets) - log_q,
        TOP1.name: best.indices == targets,
        ARGMAX.name: best.indices,
        MAX_PROB.name: 1 / sum_q,
        REFERENCE_LOGPROB.name: _own(p, targets) - sum_p.log(),
    }
    if ENTROPY.name in columns:
        found[ENTROPY.name] = log_q - _dot(exp_q, q) / sum_q
    shared = min(q.shape[-1], p.shape[-1])
    if q.shape[-1] > shared:
        q, exp_q = q[:, :shared], exp_q[:, :shared]
        sum_q = exp_q.sum(dim=-1)
    if p.shape[-1] > shared:
        p, exp_p = p[:, :shared], exp_p[:, :shared]
        sum_p = exp_p.sum(dim=-1)
    if KLD.name in columns:
        found[KLD.name] = _dot(exp_p, p.sub_(q)) / sum_p - sum_p.log() + sum_q.log()
    if ACCEPTANCE.name in columns:
        exp_p.mul_((sum_q / sum_p)[:, None])
        found[ACCEPTANCE.name] = exp_p.minimum(exp_q).sum(dim=-1) / sum_q
    return {name: found[name] for name in columns if name in found}


def _own(rows_RV: Any, targets_R: Any) -> Any:
    return rows_RV.gather(-1, targets_R[:, None])[:, 0]


def _dot(weights_RV: Any, values_RV: Any) -> Any:
    """Sum of products of each row. Where the weight is zero the value does not matter, were it infinite."""
    import torch

    # Faster and more exact than einsum, which multiplies matrices of one row.
    total = torch.linalg.vecdot(weights_RV, values_RV)
    if bool(total.isfinite().all()):
        return total
    return torch.where(weights_RV > 0, weights_RV * values_RV, 0.0).sum(dim=-1)

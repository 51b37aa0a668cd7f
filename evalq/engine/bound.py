"""A lower bound of KL divergence, for engines that show a few probabilities instead of all.

K tokens count each for itself, and all others as one bucket. Merging outcomes never raises a divergence (the
data processing inequality), so this is at most the exact value, whichever tokens are chosen; the sum over the
K tokens without the bucket is no divergence and can be negative.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.engine.reference import Float32s

Float64s = NDArray[np.float64]
# Of probabilities that float32 log-probabilities can tell from none.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Bound:
    """Of each row.

    Args:
        kld: at most the KL divergence, nats, [R].
        mass: what the chosen tokens have of the reference's probability, [R].
    """

    kld: Float64s
    mass: Float64s


def bound(p_logprob_RK: NDArray[Any], q_logprob_RK: NDArray[Any]) -> Bound:
    """A lower bound of sum p (ln p - ln q).

    Args:
        p_logprob_RK: ln p of the chosen tokens by the reference; -inf or NaN for a place that holds none.
        q_logprob_RK: ln q of the same tokens by the model.
    """
    there = np.isfinite(p_logprob_RK) & ~np.isnan(q_logprob_RK)
    p, q = np.asarray(p_logprob_RK, np.float64), np.asarray(q_logprob_RK, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        terms = np.where(there, np.exp(p) * (p - q), 0.0).sum(-1)
        mass = np.where(there, np.exp(p), 0.0).sum(-1)
        # Of the model's rest rounding may leave less than nothing: more of it only lowers the bound.
        q_rest = np.maximum(1 - np.where(there, np.exp(q), 0.0).sum(-1), _ROUNDING)
        p_rest = np.maximum(1 - mass, 0.0)
        rest = np.where(p_rest > _ROUNDING, p_rest * (np.log(p_rest) - np.log(q_rest)), 0.0)
    return Bound(np.maximum(terms + rest, 0.0), np.minimum(mass, 1.0))


def logprobs_of(logits_RV: Float32s, ids_RK: NDArray[np.int64]) -> Float64s:
    """Ln p of some tokens of each row, float64 [R, K]; -inf for ids that are none of the vocabulary's."""
    top = logits_RV.max(-1, keepdims=True)
    total = np.log(np.exp(logits_RV - top).sum(-1, keepdims=True, dtype=np.float64)) + top
    known = (ids_RK >= 0) & (ids_RK < logits_RV.shape[1])
    found = np.take_along_axis(logits_RV, np.where(known, ids_RK, 0), -1)
    return np.where(known, found - total, -np.inf)

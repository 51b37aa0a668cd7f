"""The error of a mean over tokens, and means over the tokens that are numbers.

Tokens of one window share context and topic, so errors are clustered by window (CR1: Cameron & Miller, "A
Practitioner's Guide to Cluster-Robust Inference", J. Human Resources 50(2), 2015); treating tokens as
independent, as llama-perplexity does, gives error bars that are several times too small.
"""

import math

import numpy as np
from numpy.typing import NDArray

from evalq.errors import ModelError

NONFINITE_SHARE_MAX = 0.01

Float64s = NDArray[np.float64]


def clustered_stderr(x: Float64s, window_of: NDArray[np.integer]) -> float | None:
    """Standard error of mean(x) when entries of one window are correlated (CR1).

    Var = G/(G-1) * sum_g (sum_{i in g} (x_i - mean))**2 / n**2 over G windows. With one entry per window this
    is sum (x_i - mean)**2 / (n (n-1)), llama-perplexity's error of the mean.

    Args:
        x: values, [n].
        window_of: index of the window of each, [n].

    Returns:
        None for fewer than two windows: a single cluster's deviations sum to zero by construction, so it
        says nothing about the spread between windows.
    """
    _, group_of = np.unique(window_of, return_inverse=True)
    n_groups = int(group_of.max()) + 1 if group_of.size else 0
    if n_groups < 2:
        return None
    sums = np.bincount(group_of, weights=x - x.mean(), minlength=n_groups)
    return math.sqrt(n_groups / (n_groups - 1) * float(np.square(sums).sum())) / x.size


def require_finite(n: int, n_nonfinite: int) -> None:
    """Raise ModelError (non_finite) when a mean over the finite tokens would no longer describe the text."""
    if n == 0:
        raise ModelError("no token was scored", "non_finite")
    if n_nonfinite == n or n_nonfinite > NONFINITE_SHARE_MAX * n:
        raise ModelError(
            f"{n_nonfinite} of {n} log-probabilities are NaN or infinite ({n_nonfinite / n:.1%})",
            "non_finite",
        )


def exp(nats: float) -> float:
    """Exponential that is infinite where float64 ends (a mean of 709 nats, a thoroughly broken model)."""
    return math.exp(nats) if nats < 709.0 else math.inf

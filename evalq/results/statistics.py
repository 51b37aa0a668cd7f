"""Errors of figures over tokens that depend on each other, and intervals that hold with few windows.

Tokens of one window share context and topic, so errors are clustered (CR1: Cameron & Miller, "A
Practitioner's Guide to Cluster-Robust Inference", J. Human Resources 50(2), 2015); treating tokens as
independent, as llama-perplexity does, gives error bars that are several times too small. What a cluster is
says `evalq.data.windows.cluster_of`: a window, or a stretch of text as long as one where windows overlap.

95% intervals are by the t distribution with one degree of freedom fewer than there are clusters, on a scale
on which the figure is closer to normal (`Scale`). In the simulations of tests/results/test_coverage.py they
hold the truth in 93 to 97% of runs from 4 clusters on. They hold it less often where the clusters' own
values are very skewed (a lognormal spread of 0.8 between windows and 8 windows: 91%; of 1.2: 85%), and where
topics go on over several windows: then neighbouring clusters are not independent either. On WikiText-2 in
windows of 256 tokens the mean NLL of SmolLM2-135M correlates by 0.3 from one window to the next, so the
error of its own perplexity is too small; its difference to a reference does not (BF16 beside Q8_0: -0.2,
within the noise of 48 windows).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evalq.errors import ModelError

NONFINITE_SHARE_MAX = 0.01
CONFIDENCE = 0.95
# From here on the t distribution is the normal one in every digit that is shown.
_NORMAL_FROM = 20_000

Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class Clusters:
    """Which tokens depend on each other.

    Args:
        of: cluster of each token, 0 to count - 1, none empty, [n].
        count: G.
    """

    of: NDArray[np.intp]
    count: int

    @classmethod
    def named(cls, names: NDArray[np.integer]) -> "Clusters":
        """From any integer names, [n]."""
        if names.size and names.min() >= 0 and names.max() <= 4 * names.size:  # as unique(), without sorting
            there = np.bincount(names) > 0
            return cls((np.cumsum(there) - 1)[names], int(there.sum()))
        found, of = np.unique(names, return_inverse=True)
        return cls(of, found.size)

    @cached_property
    def degrees_of_freedom(self) -> int:
        """G - 1 for clusters of one size; less where sizes differ, at least 1.

        The G here is the effective number of clusters for a mean, n**2 / sum n_g**2, rounded: a last window
        of ten tokens says nothing about the spread (Carter, Schnepel & Steigerwald, "Asymptotic Behavior of
        a t-Test Robust to Cluster Heterogeneity", Rev. Econ. Stat. 99(4), 2017).
        """
        sizes = np.bincount(self.of, minlength=self.count).astype(np.float64)
        return max(1, round(float(sizes.sum() ** 2 / np.square(sizes).sum())) - 1)

    @cached_property
    def t(self) -> float:
        """Half the width of a 95% interval, in standard errors."""
        return t_quantile(self.degrees_of_freedom)

    def stderr(self, deviations: Float64s) -> float | None:
        """Standard error of a mean whose tokens deviate from it so much (CR1).

        Var = G/(G-1) * sum_g (sum_{i in g} d_i)**2 / n**2. With one token per cluster and d = x - mean this
        is sum d**2 / (n (n-1)), llama-perplexity's error of the mean. For another figure d is its influence:
        how much the figure moves, times n, when a token gets more weight.

        Args:
            deviations: d, summing to zero, [n].

        Returns:
            None for fewer than two clusters: a single one's deviations sum to zero by construction, so it
            says nothing about the spread between clusters.
        """
        if self.count < 2:
            return None
        sums = np.bincount(self.of, weights=deviations, minlength=self.count)
        return math.sqrt(self.count / (self.count - 1) * float(np.square(sums).sum())) / self.of.size


@dataclass(frozen=True)
class Scale:
    """A scale on which an interval is symmetric.

    Args:
        there: value -> its place on the scale.
        slope: derivative of `there` at the value.
        back: the inverse of `there`.
        holds: whether a value has a place and a slope.
    """

    there: Callable[[float], float]
    slope: Callable[[float], float]
    back: Callable[[float], float]
    holds: Callable[[float], bool]


def exp(nats: float) -> float:
    """Exponential that is infinite where float64 ends (a mean of 709 nats, a thoroughly broken model)."""
    return math.exp(nats) if nats < 709.0 else math.inf


def _logistic(x: float) -> float:
    return 1 / (1 + exp(-x))


PLAIN = Scale(lambda v: v, lambda v: 1.0, lambda x: x, lambda v: True)
# For what is positive and skewed: perplexities, mean KLD.
LOG = Scale(math.log, lambda v: 1 / v, exp, lambda v: 0 < v < math.inf)
# For shares.
LOGIT = Scale(lambda v: math.log(v / (1 - v)), lambda v: 1 / (v * (1 - v)), _logistic, lambda v: 0 < v < 1)
# For correlations: Fisher's z.
FISHER = Scale(math.atanh, lambda v: 1 / (1 - v * v), math.tanh, lambda v: -1 < v < 1)


def interval(
    value: float, stderr: float | None, t: float, scale: Scale = PLAIN
) -> tuple[float, float] | None:
    """From so many standard errors below the value to as many above it, on a scale.

    Args:
        value: the figure.
        stderr: of the value itself, not of its place on the scale.
        t: how many standard errors, as `Clusters.t`.
        scale: where the interval is symmetric; on which the value has no place, the plain one is taken.

    Returns:
        None without a finite value and error.
    """
    if stderr is None or not math.isfinite(stderr) or not math.isfinite(value):
        return None
    used = scale if scale.holds(value) else PLAIN
    place, half = used.there(value), t * stderr * used.slope(value)
    return used.back(place - half), used.back(place + half)


@lru_cache(maxsize=4096)
def t_quantile(degrees_of_freedom: int, confidence: float = CONFIDENCE) -> float:
    """How many standard errors hold so much of Student's t distribution, on both sides of its middle."""
    low, high = 0.0, 2.0
    if degrees_of_freedom >= _NORMAL_FROM:
        return NormalDist().inv_cdf(0.5 + confidence / 2)
    while t_within(high, degrees_of_freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if t_within(middle, degrees_of_freedom) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_within(t: float, degrees_of_freedom: int) -> float:
    """P(|T| <= t) of Student's t distribution with a whole number of degrees of freedom.

    Exact finite sums: Abramowitz & Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    if math.isinf(t):
        return 1.0
    if degrees_of_freedom >= _NORMAL_FROM:
        return math.erf(abs(t) / math.sqrt(2))
    angle = math.atan(abs(t) / math.sqrt(degrees_of_freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees_of_freedom % 2
    # Terms are 1, 1/2 cos**2, (1 3)/(2 4) cos**4, ... and for odd degrees cos, 2/3 cos**3, ...
    k = np.arange(1, (degrees_of_freedom - odd) // 2, dtype=np.float64)
    factors = (2 * k - 1 + odd) / (2 * k + odd) * cosine**2
    total = 1 + float(np.cumprod(factors).sum())
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * cosine * total if degrees_of_freedom > 1 else 0.0))


def t_two_sided(t: float, degrees_of_freedom: int) -> float:
    """Two-sided p-value of a t statistic; below 1e-15 it is 0."""
    return max(0.0, 1.0 - t_within(t, degrees_of_freedom))


def require_finite(n: int, n_nonfinite: int) -> None:
    """Raise ModelError (non_finite) when a mean over the finite tokens would no longer describe the text."""
    if n == 0:
        raise ModelError("no token was scored", "non_finite")
    if too_many_nonfinite(n, n_nonfinite):
        raise ModelError(
            f"{n_nonfinite} of {n} log-probabilities are NaN or infinite ({n_nonfinite / n:.1%})",
            "non_finite",
        )


def too_many_nonfinite(n: int, n_nonfinite: int) -> bool:
    """Whether the finite ones among n values no longer describe all of them."""
    return n_nonfinite == n or n_nonfinite > NONFINITE_SHARE_MAX * n

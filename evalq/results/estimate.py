"""A figure with its error, and how the errors of means, functions of means and percentiles are made."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pydantic import BaseModel, ConfigDict

from evalq.results.statistics import PLAIN, Clusters, Float64s, Scale, interval

# Tokens above or below a percentile, whichever are fewer, from which on its interval holds.
TOKENS_BEYOND = 5


class Estimate(BaseModel):
    """A number with its error.

    Args:
        value: in the metric's unit.
        stderr: clustered standard error; None where it is not known, as with fewer than two windows.
        stderr_is_lower_bound: the windows overlap and the error does not take that into account. Only of
            results of evalq 0.1 that were not compared since.
        low: lower end of the 95% interval; None without an error.
        high: upper end of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    stderr: float | None = None
    stderr_is_lower_bound: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval; None where it is not known."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Sample:
    """A value per token, all finite.

    Args:
        values: [n], n > 0.
        clusters: which of them depend on each other.
        overlap_ignored: clusters are overlapping windows, so errors are lower bounds.
    """

    values: Float64s
    clusters: Clusters
    overlap_ignored: bool = False

    @cached_property
    def mean(self) -> float:
        """Of all tokens."""
        return float(self.values.mean())

    @cached_property
    def mean_stderr(self) -> float | None:
        """Its clustered standard error."""
        return self.clusters.stderr(self.values - self.mean)

    @cached_property
    def ordered(self) -> Float64s:
        """The values, smallest first."""
        return np.sort(self.values)

    def estimate(self, value: float, stderr: float | None, scale: Scale = PLAIN) -> Estimate:
        """A figure of these tokens with its error, which is left out where it is not finite."""
        kept = stderr if stderr is not None and math.isfinite(stderr) else None
        low, high = interval(value, kept, self.clusters.t if self.clusters.count > 1 else 0.0, scale) or (
            None,
            None,
        )
        return Estimate(
            value=value, stderr=kept, stderr_is_lower_bound=self.overlap_ignored, low=low, high=high
        )

    def estimate_mean(self, scale: Scale = PLAIN) -> Estimate:
        """The mean."""
        return self.estimate(self.mean, self.mean_stderr, scale)

    def quantile(self, fraction: float) -> float:
        """The value that such a share of tokens does not exceed, as numpy and llama-perplexity interpolate.

        Its place among the n ordered values is fraction * (n - 1), counted from 0.
        """
        place = min(max(fraction, 0.0), 1.0) * (self.values.size - 1)
        below = int(place)
        above = min(below + 1, self.values.size - 1)
        part = place - below
        if part == 0.0:  # infinity times 0 is no number
            return float(self.ordered[below])
        return float((1 - part) * self.ordered[below] + part * self.ordered[above])

    def estimate_quantile(self, fraction: float) -> Estimate:
        """A percentile with Woodruff's error.

        The share of tokens at or below the percentile is a mean, so it has a clustered error; the
        percentiles at the ends of that share's interval are the ends of the percentile's own (the largest
        value where that end is above 1). Nothing is assumed about the values, and no random numbers are
        needed, as a bootstrap over windows would. A percentile with fewer than TOKENS_BEYOND tokens beyond
        it has no error: nothing says how far out the next one would be. Source:
        R. S. Woodruff, "Confidence Intervals for Medians and Other Position Measures", J. Am. Stat. Assoc.
        47(260), 1952.
        """
        value = self.quantile(fraction)
        beyond = min(fraction, 1 - fraction) * self.values.size
        if beyond < TOKENS_BEYOND or self.clusters.count < 2:
            return Estimate(value=value, stderr_is_lower_bound=self.overlap_ignored)
        within = (self.values <= value).astype(np.float64)
        error = self.clusters.stderr(within - within.mean())
        one = interval(fraction, error, 1.0)
        whole = interval(fraction, error, self.clusters.t)
        assert one is not None and whole is not None, "shares and their errors are finite"
        return Estimate(
            value=value,
            stderr=(self.quantile(one[1]) - self.quantile(one[0])) / 2,
            stderr_is_lower_bound=self.overlap_ignored,
            low=self.quantile(whole[0]),
            high=self.quantile(whole[1]),
        )

"""What is computed from per-token columns: one row a metric.

A row names the columns it needs and a function from them to an estimate. Records, JSON, CSV, tables and
charts read the rows, so a new metric is a function and a row.

Convention: x_i = -ln P(token i | context) in nats, one x per scored token, and PPL = exp(mean x), accumulated
in float64. Tokens that are NaN or infinite are counted, reported and in no mean.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.engine.columns import ENTROPY, LOGPROB, TOP1, TOP1_BOUND
from evalq.results.estimate import Estimate, Sample
from evalq.results.statistics import LOG, LOGIT, PLAIN, Clusters, Float64s, Scale, exp, require_finite


@dataclass(frozen=True)
class TextScale:
    """What turns nats per token into per-byte and per-word numbers.

    Args:
        bytes_per_token: UTF-8 bytes of the text per token of its stream, None when unknown.
        n_bytes: UTF-8 bytes of the text scored as a whole; only for protocols that score every token of it.
        n_words: its words, as the protocol counts them; None for protocols without words.
    """

    bytes_per_token: float | None = None
    n_bytes: int | None = None
    n_words: int | None = None


@dataclass(frozen=True)
class Measured:
    """One model's columns on one text.

    Args:
        columns: name -> [n], n scored tokens.
        cluster_of: which of them depend on each other, int64 [n], as `evalq.data.windows.cluster_of`.
        scale: bytes and words of the text.
    """

    columns: Mapping[str, NDArray[Any]]
    cluster_of: NDArray[np.int64]
    scale: TextScale

    @cached_property
    def finite(self) -> NDArray[np.bool_]:
        """Tokens whose log-probability is a number, [n]."""
        found: NDArray[np.bool_] = np.isfinite(self.columns[LOGPROB.name])
        return found

    @cached_property
    def clusters(self) -> Clusters:
        """Those of the finite tokens."""
        return Clusters.named(self.cluster_of[self.finite])

    @cached_property
    def x_nats(self) -> Sample:
        """-ln P of the finite tokens. Raises ModelError (non_finite) when too few are."""
        require_finite(self.n_tokens, self.n_nonfinite)
        x: Float64s = -self.columns[LOGPROB.name][self.finite].astype(np.float64)
        return Sample(x, self.clusters)

    @property
    def nll_nats(self) -> float:
        """Mean of x_nats."""
        return self.x_nats.mean

    @property
    def n_tokens(self) -> int:
        """Tokens asked for, the non-finite ones included."""
        return int(self.cluster_of.size)

    @property
    def n_nonfinite(self) -> int:
        """Of these, NaN or infinite."""
        return self.n_tokens - int(self.finite.sum())

    @property
    def total_nats(self) -> float:
        """Of a text scored as a whole: its few non-finite tokens, if any, count as average ones."""
        return self.nll_nats * self.n_tokens

    def estimate(self, value: float, per_nll: float, scale: Scale = LOG) -> Estimate:
        """A function of the mean NLL, its error by the delta method: |derivative| * SE(mean x)."""
        error = self.x_nats.mean_stderr
        return self.x_nats.estimate(value, None if error is None else per_nll * error, scale)


@dataclass(frozen=True)
class Metric:
    """One row.

    Args:
        name: in records, JSON and CSV.
        columns: names of the columns it needs.
        compute: Measured -> its estimate; None where the text does not have it.
        unit: of its value, "" for a ratio or share.
        header: of its column in a table, "" keeps it out of tables.
        digits: after the decimal point, in tables.
        help: one line: formula and what it agrees with.
        share: shown in percent.
    """

    name: str
    columns: tuple[str, ...]
    compute: Callable[[Measured], Estimate | None]
    unit: str
    header: str
    digits: int
    help: str
    share: bool = False


def _ppl(found: Measured) -> Estimate | None:
    ppl = exp(found.nll_nats)
    return found.estimate(ppl, ppl)


def _nll(found: Measured) -> Estimate | None:
    return found.estimate(found.nll_nats, 1.0, PLAIN)


def _nats_per_byte(found: Measured) -> tuple[float, float] | None:
    """Nats per byte and its derivative by the mean NLL."""
    scale = found.scale
    if scale.n_bytes:
        return found.total_nats / scale.n_bytes, found.n_tokens / scale.n_bytes
    if not scale.bytes_per_token:
        return None
    return found.nll_nats / scale.bytes_per_token, 1 / scale.bytes_per_token


def _bits_per_byte(found: Measured) -> Estimate | None:
    per_byte = _nats_per_byte(found)
    if per_byte is None:
        return None
    return found.estimate(per_byte[0] / math.log(2), per_byte[1] / math.log(2), PLAIN)


def _byte_ppl(found: Measured) -> Estimate | None:
    per_byte = _nats_per_byte(found)
    if per_byte is None:
        return None
    value = exp(per_byte[0])
    return found.estimate(value, value * per_byte[1])


def _word_ppl(found: Measured) -> Estimate | None:
    if not found.scale.n_words:
        return None
    value = exp(found.total_nats / found.scale.n_words)
    return found.estimate(value, value * found.n_tokens / found.scale.n_words)


def _share_of(column: str) -> Callable[[Measured], Estimate]:
    """The share of finite tokens for which a bool column is true, with its clustered error."""

    def compute(found: Measured) -> Estimate:
        require_finite(found.n_tokens, found.n_nonfinite)
        hits = found.columns[column][found.finite].astype(np.float64)
        return Sample(hits, found.clusters).estimate_mean(LOGIT)

    return compute


def _entropy(found: Measured) -> Estimate | None:
    values = found.columns[ENTROPY.name][found.finite].astype(np.float64)
    return Sample(values, found.clusters).estimate_mean(LOG) if np.isfinite(values).all() else None


METRICS: tuple[Metric, ...] = (
    Metric(
        "ppl", (LOGPROB.name,), _ppl, "per token", "PPL", 4,
        "exp(mean x), as exllamav3's compare_q, transformers' guide, the GPTQ papers and llama-perplexity",
    ),
    Metric("nll_nats", (LOGPROB.name,), _nll, "nats per token", "", 4, "mean x"),
    Metric(
        "bits_per_byte", (LOGPROB.name,), _bits_per_byte, "bits per byte", "", 4,
        "nats of the text / (its bytes ln 2), as lm-eval; by the text's average bytes per token where "
        "only a part of it is scored",
    ),
    Metric(
        "byte_ppl", (LOGPROB.name,), _byte_ppl, "per byte", "", 4,
        "exp(nats of the text / its bytes), as lm-eval",
    ),
    Metric(
        "word_ppl", (LOGPROB.name,), _word_ppl, "per word", "", 4,
        "exp(nats of the text / its words), as lm-eval; protocols with words only",
    ),
    Metric(
        "top1", (LOGPROB.name, TOP1.name), _share_of(TOP1.name), "", "", 4,
        "share of tokens that were the model's first guess", share=True,
    ),
    Metric(
        "top1_bound", (LOGPROB.name, TOP1_BOUND.name), _share_of(TOP1_BOUND.name), "", "", 4,
        "a lower bound of top1, where the engine gives no ranks", share=True,
    ),
    Metric(
        "entropy", (LOGPROB.name, ENTROPY.name), _entropy, "nats per token", "", 4,
        "mean entropy of the model's distributions: the nll_nats that it expects of itself",
    ),
)  # fmt: skip


def compute(found: Measured, metrics: tuple[Metric, ...] = METRICS) -> dict[str, Estimate]:
    """Every metric whose columns are there.

    Raises:
        ModelError: category "non_finite", when more than 1% of the tokens, or all, are NaN or infinite.
    """
    estimates = {}
    for metric in metrics:
        if all(name in found.columns for name in metric.columns):
            estimate = metric.compute(found)
            if estimate is not None:
                estimates[metric.name] = estimate
    return estimates

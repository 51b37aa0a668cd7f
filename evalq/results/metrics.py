"""Perplexity, its error bar, and the difference between two models, from per-token log-probabilities.

Convention: x_i = -ln P(token i | context) in nats, one x per scored token, and PPL = exp(mean x), accumulated
in float64. Tokens of one window share context and topic, so errors are clustered by window (CR1: Cameron &
Miller, "A Practitioner's Guide to Cluster-Robust Inference", J. Human Resources 50(2), 2015); treating tokens
as independent, as llama-perplexity does, gives error bars that are several times too small.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evalq.errors import ModelError

NONFINITE_SHARE_MAX = 0.01

Float64s = NDArray[np.float64]


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
class Summary:
    """One model on one text.

    Args:
        ppl: exp(nll_nats), per token.
        ppl_stderr: window-clustered standard error of ppl; None with fewer than two windows.
        stderr_is_lower_bound: windows overlap, so they are not independent of one another.
        nll_nats: mean negative log-likelihood per finite token.
        bits_per_byte: nats of the text / (its bytes * ln 2); None without a scale.
        word_ppl: exp(nats of the text / its words); None without words.
        byte_ppl: exp(nats of the text / its bytes), which is 2 ** bits_per_byte; None without a scale.
        top1: share of finite tokens that were the model's first guess.
        tokens_scored: tokens asked for, the non-finite ones included.
        tokens_nonfinite: of these, NaN or infinite and in no mean; a result with any must say so.
        windows: windows with at least one finite token.
    """

    ppl: float
    ppl_stderr: float | None
    stderr_is_lower_bound: bool
    nll_nats: float
    bits_per_byte: float | None
    word_ppl: float | None
    byte_ppl: float | None
    top1: float
    tokens_scored: int
    tokens_nonfinite: int
    windows: int


@dataclass(frozen=True)
class PairedDifference:
    """Model a minus model b on the tokens that both scored.

    Args:
        nll_nats: mean of x_a - x_b, which is ln(PPL_a / PPL_b); positive when a is worse.
        stderr_nats: its window-clustered standard error; None with fewer than two windows.
        ratio: PPL_a / PPL_b.
        tokens: tokens that are finite in both.
    """

    nll_nats: float
    stderr_nats: float | None
    ratio: float
    tokens: int

    @property
    def significant(self) -> bool:
        """Whether the difference is more than two standard errors from zero; False without an error."""
        return self.stderr_nats is not None and abs(self.nll_nats) > 2 * self.stderr_nats


def summarize(
    logprob: NDArray[np.float32],
    top1: NDArray[np.bool_],
    window_of: NDArray[np.integer],
    overlapping: bool,
    *,
    scale: TextScale,
) -> Summary:
    """Perplexity with its error bar.

    PPL = exp(mean x). Agrees with exllamav3's compare_q, transformers' guide, the GPTQ papers' loops and
    llama-perplexity on their windows, and word_ppl, byte_ppl, bits_per_byte with lm-eval's `wikitext` task.
    ppl_stderr = PPL * SE(mean x) by the delta method, SE from clustered_stderr().

    With totals in the scale (every token of the text scored once), the nats of the text are sum(x); with
    bytes_per_token, bits per byte is mean x / (bytes_per_token ln 2), for windows that cover a part of it.

    Args:
        logprob: ln P of each scored token, nats, [n].
        top1: whether it was the most probable one, [n].
        window_of: index of its window, [n].
        overlapping: the plan's flag; passed on as stderr_is_lower_bound.
        scale: bytes and words of the text.

    Raises:
        ModelError: category "non_finite", when more than 1% of the tokens, or all, are NaN or infinite.
    """
    assert logprob.shape == top1.shape == window_of.shape, "one entry per scored token"
    finite = np.isfinite(logprob)
    n, n_finite = logprob.size, int(finite.sum())
    _require_finite(n, n - n_finite)
    x_nats = -logprob[finite].astype(np.float64)
    windows = window_of[finite]
    nll_nats = float(x_nats.mean())
    stderr = clustered_stderr(x_nats, windows)
    ppl = _exp(nll_nats)
    per_byte, per_word = _per_unit(nll_nats, n, scale)
    return Summary(
        ppl=ppl,
        ppl_stderr=None if stderr is None else ppl * stderr,
        stderr_is_lower_bound=overlapping,
        nll_nats=nll_nats,
        bits_per_byte=None if per_byte is None else per_byte / math.log(2),
        word_ppl=None if per_word is None else _exp(per_word),
        byte_ppl=None if per_byte is None else _exp(per_byte),
        top1=float(top1[finite].mean()),
        tokens_scored=n,
        tokens_nonfinite=n - n_finite,
        windows=int(np.unique(windows).size),
    )


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


def paired_difference(
    a: NDArray[np.float32], b: NDArray[np.float32], window_of: NDArray[np.integer]
) -> PairedDifference:
    """How much worse model a is than model b on the same tokens.

    mean(x_a - x_b) = ln(PPL_a / PPL_b), with the clustered error of the difference: what is hard for both
    models cancels, so it resolves differences far below the error bars of the two perplexities. Agrees with
    "Mean ln(PPL(Q)/PPL(base))" of llama-perplexity --kl-divergence; the error is clustered here.

    Args:
        a: ln P of each token by model a, nats, [n].
        b: the same tokens by model b, [n].
        window_of: index of the window of each, [n].

    Raises:
        ModelError: category "non_finite", when more than 1% of the tokens are not finite in both.
    """
    assert a.shape == b.shape == window_of.shape, "one entry per token, the same tokens in both"
    finite = np.isfinite(a) & np.isfinite(b)
    _require_finite(a.size, a.size - int(finite.sum()))
    difference_nats = b[finite].astype(np.float64) - a[finite].astype(np.float64)
    mean = float(difference_nats.mean())
    return PairedDifference(
        nll_nats=mean,
        stderr_nats=clustered_stderr(difference_nats, window_of[finite]),
        ratio=_exp(mean),
        tokens=difference_nats.size,
    )


def _require_finite(n: int, n_nonfinite: int) -> None:
    """Raise ModelError when a mean over the finite tokens would no longer describe the text."""
    if n == 0:
        raise ModelError("no token was scored", "non_finite")
    if n_nonfinite == n or n_nonfinite > NONFINITE_SHARE_MAX * n:
        raise ModelError(
            f"{n_nonfinite} of {n} log-probabilities are NaN or infinite ({n_nonfinite / n:.1%})",
            "non_finite",
        )


def _per_unit(nll_nats: float, n_tokens: int, scale: TextScale) -> tuple[float | None, float | None]:
    """Nats per byte and per word.

    A text scored as a whole has n_tokens * mean nats: its few non-finite tokens, if any, count as average
    ones, or the text would look easier than it is.
    """
    total_nats = nll_nats * n_tokens
    per_word = total_nats / scale.n_words if scale.n_words else None
    if scale.n_bytes:
        return total_nats / scale.n_bytes, per_word
    return (nll_nats / scale.bytes_per_token if scale.bytes_per_token else None), per_word


def _exp(nats: float) -> float:
    """exp() that is infinite where float64 ends (a mean of 709 nats, a thoroughly broken model)."""
    return math.exp(nats) if nats < 709.0 else math.inf

"""Two models on the same tokens, token by token: far sharper than two error bars side by side.

One row a quantity, as in `evalq.results.metrics`. What is hard for both models cancels, so differences far
below the error bars of the two perplexities can be told from zero.

Convention, as llama-perplexity --kl-divergence: p is the reference, q the model, KLD = sum p (ln p - ln q) in
nats, delta p = q - p of the token that came. Percentiles are its own too (`Sample.quantile`). Its errors take
tokens for independent; here they are clustered. Source:
https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/perplexity.cpp
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.engine.columns import (
    ACCEPTANCE,
    ARGMAX,
    KEPT_MASS,
    KLD,
    KLD_BOUND,
    LOGPROB,
    MAX_PROB,
    REFERENCE_LOGPROB,
)
from evalq.errors import ModelError
from evalq.results.estimate import Estimate, Sample
from evalq.results.statistics import (
    FISHER,
    LOG,
    LOGIT,
    PLAIN,
    Clusters,
    Float64s,
    Scale,
    exp,
    require_finite,
    too_many_nonfinite,
)

# Suffix of the name, share of tokens that are not above, words of llama-perplexity.
PERCENTILES = (
    ("max", 1.0, "Maximum"),
    ("p99_9", 0.999, "99.9%"),
    ("p99", 0.99, "99.0%"),
    ("p95", 0.95, "95.0%"),
    ("p90", 0.90, "90.0%"),
    ("p75", 0.75, "75.0%"),
    ("median", 0.50, "Median"),
    ("p25", 0.25, "25.0%"),
    ("p10", 0.10, "10.0%"),
    ("p5", 0.05, "5.0%"),
    ("p1", 0.01, "1.0%"),
    ("p0_1", 0.001, "0.1%"),
    ("min", 0.0, "Minimum"),
)
# How sure the reference is: suffix of the name, largest probability from, to below (the last one: to 1).
CONFIDENCE_BUCKETS = (
    ("conf_0_25", 0.0, 0.25),
    ("conf_25_50", 0.25, 0.5),
    ("conf_50_75", 0.5, 0.75),
    ("conf_75_95", 0.75, 0.95),
    ("conf_95_100", 0.95, math.inf),
)


@dataclass(frozen=True)
class Pair:
    """Columns of a model and of the reference on the same tokens.

    Args:
        mine: name -> [n].
        reference: name -> [n].
        cluster_of: which tokens depend on each other, int64 [n], as `evalq.data.windows.cluster_of`.
        overlap_ignored: clusters are overlapping windows, so errors are lower bounds.
    """

    mine: Mapping[str, NDArray[Any]]
    reference: Mapping[str, NDArray[Any]]
    cluster_of: NDArray[np.int64]
    overlap_ignored: bool = False

    @cached_property
    def finite(self) -> NDArray[np.bool_]:
        """Tokens whose log-probability is a number in both, [n]. Raises ModelError (non_finite)."""
        mine, reference = self.mine[LOGPROB.name], self.reference[LOGPROB.name]
        found: NDArray[np.bool_] = np.isfinite(mine) & np.isfinite(reference)
        require_finite(found.size, found.size - int(found.sum()))
        return found

    @cached_property
    def _clusters(self) -> Clusters:
        return Clusters.named(self.cluster_of[self.finite])

    @cached_property
    def ln_q(self) -> Float64s:
        """Of the model, finite tokens."""
        return self.mine[LOGPROB.name][self.finite].astype(np.float64)

    @cached_property
    def ln_p(self) -> Float64s:
        """Of the reference, finite tokens."""
        return self.reference[LOGPROB.name][self.finite].astype(np.float64)

    @cached_property
    def ln_ratio(self) -> Sample:
        """What each token adds to ln(PPL / PPL of the reference): ln p - ln q."""
        return self.sample(self.ln_p - self.ln_q)

    @cached_property
    def delta_p(self) -> Sample:
        """The model's probability of the token that came minus the reference's."""
        return self.sample(np.exp(self.ln_q) - np.exp(self.ln_p))

    @cached_property
    def same_top(self) -> Sample:
        """1 where both find the same token the most probable, else 0."""
        same = self.mine[ARGMAX.name] == self.reference[ARGMAX.name]
        return self.sample(same[self.finite].astype(np.float64))

    @cached_property
    def kld(self) -> Sample | None:
        """As `column`."""
        return self.column(KLD.name)

    def column(self, name: str) -> Sample | None:
        """The model's own column, where it is finite; None where too much of it is not."""
        values = self.mine[name][self.finite].astype(np.float64)
        kept = np.isfinite(values)
        if too_many_nonfinite(kept.size, kept.size - int(kept.sum())):
            return None
        return self.sample(values, kept)

    def sample(self, values: Float64s, kept: NDArray[np.bool_] | None = None) -> Sample:
        """Values of the finite tokens, [m], or of some of them."""
        if kept is None or kept.all():
            return Sample(values, self._clusters, self.overlap_ignored)
        return Sample(values[kept], Clusters.named(self._clusters.of[kept]), self.overlap_ignored)

    def notes(self) -> list[str]:
        """What was left out of KLD and its like because it is not finite, a line each."""
        lines = []
        for name in (KLD.name, KLD_BOUND.name, ACCEPTANCE.name):
            if name in self.mine:
                n = self.ln_q.size
                lost = n - int(np.isfinite(self.mine[name][self.finite]).sum())
                if lost:
                    what = "so it is left out" if too_many_nonfinite(n, lost) else "and left out of its mean"
                    lines.append(f"{lost} of {n} values of {name} are not finite, {what}")
        return lines


Compute = Callable[[Pair], Estimate | None]


@dataclass(frozen=True)
class PairMetric:
    """One row: what is computed of a pair.

    Args:
        name: in records, JSON and CSV.
        columns: names of the columns that both must have.
        compute: Pair -> its estimate; None where these tokens do not have it.
        unit: of its value, "" for a ratio, share or probability.
        help: one line: formula and what it agrees with.
        header: of its column in a table, "" keeps it out of tables.
        digits: after the decimal point, in tables.
        share: shown in percent.
        mine: names of columns that only the model must have.
        reference: names of columns that only the reference must have.
        with_kld: a table shows it only where `--kld` asks for it.
    """

    name: str
    columns: tuple[str, ...]
    compute: Compute
    unit: str
    help: str
    header: str = ""
    digits: int = 4
    share: bool = False
    mine: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    with_kld: bool = False

    def known(self, pair: Pair) -> bool:
        """Whether the columns it needs are there."""
        return all(name in pair.mine for name in (*self.columns, *self.mine)) and all(
            name in pair.reference for name in (*self.columns, *self.reference)
        )


def ln_ratio(pair: Pair) -> Estimate:
    """ln(PPL / PPL of the reference) = mean(x - x_ref) over the tokens that are finite in both.

    Raises:
        ModelError: category "non_finite", when more than 1% of the tokens are not finite in both.
    """
    return pair.ln_ratio.estimate_mean()


def recovery(pair: Pair) -> Estimate:
    """PPL of the reference / PPL, with the error of ln_ratio."""
    value, error = exp(-pair.ln_ratio.mean), pair.ln_ratio.mean_stderr
    return pair.ln_ratio.estimate(value, None if error is None else value * error, LOG)


def ppl_difference(pair: Pair) -> Estimate | None:
    """PPL - PPL of the reference. Its error takes into account that both come from the same tokens."""
    q, p = exp(-float(pair.ln_q.mean())), exp(-float(pair.ln_p.mean()))
    if not math.isfinite(q) or not math.isfinite(p):
        return None
    influence = p * (pair.ln_p - pair.ln_p.mean()) - q * (pair.ln_q - pair.ln_q.mean())
    return pair.ln_ratio.estimate(q - p, pair.ln_ratio.clusters.stderr(influence))


def ln_correlation(pair: Pair) -> Estimate | None:
    """Pearson correlation r of ln p and ln q.

    With both in units of their spread, a token's influence is z_p z_q - r (z_p**2 + z_q**2) / 2.
    """
    spread_p, spread_q = float(pair.ln_p.std()), float(pair.ln_q.std())
    if spread_p == 0.0 or spread_q == 0.0:
        return None
    z_p = (pair.ln_p - pair.ln_p.mean()) / spread_p
    z_q = (pair.ln_q - pair.ln_q.mean()) / spread_q
    r = float(np.mean(z_p * z_q))
    influence = z_p * z_q - r * (np.square(z_p) + np.square(z_q)) / 2
    return pair.ln_ratio.estimate(r, pair.ln_ratio.clusters.stderr(influence), FISHER)


def delta_p_rms(pair: Pair) -> Estimate:
    """sqrt(mean (q - p)**2), its error by the delta method as llama-perplexity's."""
    squares = Sample(np.square(pair.delta_p.values), pair.delta_p.clusters, pair.overlap_ignored)
    rms, error = math.sqrt(squares.mean), squares.mean_stderr
    return squares.estimate(rms, error / (2 * rms) if error is not None and rms > 0 else error, LOG)


def reference_drift(pair: Pair) -> Estimate | None:
    """Root mean square of ln p(token) as made again beside the model, minus as the reference gave it."""
    again = pair.mine[REFERENCE_LOGPROB.name][pair.finite].astype(np.float64)
    if not np.isfinite(again).all():
        return None
    return Estimate(value=math.sqrt(float(np.square(again - pair.ln_p).mean())))


def _mean(of: Callable[[Pair], Sample | None], scale: Scale) -> Compute:
    """The mean of a sample, its interval on a scale."""

    def compute(pair: Pair) -> Estimate | None:
        found = of(pair)
        return None if found is None else found.estimate_mean(scale)

    return compute


def _percentile(of: Callable[[Pair], Sample | None], fraction: float) -> Compute:
    def compute(pair: Pair) -> Estimate | None:
        found = of(pair)
        return None if found is None else found.estimate_quantile(fraction)

    return compute


def _where_sure(of: Callable[[Pair], Sample | None], scale: Scale, low: float, high: float) -> Compute:
    """The mean over the tokens for which the reference's largest probability is in [low, high)."""

    def compute(pair: Pair) -> Estimate | None:
        found = of(pair)
        surest = pair.reference[MAX_PROB.name][pair.finite]
        if found is None or found.values.size != surest.size:
            return None
        inside = (surest >= low) & (surest < high)
        return pair.sample(found.values, inside).estimate_mean(scale) if inside.any() else None

    return compute


def _share_where_sure(low: float, high: float) -> Compute:
    def compute(pair: Pair) -> Estimate:
        surest = pair.reference[MAX_PROB.name][pair.finite]
        inside = ((surest >= low) & (surest < high)).astype(np.float64)
        return pair.sample(inside).estimate_mean(LOGIT)

    return compute


def _column(name: str) -> Callable[[Pair], Sample | None]:
    return lambda pair: pair.column(name)


def _percentiles(
    quantity: str, of: Callable[[Pair], Sample | None], unit: str, help: str, **needs: tuple[str, ...]
) -> list[PairMetric]:
    """A row for every percentile of a quantity; the 99.9 % of KLD has a column in tables.

    Args:
        quantity: its name, before the percentile's.
        of: its values.
        unit: its own.
        help: with "{}" for llama-perplexity's word for the percentile.
        needs: `columns` or `mine` of the rows.
    """
    return [
        PairMetric(
            f"{quantity}_{suffix}",
            needs.get("columns", ()),
            _percentile(of, fraction),
            unit,
            help.format(word),
            header="KLD 99.9 %" if (quantity, suffix) == ("kld", "p99_9") else "",
            digits=3,
            mine=needs.get("mine", ()),
            with_kld=quantity == "kld",
        )
        for suffix, fraction, word in PERCENTILES
        if quantity != "kld" or suffix not in ("p75", "p25")
    ]


def _buckets() -> list[PairMetric]:
    """KLD, same-top and the share of tokens by the reference's largest probability."""
    rows = []
    for suffix, low, high in CONFIDENCE_BUCKETS:
        where = f"where the reference's largest probability is {low:g} to {min(high, 1.0):g}"
        sure = (MAX_PROB.name,)
        rows += [
            PairMetric(
                f"kld_{suffix}", (), _where_sure(lambda pair: pair.kld, LOG, low, high), "nats per token",
                f"mean KLD {where}", mine=(KLD.name,), reference=sure, with_kld=True,
            ),
            PairMetric(
                f"same_top_{suffix}", (ARGMAX.name,),
                _where_sure(lambda pair: pair.same_top, LOGIT, low, high), "",
                f"same_top {where}", share=True, reference=sure, with_kld=True,
            ),
            PairMetric(
                f"tokens_{suffix}", (), _share_where_sure(low, high), "",
                f"share of tokens {where}", share=True, reference=sure, with_kld=True,
            ),
        ]  # fmt: skip
    return rows


_BOTH = (LOGPROB.name,)

PAIR_METRICS: tuple[PairMetric, ...] = (
    PairMetric(
        "ln_ratio", _BOTH, ln_ratio, "nats per token",
        'ln(PPL / PPL of the reference), "Mean ln(PPL(Q)/PPL(base))" of llama-perplexity',
    ),
    *_percentiles("ln_ratio", lambda pair: pair.ln_ratio, "nats", "{} ln p - ln q of a token", columns=_BOTH),
    PairMetric(
        "recovery", _BOTH, recovery, "", "PPL of the reference / PPL: 1 is no loss", digits=2, share=True
    ),
    PairMetric(
        "ppl_difference", _BOTH, ppl_difference, "per token",
        'PPL - PPL of the reference, "Mean PPL(Q)-PPL(base)" of llama-perplexity',
    ),
    PairMetric(
        "ln_correlation", _BOTH, ln_correlation, "",
        'Pearson correlation of ln p(token), "Cor(ln(PPL(Q)), ln(PPL(base)))" of llama-perplexity',
        digits=2, share=True,
    ),
    PairMetric(
        "delta_p", _BOTH, _mean(lambda pair: pair.delta_p, PLAIN), "",
        'mean q - p of the token that came, "Mean Δp" of llama-perplexity', digits=3, share=True,
    ),
    PairMetric(
        "delta_p_rms", _BOTH, delta_p_rms, "",
        'root of the mean (q - p)**2, "RMS Δp" of llama-perplexity', digits=3, share=True,
    ),
    *_percentiles("delta_p", lambda pair: pair.delta_p, "", '"{} Δp" of llama-perplexity', columns=_BOTH),
    PairMetric(
        "kld", (), _mean(lambda pair: pair.kld, LOG), "nats per token",
        'mean KL divergence from the reference, sum p (ln p - ln q), "Mean KLD" of llama-perplexity',
        header="KLD", digits=5, mine=(KLD.name,), with_kld=True,
    ),
    *_percentiles("kld", lambda pair: pair.kld, "nats", '"{} KLD" of llama-perplexity', mine=(KLD.name,)),
    PairMetric(
        "same_top", (ARGMAX.name,), _mean(lambda pair: pair.same_top, LOGIT), "",
        'share of tokens for which both find the same one most probable, "Same top p" of llama-perplexity',
        header="same top", digits=2, share=True, with_kld=True,
    ),
    PairMetric(
        "acceptance", (), _mean(_column(ACCEPTANCE.name), LOGIT), "",
        "mean sum min(p, q): how many drafted tokens speculative sampling would keep",
        header="acceptance", digits=2, share=True, mine=(ACCEPTANCE.name,), with_kld=True,
    ),
    *_buckets(),
    PairMetric(
        "reference_drift", (), reference_drift, "nats",
        "how exactly the reference's distributions were made again for KLD: RMS difference of ln p(token)",
        mine=(REFERENCE_LOGPROB.name,), reference=_BOTH,
    ),
    PairMetric(
        "kld_bound", (), _mean(_column(KLD_BOUND.name), LOG), "nats per token",
        "a lower bound of the mean KL divergence, from the reference's most probable tokens and one bucket "
        "for the rest; another quantity than KLD",
        header="KLD bound", digits=5, mine=(KLD_BOUND.name,), with_kld=True,
    ),
    PairMetric(
        "kept_mass", (), _mean(_column(KEPT_MASS.name), LOGIT), "",
        "the reference's probability of the tokens behind KLD bound", header="mass kept", digits=2,
        share=True, mine=(KLD_BOUND.name, KEPT_MASS.name), with_kld=True,
    ),
)  # fmt: skip


def compare(pair: Pair, metrics: tuple[PairMetric, ...] = PAIR_METRICS) -> dict[str, Estimate]:
    """Every metric whose columns are there.

    Raises:
        ModelError: the two cannot be compared token by token: category "non_finite", or "engine_error" for
            another number of tokens.
    """
    sizes = {column.size for side in (pair.mine, pair.reference) for column in side.values()}
    if sizes != {pair.cluster_of.size}:
        raise ModelError(f"the two results hold other numbers of tokens: {sorted(sizes)}", "engine_error")
    found = {metric.name: metric.compute(pair) for metric in metrics if metric.known(pair)}
    return {name: estimate for name, estimate in found.items() if estimate is not None}

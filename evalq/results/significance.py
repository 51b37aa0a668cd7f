"""Which of many models differ: every pair on the same tokens, with p-values corrected for their number.

Three quantities, each with a matrix of its own: the perplexity (differences of ln p of the token that came),
the mean KLD beside one reference where every model has the exact one, and same-top (McNemar's test: only the
tokens on which one of two models agrees with the reference and the other does not tell them apart).

A p-value is two-sided, of a t test on clustered differences (`evalq.results.statistics`), and corrected by
Holm's method over all pairs of its matrix: S. Holm, "A Simple Sequentially Rejective Multiple Test
Procedure", Scand. J. Stat. 6(2), 1979. So in 95 of 100 comparisons of models without any difference no pair
is marked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evalq.engine.columns import ARGMAX, KLD, LOGPROB
from evalq.results.estimate import Estimate, Sample
from evalq.results.record import BesideOther, ResultRecord
from evalq.results.reference import clusters_of
from evalq.results.statistics import Clusters, Float64s, t_two_sided, too_many_nonfinite
from evalq.results.store import family_of
from evalq.results.tokens import TokenColumns

ALPHA = 0.05
Quantity = Literal["ppl", "kld", "same_top"]
ScoresOf = Callable[[ResultRecord], TokenColumns | None]


@dataclass(frozen=True)
class Scored:
    """A model's columns.

    Args:
        label: its own.
        columns: name -> [n]; those beside the reference under their plain names.
    """

    label: str
    columns: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Discordant:
    """Tokens on which exactly one of two models finds the reference's most probable token.

    Args:
        first: only the first does.
        second: only the second does.
        p_tokens: McNemar's exact p-value, which takes tokens for independent, so it is too small where they
            are not. The verdict's is `Difference.p`, clustered.
    """

    first: int
    second: int
    p_tokens: float


@dataclass(frozen=True)
class Difference:
    """Two models on the same tokens.

    Args:
        first: label.
        second: label.
        estimate: first - second, with its 95% interval, which is not corrected for the number of pairs.
        p: two-sided, of this pair alone; None without an error.
        p_holm: corrected for all pairs of the matrix.
        discordant: of same-top only.
    """

    first: str
    second: str
    estimate: Estimate
    p: float | None
    p_holm: float | None = None
    discordant: Discordant | None = None

    @property
    def shown(self) -> bool:
        """Whether the two differ, at 5% for the whole matrix."""
        return self.p_holm is not None and self.p_holm < ALPHA


@dataclass(frozen=True)
class Matrix:
    """Every pair of models that have a quantity.

    Args:
        quantity: "ppl", "kld" or "same_top".
        labels: of the models, in the order that was given.
        differences: of labels[i] and labels[j] for i < j.
    """

    quantity: Quantity
    labels: tuple[str, ...]
    differences: tuple[Difference, ...]

    def between(self, first: str, second: str) -> Difference | None:
        """The difference first - second, whichever way it is kept; None where there is none."""
        for found in self.differences:
            if (found.first, found.second) == (first, second):
                return found
            if (found.first, found.second) == (second, first):
                return _turned(found)
        return None


def matrices(
    models: Sequence[Scored], cluster_of: NDArray[np.int64], reference: Scored | None = None
) -> list[Matrix]:
    """The matrix of each quantity that at least two models have.

    Args:
        models: on the same tokens, the reference among them or not; without two of one label.
        cluster_of: which tokens depend on each other, int64 [n].
        reference: the model that KLD and same-top are beside; it is in no such matrix itself.
    """
    others = [model for model in models if reference is None or model.label != reference.label]
    found = [_matrix("ppl", models, LOGPROB.name, _ppl(cluster_of))]
    found.append(_matrix("kld", others, KLD.name, _kld(cluster_of)))
    if reference is not None and ARGMAX.name in reference.columns:
        top = reference.columns[ARGMAX.name]
        found.append(_matrix("same_top", others, ARGMAX.name, _same_top(cluster_of, top)))
    return [matrix for matrix in found if matrix.differences]


def matrices_of(records: Sequence[ResultRecord], scores_of: ScoresOf) -> list[Matrix]:
    """The matrices of a run.

    Args:
        records: of one run, compared with its reference.
        scores_of: a record's per-token columns as they are stored, None where they are gone.
    """
    base = next((record for record in records if record.is_reference), None)
    family = None if base is None else family_of(base.identity)
    found = [(record, scores_of(record)) for record in records if record.status == "ok"]
    there = [(record, columns.beside(family)) for record, columns in found if columns is not None]
    if not there:
        return []
    cluster_of = clusters_of(there[0][1], there[0][0].protocol)
    models = [Scored(r.label, c.columns) for r, c in there if c.window_of.size == cluster_of.size]
    reference = next((model for model in models if base is not None and model.label == base.label), None)
    return matrices(models, cluster_of, reference)


def with_pairs(records: Sequence[ResultRecord], matrices: Sequence[Matrix]) -> list[ResultRecord]:
    """Records that hold their rows of the matrices, in the order of the matrices."""
    return [record.model_copy(update={"beside_others": _rows(record.label, matrices)}) for record in records]


def _rows(label: str, matrices: Sequence[Matrix]) -> tuple[BesideOther, ...]:
    pairs = ((matrix, other) for matrix in matrices for other in matrix.labels)
    cells = ((matrix.quantity, matrix.between(label, other)) for matrix, other in pairs)
    return tuple(
        BesideOther(
            quantity=quantity,
            other=cell.second,
            difference=cell.estimate,
            p=cell.p,
            p_holm=cell.p_holm,
            differs=cell.shown,
            only_this=None if cell.discordant is None else cell.discordant.first,
            only_other=None if cell.discordant is None else cell.discordant.second,
        )
        for quantity, cell in cells
        if cell is not None
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number m: the k-th smallest times m - k + 1, in the order they had."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def mcnemar_exact(first: int, second: int) -> float:
    """McNemar's exact two-sided p-value: were the models alike, a fair coin would decide each token.

    P = 2 P(X <= min(first, second)) for X of the binomial distribution with n = first + second and 1/2, at
    most 1. Source: Q. McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions",
    Psychometrika 12(2), 1947.
    """
    n, fewer = first + second, min(first, second)
    k = np.arange(1, fewer + 1, dtype=np.float64)
    ln_choose = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k))])
    largest = float(ln_choose.max())
    ln_sum = largest + math.log(float(np.exp(ln_choose - largest).sum()))
    return min(1.0, 2 * math.exp(ln_sum - n * math.log(2)))


Compare = Callable[[Scored, Scored], Difference | None]


def _matrix(quantity: Quantity, models: Sequence[Scored], column: str, compare: Compare) -> Matrix:
    able = [model for model in models if column in model.columns]
    found = [compare(first, second) for first, second in combinations(able, 2)]
    kept = [difference for difference in found if difference is not None]
    tested = [i for i, difference in enumerate(kept) if difference.p is not None]
    for i, p in zip(tested, holm([kept[i].p or 0.0 for i in tested]), strict=True):
        kept[i] = replace(kept[i], p_holm=p)
    return Matrix(quantity, tuple(model.label for model in able), tuple(kept))


def _ppl(cluster_of: NDArray[np.int64]) -> Compare:
    """ln(PPL / PPL): ln p of the second minus that of the first."""

    def compare(first: Scored, second: Scored) -> Difference | None:
        values = second.columns[LOGPROB.name].astype(np.float64) - first.columns[LOGPROB.name]
        return _tested(first.label, second.label, values, cluster_of)

    return compare


def _kld(cluster_of: NDArray[np.int64]) -> Compare:
    def compare(first: Scored, second: Scored) -> Difference | None:
        values = first.columns[KLD.name].astype(np.float64) - second.columns[KLD.name]
        return _tested(first.label, second.label, values, cluster_of)

    return compare


def _same_top(cluster_of: NDArray[np.int64], top: NDArray[np.integer]) -> Compare:
    def compare(first: Scored, second: Scored) -> Difference | None:
        mine, theirs = first.columns[ARGMAX.name] == top, second.columns[ARGMAX.name] == top
        values = mine.astype(np.float64) - theirs
        found = _tested(first.label, second.label, values, cluster_of)
        only_first, only_second = int((mine & ~theirs).sum()), int((theirs & ~mine).sum())
        discordant = Discordant(only_first, only_second, mcnemar_exact(only_first, only_second))
        return None if found is None else replace(found, discordant=discordant)

    return compare


def _tested(first: str, second: str, values: Float64s, cluster_of: NDArray[np.int64]) -> Difference | None:
    """The mean of differences with its t test; None where too much of it is not finite."""
    finite = np.isfinite(values)
    if too_many_nonfinite(finite.size, finite.size - int(finite.sum())):
        return None
    sample = Sample(values[finite], Clusters.named(cluster_of[finite]))
    return Difference(first, second, sample.estimate_mean(), p_value(sample))


def p_value(sample: Sample) -> float | None:
    """Two-sided, that the mean is zero; 1 where it is exactly that, None without an error."""
    error = sample.mean_stderr
    if error is None:
        return None
    if error == 0.0:
        return 1.0 if sample.mean == 0.0 else 0.0
    return t_two_sided(sample.mean / error, sample.clusters.degrees_of_freedom)


def _turned(found: Difference) -> Difference:
    """The same pair the other way round."""
    estimate, told = found.estimate, found.discordant
    low, high = (None, None) if estimate.interval is None else (-estimate.interval[1], -estimate.interval[0])
    return replace(
        found,
        first=found.second,
        second=found.first,
        estimate=estimate.model_copy(update={"value": -estimate.value, "low": low, "high": high}),
        discordant=None if told is None else Discordant(told.second, told.first, told.p_tokens),
    )

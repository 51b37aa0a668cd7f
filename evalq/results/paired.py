"""Two models on the same tokens, token by token: far sharper than two error bars side by side.

One row a quantity, as in `evalq.results.metrics`. What is hard for both models cancels, so differences far
below the error bars of the two perplexities can be told from zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.engine.columns import LOGPROB
from evalq.errors import ModelError
from evalq.results.metrics import Estimate
from evalq.results.statistics import clustered_stderr, require_finite


@dataclass(frozen=True)
class Pair:
    """Columns of a model and of the reference on the same tokens.

    Args:
        mine: name -> [n].
        reference: name -> [n].
        window_of: index of the window of each token, int64 [n].
        overlapping: windows share tokens, so standard errors are lower bounds.
    """

    mine: Mapping[str, NDArray[Any]]
    reference: Mapping[str, NDArray[Any]]
    window_of: NDArray[np.int64]
    overlapping: bool = False


@dataclass(frozen=True)
class PairMetric:
    """One row: what is computed of a pair.

    Args:
        name: in records, JSON and CSV.
        columns: names of the columns that both must have.
        compute: Pair -> its estimate.
        unit: of its value.
        help: one line: formula and what it agrees with.
        header: of its column in a table, "" keeps it out of tables.
        digits: after the decimal point, in tables.
        share: shown in percent.
    """

    name: str
    columns: tuple[str, ...]
    compute: Callable[[Pair], Estimate]
    unit: str
    help: str
    header: str = ""
    digits: int = 4
    share: bool = False


def ln_ratio(pair: Pair) -> Estimate:
    """ln(PPL / PPL of the reference) = mean(x - x_ref) over the tokens that are finite in both.

    Agrees with "Mean ln(PPL(Q)/PPL(base))" of llama-perplexity --kl-divergence; the error is clustered by
    window here.

    Raises:
        ModelError: category "non_finite", when more than 1% of the tokens are not finite in both.
    """
    mine, reference = pair.mine[LOGPROB.name], pair.reference[LOGPROB.name]
    finite = np.isfinite(mine) & np.isfinite(reference)
    require_finite(mine.size, mine.size - int(finite.sum()))
    difference_nats = reference[finite].astype(np.float64) - mine[finite].astype(np.float64)
    error = clustered_stderr(difference_nats, pair.window_of[finite])
    return Estimate(value=float(difference_nats.mean()), stderr=error, stderr_is_lower_bound=pair.overlapping)


PAIR_METRICS: tuple[PairMetric, ...] = (
    PairMetric("ln_ratio", (LOGPROB.name,), ln_ratio, "nats per token", "ln(PPL / PPL of the reference)"),
)


def compare(pair: Pair, metrics: tuple[PairMetric, ...] = PAIR_METRICS) -> dict[str, Estimate]:
    """Every metric whose columns both have.

    Raises:
        ModelError: the two cannot be compared token by token: category "non_finite", or "engine_error" for
            another number of tokens.
    """
    sizes = {column.size for side in (pair.mine, pair.reference) for column in side.values()}
    if sizes != {pair.window_of.size}:
        raise ModelError(f"the two results hold other numbers of tokens: {sorted(sizes)}", "engine_error")
    return {
        metric.name: metric.compute(pair)
        for metric in metrics
        if all(name in pair.mine and name in pair.reference for name in metric.columns)
    }

"""Metrics by position in the window: how much worse, or better, a model is the longer its context.

A token's position is the number of tokens of the text before it in its window. Positions fall into buckets
0 to 1023, 1024 to 2047, 2048 to 4095 and so on, each as long as all before it. In a bucket the metrics are
those of the whole result, worked out from its tokens alone: nothing is stored for it, and results of any
protocol have it that have windows longer than the first bucket.

Errors: tokens of one window depend on each other, so a bucket's clusters are the parts of the windows in it
(where windows overlap, the stretches of text that the whole result has). Where that makes fewer than
LEAST_CLUSTERS, because few windows are that long, each part is cut into equal stretches, as few as make so
many. The shorter a stretch, the more its neighbours have in common, so errors of a perplexity from one window
are too small: tests/results/test_by_position.py has simulations, and docs/long-context.md what was measured.
Differences to the reference hardly show that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.data.protocols import LEAST_CLUSTERS
from evalq.data.windows import cluster_of, positions_of, stretches, windows_overlap
from evalq.errors import ModelError
from evalq.results.metrics import METRICS, Measured, TextScale, compute
from evalq.results.paired import PAIR_METRICS, Pair, compare
from evalq.results.record import AtPosition

FIRST_STOP = 1024
OWN_ROWS = tuple(row for row in METRICS if row.name in ("ppl", "nll_nats"))
PAIR_ROWS = tuple(row for row in PAIR_METRICS if row.name in ("ln_ratio", "kld", "kld_bound", "same_top"))
Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Bucket:
    """Tokens of one range of positions.

    Args:
        start: the first position.
        stop: one past the last.
        index: which of the scored tokens they are, int64 [m].
        cluster_of: which of them depend on each other, int64 [m].
    """

    start: int
    stop: int
    index: NDArray[np.int64]
    cluster_of: NDArray[np.int64]

    def of(self, columns: Columns) -> dict[str, NDArray[Any]]:
        """Their part of columns [n]."""
        return {name: column[self.index] for name, column in columns.items()}


def buckets(table: NDArray[np.int64], targets: NDArray[np.int64] | None = None) -> list[Bucket]:
    """The buckets that hold scored tokens; none where all are in one.

    Args:
        table: windows in stream order as (start, end, score_from, ...), int64 [W, 3 or more].
        targets: which of the windows' targets the tokens are, int64 [n]; None where they are all of them.
    """
    position, clusters = positions_of(table), cluster_of(table)
    if targets is not None:
        position, clusters = position[targets], clusters[targets]
    overlap = windows_overlap(table[:, 0], table[:, 1])
    found, start, stop = [], 0, FIRST_STOP
    while start <= position.max(initial=-1):
        index = np.flatnonzero((position >= start) & (position < stop))
        if index.size:
            inside = clusters[index]
            found.append(Bucket(start, stop, index, inside if overlap else stretches(inside, LEAST_CLUSTERS)))
        start, stop = stop, 2 * stop
    return found if len(found) > 1 else []


def own_by_position(
    found: Measured, table: NDArray[np.int64], targets: NDArray[np.int64] | None = None
) -> tuple[AtPosition, ...]:
    """Perplexity and mean NLL by position.

    Args:
        found: columns of the windows' targets.
        table: the windows.
        targets: which of their targets, as for `buckets`.
    """
    rows = []
    for bucket in buckets(table, targets):
        part = Measured(bucket.of(found.columns), bucket.cluster_of, TextScale())
        try:
            metrics = compute(part, OWN_ROWS)
        except ModelError:  # too many of these tokens are not finite, though few are of the whole
            metrics = {}
        rows.append(AtPosition(start=bucket.start, stop=bucket.stop, tokens=part.n_tokens, metrics=metrics))
    return tuple(rows)


def pair_by_position(
    pair: Pair, table: NDArray[np.int64] | None, targets: NDArray[np.int64] | None = None
) -> tuple[AtPosition, ...]:
    """The ratio of perplexities, KLD and same-top by position.

    Args:
        pair: columns of the windows' targets.
        table: the windows; None for results of evalq 0.1, which do not say where they lie.
        targets: which of their targets, as for `buckets`.
    """
    rows = []
    for bucket in [] if table is None else buckets(table, targets):
        part = replace(
            pair,
            mine=bucket.of(pair.mine),
            reference=bucket.of(pair.reference),
            cluster_of=bucket.cluster_of,
        )
        try:
            metrics = compare(part, PAIR_ROWS)
        except ModelError:
            metrics = {}
        rows.append(
            AtPosition(start=bucket.start, stop=bucket.stop, tokens=bucket.index.size, metrics=metrics)
        )
    return tuple(rows)


def bucket_name(found: AtPosition) -> str:
    """Its positions in units of 1024, as context lengths are written: "0-1k", "16k-32k"."""
    return f"{found.start // FIRST_STOP}{'k' if found.start else ''}-{found.stop // FIRST_STOP}k"

"""How many windows a wanted resolution takes, from the first ones.

The resolution is half the width of the 95% interval of the perplexity's ratio to the reference's, on the same
tokens. It shrinks with the root of the number of windows, and with few of them the t distribution's factor
too. How much models differ from window to window is taken from the windows there are, so with few of them
the answer is a rough one: its spread is about sqrt(2 / (windows - 1)).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evalq.errors import ModelError
from evalq.results.estimate import Sample
from evalq.results.record import ResultRecord
from evalq.results.reference import paired
from evalq.results.statistics import t_quantile
from evalq.results.tokens import TokenColumns

# No text is longer: about 10**12 tokens.
_CLUSTERS_MAX = 2**30


@dataclass(frozen=True)
class Resolution:
    """What windows resolve.

    Args:
        windows: scored so far.
        half_width: of the 95% interval of the ratio with them, 0.005 is half a percent.
        wanted: half width that was asked for.
        windows_needed: for it; None for more than any text has.
        spread: relative standard deviation of windows_needed.
    """

    windows: int
    half_width: float
    wanted: float
    windows_needed: int | None
    spread: float


def resolution(ln_ratio: Sample, windows: int, wanted: float) -> Resolution | None:
    """Windows for a half width of the interval of PPL / PPL of the reference.

    With s the standard error of the mean over G clusters, G' clusters have s sqrt(G / G'), so G' is the
    smallest number with t(G' - 1) s sqrt(G / G') <= ln(1 + wanted).

    Args:
        ln_ratio: differences of a pair's log-probabilities, `Pair.ln_ratio`.
        windows: that these are of; more than there are clusters where windows overlap.
        wanted: half width, above 0.

    Returns:
        None with fewer than two clusters, which say nothing about the spread.
    """
    error, clusters = ln_ratio.mean_stderr, ln_ratio.clusters
    if error is None:
        return None

    def half(n_clusters: int) -> float:
        return t_quantile(n_clusters - 1) * error * math.sqrt(clusters.count / n_clusters)

    needed, limit = None, math.log1p(wanted)
    if half(_CLUSTERS_MAX) <= limit:
        low, high = 1, _CLUSTERS_MAX  # half() is above the limit at low, or low is below what is tried
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if half(middle) <= limit else (middle, high)
        needed = math.ceil(high * windows / clusters.count)
    return Resolution(
        windows=windows,
        half_width=math.expm1(min(clusters.t * error, 700.0)),
        wanted=wanted,
        windows_needed=needed,
        spread=math.sqrt(2 / clusters.degrees_of_freedom),
    )


def resolutions_of(
    records: Sequence[ResultRecord],
    scores_of: Callable[[ResultRecord], TokenColumns | None],
    wanted: float,
) -> list[tuple[str, Resolution | None]]:
    """Of each model of a run that was compared with its reference: label, and what its windows resolve.

    Args:
        records: of one run.
        scores_of: a record's per-token columns, None where they are gone.
        wanted: half width, above 0.
    """
    base = next((record for record in records if record.is_reference), None)
    theirs = None if base is None else scores_of(base)
    found: list[tuple[str, Resolution | None]] = []
    for record in records:
        mine = scores_of(record) if record.against_reference is not None else None
        if mine is None or theirs is None:
            continue
        windows = int(np.unique(mine.window_of).size)
        try:
            ln_ratio = paired(mine, theirs, record.protocol).ln_ratio
        except ModelError:
            continue
        found.append((record.label, resolution(ln_ratio, windows, wanted)))
    return found

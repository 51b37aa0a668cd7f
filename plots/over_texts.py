"""The y axis of a chart over several texts: the geometric mean of the perplexities' ratios, or the mean KLD.

Each text counts alike (`evalq.results.means`). A model without a mean has no point, and the chart says why.
"""

import math
from collections.abc import Mapping, Sequence

from evalq.plots.quantity import FARTHEST, Bar, Quantity, kld_axis, kld_number, number
from evalq.results.estimate import Estimate
from evalq.results.floor import floor_of
from evalq.results.means import MeanOverTexts, mean_over_texts
from evalq.results.record import Floor, ResultRecord
from evalq.results.texts import ByText

Means = Mapping[str, MeanOverTexts]  # by label


def quantity_of(found: ByText, name: str) -> Quantity:
    """The mean of "ppl" or of "kld" over texts, of each model's record of the first text."""
    means = {records[0].label: mean_over_texts(records, found.names) for records in found.models}
    n_texts = len(found.names)
    return _mean_kld(means, n_texts) if name == "kld" else _mean_ratio(means, n_texts)


def facts(found: ByText) -> list[str]:
    """What stands under the title: which texts."""
    return [f"mean of {len(found.names)} texts, each alike: {', '.join(found.names)}"]


def _mean_ratio(means: Means, n_texts: int) -> Quantity:
    def value(record: ResultRecord) -> float | None:
        mean = means[record.label]
        if mean.ratio is None:
            return 1.0 if record.is_reference and not mean.why_not else None
        return mean.ratio.value

    def missing(record: ResultRecord) -> str | None:
        y = value(record)
        if y is None:
            return means[record.label].why_not or "no mean"
        return None if math.isfinite(y) and y > 0 else "no finite mean"

    def bar(record: ResultRecord) -> Bar | None:
        found = means[record.label].ratio
        if found is None or not found.stderr or not math.isfinite(found.stderr):
            return None
        y, error = found.value, found.stderr
        return max(y - error, 0.5 * y), min(y + error, FARTHEST * y)

    def axis(reference: str | None, per: str) -> list[str]:
        to = reference or "the reference"
        return [
            f"PPL per token / PPL of {to}, geometric mean of {n_texts} texts",
            f"PPL / PPL of {to}, geometric mean",
            "ratio of perplexities, geometric mean",
        ]

    title = f"Ratio of perplexities per token, mean of {n_texts} texts,"
    return Quantity(
        "mean_ratio", title, value, missing, bar, ratio_number, 8.0, FARTHEST, "ratios of perplexities", axis
    )


def ratio_number(ratio: float) -> str:
    """A ratio near 1 with the digits that tell models apart."""
    return f"{ratio:.3f}" if ratio < 10 else number(ratio)


def _mean_kld(means: Means, n_texts: int) -> Quantity:
    def of(label: str) -> Estimate | None:
        return means[label].kld if label in means else None

    def value(record: ResultRecord) -> float | None:
        found = of(record.label)
        return None if found is None else found.value

    def missing(record: ResultRecord) -> str | None:
        y = value(record)
        if y is None:
            return means[record.label].why_not or "no KLD on every text"
        return None if math.isfinite(y) and y > 0 else "no KLD above 0"

    def bar(record: ResultRecord) -> Bar | None:
        found = of(record.label)
        ends = None if found is None else found.interval
        if found is None or ends is None or not all(map(math.isfinite, ends)):
            return None
        return max(ends[0], found.value / FARTHEST), min(ends[1], FARTHEST * found.value)

    def floor(one: Floor) -> float | None:
        found = of(one.label)
        return None if found is None else found.value

    def at_floor(record: ResultRecord, records: Sequence[ResultRecord]) -> bool:
        one, y = floor_of(record, records), value(record)
        limit = None if one is None else floor(one)
        return y is not None and limit is not None and y <= limit

    return Quantity(
        "mean_kld", f"KL divergence, mean of {n_texts} texts (nats per token),", value, missing, bar,
        kld_number, 10.0, math.inf, "KL divergences",
        lambda reference, per: kld_axis(reference, f"{n_texts} texts, "),
        divergence=True, floor=floor, at_floor=at_floor,
    )  # fmt: skip

"""What stands on the y axis: the protocol's own perplexity, or the mean KL divergence from the reference.

Means over several texts are in `evalq.plots.over_texts`. A KL divergence that is a lower bound is another
quantity and is never drawn on the axis of the exact one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evalq.engine.columns import KLD_BOUND
from evalq.results.floor import at_floor, kld_of
from evalq.results.record import Floor, ResultRecord

FARTHEST = 10_000.0  # times the best perplexity: a broken model must not press the others into one line
LONGEST_BAR = 3.0  # times the value, as far as an axis follows an error bar

Bar = tuple[float, float]


@dataclass(frozen=True)
class Quantity:
    """One kind of y axis.

    Args:
        name: "ppl" or "kld".
        title: how a chart's title begins.
        value: of a record; None where it has none.
        missing: why a record has none that can be drawn, None where it has one.
        bar: ends of a record's error bar; None where its error is unknown.
        number: a value as the chart writes it.
        log_above: the axis is logarithmic where the largest is more than so many times the smallest.
        farthest: models so many times worse than the best are named instead of drawn.
        values: what its values are called.
        axis: what the axis may be called, the longest first, by the label of the reference (None without) and
            what perplexities are per.
        divergence: it is a distance from the reference, so that the reference itself has no point, engines
            have floors and bars are 95% intervals.
        floor: y of an engine's floor; None where it is not known.
        at_floor: whether a record, among the others, is at or below its engine's floor.
    """

    name: str
    title: str
    value: Callable[[ResultRecord], float | None]
    missing: Callable[[ResultRecord], str | None]
    bar: Callable[[ResultRecord], Bar | None]
    number: Callable[[float], str]
    log_above: float
    farthest: float
    values: str
    axis: Callable[[str | None, str], list[str]]
    divergence: bool = False
    floor: Callable[[Floor], float | None] = lambda floor: floor.kld.value
    at_floor: Callable[[ResultRecord, Sequence[ResultRecord]], bool] = at_floor


def number(value: float) -> str:
    """A perplexity, or bits or GiB, in the fewest characters that still tell models apart."""
    if value < 1000:
        return f"{value:.2f}"
    if value < 1e7:
        return f"{value:,.0f}" if value >= 10_000 else f"{value:.0f}"
    return f"{value:.1e}"


def kld_number(nats: float) -> str:
    """A KL divergence with three digits that count, two where it is hardly anything."""
    if not math.isfinite(nats) or nats >= 1000:
        return f"{nats:.3g}"
    if nats < 1e-5:
        return f"{nats:.1e}".replace("e-0", "e-") if nats > 0 else "0"
    return f"{nats:.{max(0, 2 - math.floor(math.log10(nats)))}f}"


def _no_perplexity(record: ResultRecord) -> str | None:
    y = record.headline_ppl
    if record.unit == "byte":
        return None if y is not None and math.isfinite(y) and y > 0 else "no bits per byte"
    # No perplexity is below 1.
    if y is None or not math.isfinite(y) or y < 1:
        return "no perplexity per word" if record.unit == "word" else "no perplexity"
    return None


def _ppl_bar(record: ResultRecord) -> Bar | None:
    """One standard error of the difference to the reference, where there is one, else of itself.

    Two models find the same tokens hard, so the difference is what tells them apart; the error of each
    perplexity alone is many times larger. The lower end stays above 0 for a logarithmic axis.
    """
    y = record.headline_ppl
    error = record.headline_stderr
    if record.headline_ratio is not None and y is not None:
        ratio, stderr = record.headline_ratio
        error = y / ratio * stderr if stderr else None
    if y is None or not error or not math.isfinite(error):
        return None
    return max(y - error, 0.5 * y), min(y + error, FARTHEST * y)


def _kld_value(record: ResultRecord) -> float | None:
    found = kld_of(record)
    return None if found is None else found.value


def _no_kld(record: ResultRecord) -> str | None:
    against, found = record.against_reference, kld_of(record)
    if against is None:
        return "not compared with the reference"
    if found is None:
        return "a lower bound of KLD only" if KLD_BOUND.name in against.metrics else "no KLD"
    # Zero has no place on a logarithmic axis, and rounding leaves identical models a little below.
    return None if math.isfinite(found.value) and found.value > 0 else "no KLD above 0"


def _kld_bar(record: ResultRecord) -> Bar | None:
    """The 95% interval."""
    found = kld_of(record)
    ends = None if found is None else found.interval
    if found is None or ends is None or not all(map(math.isfinite, ends)):
        return None
    return max(ends[0], found.value / FARTHEST), min(ends[1], FARTHEST * found.value)


def kld_axis(reference: str | None, of_texts: str = "") -> list[str]:
    """Names of an axis of mean KL divergence, the longest first; `of_texts` stands before the unit."""
    unit = f"({of_texts}nats per token)"
    return [
        f"mean KL divergence from {reference or 'the reference'} {unit}",
        f"mean KLD from {reference or 'the reference'} {unit}",
        f"mean KL divergence {unit}",
        f"mean KLD {unit}",
    ]


PPL = Quantity(
    "ppl", "Perplexity", lambda record: record.headline_ppl, _no_perplexity, _ppl_bar, number, 8.0, FARTHEST,
    "perplexities", lambda reference, per: [f"perplexity per {per}"],
)  # fmt: skip
KLD = Quantity(
    "kld", "KL divergence", _kld_value, _no_kld, _kld_bar, kld_number, 10.0, math.inf,
    "KL divergences", lambda reference, per: kld_axis(reference), divergence=True,
)  # fmt: skip
BITS = Quantity(
    "bits_per_byte", "Bits per byte", PPL.value, _no_perplexity, _ppl_bar, kld_number, 8.0, FARTHEST,
    "bits per byte", lambda reference, per: ["bits per byte"],
)  # fmt: skip
QUANTITIES = {one.name: one for one in (PPL, KLD)}


def quantity_of(name: str, records: Sequence[ResultRecord]) -> Quantity:
    """What a chart of these records shows: "ppl" is what stands for a result, in the records' own unit."""
    return BITS if name == PPL.name and records[0].unit == "byte" else QUANTITIES[name]

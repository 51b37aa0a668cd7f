"""One line for each model beside the reference: worse, better, broken, or no difference shown.

The difference is that of the perplexities on the same tokens, and a model is worse (better) when the whole
95% interval of it is. Where the interval holds zero no difference is shown, which is not the same as showing
that there is none: the interval says how large it may still be. These intervals hold for one model each; for
choosing among many see `evalq.results.significance`, whose p-values are corrected for their number.
"""

import math
from dataclasses import dataclass
from typing import Literal

from evalq.results.estimate import Estimate
from evalq.results.record import ResultRecord

# So far from the reference, per token, rounding does not lead. One nat is a factor of e in perplexity. In
# llama.cpp's table for Llama 3 8B the formats of 2 bits and more are below it (mean KLD of Q4_K_M 0.03, of
# Q2_K 0.45, of IQ2_XXS 0.81) and only IQ1_M (1.4) and IQ1_S (2.2) above; mixed-up weights make several nats.
# https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md
BROKEN_NATS = 1.0
BROKEN_RULE = (
    f"broken: surely more than {BROKEN_NATS:g} nat per token from the reference, in mean KLD or in ln of the "
    "ratio of the perplexities; in llama.cpp's table for Llama 3 8B only IQ1 formats are"
)

Kind = Literal["no difference shown", "worse", "better", "broken", "not known"]


@dataclass(frozen=True)
class Verdict:
    """What can be said of a model beside the reference.

    Args:
        kind: in a word.
        text: in one line, the word included.
    """

    kind: Kind
    text: str


def verdict(record: ResultRecord) -> Verdict | None:
    """The verdict on a model; None for the reference itself, a failed model and one that was not compared."""
    against = record.against_reference
    if against is None:
        return None
    for name, what in (("kld", "KLD"), ("ln_ratio", "ln of the ratio of the perplexities")):
        found = against.metrics.get(name)
        if found is not None and _surely_above(found, BROKEN_NATS):
            return Verdict("broken", f"broken: {what} {found.value:.2f} nats per token")
    return verdict_on_change(record.headline_change)


def verdict_on_change(change: tuple[float, float] | None) -> Verdict:
    """The verdict on a 95% interval of PPL / PPL of the reference, minus 1; None where it is not known."""
    if change is None:
        return Verdict("not known", "not known: too few windows for an error")
    low, high = 100 * change[0], 100 * change[1]
    digits = _digits(high - low)
    if low > 0:
        return Verdict("worse", f"worse by {low:,.{digits}f} to {high:,.{digits}f} %")
    if high < 0:
        return Verdict("better", f"better by {-high:,.{digits}f} to {-low:,.{digits}f} %")
    if low == high:
        return Verdict("no difference shown", "no difference shown: the same on every token")
    between = f"{-low:,.{digits}f} % better to {high:,.{digits}f} % worse"
    return Verdict("no difference shown", f"no difference shown ({between})")


def _surely_above(found: Estimate, limit: float) -> bool:
    """Whether the whole interval is, or the value where there is none."""
    return (found.value if found.low is None else found.low) > limit


def _digits(width: float) -> int:
    """Decimals that show the ends of an interval so wide in percent, with two digits of the width."""
    if not 0 < width < math.inf:
        return 2
    return min(max(1 - math.floor(math.log10(width)), 0), 6)

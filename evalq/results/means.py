"""A model over several texts: the geometric mean of its ratios to the reference, and its mean KLD.

Macro means: each text counts alike, however many tokens were scored on it.

    mean ratio = exp(mean over texts of ln(PPL / PPL of the reference))
    mean KLD   = mean over texts of KLD

Texts are independent of each other, so with n texts and the standard error s_i of each the error of the mean
is sqrt(sum s_i**2) / n. Its interval is that of the t distribution with Welch's degrees of freedom,
(sum s_i**2)**2 / sum (s_i**4 / f_i), f_i those of each text, rounded down. Source: B. L. Welch, "The
generalization of 'Student's' problem when several different population variances are involved", Biometrika
34, 1947. Perplexities are per token, whatever unit a protocol shows. This is the error for these texts; how a
model does on other texts is another question.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evalq.engine.columns import KLD
from evalq.results.estimate import Estimate
from evalq.results.record import ResultRecord
from evalq.results.statistics import LOG, PLAIN, Scale, exp, interval, t_quantile

_MOST_DEGREES = 20_000


@dataclass(frozen=True)
class MeanOverTexts:
    """One model over all texts of a run.

    Args:
        label: of the model.
        ln_ratio: mean of ln(PPL / PPL of the reference); None for the reference itself and without one.
        kld: mean KLD; None where a text has none, or a lower bound only.
        why_not: why there is no mean of the ratios, "" where there is one and for the reference.
    """

    label: str
    ln_ratio: Estimate | None = None
    kld: Estimate | None = None
    why_not: str = ""

    @property
    def ratio(self) -> Estimate | None:
        """Geometric mean of PPL / PPL of the reference."""
        found = self.ln_ratio
        if found is None:
            return None
        value, ends = exp(found.value), found.interval
        return Estimate(
            value=value,
            stderr=None if found.stderr is None or not math.isfinite(value) else value * found.stderr,
            low=None if ends is None else exp(ends[0]),
            high=None if ends is None else exp(ends[1]),
        )


def mean_over_texts(records: Sequence[ResultRecord], names: Sequence[str]) -> MeanOverTexts:
    """The means of one model; never over fewer texts than the others have.

    Args:
        records: of the model, one a text.
        names: of the texts.
    """
    label = records[0].label
    failed = [name for record, name in zip(records, names, strict=True) if record.status != "ok"]
    if failed:
        return MeanOverTexts(label, why_not=f"it failed on {', '.join(failed)}")
    if all(record.is_reference for record in records):
        return MeanOverTexts(label)
    references = {name: _reference(record) for name, record in zip(names, records, strict=True)}
    alone = [name for name, reference in references.items() if reference is None]
    if alone:
        return MeanOverTexts(label, why_not=f"it was not compared with a reference on {', '.join(alone)}")
    different = dict.fromkeys(str(reference) for reference in references.values())
    if len(different) > 1:
        return MeanOverTexts(label, why_not=f"the texts have different references: {', '.join(different)}")
    compared = [record.against_reference for record in records if record.against_reference is not None]
    klds = [found.metrics.get(KLD.name) for found in compared]
    exact = [found for found in klds if found is not None]
    return MeanOverTexts(
        label,
        ln_ratio=mean_of([found.log_ratio for found in compared]),
        kld=mean_of(exact, LOG) if len(exact) == len(klds) else None,
    )


def _reference(record: ResultRecord) -> str | None:
    """Label of the model that it was compared with, or is itself; None without."""
    if record.is_reference:
        return record.label
    return None if record.against_reference is None else record.against_reference.label


def mean_of(figures: Sequence[Estimate], scale: Scale = PLAIN) -> Estimate:
    """The mean of independent figures.

    Args:
        figures: at least one; their intervals by the t distribution on `scale`.
        scale: on which the mean's interval is symmetric too.
    """
    n = len(figures)
    value = sum(figure.value for figure in figures) / n
    errors = [figure.stderr for figure in figures if figure.stderr is not None]
    if len(errors) < n or not all(map(math.isfinite, errors)) or not math.isfinite(value):
        return Estimate(value=value)
    variance = sum(error**2 for error in errors)
    spread = sum(
        error**4 / degrees_of_freedom(figure, scale) for figure, error in zip(figures, errors, strict=True)
    )
    degrees = max(1, math.floor(variance**2 / spread + 1e-9)) if spread > 0 else _MOST_DEGREES
    stderr = math.sqrt(variance) / n
    ends = interval(value, stderr, t_quantile(min(degrees, _MOST_DEGREES)), scale)
    low, high = ends or (None, None)
    bound = any(figure.stderr_is_lower_bound for figure in figures)
    return Estimate(value=value, stderr=stderr, stderr_is_lower_bound=bound, low=low, high=high)


def degrees_of_freedom(figure: Estimate, scale: Scale = PLAIN) -> int:
    """Those that a figure's 95% interval was made with, read from its width.

    Results of evalq 0.1 have an error and no interval; theirs count as 1, the most cautious number.
    """
    ends, error = figure.interval, figure.stderr
    if ends is None or not error:
        return 1
    used = scale if scale.holds(figure.value) and scale.holds(ends[1]) else PLAIN
    t = (used.there(ends[1]) - used.there(figure.value)) / (error * used.slope(figure.value))
    low, high = 1, _MOST_DEGREES  # t_quantile falls
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if t_quantile(middle) <= t * (1 + 1e-9) else (middle + 1, high)
    return low

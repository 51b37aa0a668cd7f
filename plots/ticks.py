"""Limits and ticks of an axis, with plain numbers: no exponents, no offset in a corner.

Perplexities of good quantizations differ by percents and a broken one by a factor of a thousand, so the
y axis is linear until the largest is more than 8 times the smallest, then logarithmic. KL divergences differ
by decades; there it is 10 times.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

_LOG_STEPS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
_MAX_LOG_TICKS = 9


@dataclass(frozen=True)
class Scale:
    """One axis.

    Args:
        low: lower limit.
        high: upper limit.
        log: logarithmic.
        ticks: places.
        labels: what stands there.
    """

    low: float
    high: float
    log: bool
    ticks: list[float]
    labels: list[str]


def wants_log(values: Sequence[float], ratio: float) -> bool:
    """Whether values span too much for a linear axis: more than so many times the smallest."""
    return max(values) > ratio * min(values)


def scale(
    values: Sequence[float], log: bool, margins: tuple[float, float], smallest: float, n_ticks: int
) -> Scale:
    """An axis that holds values.

    Args:
        values: what must lie inside; above 0 if log.
        log: logarithmic.
        margins: shares of the range added below and above.
        smallest: least range as a share of the values, so that equal values are not magnified.
        n_ticks: at most, on a linear axis.
    """
    points = [math.log(v) for v in values] if log else list(values)
    low, high = min(points), max(points)
    least = smallest if log else smallest * max(abs(low), abs(high), 1e-9)
    missing = max(0.0, least - (high - low)) / 2
    low, high = low - missing, high + missing
    below, above = margins[0] * (high - low), margins[1] * (high - low)
    floor = -math.inf if log or min(points) < 0 else 0.0
    low, high = max(low - below, floor), high + above
    if log:
        low, high = math.exp(low), math.exp(high)
        ticks = _log_ticks(low, high)
        return Scale(low, high, True, ticks, [_plain(tick) for tick in ticks])
    ticks = [float(t) for t in MaxNLocator(n_ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    step = ticks[1] - ticks[0]
    ticks = [tick for tick in ticks if low <= tick <= high]
    decimals = next((d for d in range(16) if abs(round(step, d) - step) < 1e-6 * step), 16)
    return Scale(low, high, False, ticks, [_plain(tick, decimals) for tick in ticks])


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between the limits, the densest series that stays readable."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in _LOG_STEPS:
        ticks = [step * 10.0**e for e in range(first, last + 1) for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= _MAX_LOG_TICKS:
            return ticks
    every = math.ceil((last - first) / _MAX_LOG_TICKS)
    return [10.0**e for e in range(first, last + 1, every) if low <= 10.0**e <= high]


def _plain(value: float, decimals: int | None = None) -> str:
    if abs(value) >= 1e7:
        return f"{value:.0e}"
    if decimals is None:
        if 0 < abs(value) < 1e-5:
            return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
        decimals = next(d for d in range(8) if abs(round(value, d) - value) < 1e-6 * abs(value) or d == 7)
    return f"{value:,.{decimals}f}" if abs(value) >= 10_000 else f"{value:.{decimals}f}"

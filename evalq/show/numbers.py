"""Numbers as people read them, whatever a result can hold: none, NaN, infinity, 1e300."""

import math

NOTHING = "–"
# From here on a number says more as a power of ten, and stays narrow in a table.
_HUGE = 1e7


def number(value: float | None, digits: int) -> str:
    """A number with thousands separated; "–" for none."""
    if value is None:
        return NOTHING
    if not math.isfinite(value) or abs(value) >= _HUGE:
        return f"{value:.3g}"
    return f"{value:,.{digits}f}"


def digits_for(value: float, least: int) -> int:
    """Decimals that leave three digits of a small number: at least so many, at most nine."""
    if not 0 < abs(value) < 1:
        return least
    return min(max(least, 2 - math.floor(math.log10(abs(value)))), 9)


def change_percent(ratio: float, stderr: float | None) -> str:
    """How far a ratio is from 1, in percent, with its standard error."""
    change = 100 * (ratio - 1)
    sign = "" if math.isnan(change) or change < 0 else "+"
    if stderr is None or not math.isfinite(stderr):
        return f"{sign}{number(change, 2)} %"
    return f"{sign}{number(change, 2)} ± {number(100 * stderr, 2)} %"


def estimate(value: float, stderr: float | None, digits: int, share: bool = False) -> str:
    """A number with its standard error where there is one; a share in percent."""
    scale, unit = (100.0, " %") if share else (1.0, "")
    error = "" if stderr is None or not math.isfinite(stderr) else f" ± {number(scale * stderr, digits)}"
    return f"{number(scale * value, digits)}{error}{unit}"

"""The axes that charts share: two thin spines, a light grid, plain numbers."""

from matplotlib.axes import Axes

from evalq.plots import style
from evalq.plots.page import MARGIN_PT, Page, font
from evalq.plots.ticks import Scale


def frame(page: Page, rows: tuple[float, float], y_scale: Scale) -> Axes:
    """The page's axes between two heights, points, with room for the numbers and the name on the left."""
    widest = max((page.measure(label, style.TICK_PT)[0] for label in y_scale.labels), default=0.0)
    left = MARGIN_PT + 1.4 * style.AXIS_LABEL_PT + widest + 5
    return page.add_axes((left, rows[0], page.width - MARGIN_PT, rows[1]))


def dress(axes: Axes, look: style.Theme, x_scale: Scale, y_scale: Scale) -> None:
    """Limits, numbers, grid and spines."""
    if y_scale.log:
        axes.set_yscale("log")
    if x_scale.log and axes.get_xscale() != "log":
        axes.set_xscale("log")
    axes.set_xlim(x_scale.low, x_scale.high)
    axes.set_ylim(y_scale.low, y_scale.high)
    for axis, one in ((axes.xaxis, x_scale), (axes.yaxis, y_scale)):
        axis.set_ticks([], minor=True)
        axis.set_ticks(one.ticks, labels=one.labels, fontproperties=font(style.TICK_PT), color=look.muted)
    axes.tick_params(length=0, pad=5)
    axes.grid(True, color=look.grid, lw=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=look.spine, linewidth=0.7)

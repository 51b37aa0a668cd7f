"""The chart: perplexity or KL divergence against bits per weight or VRAM, one point per model.

A dotted line joins the points of a group. With perplexities a thin horizontal line marks that of each
unquantized model and of the run's reference, and bars are one standard error. With KL divergence the
reference has no point, a dashed line marks each engine's floor, points at or below their floor are hollow,
and bars are 95% intervals. Lower left is better: fewer bits and less lost. Against speed the lower right is
better, groups are not joined, and a line with rings marks the Pareto frontier. The chart of several texts
shows their means (`evalq.plots.over_texts`).
"""

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.figure import Figure

from evalq.plots import over_texts, style
from evalq.plots.across import Axis
from evalq.plots.annotate import Tag, write_tags
from evalq.plots.axes import dress, frame
from evalq.plots.geometry import Floats
from evalq.plots.output import save, show
from evalq.plots.page import MARGIN_PT, Page, quiet_glyphs
from evalq.plots.quantity import LONGEST_BAR
from evalq.plots.selection import ChartOptions, FloorLine, Point, Selection, Series, printable, select
from evalq.plots.surround import write_footer, write_header
from evalq.plots.ticks import Scale, scale, wants_log
from evalq.results.record import ResultRecord
from evalq.results.texts import ByText

__all__ = ["Axis", "ChartOptions", "draw", "draw_means", "save", "show"]

MIN_AXES_PT = 150.0


def draw(records: Sequence[ResultRecord], options: ChartOptions) -> Figure:
    """Draw records as one chart, ready for save() or show().

    Args:
        records: of one comparison; failed ones are named under the axes.
        options: axis, limits, looks.

    Raises:
        NotComparable: the perplexities measure different things.
        SpecError: nothing to draw.
    """
    return _draw(records, options, select(records, options), None)


def draw_means(found: ByText, options: ChartOptions) -> Figure:
    """Draw what models show over several texts: the mean ratio to the reference, or the mean KLD.

    Args:
        found: the records of the texts.
        options: axis, limits, looks.

    Raises:
        SpecError: nothing to draw.
    """
    records = found.texts[found.names[0]]
    chosen = select(records, options, over_texts.quantity_of(found, options.y))
    return _draw(records, options, chosen, over_texts.facts(found))


def _draw(
    records: Sequence[ResultRecord], options: ChartOptions, chosen: Selection, facts: list[str] | None
) -> Figure:
    """`facts` are what the records have in common; None reads it from them."""
    series = _series(chosen, style.theme(options.dark))
    with quiet_glyphs():
        page, low, high = _page(records, chosen, options, series, facts)
        x_scale, y_scale = _scales(chosen)
        dress(frame(page, (low, high), y_scale), page.look, x_scale, y_scale)
        y_labels = _y_labels(chosen) if options.y_label is None else [options.y_label]
        _name_axes(page, chosen.across.label(records), y_labels)
        _draw_levels(page, series)
        for floor in chosen.floors:
            color = _floor_color(floor, series, page.look)
            page.axes.axhline(floor.y, color=color, lw=style.FLOOR_PT, ls=style.DASHED, zorder=1.5)
        _draw_frontier(page, chosen.frontier)
        for one in series:
            _draw_series(page, one)
        tags, segments = _tags(page, series, chosen.floors), _segments(page, series, chosen)
        write_tags(page, tags, segments, chosen.across.more_is_better)
    return page.figure


def _series(chosen: Selection, look: style.Theme) -> list[Series]:
    """Groups with something to draw, each with the colour and marker of its place among all groups."""
    colors = style.group_colors(chosen.groups, look)
    series = []
    for i, group in enumerate(chosen.groups):
        points = sorted((p for p in chosen.points if p.group == group), key=lambda p: (p.x, p.y, p.name))
        levels = [p for p in chosen.levels if p.group == group]
        if points or levels:
            marker = style.MARKERS[i % len(style.MARKERS)]
            joins = not chosen.across.more_is_better
            series.append(Series(group, colors[group], marker, points, levels, joins))
    return series


def _scales(chosen: Selection) -> tuple[Scale, Scale]:
    """Axes that hold every point, its error bar and a label beside it."""
    heights = [point.y for point in chosen.points + chosen.levels] + [floor.y for floor in chosen.floors]
    ends = [
        min(max(y, point.y / LONGEST_BAR), LONGEST_BAR * point.y)
        for point in chosen.points
        for y in point.bar or ()
    ]
    places = [p.x for p in chosen.points]
    spread = [x for p in chosen.points for x in p.x_bar or ()]
    log_x = wants_log(places + spread, chosen.across.log_above)
    x_scale = scale(places + spread, log_x, margins=(0.07, 0.07), smallest=0.1, n_ticks=10)
    log = wants_log(heights, chosen.quantity.log_above)
    y_scale = scale(heights + ends, log, margins=(0.14, 0.12), smallest=0.01, n_ticks=7)
    return x_scale, y_scale


def _page(
    records: Sequence[ResultRecord],
    chosen: Selection,
    options: ChartOptions,
    series: list[Series],
    facts: list[str] | None,
) -> tuple[Page, float, float]:
    """A page with everything that stands round the axes, and the room left between, points."""
    title = options.title
    if title is None:
        title = f"{chosen.quantity.title} against {chosen.across.title}"
    height = options.height * 72
    while True:
        page = Page(options.width * 72, height, style.theme(options.dark))
        high = write_header(page, records, title, chosen, [one for one in series if one.points], facts)
        low = write_footer(page, chosen) + 2.6 * style.AXIS_LABEL_PT + style.TICK_PT
        if high - low >= MIN_AXES_PT:
            return page, low, high
        height += MIN_AXES_PT - (high - low) + 1


def _y_labels(chosen: Selection) -> list[str]:
    """What the y axis may be called, the longest first."""
    against = None if chosen.against is None else printable(chosen.against, 60)
    return chosen.quantity.axis(against, chosen.per)


def _name_axes(page: Page, x_label: str, y_labels: list[str]) -> None:
    """Both names; of several for y the first that fits, else the last as far as it does."""
    x0, y0, x1, y1 = page.axes_box()
    size, ink = style.AXIS_LABEL_PT, page.look.ink
    named = [printable(label, 300) for label in y_labels]
    fitting = [label for label in named if page.measure(label, size)[0] <= y1 - y0]
    y_label = page.shorten((fitting or named[-1:])[0], y1 - y0, size)
    page.text((x0 + x1) / 2, y0 - style.TICK_PT - 8 - size, x_label, size, ink, ha="center")
    page.text(
        MARGIN_PT + 0.8 * size, (y0 + y1) / 2, y_label, size, ink,
        ha="center", rotation=90, rotation_mode="anchor",
    )  # fmt: skip


def _draw_levels(page: Page, series: list[Series]) -> None:
    """A line across the chart at the perplexity of every unquantized model and of the reference."""
    for one in series:
        for point in one.lines:
            color = point.color or one.color
            page.axes.axhline(point.y, color=color, lw=style.THIN_PT, alpha=0.6, zorder=1.5)


def _draw_frontier(page: Page, points: Sequence[Point]) -> None:
    """A line through the Pareto frontier, and a ring round each of its points."""
    if not points:
        return
    axes, look = page.axes, page.look
    places = [p.x for p in points], [p.y for p in points]
    axes.plot(*places, color=look.muted, lw=style.FRONTIER_PT, alpha=0.7, zorder=2)
    axes.plot(
        *places, ls="none", marker="o", ms=style.RING_SIZE_PT, mfc="none", mec=look.muted,
        mew=style.FRONTIER_PT, zorder=3.5,
    )  # fmt: skip


def _draw_series(page: Page, one: Series) -> None:
    axes, look = page.axes, page.look
    if one.joined:
        axes.plot(
            [p.x for p in one.points], [p.y for p in one.points], color=one.color, lw=style.LINE_PT,
            ls=style.DOTTED, dash_capstyle="round", alpha=0.85, zorder=2,
        )  # fmt: skip
    for point in one.points:
        color = point.color or one.color
        if point.x_bar:
            axes.plot(
                point.x_bar, [point.y, point.y], color=color, lw=style.BAR_PT, alpha=0.4, zorder=2.5,
                solid_capstyle="butt",
            )  # fmt: skip
        if point.bar:
            axes.plot(
                [point.x, point.x], point.bar, color=color, lw=style.BAR_PT, alpha=0.4, zorder=2.5,
                solid_capstyle="butt",
            )  # fmt: skip
        face, rim, width = color, style.edge(color, look), style.EDGE_PT
        if point.hollow:
            face, rim, width = look.paper, style.legible(color, look, 3.0), style.HOLLOW_PT
        axes.plot(
            [point.x], [point.y], ls="none", marker=one.marker, color=color, zorder=4,
            ms=style.marker_size(one.marker), mfc=face, mec=rim, mew=width,
        )  # fmt: skip


def _floor_color(floor: FloorLine, series: list[Series], look: style.Theme) -> str:
    """The colour of the engine's only group, else none of them."""
    return next((one.color for one in series if one.name == floor.group), look.muted)


def _tags(page: Page, series: list[Series], floors: list[FloorLine]) -> list[Tag]:
    """What stands beside each point, at the right end of levels without one, at the left end of floors.

    Curves of KL divergence fall to the right, so there is room at the left end.
    """
    tags, look, (left, right) = [], page.look, page.axes.get_xlim()
    for one in series:
        for p in one.points:
            tags.append(Tag(p.name, p.value, style.legible(p.color or one.color, look), (p.x, p.y)))
        for p in one.levels:
            name = p.name if p.name == p.group else f"{p.group} {p.name}"
            tags.append(Tag(name, p.value, style.legible(p.color or one.color, look), (right, p.y)))
    for floor in floors:
        color = style.legible(_floor_color(floor, series, look), look)
        tags.append(Tag(floor.name, "", color, (left, floor.y)))
    return tags


def _segments(page: Page, series: list[Series], chosen: Selection) -> Floats:
    """Everything thin that labels should not cover, page points, [K, 4]."""
    left, right = page.axes.get_xlim()
    ends: list[tuple[float, float]] = []
    for one in series:
        places = [(p.x, p.y) for p in one.points]
        if one.joined:
            for start, end in pairwise(places):
                ends += [start, end]
        for p in one.points:
            if p.bar:
                ends += [(p.x, y) for y in p.bar]
            if p.x_bar:
                ends += [(x, p.y) for x in p.x_bar]
        for p in one.lines:
            ends += [(left, p.y), (right, p.y)]
    for floor in chosen.floors:
        ends += [(left, floor.y), (right, floor.y)]
    for before, after in pairwise(chosen.frontier):
        ends += [(before.x, before.y), (after.x, after.y)]
    return page.from_data(ends).reshape(-1, 4)

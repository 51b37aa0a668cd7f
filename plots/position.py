"""The chart by position: perplexity or KL divergence against the number of tokens before one, a line a model.

Each bucket of positions is one step of the x axis, which is logarithmic from 1024 on because buckets double.
Models stand beside each other within a step, so that their bars can be told apart; bars are 95% intervals.
Under perplexities a second panel shows their change against the run's reference on the same tokens, which is
far sharper. With KL divergence the floor of each engine is a dashed line.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from matplotlib.figure import Figure

from evalq.engine.columns import KLD
from evalq.errors import SpecError
from evalq.plots import style
from evalq.plots.axes import dress, frame
from evalq.plots.page import LEADING, MARGIN_PT, Page, quiet_glyphs
from evalq.plots.quantity import LONGEST_BAR
from evalq.plots.selection import NAME_CHARACTERS, Series, YAxis, printable
from evalq.plots.style import NOTE_PT, SUBTITLE_PT, TITLE_PT
from evalq.plots.surround import compared
from evalq.plots.ticks import Scale, scale, wants_log
from evalq.results.by_position import FIRST_STOP
from evalq.results.estimate import Estimate
from evalq.results.floor import floors
from evalq.results.record import AtPosition, ResultRecord, require_comparable
from evalq.results.statistics import exp

TITLES = {"ppl": "Perplexity by position", "kld": "KL divergence by position"}
LEGEND_NAME_CHARACTERS = 2 * NAME_CHARACTERS
MIN_PANEL_PT = 110.0
BETWEEN_PANELS_PT = 22.0
SPREAD = 0.5  # of a step, over which models stand beside each other
LOG_ABOVE = 8.0


@dataclass(frozen=True)
class PositionChart:
    """What the user may choose.

    Args:
        title: None for a plain description of the axes, "" for no title.
        y: "ppl" or "kld".
        dark: light lines on a dark page.
        width: inches.
        height: inches; more where the panels need it.
    """

    title: str | None = None
    y: YAxis = "ppl"
    dark: bool = False
    width: float = 8.0
    height: float = 5.6


@dataclass(frozen=True)
class Line:
    """One model in one panel.

    Args:
        series: its name, colour and marker.
        at: step of each point, ascending.
        values: of each, in the panel's unit.
        ends: of its interval, None where it has none.
        dashed: it is a floor.
    """

    series: Series
    at: list[int]
    values: list[float]
    ends: list[tuple[float, float] | None]
    dashed: bool


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        name: of the y axis.
        lines: at least one.
        may_log: values are above zero and may differ by decades.
    """

    name: str
    lines: list[Line]
    may_log: bool

    @property
    def scale(self) -> Scale:
        """An axis that holds every value and bar; an extreme bar as far as LONGEST_BAR times the median one.

        On a logarithmic axis a bar is followed as far as LONGEST_BAR times its value.
        """
        values = [value for line in self.lines for value in line.values]
        bars = [
            (value, ends)
            for line in self.lines
            for value, ends in zip(line.values, line.ends, strict=True)
            if ends is not None and all(map(math.isfinite, ends))
        ]
        log = self.may_log and wants_log(values, LOG_ABOVE)
        halves = [max(high - value, value - low) for value, (low, high) in bars]
        reach = LONGEST_BAR * (median(halves) if halves else 0.0)
        for value, ends in bars:
            for end in ends:
                near = (value / LONGEST_BAR, value * LONGEST_BAR) if log else (value - reach, value + reach)
                values.append(min(max(end, near[0]), near[1]))
        return scale(values, log, margins=(0.08, 0.1), smallest=0.01, n_ticks=6)


def draw(records: Sequence[ResultRecord], options: PositionChart) -> Figure:
    """Draw what was measured by position, ready for `evalq.plots.output.save`.

    Args:
        records: of one comparison; those without buckets are named under the axes.
        options: quantity, looks.

    Raises:
        NotComparable: the records measure different things.
        SpecError: no record has anything by position.
    """
    require_comparable(list(records))
    look = style.theme(options.dark)
    starts = sorted({at.start for record in records for at in record.by_position})
    panels = _panels(records, options, _series(records, look), starts)
    if not panels:
        quantity = "perplexity" if options.y == "ppl" else "KL divergence"
        raise SpecError(
            f"no chart by position: no model has a {quantity} in windows longer than {FIRST_STOP} tokens",
            "score longer windows, for example with --protocol long",
        )
    with quiet_glyphs():
        page, low, high = _page(records, options, look, panels)
        share = (high - low - BETWEEN_PANELS_PT * (len(panels) - 1)) / len(panels)
        names = list(dict.fromkeys(line.series.name for panel in panels for line in panel.lines))
        shifts = {name: SPREAD * ((i + 0.5) / len(names) - 0.5) for i, name in enumerate(names)}
        for i, panel in enumerate(panels):
            top = high - i * (share + BETWEEN_PANELS_PT)
            _add_axes(page, (top - share, top), panel, starts, last=i == len(panels) - 1)
            for line in panel.lines:
                _draw_line(page, line, shifts[line.series.name])
    return page.figure


def _series(records: Sequence[ResultRecord], look: style.Theme) -> dict[str, Series]:
    """Label -> name, colour and marker; those of failed models are not given to others."""
    colors = style.group_colors({record.label: style.usable(record.color) for record in records}, look)
    return {
        record.label: Series(
            printable(record.label, LEGEND_NAME_CHARACTERS) or "?",
            colors[record.label],
            style.MARKERS[i % len(style.MARKERS)],
            [],
            [],
        )
        for i, record in enumerate(records)
    }


def _panels(
    records: Sequence[ResultRecord], options: PositionChart, series: dict[str, Series], starts: Sequence[int]
) -> list[Panel]:
    against = next((r.against_reference.label for r in records if r.against_reference), "")
    name = printable(against, NAME_CHARACTERS)

    def lines(of: Callable[[ResultRecord], Sequence[AtPosition]], metric: str, percent: bool) -> list[Line]:
        dashed = {one.floor.label for one in floors(records) if one.floor} if metric == KLD.name else set()
        read = partial(_points, metric=metric, percent=percent, starts=starts)
        found = [(record.label, read(of(record))) for record in records]
        return [Line(series[label], *points, label in dashed) for label, points in found if points[0]]

    if options.y == "kld":
        kld = lines(_beside, KLD.name, False)
        return [Panel(f"mean KLD from {name} (nats per token)", kld, True)] if kld else []
    own, beside = lines(lambda r: r.by_position, "ppl", False), lines(_beside, "ln_ratio", True)
    panels = [Panel("perplexity per token", own, True)] if own else []
    return [*panels, Panel(f"change vs {name} (%)", beside, False)] if own and beside else panels


def _beside(record: ResultRecord) -> Sequence[AtPosition]:
    return () if record.against_reference is None else record.against_reference.by_position


def _points(
    found: Sequence[AtPosition], metric: str, percent: bool, starts: Sequence[int]
) -> tuple[list[int], list[float], list[tuple[float, float] | None]]:
    """Steps, values and intervals of a metric; of a logarithm of a ratio the change in percent."""

    def shown(value: float) -> float:
        return 100 * (exp(value) - 1) if percent else value

    there: list[tuple[int, Estimate]] = [
        (starts.index(at.start), at.metrics[metric])
        for at in found
        if metric in at.metrics and at.start in starts and abs(shown(at.metrics[metric].value)) < 1e12
    ]
    # Zero and less have no place on a logarithmic axis; rounding leaves identical models there.
    kept = [(step, one) for step, one in there if metric != KLD.name or one.value > 0]
    ends = [None if (e := one.interval) is None else (shown(e[0]), shown(e[1])) for _, one in kept]
    return [step for step, _ in kept], [shown(one.value) for _, one in kept], ends


def _page(
    records: Sequence[ResultRecord], options: PositionChart, look: style.Theme, panels: Sequence[Panel]
) -> tuple[Page, float, float]:
    """A page with title, facts, legend and notes, and the room left between them, points."""
    height = options.height * 72
    while True:
        page = Page(options.width * 72, height, look)
        room = page.width - 2 * MARGIN_PT
        title = printable(TITLES[options.y] if options.title is None else options.title, 300)
        y = page.height - MARGIN_PT + 3
        if title:
            heading = page.shorten(title, room, TITLE_PT, "bold")
            y = page.paragraph(y, [heading], TITLE_PT, look.ink, weight="bold")
        facts = page.wrap(compared(records), " · ", SUBTITLE_PT, 3)
        y = page.paragraph(y, facts, SUBTITLE_PT, look.muted)
        drawn = {line.series.name: line.series for panel in panels for line in panel.lines}
        high = page.legend(y - 6, list(drawn.values())) - 6
        notes = _notes(records, panels, page)
        foot = MARGIN_PT + len(notes) * NOTE_PT * LEADING
        low = foot + 2.6 * style.AXIS_LABEL_PT + style.TICK_PT
        least = len(panels) * MIN_PANEL_PT + (len(panels) - 1) * BETWEEN_PANELS_PT
        if high - low >= least:
            page.paragraph(foot - 4, notes, NOTE_PT, look.muted)
            return page, low, high
        height += least - (high - low) + 1


def _notes(records: Sequence[ResultRecord], panels: Sequence[Panel], page: Page) -> list[str]:
    """What bars and dashed lines are, and who is not there."""
    lines = []
    if any(ends for panel in panels for line in panel.lines for ends in line.ends):
        own = "" if len(panels) == 1 else "; below, of the difference on the same tokens"
        lines.append(f"bars: 95% intervals{own}")
    floor = [line.series.name for panel in panels for line in panel.lines if line.dashed]
    if floor:
        lines.append(f"dashed: the floor of its engine ({', '.join(floor)}); at or below it KLD says nothing")
    drawn = {line.series.name for panel in panels for line in panel.lines}
    missing = [
        printable(record.label, LEGEND_NAME_CHARACTERS)
        for record in records
        if printable(record.label, LEGEND_NAME_CHARACTERS) not in drawn and not record.is_reference
    ]
    return lines + (page.wrap(missing, ", ", NOTE_PT, 2, lead="not drawn: ") if missing else [])


def _add_axes(page: Page, rows: tuple[float, float], panel: Panel, starts: Sequence[int], last: bool) -> None:
    """A panel's axes with their names, and a line at no change."""
    y_scale, n = panel.scale, len(starts)
    places = [float(i) for i in range(n + 1)]
    labels = [_tokens(start) for start in (*starts, 2 * starts[-1] if starts[-1] else FIRST_STOP)]
    x_scale = Scale(0.0, float(n), False, places, labels if last else ["" for _ in places])
    axes = frame(page, rows, y_scale)
    dress(axes, page.look, x_scale, y_scale)
    if y_scale.low < 0 < y_scale.high:
        axes.axhline(0.0, color=page.look.spine, lw=style.LINE_PT, zorder=1.5)
    x0, y0, x1, y1 = page.axes_box()
    size, ink = style.AXIS_LABEL_PT, page.look.ink
    name = page.shorten(panel.name, y1 - y0, size)
    page.text(
        MARGIN_PT + 0.8 * size, (y0 + y1) / 2, name, size, ink,
        ha="center", rotation=90, rotation_mode="anchor",
    )  # fmt: skip
    if last:
        x_name = "position in the window (tokens before a token)"
        page.text((x0 + x1) / 2, y0 - style.TICK_PT - 8 - size, x_name, size, ink, ha="center")


def _draw_line(page: Page, line: Line, shift: float) -> None:
    """A model's line, bars and markers, so far from the middle of each step."""
    axes, one, places = page.axes, line.series, [step + 0.5 + shift for step in line.at]
    axes.plot(
        places, line.values, color=one.color, lw=style.LINE_PT, alpha=0.85, zorder=2,
        ls=style.DASHED if line.dashed else "-",
    )  # fmt: skip
    for x, ends in zip(places, line.ends, strict=True):
        if ends:
            axes.plot([x, x], ends, color=one.color, lw=style.BAR_PT, alpha=0.5, zorder=2.5)
    axes.plot(
        places, line.values, ls="none", marker=one.marker, color=one.color, zorder=4,
        ms=style.marker_size(one.marker), mec=style.edge(one.color, page.look), mew=style.EDGE_PT,
    )  # fmt: skip


def _tokens(position: int) -> str:
    return f"{position // FIRST_STOP}k" if position >= FIRST_STOP else str(position)

"""Where the memory of a GPU went: one stacked bar per run of an engine.

Weights, peak activation, non-torch memory, KV cache and CUDA graphs lie behind each other in the order in
which vLLM allocates the memory; the graphs come last because it captures them into what is left. A line is
the GPU's size, two short ones above and below a bar what was requested of it. A run that ran out of memory
shows what it held and, in outline, the allocation that did not fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evalq.errors import SpecError
from evalq.plots import style
from evalq.plots.page import LEADING, MARGIN_PT, Page, font, quiet_glyphs
from evalq.plots.selection import printable
from evalq.plots.ticks import scale
from evalq.vllm_memory.engine_run import EngineRun
from evalq.vllm_memory.run_output import short_name

WIDTH_PT = 612.0
ROW_PT = 44.0
BAR_HEIGHT_PT = 17.0
NAME_BASELINE = 0.34  # of a row, from its top
TITLE = "GPU memory of vLLM"
LEGEND_ROW_PT = 1.45 * style.LEGEND_PT
SEGMENT_PADDING_PT = 4.0
KEY_PT = 8.0
STUB_PT = 4.0
GPU_LINE_PT = 1.4
LARGEST_GIB = 1e5

_NAMES = ("weights", "peak activation", "non-torch", "KV cache", "CUDA graphs")
_PALETTE = (0, 4, 6, 2, 3)
_IN_USE = "in use when it failed"
_REFUSED = "allocation that did not fit"
_GPU = "GPU"
_REQUESTED = "requested"


@dataclass(frozen=True)
class MemoryChart:
    """How the picture looks."""

    title: str | None = None
    dark: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of the legend: its left edge, points, and its row."""

    name: str
    color: str | None
    x: float
    row: int


@dataclass(frozen=True)
class Segment:
    """A part of a bar; without a colour it is drawn in outline."""

    name: str
    size_gib: float
    color: str | None


@dataclass(frozen=True)
class Bar:
    """One run."""

    run: EngineRun
    segments: list[Segment]

    @property
    def end_gib(self) -> float:
        """Where the bar ends."""
        return float(sum(segment.size_gib for segment in self.segments))


def draw(runs: Sequence[EngineRun], options: MemoryChart) -> Figure:
    """Draw the runs that say what they held; the others are named below.

    Raises:
        SpecError: none does.
    """
    look = style.theme(options.dark)
    bars = [Bar(run, _segments(run, look)) for run in runs]
    drawn = [bar for bar in bars if bar.segments]
    if not drawn:
        raise SpecError("nothing to draw: no log says what a GPU held", "vLLM logs it on GPUs only")
    missing = [printable(short_name(bar.run.engine.model), 60) for bar in bars if not bar.segments]
    with quiet_glyphs():
        page, low, high = _page(drawn, missing, options, look)
        _add_axes(page, (low, high), drawn)
        totals = [_total(bar) for bar in drawn]
        if len(drawn) > 1 and totals[0] is not None and len(set(totals)) == 1:
            page.axes.axvline(totals[0], color=look.ink, lw=GPU_LINE_PT, zorder=1.5)
        for row, bar in enumerate(drawn):
            _draw_bar(page, row, bar, first=row == 0 or totals[row - 1] != totals[row])
    return page.figure


def _segments(run: EngineRun, look: style.Theme) -> list[Segment]:
    memory, failure = run.memory, run.failure
    if run.device.kind == "cpu":
        return []
    if memory.weights_gib is None:
        in_use, tried = (
            (None, None) if failure is None else map(_size, (failure.in_use_gib, failure.tried_gib))
        )
        if in_use is None:
            return []
        segments = [Segment(_IN_USE, in_use, look.muted)]
        return segments + ([] if tried is None else [Segment(_REFUSED, tried, None)])
    sizes = (
        memory.weights_gib,
        memory.peak_activation_gib,
        memory.non_torch_gib,
        memory.kv_cache_gib,
        memory.cudagraph_gib,
    )
    return [
        Segment(name, size, look.palette[color])
        for name, size, color in zip(_NAMES, map(_size, sizes), _PALETTE, strict=True)
        if size is not None
    ]


def _total(bar: Bar) -> float | None:
    return _size(bar.run.device.total_gib)


def _requested(bar: Bar) -> float | None:
    return _size(bar.run.device.requested_gib)


def _size(gib: float | None) -> float | None:
    """A size that can be drawn, None where a log says nothing or no GPU has it."""
    return gib if gib is not None and 0 < gib < LARGEST_GIB else None


def _page(
    bars: Sequence[Bar], missing: Sequence[str], options: MemoryChart, look: style.Theme
) -> tuple[Page, float, float]:
    """A page as high as its bars need, with what stands round them, and the room left between, points."""
    measuring = Page(WIDTH_PT, ROW_PT, look)
    notes = [f"not drawn, no figures: {', '.join(dict.fromkeys(missing))}"] if missing else []
    if any((bar.run.memory.cudagraph_gib or 0) < 0 for bar in bars):
        notes.append("a measured size of the CUDA graphs below 0 is left out")
    lines = [line for note in notes for line in measuring.wrap(note.split(", "), ", ", style.NOTE_PT, 2)]
    entries = _legend(measuring, bars)
    rows = 1 + max(entry.row for entry in entries)
    header = 1.5 * MARGIN_PT + (style.TITLE_PT + style.SUBTITLE_PT) * LEADING + rows * LEGEND_ROW_PT
    footer = MARGIN_PT + len(lines) * style.NOTE_PT * LEADING
    below = footer + 2.6 * style.AXIS_LABEL_PT + style.TICK_PT
    page = Page(WIDTH_PT, header + ROW_PT * len(bars) + below, look)
    title = printable(TITLE if options.title is None else options.title, 300)
    title = page.shorten(title, page.width - 2 * MARGIN_PT, style.TITLE_PT, "bold")
    versions = dict.fromkeys(bar.run.engine.version for bar in bars if bar.run.engine.version)
    facts = ["per GPU, the largest rank", *([f"vLLM {', '.join(versions)}"] if versions else [])]
    y = page.paragraph(page.height - MARGIN_PT + 3, [title], style.TITLE_PT, look.ink, weight="bold")
    y = page.paragraph(y, page.wrap(facts, " · ", style.SUBTITLE_PT, 1), style.SUBTITLE_PT, look.muted)
    _draw_legend(page, y - 6, entries)
    page.paragraph(footer - 4, lines, style.NOTE_PT, look.muted)
    return page, below, page.height - header


def _legend(page: Page, bars: Sequence[Bar]) -> list[Key]:
    """What the parts and lines of these bars are called, and where each name goes."""
    found = dict.fromkeys((segment.name, segment.color) for bar in bars for segment in bar.segments)
    wanted = sorted(found, key=lambda key: (*_NAMES, _IN_USE, _REFUSED).index(key[0]))
    if any(_total(bar) for bar in bars):
        wanted.append((_GPU, None))
    if any(_requested(bar) for bar in bars):
        wanted.append((_REQUESTED, None))
    keys, x, row = [], MARGIN_PT, 0
    for name, color in wanted:
        width = KEY_PT + 5 + page.measure(name, style.LEGEND_PT)[0]
        if x + width > page.width - MARGIN_PT:
            x, row = MARGIN_PT, row + 1
        keys.append(Key(name, color, x, row))
        x += width + 16
    return keys


def _draw_legend(page: Page, y: float, keys: Sequence[Key]) -> None:
    look = page.look
    for key in keys:
        baseline = y - style.LEGEND_PT - key.row * LEGEND_ROW_PT
        middle = key.x + KEY_PT / 2
        if key.name == _GPU:
            page.line((middle, baseline - 1.5, middle, baseline + KEY_PT), look.ink, GPU_LINE_PT)
        elif key.name == _REQUESTED:
            page.line((middle, baseline - 1.5, middle, baseline + 1.5), look.ink, style.LINE_PT)
            page.line((middle, baseline + KEY_PT - 3, middle, baseline + KEY_PT), look.ink, style.LINE_PT)
        else:
            place = (key.x, baseline - 0.5, KEY_PT, KEY_PT)
            page.figure.add_artist(_box(page, place, key.color, page.transform))
        page.text(key.x + KEY_PT + 5, baseline, key.name, style.LEGEND_PT, look.ink)


def _box(
    page: Page, place: tuple[float, float, float, float], color: str | None, transform: object
) -> Rectangle:
    x, y, width, height = place
    edge = page.look.paper if color else page.look.ink
    return Rectangle(
        (x, y), width, height, facecolor=color or "none", edgecolor=edge, linewidth=style.EDGE_PT,
        linestyle="-" if color else (0, (3, 2)), transform=transform, zorder=3,
    )  # fmt: skip


def _add_axes(page: Page, rows: tuple[float, float], bars: Sequence[Bar]) -> None:
    """An axis of GiB below, rows from the top."""
    look = page.look
    ends = [bar.end_gib for bar in bars] + [_total(bar) or 0.0 for bar in bars]
    x_scale = scale([0.0, *ends], False, margins=(0.0, 0.09), smallest=0.1, n_ticks=9)
    axes = page.add_axes((MARGIN_PT, rows[0], page.width - MARGIN_PT, rows[1]))
    axes.set_xlim(0, x_scale.high)
    axes.set_ylim(len(bars), 0)
    axes.set_yticks([])
    axes.set_xticks(
        x_scale.ticks, labels=x_scale.labels, fontproperties=font(style.TICK_PT), color=look.muted
    )
    axes.tick_params(length=0, pad=5)
    axes.grid(True, axis="x", color=look.grid, lw=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=look.spine, linewidth=0.7)
    x0, y0, x1, _ = page.axes_box()
    size = style.AXIS_LABEL_PT
    page.text((x0 + x1) / 2, y0 - style.TICK_PT - 8 - size, "GiB", size, look.ink, ha="center")


def _draw_bar(page: Page, row: int, bar: Bar, first: bool) -> None:
    """Name and outcome, the bar below them, the lines at its end."""
    axes, look, run = page.axes, page.look, bar.run
    left, top = (float(v) for v in page.from_data([(0.0, float(row))])[0])
    points_per_gib = float(page.from_data([(1.0, 0.0)])[0][0]) - left
    height, stub, upper = BAR_HEIGHT_PT / ROW_PT, STUB_PT / ROW_PT, row + 0.5
    lower, x = upper + height, 0.0
    for segment in bar.segments:
        axes.add_patch(_box(page, (x, upper, segment.size_gib, height), segment.color, axes.transData))
        _write_size(page, (x, upper + height / 2), segment, points_per_gib)
        x += segment.size_gib
    total, requested = _total(bar), _requested(bar)
    if requested is not None:
        for start, end in ((upper - stub, upper), (lower, lower + stub)):
            axes.plot([requested] * 2, [start, end], color=look.ink, lw=style.LINE_PT, zorder=4)
    if total is not None:
        axes.plot([total] * 2, [upper - stub, lower + stub], color=look.ink, lw=GPU_LINE_PT, zorder=4)
    if first and total is not None:
        place = left + max(total, bar.end_gib) * points_per_gib + 4
        middle = top - (0.5 + height / 2) * ROW_PT - 0.33 * style.VALUE_PT
        page.text(place, middle, f"{total:.2f}", style.VALUE_PT, look.ink)
    _write_name(page, (left + 1, top - NAME_BASELINE * ROW_PT), run)


def _write_size(page: Page, middle: tuple[float, float], segment: Segment, points_per_gib: float) -> None:
    """The size within its part, where it fits."""
    text = f"{segment.size_gib:.2f}"
    if page.measure(text, style.VALUE_PT)[0] + 2 * SEGMENT_PADDING_PT > segment.size_gib * points_per_gib:
        return
    inks = (page.look.paper, page.look.ink)
    color = max(inks, key=lambda ink: style.contrast(ink, segment.color or page.look.paper))
    x, y = page.from_data([(middle[0] + segment.size_gib / 2, middle[1])])[0]
    page.text(float(x), float(y) - 0.33 * style.VALUE_PT, text, style.VALUE_PT, color, ha="center")


def _write_name(page: Page, place: tuple[float, float], run: EngineRun) -> None:
    look = page.look
    size = style.NAME_PT
    room = (page.width - 2 * MARGIN_PT) * 0.55
    name = page.shorten(printable(short_name(run.engine.model), 120), room, size, "bold")
    page.text(*place, name, size, look.ink, weight="bold")
    said = [f"TP {run.engine.tensor_parallel}"] if (run.engine.tensor_parallel or 1) > 1 else []
    if run.failure is not None:
        said.append(f"failed: {run.failure.meaning}")
    elif run.cache.tokens is not None:
        said.append(f"{run.cache.tokens:,} tokens of KV cache")
    color = style.legible(look.palette[1], look) if run.failure else look.muted
    x = place[0] + page.measure(name, size, "bold")[0] + 8
    page.text(x, place[1], " · ".join(said), style.VALUE_PT, color)

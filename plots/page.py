"""Text round the axes: title, what is compared, legend, notes; laid out in points of 1/72 inch.

Text is never parsed as markup (a model may be called "q_4$x$"). Widths come from matplotlib's own renderer,
so that lines break where the picture ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal
from warnings import catch_warnings, filterwarnings

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Affine2D

from evalq.plots.geometry import Floats
from evalq.plots.selection import Series
from evalq.plots.style import (
    DOTTED,
    DPI,
    EDGE_PT,
    FONT_FAMILIES,
    LEGEND_PT,
    LINE_PT,
    MARKER_RADIUS_PT,
    OTHER_SCRIPTS,
    Theme,
    edge,
    marker_size,
)

MARGIN_PT = 16.0
LEADING = 1.32  # distance of baselines over font size
MAX_LEGEND_ROWS = 4
Slant = Literal["normal", "italic", "oblique"]


@contextmanager
def quiet_glyphs() -> Iterator[None]:
    """Draw characters that no shipped font has as boxes, without a warning for each."""
    with catch_warnings():
        filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


@cache
def families() -> tuple[str, ...]:
    """The charts' typefaces, then those installed here for scripts that they lack."""
    installed = set(fontManager.get_font_names())
    return (*FONT_FAMILIES, *(family for family in OTHER_SCRIPTS if family in installed))


@cache
def font(size: float, weight: str = "normal", style: Slant = "normal") -> FontProperties:
    """The charts' typeface at a size in points."""
    return FontProperties(family=list(families()), size=size, weight=weight, style=style)


def _drawable(text: str) -> str:
    """The text as one line; matplotlib would break it at a newline, and an SVG cannot hold controls."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


class Page:
    """A figure that is written on in points, origin at the lower left.

    Args:
        width: of the page, points.
        height: points.
        look: the colours.
    """

    def __init__(self, width: float, height: float, look: Theme) -> None:
        """Start with an empty page."""
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=DPI, facecolor=look.paper)
        self.width, self.height, self.look = width, height, look
        self.transform = Affine2D().scale(1 / 72) + self.figure.dpi_scale_trans
        self._axes: Axes | None = None
        self._renderer: RendererAgg = FigureCanvasAgg(self.figure).get_renderer()
        self._sizes: dict[tuple[str, float, str], tuple[float, float, float]] = {}

    def measure(self, text: str, size: float, weight: str = "normal") -> tuple[float, float, float]:
        """Width, height above and depth below the baseline of one line, points."""
        text = _drawable(text)
        key = (text, size, weight)
        if key not in self._sizes:
            pixels = self._renderer.get_text_width_height_descent(text, font(size, weight), False)
            w, h, d = (float(v) * 72 / DPI for v in pixels)
            self._sizes[key] = (w, h - d, d)
        return self._sizes[key]

    def text(self, x: float, y: float, text: str, size: float, color: str, **how: Any) -> Text:
        """Write one line with its baseline at y; `how` goes to matplotlib's Text."""
        properties = font(size, how.pop("weight", "normal"), how.pop("style", "normal"))
        artist = Text(
            x, y, _drawable(text), color=color, fontproperties=properties, parse_math=False,
            transform=self.transform, **{"va": "baseline", "zorder": 6, **how},
        )  # fmt: skip
        self.figure.add_artist(artist)
        return artist

    def line(self, ends: tuple[float, float, float, float], color: str, width: float, **how: Any) -> None:
        """Draw a line from (x0, y0) to (x1, y1); `how` goes to matplotlib's Line2D."""
        x0, y0, x1, y1 = ends
        artist = Line2D([x0, x1], [y0, y1], color=color, lw=width, transform=self.transform, **how)
        self.figure.add_artist(artist)

    def paragraph(self, y: float, lines: Sequence[str], size: float, color: str, **how: Any) -> float:
        """Write lines downwards from the upper edge y; returns the lower edge."""
        for line in lines:
            self.text(MARGIN_PT, y - size, line, size, color, **how)
            y -= size * LEADING
        return y

    def wrap(
        self, pieces: Sequence[str], joint: str, size: float, max_lines: int, lead: str = ""
    ) -> list[str]:
        """Break pieces into lines as wide as the page, with "+N more" where max_lines do not hold them."""
        room = self.width - 2 * MARGIN_PT
        lines: list[str] = []
        line = lead
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            piece = self.shorten(piece, room - self.measure(lead + " +999 more", size)[0], size)
            more = f"{joint}+{len(pieces) - i} more"
            candidate = line + (joint if line not in ("", lead) else "") + piece
            # On the last line there must be room for the count of those that follow.
            tail = "" if last or len(lines) + 1 < max_lines else f"{joint}+{len(pieces) - i - 1} more"
            if self.measure(candidate + tail, size)[0] <= room:
                line = candidate
            elif len(lines) + 1 == max_lines:
                return [*lines, line + more]
            else:
                lines.append(line + ("," if joint == ", " else ""))
                line = piece
        return [*lines, line] if line else lines

    def shorten(self, text: str, room: float, size: float, weight: str = "normal") -> str:
        """The text, or as much of it as fits with an ellipsis."""
        if self.measure(text, size, weight)[0] <= room:
            return text
        fits, too_long = 1, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.measure(text[:middle].rstrip() + "…", size, weight)[0] > room:
                too_long = middle
            else:
                fits = middle
        return text[:fits].rstrip() + "…"

    def legend(self, y: float, entries: Sequence[Series]) -> float:
        """Draw rows of groups downwards from the upper edge y; returns the lower edge."""
        space, x, row = 16.0, MARGIN_PT, 0
        baseline = y - LEGEND_PT
        for i, entry in enumerate(entries):
            name = self.shorten(entry.name, self.width / 3, LEGEND_PT)
            key_width = 22.0 if entry.joined else 2 * MARKER_RADIUS_PT
            width = key_width + 5 + self.measure(name, LEGEND_PT)[0]
            if x + width > self.width - MARGIN_PT and x > MARGIN_PT:
                x, row = MARGIN_PT, row + 1
                baseline -= LEGEND_PT * 1.45
            if row == MAX_LEGEND_ROWS:
                self.text(x, baseline, f"+{len(entries) - i} more", LEGEND_PT, self.look.muted)
                break
            self._legend_key(x, baseline + 0.33 * LEGEND_PT, key_width, entry)
            self.text(x + key_width + 5, baseline, name, LEGEND_PT, self.look.ink)
            x += width + space
        return float(baseline - 0.45 * LEGEND_PT)

    def _legend_key(self, x: float, y: float, width: float, entry: Series) -> None:
        if entry.joined:
            how = {"ls": DOTTED, "alpha": 0.85, "dash_capstyle": "round"}
            self.line((x, y, x + width, y), entry.color, LINE_PT, **how)
        marker = Line2D(
            [x + width / 2], [y], ls="none", marker=entry.marker, color=entry.color,
            ms=marker_size(entry.marker), mec=edge(entry.color, self.look), mew=EDGE_PT,
            transform=self.transform,
        )  # fmt: skip
        self.figure.add_artist(marker)

    @property
    def axes(self) -> Axes:
        """The axes that add_axes() made."""
        assert self._axes is not None
        return self._axes

    def add_axes(self, box: tuple[float, float, float, float]) -> Axes:
        """Matplotlib's axes in a box of the page; this page's from now on."""
        x0, y0, x1, y1 = box
        w, h = self.width, self.height
        place = (x0 / w, y0 / h, (x1 - x0) / w, (y1 - y0) / h)
        self._axes = self.figure.add_axes(place, facecolor=self.look.paper)
        return self._axes

    def axes_box(self) -> Floats:
        """The axes, points, [4]."""
        box = self.axes.get_position()
        w, h = self.width, self.height
        return np.array([box.x0 * w, box.y0 * h, box.x1 * w, box.y1 * h], dtype=np.float64)

    def from_data(self, places: Sequence[tuple[float, float]]) -> Floats:
        """Data coordinates to points, [N, 2]."""
        if not places:
            return np.zeros((0, 2))
        pixels = self.axes.transData.transform(np.array(places, dtype=np.float64))
        return np.asarray(pixels * 72 / DPI, dtype=np.float64)

    def veil(self, box: Floats) -> None:
        """Fade what lies under a text that had to be written across a line."""
        x0, y0, x1, y1 = (float(v) for v in box)
        veil = Rectangle(
            (x0, y0), x1 - x0, y1 - y0, color=self.look.paper, alpha=0.7, lw=0, zorder=3,
            transform=self.transform,
        )  # fmt: skip
        self.figure.add_artist(veil)

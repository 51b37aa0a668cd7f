"""How every chart looks: fonts, sizes in points, colours for a light and a dark page.

The typeface is STIX, which matplotlib ships: a text face of scientific printing with the widths of Times, so
that an SVG shown where STIX is missing falls back to Times without moving a label into another. DejaVu Sans
follows for the characters STIX lacks.

The light palette starts with colours of Okabe and Ito, told apart under the common colour vision
deficiencies (https://jfly.uni-koeln.de/color/); the dark one is the same hues, lightened. Seven colours and
eight markers share no divisor, so 56 groups differ in at least one of the two, and the first seven in both.
"""

from dataclasses import dataclass

from matplotlib import colors

FONT_FAMILIES = ("STIXGeneral", "DejaVu Sans")
# For names in other scripts, where one of these is installed.
OTHER_SCRIPTS = (
    "Noto Serif CJK JP",
    "Noto Sans CJK JP",
    "Hiragino Sans",
    "PingFang SC",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "WenQuanYi Zen Hei",
    "Noto Sans Symbols2",
    "Noto Emoji",
)
SVG_FAMILIES = "'STIX Two Text', 'STIXGeneral', 'Times New Roman', Times, 'DejaVu Sans', serif"

TITLE_PT = 14.0
SUBTITLE_PT = 9.5
AXIS_LABEL_PT = 10.5
TICK_PT = 9.5
LEGEND_PT = 10.0
NAME_PT = 9.0
VALUE_PT = 8.5
NOTE_PT = 8.5

MARKER_RADIUS_PT = 3.4
LINE_PT = 1.1
THIN_PT = 0.6
BAR_PT = 1.0
EDGE_PT = 0.6
HOLLOW_PT = 1.2
FLOOR_PT = 0.9
FRONTIER_PT = 0.9
RING_SIZE_PT = 13.0
DOTTED = (0, (1.0, 2.2))
DASHED = (0, (5.0, 3.0))

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
# Equal nominal sizes look unequal: a square or a diamond fills more of its box than a circle.
MARKER_SCALE = {"o": 1.0, "s": 0.9, "^": 1.1, "D": 0.84, "v": 1.1, "P": 1.12, "X": 1.12, "p": 1.1}

DPI = 200


@dataclass(frozen=True)
class Theme:
    """Colours of one page.

    Args:
        paper: the background.
        ink: titles and what must be read first.
        muted: values, ticks, notes.
        grid: lines behind the data.
        spine: the two axes.
        palette: one colour per group, in order of first appearance.
    """

    paper: str
    ink: str
    muted: str
    grid: str
    spine: str
    palette: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1b1f24",
    muted="#5b636d",
    grid="#e9ecf0",
    spine="#9aa2ac",
    palette=("#0072b2", "#d55e00", "#009e73", "#d16ba5", "#e0a000", "#4fb3e8", "#4a4a4a"),
)
DARK = Theme(
    paper="#0d1117",
    ink="#e9eef4",
    muted="#a1a9b4",
    grid="#1e242c",
    spine="#59626d",
    palette=("#4ba3e3", "#f2793a", "#2fc092", "#d987c4", "#f0c541", "#9bdcff", "#c4c9d0"),
)


def theme(dark: bool) -> Theme:
    """The colours of a dark or a light page."""
    return DARK if dark else LIGHT


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast of two colours, 1 to 21 (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio)."""
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def legible(color: str, page: Theme, ratio: float = 4.5) -> str:
    """The colour, moved towards the ink until it can be read as small text on the page."""
    start, end = colors.to_rgb(color), colors.to_rgb(page.ink)
    for step in range(11):
        red, green, blue = (a + (b - a) * step / 10 for a, b in zip(start, end, strict=True))
        mix = colors.to_hex((red, green, blue))
        if contrast(mix, page.paper) >= ratio:
            break
    return mix


def marker_size(marker: str) -> float:
    """Matplotlib's size of a marker, points."""
    return 2 * MARKER_RADIUS_PT * MARKER_SCALE[marker]


def edge(color: str, page: Theme) -> str:
    """The rim of a marker: the page's colour, or one that shows where the marker is as pale as the page."""
    return page.paper if contrast(color, page.paper) >= 1.6 else legible(color, page, 3.0)


def usable(color: str | None) -> str | None:
    """A colour name or hex code as opaque hex; None if matplotlib does not know it or it is transparent."""
    # "C0" to "C9" stand for whatever the user's matplotlib is set to: not a colour of the record.
    if not color or not colors.is_color_like(color) or color[:1] == "C" and color[1:].isdigit():
        return None
    return colors.to_hex(color) if colors.to_rgba(color)[3] > 0 else None


def group_colors(own: dict[str, str | None], page: Theme) -> dict[str, str]:
    """One colour per group: its own where it has one, else the next of the palette unlike all of those.

    Args:
        own: group -> a usable colour or None, in order of appearance.
        page: where the palette comes from.
    """
    taken = [color for color in own.values() if color]
    free = [color for color in page.palette if all(_distance(color, other) > 0.2 for other in taken)]
    free = free or list(page.palette)
    chosen: dict[str, str] = {}
    n_from_palette = 0
    for group, color in own.items():
        chosen[group] = color or free[n_from_palette % len(free)]
        n_from_palette += color is None
    return chosen


def _luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _distance(one: str, other: str) -> float:
    pairs = zip(colors.to_rgb(one), colors.to_rgb(other), strict=True)
    return float(sum((a - b) ** 2 for a, b in pairs) ** 0.5)

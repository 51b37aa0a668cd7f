"""The picture of `evalq inspect`: where a checkpoint's bytes are.

One bar per kind of layer, as long as its bytes, in one colour per format; beside it the size, its share of
the whole and the bits per weight. Kinds follow one another from the largest to the smallest.
"""

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evalq.errors import SpecError
from evalq.inspect import Inspection
from evalq.inspect.layers import PartBits, part_name
from evalq.plots import style
from evalq.plots.output import save
from evalq.plots.page import MARGIN_PT, Page, quiet_glyphs
from evalq.plots.selection import Series, printable
from evalq.show.inspection import parameters_line, share, size

__all__ = ["draw", "save"]

WIDTH_PT = 576.0
BAR_HEIGHT_PT = 15.0
ROW_PT = 26.0
ROOM_PT = 400.0  # more than any header takes
THINNEST_PT = 1.2  # so that a kind of few bytes is visible
COLOR_BAR = "bar"  # how a test finds the bars among the shapes


def draw(found: Inspection, dark: bool = False) -> Figure:
    """Draw an inspection, ready for save().

    Args:
        found: what was inspected.
        dark: light on dark.

    Raises:
        SpecError: there are no weights.
    """
    parts = _largest_first(found)
    if not parts:
        raise SpecError(f"{found.checkpoint.name} holds no weights that could be drawn")
    look = style.theme(dark)
    colors = style.group_colors({name: None for part in parts for name, _ in part.formats}, look)
    with quiet_glyphs():
        # Written twice: how high the header is shows only when it is written.
        header = ROOM_PT - _write_header(Page(WIDTH_PT, ROOM_PT, look), found, colors)
        page = Page(WIDTH_PT, header + ROW_PT * len(parts) + MARGIN_PT, look)
        _draw_bars(page, found, colors, _write_header(page, found, colors))
    return page.figure


def _largest_first(found: Inspection) -> list[PartBits]:
    return sorted((part for part in found.parts if part.bytes), key=lambda part: -part.bytes)


def _write_header(page: Page, found: Inspection, colors: dict[str, str]) -> float:
    """Title, facts, one colour key per format; returns where the bars may begin, points."""
    room = page.width - 2 * MARGIN_PT
    name = printable(found.checkpoint.name.rstrip("/").rpartition("/")[2], 200)
    y = page.height - MARGIN_PT + 3
    title = page.shorten(f"Where the bytes of {name} are", room, style.TITLE_PT, "bold")
    y = page.paragraph(y, [title], style.TITLE_PT, page.look.ink, weight="bold")
    storage = found.checkpoint.storage
    facts = [
        printable(found.facts.scheme, 120),
        parameters_line(found),
        size(storage.disk_bytes),
    ]
    if storage.layer_bpw is not None:
        facts.append(f"{storage.layer_bpw:.3f} bits per weight in the layers")
    y = page.paragraph(y, page.wrap(facts, " · ", style.SUBTITLE_PT, 2), style.SUBTITLE_PT, page.look.muted)
    keys = [Series(printable(form, 40), color, "s", [], []) for form, color in colors.items()]
    return page.legend(y - 6, keys) - 8


def _draw_bars(page: Page, found: Inspection, colors: dict[str, str], top: float) -> None:
    """One row per kind of layer, downwards from the upper edge."""
    parts = _largest_first(found)
    total = sum(part.bytes for part in parts)
    notes = [_note(part, total) for part in parts]
    names = [part_name(part.part, found.checkpoint.storage.tied_head) for part in parts]
    left = MARGIN_PT + max(page.measure(name, style.NAME_PT)[0] for name in names) + 10
    widest = max(page.measure(note, style.VALUE_PT)[0] for note in notes)
    points_per_byte = (page.width - MARGIN_PT - widest - 8 - left) / parts[0].bytes
    for row, (part, note) in enumerate(zip(parts, notes, strict=True)):
        y = top - ROW_PT * (row + 1) + (ROW_PT - BAR_HEIGHT_PT) / 2
        baseline = y + BAR_HEIGHT_PT / 2 - 0.33 * style.NAME_PT
        page.text(left - 8, baseline, names[row], style.NAME_PT, page.look.ink, ha="right")
        x = left
        for form, count in part.formats:
            width = max(count * points_per_byte, THINNEST_PT)
            page.figure.add_artist(_bar(page, (x, y), width, colors[form]))
            x += width
        page.text(x + 6, baseline, note, style.VALUE_PT, page.look.muted)
    page.line((left, top, left, top - ROW_PT * len(parts)), page.look.spine, 0.7)


def _bar(page: Page, corner: tuple[float, float], width: float, color: str) -> Rectangle:
    return Rectangle(
        corner, width, BAR_HEIGHT_PT, facecolor=color, lw=0, transform=page.transform, gid=COLOR_BAR, zorder=3
    )


def _note(part: PartBits, total: int) -> str:
    """What stands behind a bar."""
    return f"{size(part.bytes)}, {share(part.bytes, total)}" + (
        "" if part.bpw is None else f", {part.bpw:.2f} bpw"
    )

"""Writing beside the points: name over value, a thin line where they stand apart, and where better is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evalq.plots.geometry import Floats, clipped_lengths, overlap_areas
from evalq.plots.labels import Placement, Scene, place
from evalq.plots.page import Page
from evalq.plots.style import AXIS_LABEL_PT, MARKER_RADIUS_PT, NAME_PT, NOTE_PT, THIN_PT, TICK_PT, VALUE_PT

TAG = "tag"  # how a test finds the labels of points among the texts
HINT = "↙ better"
HINT_RIGHT = "better ↘"
CLEAR_OF_MARKER_PT = 0.8
BETWEEN_LINES_PT = 0.8


@dataclass(frozen=True)
class Tag:
    """Two lines of text that belong to a place in the axes.

    Args:
        name: upper line, in the colour.
        value: lower line; "" for none.
        color: of the name; legible on the page.
        at: x and y in data coordinates.
    """

    name: str
    value: str
    color: str
    at: tuple[float, float]


def write_tags(page: Page, tags: Sequence[Tag], segments: Floats, better_right: bool = False) -> None:
    """Write every tag near its place and on no other thing.

    Args:
        page: with axes.
        tags: one per point.
        segments: lines in page points that tags should not cover, [K, 4].
        better_right: the better models are on the right below, not on the left.
    """
    bounds = page.axes_box() + np.array([2.0, 2.0, 0.0, 4.0])
    anchors = page.from_data([tag.at for tag in tags])
    sizes = np.array([_size(page, tag) for tag in tags])
    hint = _write_hint(page, bounds, anchors, segments, better_right)
    radius = MARKER_RADIUS_PT + CLEAR_OF_MARKER_PT
    placements = place(Scene(anchors, sizes, radius, bounds, hint, segments))
    for tag, size, placement in zip(tags, sizes, placements, strict=True):
        if placement:
            _write_tag(page, tag, size, placement, segments)
    missing = sum(placement is None for placement in placements)
    if missing:
        text = f"no room for {missing} label{'s' if missing > 1 else ''}"
        y = bounds[1] - TICK_PT - 10 - AXIS_LABEL_PT
        page.text(bounds[2], y, text, NOTE_PT, page.look.muted, ha="right")


def _size(page: Page, tag: Tag) -> tuple[float, float]:
    name, value = _lines(page, tag)
    if not tag.value:
        return name[0], sum(name[1:])
    return max(name[0], value[0]), sum(name[1:]) + BETWEEN_LINES_PT + sum(value[1:])


def _lines(page: Page, tag: Tag) -> list[tuple[float, float, float]]:
    """Width, height above and depth below the baseline of both lines, with room for any letter."""
    lines = []
    for text, size, weight in ((tag.name, NAME_PT, "bold"), (tag.value, VALUE_PT, "normal")):
        width, up, down = page.measure(text, size, weight)
        _, least_up, least_down = page.measure("lp", size, weight)
        lines.append((width, max(up, least_up), max(down, least_down)))
    return lines


def _write_tag(page: Page, tag: Tag, size: Floats, placement: Placement, segments: Floats) -> None:
    name, value = _lines(page, tag)
    x, y = placement.center
    box = np.concatenate([placement.center - size / 2, placement.center + size / 2])
    if clipped_lengths(box[None], segments).any():
        page.veil(box)
    middle = {"ha": "center", "label": TAG}
    page.text(x, y + size[1] / 2 - name[1], tag.name, NAME_PT, tag.color, weight="bold", **middle)
    if tag.value:
        page.text(x, y - size[1] / 2 + value[2], tag.value, VALUE_PT, page.look.muted, **middle)
    if placement.leader:
        page.line(placement.leader, tag.color, THIN_PT, alpha=0.75, zorder=3.5)


def _write_hint(page: Page, bounds: Floats, anchors: Floats, segments: Floats, right: bool) -> Floats:
    """Say in the corner of the better models that they are, unless something is there; its box, [M, 4]."""
    hint = HINT_RIGHT if right else HINT
    width, up, down = page.measure(hint, NOTE_PT)
    x, y = bounds[:2] + 4
    if right:
        x = bounds[2] - width - 4
    box = np.array([[x, y, x + width, y + up + down]])
    markers = np.concatenate([anchors - 6, anchors + 6], axis=1)
    if overlap_areas(box, markers).any() or clipped_lengths(box, segments).any():
        return np.zeros((0, 4))
    page.text(x, y + down, hint, NOTE_PT, page.look.muted, style="italic")
    return box

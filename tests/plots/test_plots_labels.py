"""Labels of the chart: on nothing, on the page, near their points."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.text import Text
from test_plots import (
    LAYOUTS,
    boxes_of,
    chart,
    markers_of,
    pairs_that_overlap,
    record,
    tags_of,
    texts,
)

from evalq.plots import style
from evalq.plots.annotate import TAG
from evalq.plots.geometry import box_distances, clipped_lengths, crossings, overlap_areas, point_distances
from evalq.plots.labels import Scene, place
from evalq.plots.scatter import ChartOptions, draw
from evalq.plots.selection import select


@pytest.mark.parametrize("dpi", [200, 72], ids=["png", "svg"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_touch_no_label_no_marker_and_no_edge(layout: str, dpi: int) -> None:
    records, options = LAYOUTS[layout]
    figure = chart(layout)
    figure.set_dpi(dpi)
    tags, markers = tags_of(figure), markers_of(figure)
    drawn = select(records, options)
    assert len(markers) == len(drawn.points)
    assert len(tags) == 2 * len(drawn.points + drawn.levels)
    boxes = boxes_of(figure, tags)
    # Name and value are one label: their lines may share the height of a descender, no other two may.
    whole = np.concatenate(
        [np.minimum(boxes[::2, :2], boxes[1::2, :2]), np.maximum(boxes[::2, 2:], boxes[1::2, 2:])], 1
    )
    assert pairs_that_overlap(whole) == []
    assert not (overlap_areas(whole, markers) > 0).any()
    frame = figure.axes[0].get_window_extent()
    slack = 5 * dpi / 72
    assert (whole[:, :2] >= [frame.x0, frame.y0]).all()
    assert (whole[:, 2:] <= [frame.x1, frame.y1 + slack]).all()


@pytest.mark.parametrize("layout", ["shootout", "dark vram", "without reference", "near identical", "single"])
def test_labels_cover_no_dotted_line_where_there_is_room(layout: str) -> None:
    records, options = LAYOUTS[layout]
    figure = draw([r.model_copy(update={"ppl_stderr": None}) for r in records], options)
    [axes] = figure.axes
    ends = []
    for line in axes.lines:
        path = axes.transData.transform(line.get_xydata())
        if len(path) > 1 and line.get_linestyle() == "--":
            ends += [np.concatenate(pair) for pair in itertools.pairwise(path)]
    covered = clipped_lengths(boxes_of(figure, tags_of(figure)), np.array(ends).reshape(-1, 4))
    assert covered.sum() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_text_is_on_the_page(layout: str) -> None:
    figure = chart(layout)
    figure.set_dpi(style.DPI)
    written = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = boxes_of(figure, written)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [figure.bbox.x1, figure.bbox.y1]).all()
    assert pairs_that_overlap(boxes_of(figure, [t for t in written if t.get_label() != TAG])) == []


def test_labels_without_any_room_are_left_out_and_counted() -> None:
    records = [record(f"Group{i % 3} name_number_{i}", 4 + i / 1000, 26 + i / 997) for i in range(150)]
    figure = draw(records, ChartOptions(width=5, height=3.5))
    tags = boxes_of(figure, tags_of(figure))
    assert 0 < len(tags) < 300
    assert f"no room for {150 - len(tags) // 2} labels" in texts(figure)
    assert [pair for pair in pairs_that_overlap(tags) if pair[0] // 2 != pair[1] // 2] == []


def test_place_uses_the_whole_room_before_it_gives_a_label_up() -> None:
    anchors = np.full((16, 2), 80.0) + np.arange(16)[:, None] * 0.01
    none = np.zeros((0, 4))
    scene = Scene(
        anchors, np.full((24, 2), (40.0, 20.0)), 4.0, np.array([0.0, 0.0, 420.0, 300.0]), none, none
    )
    placements = place(scene)
    assert all(placements)
    assert placements == place(scene)
    centers = np.array([p.center for p in placements if p])
    boxes = np.concatenate([centers - (20, 10), centers + (20, 10)], axis=1)
    assert pairs_that_overlap(boxes) == []
    far = [p for p in placements if p and math.dist(p.center, (80, 80)) > 60]
    assert far
    assert all(p.leader for p in far)


def test_geometry_against_answers_known_by_hand() -> None:
    box = np.array([[0.0, 0.0, 10.0, 10.0]])
    assert overlap_areas(box, np.array([[5.0, 5.0, 20.0, 20.0], [10.0, 0.0, 12.0, 5.0]])).tolist() == [
        [25, 0]
    ]
    lines = np.array(
        [[-5.0, 5.0, 15.0, 5.0], [0.0, 20.0, 20.0, 0.0], [3.0, 3.0, 7.0, 6.0], [5.0, -9.0, 5.0, 4.0]]
    )
    assert clipped_lengths(box, lines)[0] == pytest.approx([10, 0, 5, 4])
    cross = np.array([[5.0, -5.0, 5.0, 5.1], [5.0, -5.0, 5.0, 4.9]])
    assert crossings(np.array([[-5.0, 5.0, 15.0, 5.0]]), cross).tolist() == [[True, False]]
    points = np.array([[5.0, 13.0], [14.0, 8.0], [20.0, 5.0]])
    assert point_distances(np.array([[0.0, 5.0, 10.0, 5.0]]), points)[0] == pytest.approx([8, 5, 10])
    assert box_distances(box, points)[0] == pytest.approx([3, 4, 10])

"""Colours and markers: told apart by everyone, the user's own ones kept."""

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib import colors
from test_plots import (
    failed,
    record,
    tags_of,
)

from evalq.plots import style
from evalq.plots.scatter import ChartOptions, draw
from evalq.results.record import ResultRecord


def test_own_colours_are_used_and_unknown_ones_replaced() -> None:
    records = [
        record("A 1", 3.0, 30.0, color="purple"), record("A 2", 4.0, 28.0),
        record("B 1", 3.5, 31.0, color="not a colour"), record("C 1", 4.5, 29.0, color="#00ff00"),
        record("D 1", 5.0, 27.0, color="none"), record("E 1", 5.5, 26.5, color="C3"),
    ]  # fmt: skip
    figure = draw(records, ChartOptions())
    lines = [line for line in figure.axes[0].lines if line.get_marker() in style.MARKERS]
    drawn = {line.get_ydata()[0]: colors.to_hex(line.get_color()) for line in lines}
    assert drawn[30.0] == drawn[28.0] == colors.to_hex("purple")
    assert drawn[29.0] == "#00ff00"
    palette = set(style.LIGHT.palette)
    assert {drawn[31.0], drawn[27.0], drawn[26.5]} <= palette
    assert len(set(drawn.values())) == 5


def test_a_failure_does_not_change_the_colours_of_the_others() -> None:
    def colour_of_b(first: ResultRecord) -> Any:
        figure = draw([first, record("B 1", 4.0, 26.0)], ChartOptions())
        lines = [line for line in figure.axes[0].lines if line.get_marker() in style.MARKERS]
        return next(line.get_color() for line in lines if line.get_ydata()[0] == 26.0)

    assert colour_of_b(failed("A 1")) == colour_of_b(record("A 1", 5.0, 25.0))


def test_a_white_marker_on_a_white_page_has_an_edge() -> None:
    figure = draw([record("A 1", 4.0, 26.0, color="white")], ChartOptions())
    [line] = [line for line in figure.axes[0].lines if line.get_marker() in style.MARKERS]
    assert style.contrast(colors.to_hex(line.get_markeredgecolor()), "#ffffff") >= 3
    names = [text for text in tags_of(figure) if text.get_text() == "1"]
    assert style.contrast(colors.to_hex(names[0].get_color()), "#ffffff") >= 4.5


def test_groups_differ_in_marker_and_fifty_six_in_colour_or_marker() -> None:
    records = [record(f"G{i} x", 3 + i / 10, 25 + (i * 13) % 56) for i in range(56)]
    figure = draw(records, ChartOptions(width=16, height=10))
    lines = [line for line in figure.axes[0].lines if line.get_marker() in style.MARKERS]
    assert len({(line.get_marker(), line.get_color()) for line in lines}) == 56
    assert len({line.get_marker() for line in lines[:8]}) == 8


# Colours as seen without red, green or blue cones, in linear RGB, severity 1.0: Machado, Oliveira,
# Fernandes 2009, https://www.inf.ufrgs.br/~oliveira/pubs_files/CVD_Simulation/CVD_Simulation.html
VISION = {
    "full": np.eye(3),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(color: str, vision: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as it is seen."""
    rgb = np.array(colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(VISION[vision] @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / [0.9505, 1.0, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("page", [style.LIGHT, style.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_palette_is_told_apart_by_everyone(page: style.Theme, vision: str) -> None:
    for one, other in itertools.combinations(page.palette, 2):
        assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 10, (one, other)
    assert all(style.contrast(color, page.paper) > 2 for color in page.palette)
    assert style.contrast(page.muted, page.paper) >= 4.5

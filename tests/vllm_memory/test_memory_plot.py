"""The picture: every part has its size, lines mark the GPU, no text lies on another."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from evalq.errors import SpecError
from evalq.plots.memory import MemoryChart, draw
from evalq.plots.output import save
from evalq.plots.style import theme
from evalq.vllm_memory.reader import read_logs

LOGS = Path(__file__).parent / "logs"
H100 = str(LOGS / "written-0.18-h100.log")
EVERY = [str(path) for path in sorted(LOGS.glob("*.log"))]


def drawn(names: list[str], dark: bool = False) -> Figure:
    figure = draw(read_logs(names), MemoryChart(dark=dark))
    FigureCanvasAgg(figure).draw()
    return figure


def bars(figure: Figure) -> list[list[Rectangle]]:
    """The parts of each bar, in the order of the rows."""
    rows: dict[float, list[Rectangle]] = {}
    for patch in figure.axes[0].patches:
        rows.setdefault(patch.get_y(), []).append(patch)
    return [rows[y] for y in sorted(rows)]


def test_widths_are_the_sizes_and_follow_each_other() -> None:
    found = bars(drawn([H100]))
    widths = [[round(part.get_width(), 2) for part in row] for row in found]
    assert widths == [
        [75.84, 3.5],
        [13.47, 7.38, 0.13, 50.28, 0.39],
        [33.88, 4.84, 0.55, 32.0],
        [67.72, 4.84, 0.14, 0.6],
        [14.99, 4.76, 0.13, 51.38],
        [1.12, 5.56, 0.13, 64.45, 0.1],
    ]
    for row in found:
        for one, other in itertools.pairwise(row):
            assert other.get_x() == pytest.approx(one.get_x() + one.get_width())


@pytest.mark.parametrize("gib", [1e5, 1.7e308, math.inf, math.nan, -5.0])
@pytest.mark.parametrize("what", ["weights_gib", "total_gib", "requested_gib"])
def test_a_size_that_no_gpu_has_is_left_out(what: str, gib: float, tmp_path: Path) -> None:
    run = read_logs([H100])[1]
    part = "memory" if what == "weights_gib" else "device"
    odd = replace(run, **{part: replace(getattr(run, part), **{what: gib})})
    figure = draw([run, odd], MemoryChart())
    save(figure, tmp_path / "chart.png")
    assert figure.axes[0].get_xlim()[1] < 100
    n_parts = [len(row) for row in bars(figure)]
    assert n_parts[1] == n_parts[0] - (what == "weights_gib")


def test_names_and_versions_of_a_log_are_text_that_fits(tmp_path: Path) -> None:
    run = read_logs([H100])[1]
    engine = replace(run.engine, model="$x$\x1b[31m\n" + "y" * 500, version="0.1\x1b[2J\n$z$" + "9" * 500)
    figure = draw([replace(run, engine=engine)], MemoryChart(title="\x1b]0;x\x07" + "t" * 500))
    save(figure, tmp_path / "chart.svg")
    renderer = FigureCanvasAgg(figure).get_renderer()
    written = [one for one in figure.get_children() if isinstance(one, Text)]
    assert len(written) > 10
    for one in written:
        assert one.get_text().isprintable() and not one.get_parse_math()
        assert one.get_window_extent(renderer).x1 <= figure.bbox.x1


def test_lines_stand_at_the_gpus_size_and_the_request() -> None:
    figure = drawn([H100])
    places = {round(float(line.get_xdata()[0]), 2) for line in figure.axes[0].lines}
    assert places == {79.18, 71.26}
    assert figure.axes[0].get_xlim()[1] > 79.18


def test_gpus_of_different_sizes_have_their_own_lines() -> None:
    figure = drawn(EVERY)
    places = {round(float(line.get_xdata()[0]), 2) for line in figure.axes[0].lines}
    assert {139.8, 79.18, 39.49, 15.57, 23.56} <= places
    words = [text.get_text() for text in figure.findobj(Text)]
    assert "139.80" in words and any(word.startswith("not drawn, no figures: ") for word in words)
    versions = next(word for word in words if "vLLM 0." in word)
    assert "0.26.0" in versions


@pytest.mark.parametrize("names", [[H100], EVERY])
def test_no_text_lies_on_another_or_beside_the_page(names: list[str]) -> None:
    figure = drawn(names)
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second) or one == other, (one, other)
    for word, box in boxes:
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 <= figure.bbox.height, (
            word
        )


def test_light_and_dark() -> None:
    for dark in (False, True):
        figure = drawn([H100], dark)
        assert figure.get_facecolor()[:3] == pytest.approx(
            tuple(int(theme(dark).paper[i : i + 2], 16) / 255 for i in (1, 3, 5)), abs=0.01
        )


def test_same_runs_same_bytes(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        save(drawn([H100]), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_nothing_to_draw() -> None:
    with pytest.raises(SpecError, match="nothing to draw: no log says what a GPU held"):
        draw(read_logs([str(LOGS / "real-0.32-cpu.log")]), MemoryChart())

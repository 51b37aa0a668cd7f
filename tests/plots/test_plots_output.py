"""Files and windows: reproducible bytes, whole files, text that stays text."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_plots import boxes_of, failed, near, pairs_that_overlap, record, shootout, tags_of

from evalq.errors import SpecError, StoreError
from evalq.plots.scatter import ChartOptions, draw, save, show

HOSTILE = [
    r"$x_1^2$ \frac{a}{b}$", '_hidden <b>&amp;</b> "q"', "日本語 モデル_4", "ünï\x00çödé ½ → 𝄞\n\tx",
    "% {0} \\", "", " ", "Long " + "abcdefghij_" * 30, "W" * 300, "$", "\u202eabc \u202e", "🙂 🙂",
    "ANSI \x1b[31mred\x1b[0m", "\ufffe\uffff \ud800", "\x9b2J", "-->]]>" * 4, "Z" + "\u0335\u0336" * 200,
]  # fmt: skip


def test_hostile_labels_are_drawn_as_they_are(tmp_path: Path) -> None:
    records = [
        record(label, 3.0 + i / 2, 25.0 + (i * 7) % 5, color="no such colour")
        for i, label in enumerate(HOSTILE)
    ]
    figure = draw([*records, failed("$fail_{ed}$ <x>")], ChartOptions(title="$t_{i}$ & <tle> \x07"))
    for suffix in ("png", "svg", "pdf"):
        save(figure, tmp_path / f"chart.{suffix}")
    written = svg_texts(tmp_path / "chart.svg")
    expected_texts = (
        r"\frac{a}{b}$", '<b>&amp;</b> "q"', "モデル_4", r"$t_{i}$ & <tle> \x07", "_hidden",
        r"\x1b[31mred\x1b[0m", r"\u202e",
    )  # fmt: skip
    for expected in expected_texts:
        assert expected in written
    assert "not drawn: $fail_{ed}$ <x> (oom_load)" in written
    assert all(not text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text())
    tags = boxes_of(figure, tags_of(figure))
    assert len(tags) == 2 * len(HOSTILE)
    assert [pair for pair in pairs_that_overlap(tags) if pair[0] // 2 != pair[1] // 2] == []
    assert (tags[:, 2:] <= [figure.bbox.x1, figure.bbox.y1]).all()


@pytest.mark.parametrize("text", ["y\n\x1b[2J" * 100, "$y_{1}$ " * 60, "<y>&" * 125])
def test_title_and_axis_label_of_the_user_are_one_line_that_fits(tmp_path: Path, text: str) -> None:
    figure = draw(shootout(), ChartOptions(title=text, y_label=text))
    save(figure, tmp_path / "chart.svg")
    [axes] = figure.axes
    written = [one for one in figure.get_children() if isinstance(one, Text)]
    assert len(written) > 30
    assert all(one.get_text().isprintable() and not one.get_parse_math() for one in written)
    label = next(one for one in written if one.get_rotation() == 90)
    assert boxes_of(figure, [label])[0, 3] <= axes.bbox.y1 + 1 and axes.bbox.height > 300
    assert svg_texts(tmp_path / "chart.svg")


def svg_texts(path: Path) -> list[str]:
    elements = ET.fromstring(path.read_text(encoding="utf-8")).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(element.itertext()).strip() for element in elements]


def test_svg_keeps_text_and_names_fonts_every_viewer_has(tmp_path: Path) -> None:
    save(draw(shootout(), ChartOptions(title="Title")), tmp_path / "chart.svg")
    written = svg_texts(tmp_path / "chart.svg")
    for expected in ("Title", "4.0", "26.18", "Q4_K_M", "27.35", "EXL3", "perplexity per token"):
        assert expected in written
    styles = [line for line in (tmp_path / "chart.svg").read_text().splitlines() if "STIXGeneral" in line]
    assert styles
    assert all("'Times New Roman'" in line for line in styles)


SCRIPT = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
from test_plots import failed, shootout
from evalq.plots.scatter import ChartOptions, draw, save
figure = draw([*shootout(), failed("EXL3 1.5")], ChartOptions())
for name in ("chart.png", "chart.svg", "chart.pdf"):
    save(figure, pathlib.Path(sys.argv[2]) / name)
"""


def test_the_same_records_give_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / seed)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    for name in ("chart.png", "chart.svg", "chart.pdf"):
        first, second = ((tmp_path / seed / name).read_bytes() for seed in ("1", "2"))
        assert first == second
        assert len(first) > 5000
    png = (tmp_path / "1" / "chart.png").read_bytes()
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1600, 1040)  # 8 x 5.2 inches at 200 dpi


def test_drawing_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from evalq.plots.scatter import ChartOptions, draw, save\n"
        "from evalq.results.record import ResultRecord\n"
        "records = [ResultRecord.model_validate_json(line) for line in open(sys.argv[2])]\n"
        "save(draw(records, ChartOptions()), Path(sys.argv[2]).with_suffix('.png'))\n"
        "assert not {'matplotlib.pyplot', 'scipy', 'adjustText', 'torch'} & set(sys.modules)\n"
    )
    lines = tmp_path / "five.jsonl"
    lines.write_text("\n".join(one.model_dump_json() for one in shootout()[:5]))
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(lines)]
    subprocess.run(command, check=True)
    assert (tmp_path / "five.png").stat().st_size > 10_000


def test_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"\.png, \.svg, \.pdf"):
        save(Figure(), tmp_path / "chart.jpeg")
    with pytest.raises(SpecError, match="cannot be written"):
        save(Figure(), tmp_path / "chart")
    assert list(tmp_path.iterdir()) == []


def test_suffix_in_capitals_and_missing_folders_are_fine(tmp_path: Path) -> None:
    save(draw(near(1), ChartOptions()), tmp_path / "new" / "deep" / "CHART.PNG")
    assert (tmp_path / "new" / "deep" / "CHART.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.png").mkdir()
    figure = draw(near(1), ChartOptions())
    for path in (tmp_path / "file" / "chart.png", tmp_path / "folder.png"):
        with pytest.raises(StoreError, match="cannot be written"):
            save(figure, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


class Broken(Artist):
    def draw(self, renderer: Any) -> None:
        raise RuntimeError("in the middle of drawing")


def test_a_drawing_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"
    path.write_text("the old chart")
    figure = draw(near(1), ChartOptions())
    figure.add_artist(Broken())
    with pytest.raises(RuntimeError, match="in the middle"):
        save(figure, path)
    assert path.read_text() == "the old chart"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems always have a display")
def test_show_without_a_display_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SpecError, match="no display"):
        show(Figure())


TOOLKIT = """
import os
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
class FigureManager(FigureManagerBase):
    def show(self):
        self.canvas.draw()
        open(os.environ["SHOWN"], "w").write(str(len(self.canvas.figure.axes)))
class FigureCanvas(FigureCanvasAgg):
    manager_class = FigureManager
"""


@pytest.mark.parametrize("backend", ["agg", "module://toolkit"])
def test_show_draws_the_chart_in_a_window_of_the_toolkit(tmp_path: Path, backend: str) -> None:
    (tmp_path / "toolkit.py").write_text(TOOLKIT)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_plots import near\n"
        "from evalq.errors import SpecError\n"
        "from evalq.plots.scatter import ChartOptions, draw, show\n"
        "try:\n    show(draw(near(), ChartOptions()))\n"
        "except SpecError as error:\n    print(error)\n"
    )
    shown = tmp_path / "shown"
    environment = {**os.environ, "DISPLAY": ":99", "MPLBACKEND": backend, "SHOWN": str(shown)}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    if backend == "agg":
        assert "no window toolkit" in done.stdout
    else:
        assert (done.stdout, shown.read_text()) == ("", "1")

"""The chart: what is drawn and named, labels on nothing, same bytes from same records."""

import itertools
import math
import random
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from evalq.errors import NotComparable, SpecError
from evalq.plots import style
from evalq.plots.annotate import TAG
from evalq.plots.geometry import overlap_areas
from evalq.plots.page import quiet_glyphs
from evalq.plots.quantity import number
from evalq.plots.scatter import ChartOptions, draw
from evalq.plots.selection import select
from evalq.plots.ticks import scale
from evalq.results.record import AgainstReference, Failure, ResultRecord

WIKI2 = {
    "dataset": "wiki2",
    "protocol": "exllamav3",
    "eval_len": 2048,
    "eval_stride": 512,
    "tokens_scored": 40940,
}
LM_EVAL = {"dataset": "wiki2", "protocol": "lm-eval", "eval_len": 2048, "eval_stride": 2048, "unit": "word"}


def record(label: str, bpw: float | None, ppl: float | None, **more: Any) -> ResultRecord:
    comparison = more.pop("comparison", WIKI2)
    values = {
        "metrics_version": 1,
        "label": label,
        "group": label.split()[0] if label.split() else "",
        "status": "ok",
        "layer_bpw": bpw,
        "vram_gb": None if bpw is None else 0.05 + 0.0169 * bpw,
        "ppl": ppl,
        "tokens_scored": 40940,
        "engine": "fake",
        "protocol": comparison["protocol"],
        "comparison": comparison,
        "identity": dict(comparison),
    }
    return ResultRecord(**{**values, **more})


def failed(label: str, category: str = "oom_load") -> ResultRecord:
    error = Failure(category=category, message="out of memory", remedy="use a larger GPU")
    return record(label, None, None, status="failed", error=error)


def shootout(stderr: float | None = 0.3) -> list[ResultRecord]:
    rows = [
        ("BF16", 16.0, 25.06), ("GGUF Q8_0", 8.5, 25.09), ("GGUF Q6_K", 6.56, 25.21),
        ("GGUF Q5_K_M", 5.68, 25.83), ("GGUF Q4_K_M", 4.83, 27.35), ("GGUF Q3_K_M", 3.91, 31.7),
        ("GGUF Q2_K", 2.94, 51.3), ("EXL3 2.0", 2.04, 55.84), ("EXL3 2.5", 2.54, 38.2),
        ("EXL3 3.0", 3.04, 30.6), ("EXL3 3.5", 3.54, 27.9), ("EXL3 4.0", 4.04, 26.18),
        ("EXL3 5.0", 5.04, 25.41), ("EXL3 6.0", 6.04, 25.19), ("INT4 g128", 4.125, 40.59),
        ("FP8 dynamic", 8.03, 25.55), ("NVFP4", 4.5, 32.13),
    ]  # fmt: skip
    return [record(label, bpw, ppl, ppl_stderr=stderr) for label, bpw, ppl in rows]


def forty(seed: int) -> list[ResultRecord]:
    """Six curves that run into each other at the right, as those of real formats do."""
    noise = random.Random(seed)
    counts = {"EXL3": 8, "GGUF": 9, "AWQ": 5, "GPTQ": 6, "HQQ": 6, "QuIP#": 6}
    records = []
    for harm, (group, n) in zip((1.0, 1.15, 1.3, 1.4, 1.7, 1.05), counts.items(), strict=True):
        for i in range(n):
            bpw = 2 + 6 * i / (n - 1) + noise.uniform(-0.1, 0.1)
            ppl = 25 * (1 + 4.4 * harm * math.exp(-0.75 * bpw)) + noise.uniform(-0.1, 0.1)
            records.append(record(f"{group} {bpw:.2f}{'_hb8' if i % 3 == 0 else ''}", bpw, ppl))
    return records


def near(n: int = 5) -> list[ResultRecord]:
    points = [record(f"EXL3 v{i}", 4.0 + 0.001 * i, 26.18 + 0.0007 * i, ppl_stderr=0.3) for i in range(n)]
    return [*points, record("BF16", 16.0, 25.06)]


LAYOUTS: dict[str, tuple[list[ResultRecord], ChartOptions]] = {
    "shootout": (shootout(), ChartOptions(title="SmolLM2")),
    "dark vram": (shootout(), ChartOptions(x="vram", dark=True)),
    "without reference": (shootout(), ChartOptions(max_x=9, max_y=45)),
    "one broken": ([*shootout(), record("NVFP4 fused", 4.5, 19762.0, ppl_stderr=800.0)], ChartOptions()),
    "near identical": (near(), ChartOptions()),
    "twins": ([record("A one", 4.0, 26.18), record("B two", 4.0, 26.18)], ChartOptions()),
    "single": ([record("GGUF Q4_1", 5.0, 25.2, ppl_stderr=0.4)], ChartOptions()),
    "small": (shootout(), ChartOptions(width=5, height=3.5)),
    **{f"forty {seed}": (forty(seed), ChartOptions()) for seed in range(4)},
}


@cache
def chart(layout: str) -> Figure:
    return draw(*LAYOUTS[layout])


def texts(figure: Figure) -> list[str]:
    return [artist.get_text() for artist in figure.findobj(Text) if artist.get_text()]


def boxes_of(figure: Figure, artists: list[Artist]) -> np.ndarray:
    renderer = FigureCanvasAgg(figure).get_renderer()
    with quiet_glyphs():
        extents = [artist.get_window_extent(renderer) for artist in artists]
    return np.array([[e.x0, e.y0, e.x1, e.y1] for e in extents]).reshape(-1, 4)


def tags_of(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_label() == TAG]


def markers_of(figure: Figure) -> np.ndarray:
    """Squares round the markers, pixels."""
    [axes] = figure.axes
    lines = [line for line in axes.lines if line.get_marker() in style.MARKERS]
    centers = axes.transData.transform([(line.get_xdata()[0], line.get_ydata()[0]) for line in lines])
    radius = np.array([[line.get_markersize() / 2 * figure.dpi / 72] for line in lines])
    return np.concatenate([centers - radius, centers + radius], axis=1)


def pairs_that_overlap(boxes: np.ndarray) -> list[tuple[int, int]]:
    areas = overlap_areas(boxes, boxes)
    return [(i, j) for i, j in itertools.combinations(range(len(boxes)), 2) if areas[i, j] > 0]


def test_every_point_has_its_name_without_the_group_and_its_value() -> None:
    found = texts(draw(shootout(), ChartOptions()))
    for expected in ("4.0", "26.18", "Q4_K_M", "27.35", "g128", "40.59", "dynamic", "BF16", "25.06"):
        assert expected in found
    assert "EXL3 4.0" not in found
    assert found.count("EXL3") == 1  # the legend


def test_a_single_group_is_named_above_instead_of_a_legend() -> None:
    found = texts(draw([record("EXL3 4.0", 4.0, 26.2), record("EXL3 3.0", 3.0, 30.6)], ChartOptions()))
    assert "EXL3" not in found
    assert [text for text in found if text.startswith("EXL3 · WikiText-2 test")]


def test_header_says_what_is_compared_and_axes_their_units() -> None:
    found = texts(draw(shootout(), ChartOptions(title="My model")))
    assert "My model" in found
    line = "WikiText-2 test · exllamav3 protocol · windows of 2048 tokens, stride 512 · 40,940 tokens scored"
    assert line in found
    assert {"bits per weight (layers)", "perplexity per token"} <= set(found)
    assert "VRAM of layers + head (GiB)" in texts(draw(shootout(), ChartOptions(x="vram")))
    assert "loss" in texts(draw(shootout(), ChartOptions(y_label="loss")))


def test_lm_eval_is_drawn_per_word_with_the_error_carried_over() -> None:
    records = [
        record("A 1", 4.0, 5.0, word_ppl=8.0, ppl_stderr=0.05, comparison=LM_EVAL),
        record("B 2", 5.0, 5.0, comparison=LM_EVAL),
    ]
    chosen = select(records, ChartOptions())
    assert [point.y for point in chosen.points] == [8.0]
    # ln(8) is ln(5) times the tokens per word; so are their absolute errors.
    tokens_per_word = math.log(8) / math.log(5)
    above = math.exp(tokens_per_word * math.log(5.05)) - 8
    bar = chosen.points[0].bar
    assert bar is not None and bar[1] - 8 == pytest.approx(above, rel=0.01)
    found = texts(draw(records, ChartOptions()))
    assert "perplexity per word" in found
    assert "not drawn: B 2 (no perplexity per word)" in found


def test_failed_and_incomplete_models_are_named_under_the_axes() -> None:
    records = [
        *shootout(),
        failed("EXL3 1.5"),
        record("GGUF odd", 4.0, math.nan),
        record("AWQ x", None, 30.0),
        record("AWQ inf", 4.0, math.inf),
    ]
    line = (
        "not drawn: EXL3 1.5 (oom_load), GGUF odd (no perplexity), "
        "AWQ x (bits per weight unknown), AWQ inf (no perplexity)"
    )
    assert line in texts(draw(records, ChartOptions()))
    assert "AWQ" not in texts(draw(records, ChartOptions()))


def test_many_failures_take_three_lines_and_a_count() -> None:
    records = [*shootout(), *(failed(f"AWQ model_with_a_long_name {i}") for i in range(30))]
    found = texts(draw(records, ChartOptions()))
    lines = [text for text in found if "oom_load" in text]
    assert len(lines) == 3
    named = sum(line.count("(oom_load)") for line in lines)
    assert lines[-1].endswith(f"+{30 - named} more")


def test_models_beyond_the_limits_are_dropped_and_named() -> None:
    found = texts(draw(shootout(), ChartOptions(max_x=9, max_y=45)))
    note = "beyond the axes: BF16 (16.00 bpw, 25.06), GGUF Q2_K (2.94 bpw, 51.30), EXL3 2.0 (2.04 bpw, 55.84)"
    assert note in found
    assert "51.30" not in found
    assert "40.59" in found


def test_the_unquantized_model_is_a_line_also_when_its_point_is_beyond() -> None:
    for options, n_markers in ((ChartOptions(), 17), (ChartOptions(max_x=9), 16)):
        figure = draw(shootout(), options)
        [axes] = figure.axes
        across = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
        assert [list(line.get_ydata()) for line in across] == [[25.06, 25.06]]
        assert len(markers_of(figure)) == n_markers
        assert "BF16" in texts(figure)
    hidden = draw(shootout(), ChartOptions(max_x=9, max_y=25.06 - 1e-9 + 1))
    assert [list(line.get_ydata()) for line in hidden.axes[0].lines if list(line.get_xdata()) == [0, 1]]
    with pytest.raises(SpecError, match="nothing to draw"):
        draw(shootout(), ChartOptions(max_y=25.0))


def test_dotted_line_joins_a_group_in_order_of_x() -> None:
    figure = draw(
        [record("A 2", 5.0, 26.0), record("A 1", 3.0, 30.0), record("A 3", 4.0, 27.0)], ChartOptions()
    )
    [line] = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert list(line.get_xdata()) == [3.0, 4.0, 5.0]
    assert line.get_linestyle() == "--"


def test_error_bars_are_one_standard_error_and_say_so() -> None:
    records = [record("A 1", 4.0, 26.0, ppl_stderr=0.5, ppl_stderr_is_lower_bound=True)]
    figure = draw([*records, record("A 2", 5.0, 25.5, ppl_stderr=math.nan)], ChartOptions())
    bars = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [4.0, 4.0]]
    assert [list(bar.get_ydata()) for bar in bars] == [[25.5, 26.5]]
    assert "bars: ±1 standard error, a lower bound because windows overlap" in texts(figure)
    assert not [text for text in texts(draw(shootout(None), ChartOptions())) if text.startswith("bars")]


def test_logarithmic_only_when_perplexities_differ_by_more_than_eight() -> None:
    for largest, expected in ((199.0, "linear"), (201.0, "log")):
        records = [record("A 1", 4.0, 25.0), record("A 2", 2.0, largest)]
        assert draw(records, ChartOptions()).axes[0].get_yscale() == expected
    figure = draw([*shootout(), record("NVFP4 fused", 4.5, 19762.0)], ChartOptions())
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {"30", "100", "1000", "10,000"} <= set(labels)
    assert "19,762" in texts(figure)


@pytest.mark.parametrize("broken", [1e6, 1e100, 1.7e308])
def test_a_hopeless_model_is_named_and_does_not_flatten_the_others(broken: float) -> None:
    figure = draw([*shootout(), record("NVFP4 fused", 4.5, broken)], ChartOptions())
    assert figure.axes[0].get_yscale() == "linear"
    assert f"beyond the axes: NVFP4 fused (4.50 bpw, {number(broken)})" in texts(figure)
    asked_for = draw([*shootout(), record("NVFP4 fused", 4.5, 1e6)], ChartOptions(max_y=1e7))
    assert "1,000,000" in texts(asked_for) and asked_for.axes[0].get_yscale() == "log"


LARGEST = sys.float_info.max
ODD = [
    *((ppl, 1.0, 4.0) for ppl in (1.0, 1e12, 1e100, LARGEST, math.inf, math.nan, 0.0, -1.0)),
    *((25.0, error, 4.0) for error in (0.0, 1e300, LARGEST, math.inf, math.nan)),
    *((25.0, None, bpw) for bpw in (0.0, 1e12, LARGEST, math.inf)),
    (LARGEST, LARGEST, LARGEST),
    (1.0, LARGEST, 0.0),
]


@pytest.mark.parametrize(("ppl", "error", "bpw"), ODD)
def test_one_model_of_any_numbers_does_not_break_the_chart(
    ppl: float, error: float | None, bpw: float
) -> None:
    others = [record("BF16", 16.0, 25.06, ppl_stderr=0.3), record("GGUF Q8_0", 8.5, 25.09)]
    figure = draw([*others, record("Odd one", bpw, ppl, ppl_stderr=error)], ChartOptions())
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < 25.06 < high < 1e6
    drawn = len(markers_of(figure))
    named = [line for line in texts(figure) if "Odd one" in line]
    assert drawn + len(named) >= 3 and all(len(line) < 80 for line in named)


@pytest.mark.parametrize(("ppl", "bpw"), [(1e100, 4.0), (30.0, 1e300)])
def test_numbers_too_large_for_any_chart_say_what_can_be_drawn(ppl: float, bpw: float) -> None:
    with pytest.raises(SpecError, match=r"nothing to draw: A 1 .*perplexities to 1e\+12 and bpw to 1e\+06"):
        draw([record("A 1", bpw, ppl)], ChartOptions())


def test_a_reference_that_is_not_unquantized_is_said_and_has_the_line() -> None:
    def beside(label: str, **more: Any) -> AgainstReference:
        return AgainstReference(label=label, ln_ratio=0.1, ln_ratio_stderr=0.01, **more)

    q8 = record("GGUF Q8_0 $x$", 8.5, 25.09, ppl_stderr=0.3)
    q4 = record("GGUF Q4_K_M", 4.83, 27.35, ppl_stderr=0.3, against_reference=beside(q8.label))
    figure = draw([q8, q4], ChartOptions())
    assert "reference: GGUF Q8_0 $x$, which is not an unquantized model" in texts(figure)
    across = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]]
    assert [list(line.get_ydata()) for line in across] == [[25.09, 25.09]]

    bf16 = record("BF16", 16.0, 25.06)
    q4 = record("GGUF Q4_K_M", 4.83, 27.35, against_reference=beside("BF16"))
    assert not [line for line in texts(draw([bf16, q4], ChartOptions())) if line.startswith("reference")]
    # Made out of a quantized one, as its record says: 16 bits per weight alone mean nothing.
    q4 = q4.model_copy(update={"against_reference": beside("BF16", quantized=True)})
    assert "reference: BF16, which is not an unquantized model" in texts(draw([bf16, q4], ChartOptions()))


@pytest.mark.parametrize("low", [1.0, 5.43, 25.0, 900.0])
@pytest.mark.parametrize("factor", [1.0, 1.0001, 1.3, 9.0, 1e3, 1e12])
def test_ticks_are_plain_distinct_and_inside(low: float, factor: float) -> None:
    one = scale([low, low * factor], factor > 8, margins=(0.14, 0.12), smallest=0.01, n_ticks=7)
    assert one.low < low <= low * factor < one.high
    assert 2 <= len(one.ticks) <= 11
    assert len(set(one.labels)) == len(one.labels)
    for tick, label in zip(one.ticks, one.labels, strict=True):
        assert one.low <= tick <= one.high
        assert float(label.replace(",", "")) == pytest.approx(tick, rel=1e-6, abs=1e-9)


def test_numbers_keep_what_tells_models_apart() -> None:
    assert [number(v) for v in (5.4, 25.0649, 999.994, 1234.5, 19762.0, 3.2e9)] == [
        "5.40", "25.06", "999.99", "1234", "19,762", "3.2e+09",
    ]  # fmt: skip


def test_records_that_measure_different_things_are_refused() -> None:
    other = record("GGUF Q4", 4.5, 27.0, comparison={**WIKI2, "eval_stride": 2048})
    with pytest.raises(NotComparable, match="eval_stride is 512 and 2048"):
        draw([record("EXL3 4", 4.0, 26.0), other], ChartOptions())


def test_nothing_to_draw_says_why() -> None:
    with pytest.raises(SpecError, match="nothing to draw"):
        draw([], ChartOptions())
    with pytest.raises(SpecError, match=r"nothing to draw: A 1 \(oom_load\)"):
        draw([failed("A 1")], ChartOptions())
    with pytest.raises(SpecError, match="raise max_x or max_y"):
        draw([record("A 1", 4.0, 26.0)], ChartOptions(max_x=2))


@pytest.mark.parametrize(
    "wrong", [{"x": "bits"}, {"max_x": 0}, {"max_y": math.nan}, {"width": 1}, {"height": math.inf}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        ChartOptions(**wrong)

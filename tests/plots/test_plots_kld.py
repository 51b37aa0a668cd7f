"""The chart of KL divergence: intervals, floors, and what is never on its axis."""

import math
from typing import Any

import pytest
from matplotlib import colors
from matplotlib.figure import Figure
from result_records import diverging
from test_plots import boxes_of, failed, markers_of, pairs_that_overlap, record, tags_of, texts

from evalq.errors import SpecError
from evalq.plots import style
from evalq.plots.quantity import kld_number
from evalq.plots.scatter import ChartOptions, draw
from evalq.plots.ticks import scale
from evalq.results.estimate import Estimate
from evalq.results.record import ResultRecord

ON_KLD = ChartOptions(y="kld")
BOUND = {"kld_bound": Estimate(value=0.02, stderr=0.001, low=0.018, high=0.022)}


def beside(label: str, engine: str, bpw: float, kld: float | None, **more: Any) -> ResultRecord:
    """A model beside the reference "BF16", its interval a factor of 1.2 to both sides."""
    found = dict(more.pop("metrics", {}))
    if kld is not None:
        found["kld"] = Estimate(value=kld, stderr=0.08 * kld, low=kld / 1.2, high=kld * 1.2)
    identity = {"engine": engine, "forward": engine, "options": more.pop("options", {})}
    against = diverging("BF16", None, metrics=found, quantized=more.pop("quantized", None))
    return record(label, bpw, 26.0, identity=identity, against_reference=against, **more)


REFERENCE = record("BF16", 16.0, 25.06, identity={"forward": "hf", "engine": "hf"}, is_reference=True)
IN_VLLM = beside("BF16 vLLM", "vllm", 16.0, 0.00088)
NOISE = beside("BF16 noise floor", "hf", 16.0, 0.00021, options={"layer_noise": 2**-9})
EIGHT = [
    REFERENCE, NOISE, IN_VLLM,
    beside("INT4 g128", "vllm", 4.25, 0.061), beside("FP8 dynamic", "vllm", 8.03, 0.0052),
    beside("FP8 block", "vllm", 8.06, 0.00081), beside("NVFP4", "vllm", 4.5, 0.083),
    beside("INT4 hf", "hf", 4.3, 0.07), beside("GGUF Q8_0", "gguf", 8.5, 0.0011),
    beside("GGUF Q4_K_M", "gguf", 4.83, 0.028), beside("GGUF Q2_K", "gguf", 2.94, 0.55),
]  # fmt: skip
FIFTEEN = [
    *EIGHT,
    beside("F16 GGUF", "gguf", 16.0, 0.00042),
    *(
        beside(f"EXL3 {b}", "exl3", b + 0.04, 1.9 * math.exp(-1.1 * b))
        for b in (2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
    ),
]


def dashed(figure: Figure) -> list[float]:
    """Heights of the dashed lines across the chart."""
    across = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]]
    return sorted(float(line.get_ydata()[0]) for line in across if line.get_linestyle() == "--")


def hollow(figure: Figure, dark: bool = False) -> list[float]:
    paper = style.theme(dark).paper
    markers = [line for line in figure.axes[0].lines if line.get_marker() in style.MARKERS]
    return [
        float(line.get_ydata()[0]) for line in markers if colors.to_hex(line.get_markerfacecolor()) == paper
    ]


@pytest.mark.parametrize("dark", [False, True])
def test_points_are_means_with_their_intervals_and_the_reference_is_named(dark: bool) -> None:
    figure = draw(EIGHT, ChartOptions(y="kld", dark=dark))
    [axes] = figure.axes
    drawn = [line for line in axes.lines if line.get_marker() in style.MARKERS]
    assert sorted(float(line.get_ydata()[0]) for line in drawn) == sorted(
        [0.061, 0.0052, 0.00081, 0.083, 0.07, 0.0011, 0.028, 0.55]
    )
    bars = [list(line.get_ydata()) for line in axes.lines if list(line.get_xdata()) == [4.5, 4.5]]
    assert bars == [pytest.approx([0.083 / 1.2, 0.083 * 1.2])]
    found = texts(figure)
    assert "KL divergence against bits per weight" in found and "bars: 95% intervals" in found
    assert "mean KL divergence from BF16 (nats per token)" in found
    assert [text for text in found if text.endswith("reference BF16 in hf")]
    assert "0.0830" in found and not [text for text in found if "standard error" in text]


def test_floors_are_dashed_lines_and_what_is_at_them_is_hollow() -> None:
    figure = draw(EIGHT, ON_KLD)
    assert dashed(figure) == [0.00021, 0.00088]
    found = texts(figure)
    assert "floor: vllm (BF16 vLLM) 0.000880" in found and "floor: hf (BF16 noise floor) 0.000210" in found
    assert "floor unknown: gguf" in found
    assert hollow(figure) == [0.00081] and hollow(draw(EIGHT, ChartOptions(y="kld", dark=True)), True) == [
        0.00081
    ]
    assert [text for text in found if text.startswith("hollow: at or below the engine's floor")]
    without = draw([r for r in EIGHT if r not in (IN_VLLM, NOISE)], ON_KLD)
    assert dashed(without) == [] and hollow(without) == []
    assert "floor unknown: vllm, hf, gguf" in texts(without)
    assert not [text for text in texts(without) if text.startswith("hollow")]


def test_a_floor_has_the_colour_of_the_only_series_of_its_engine() -> None:
    figure = draw(FIFTEEN, ON_KLD)
    lines = {float(line.get_ydata()[0]): line for line in figure.axes[0].lines}
    assert lines[0.00042].get_color() == lines[0.0011].get_color()
    assert lines[0.00088].get_color() == style.LIGHT.muted


def test_a_floor_far_below_the_points_is_named_and_leaves_them_their_room() -> None:
    figure = draw([REFERENCE, beside("F16", "gguf", 16.0, 1e-9), beside("Q4", "gguf", 4.5, 0.02)], ON_KLD)
    assert dashed(figure) == [] and "floors far below the axes: gguf (F16) 1.0e-9" in texts(figure)
    assert figure.axes[0].get_ylim()[0] > 0.01


def test_a_lower_bound_is_never_on_the_axis() -> None:
    served = beside("Served", "server", 4.5, None, metrics=BOUND)
    figure = draw([*EIGHT, served], ON_KLD)
    assert len(markers_of(figure)) == 8
    assert "not drawn: Served (a lower bound of KLD only)" in texts(figure)
    assert not [line for line in figure.axes[0].lines if 0.02 in list(line.get_ydata())]
    with pytest.raises(SpecError, match=r"nothing to draw: Served \(a lower bound of KLD only\)"):
        draw([REFERENCE, served], ON_KLD)


@pytest.mark.parametrize("kld", [0.0, -1e-9, math.nan, math.inf])
def test_what_has_no_place_on_the_axis_is_named(kld: float) -> None:
    odd = beside("Odd", "hf", 8.0, 0.1)
    assert odd.against_reference is not None
    against = odd.against_reference.model_copy(
        update={"metrics": odd.against_reference.metrics | {"kld": Estimate(value=kld)}}
    )
    records = [
        *EIGHT,
        odd.model_copy(update={"against_reference": against}),
        failed("GGUF Q5"),
        beside("No", "hf", 4, None),
    ]
    line = "not drawn: Odd (no KLD above 0), GGUF Q5 (oom_load), No (no KLD)"
    assert line in texts(draw(records, ON_KLD))


@pytest.mark.parametrize(("largest", "kind"), [(0.099, "linear"), (0.101, "log")])
def test_logarithmic_from_a_decade(largest: float, kind: str) -> None:
    records = [REFERENCE, beside("A 1", "hf", 8.0, 0.01), beside("A 2", "hf", 4.0, largest)]
    assert draw(records, ON_KLD).axes[0].get_yscale() == kind


def test_models_beyond_the_limits_are_named_with_their_divergence() -> None:
    figure = draw(EIGHT, ChartOptions(y="kld", max_y=0.5))
    assert "beyond the axes: GGUF Q2_K (2.94 bpw, 0.550)" in texts(figure)
    assert "VRAM of layers + head (GiB)" in texts(draw(EIGHT, ChartOptions(y="kld", x="vram")))


@pytest.mark.parametrize("size", [(8.0, 5.2), (5.0, 3.5)])
@pytest.mark.parametrize("records", [EIGHT[:5], EIGHT, FIFTEEN], ids=["2", "8", "15"])
def test_labels_overlap_no_label_and_no_marker(
    records: list[ResultRecord], size: tuple[float, float]
) -> None:
    figure = draw(records, ChartOptions(y="kld", width=size[0], height=size[1]))
    tags = boxes_of(figure, tags_of(figure))
    n_points = len(markers_of(figure))
    assert len(tags) == 2 * n_points + len(dashed(figure))
    own = {(2 * i, 2 * i + 1) for i in range(n_points)}
    assert set(pairs_that_overlap(tags)) <= own
    for square in markers_of(figure):
        inside = (tags[:, :2] < square[2:] - 1).all(1) & (tags[:, 2:] > square[:2] + 1).all(1)
        assert not inside.any()


def test_a_long_reference_leaves_the_name_of_the_axis_whole() -> None:
    long = "Llama-3.1-8B-Instruct of somebody with a very long name indeed"
    records = [
        r.model_copy(update={"against_reference": r.against_reference.model_copy(update={"label": long})})
        for r in EIGHT[3:]
        if r.against_reference is not None
    ]
    found = texts(draw(records, ChartOptions(y="kld", width=5, height=3.5)))
    assert "mean KLD (nats per token)" in found or "mean KL divergence (nats per token)" in found


def test_divergences_keep_what_tells_models_apart() -> None:
    values = (0.0, 3.14e-7, 0.0000123, 0.000312, 0.00426, 0.0426, 0.426, 4.26, 42.6)
    assert [kld_number(v) for v in values] == [
        "0", "3.1e-7", "0.0000123", "0.000312", "0.00426", "0.0426", "0.426", "4.26", "42.6",
    ]  # fmt: skip


@pytest.mark.parametrize("low", [1e-12, 3e-7, 0.00012, 0.05])
@pytest.mark.parametrize("factor", [1.0, 1.3, 30.0, 1e5])
def test_ticks_of_small_numbers_are_distinct_and_true(low: float, factor: float) -> None:
    one = scale([low, low * factor], factor > 10, margins=(0.14, 0.12), smallest=0.01, n_ticks=7)
    assert len(one.ticks) >= 2 and len(set(one.labels)) == len(one.labels)
    for tick, label in zip(one.ticks, one.labels, strict=True):
        assert float(label.replace(",", "")) == pytest.approx(tick, rel=1e-6, abs=1e-16)


def test_another_quantity_is_refused() -> None:
    with pytest.raises(SpecError, match='y is "bits"'):
        ChartOptions(y="bits")  # type: ignore[arg-type]

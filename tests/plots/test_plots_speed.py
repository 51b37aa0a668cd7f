"""Quality against speed: where points stand, which are on the Pareto frontier, and who has no speed."""

from typing import Any, NamedTuple

import pytest
from matplotlib.figure import Figure
from result_records import diverging
from test_plots import boxes_of, pairs_that_overlap, record, tags_of, texts

from evalq.errors import SpecError
from evalq.plots.across import frontier
from evalq.plots.scatter import ChartOptions, draw
from evalq.plots.style import RING_SIZE_PT
from evalq.results.record import ResultRecord
from evalq.results.speed import Repeated, Speed, SpeedSettings

SIZES = SpeedSettings(batch=32, windows=128)


def repeated(median: float) -> Repeated:
    return Repeated(median=median, low=0.95 * median, high=1.02 * median, repeats=3)


def timed(
    label: str, bpw: float, ppl: float, one: float, batch: float | None = None, **more: Any
) -> ResultRecord:
    speed = Speed(
        generation=repeated(one),
        generation_batch=None if batch is None else repeated(batch),
        settings=SIZES,
        device="cuda:0",
    )
    return record(label, bpw, ppl, speed=speed, **more)


MODELS = [
    timed("BF16", 16.0, 25.06, 120.0, 3100.0),
    timed("FP8 dynamic", 8.03, 25.75, 190.0, 4900.0),
    timed("INT8 W8A16", 8.06, 25.19, 170.0, 4000.0),
    timed("INT4 g128", 4.25, 40.59, 260.0, 4700.0),
    timed("INT4 asym", 4.3, 35.05, 265.0, 4800.0),
    timed("NVFP4 A16", 4.5, 32.1, 240.0, 4400.0),
    timed("EXL3 4.0", 4.04, 26.18, 230.0, 2500.0),
    timed("EXL3 2.0", 2.04, 55.84, 275.0, 2600.0),
    timed("GGUF Q8_0", 8.5, 25.1, 160.0, 900.0),
    timed("GGUF Q4_1", 5.0, 25.9, 205.0, 1000.0),
]


class Place(NamedTuple):
    x: float
    y: float


def rings(figure: Figure) -> set[tuple[float, float]]:
    found: set[tuple[float, float]] = set()
    for line in figure.axes[0].lines:
        if line.get_markersize() == RING_SIZE_PT and line.get_marker() == "o":
            found |= set(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))
    return found


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(1, 1)], [(1, 1)]),
        ([(1, 1), (2, 2), (3, 3)], [(3, 3), (2, 2), (1, 1)]),
        ([(1, 3), (2, 2), (3, 1)], [(3, 1)]),
        ([(2, 5), (2, 4), (1, 4), (3, 6)], [(3, 6), (2, 4)]),
        ([(2, 4), (2, 4), (1, 3)], [(2, 4), (2, 4), (1, 3)]),
        ([], []),
    ],
)
def test_frontier_is_what_nothing_beats(
    points: list[tuple[float, float]], best: list[tuple[float, float]]
) -> None:
    assert frontier([Place(*point) for point in points]) == [Place(*point) for point in best]


@pytest.mark.parametrize("dark", [False, True])
def test_perplexity_against_speed(dark: bool) -> None:
    figure = draw(MODELS, ChartOptions(x="speed", dark=dark))
    assert rings(figure) == {
        (275.0, 55.84), (265.0, 35.05), (240.0, 32.1), (230.0, 26.18), (205.0, 25.9), (190.0, 25.75),
        (170.0, 25.19), (160.0, 25.1), (120.0, 25.06),
    }  # fmt: skip
    found = texts(figure)
    assert "Perplexity against speed of generating" in found
    assert "new tokens per second, one prompt at a time (128 after 512)" in found
    assert any(line.startswith("ringed: the Pareto frontier") for line in found)
    assert "better ↘" in found and "↙ better" not in found
    spreads = [
        list(line.get_xdata()) for line in figure.axes[0].lines if list(line.get_ydata()) == [25.19] * 2
    ]
    assert pytest.approx([0.95 * 170, 1.02 * 170]) in spreads
    assert not any(line.get_linestyle() not in ("-", "None") for line in figure.axes[0].lines)


def test_batch_of_one_spread_over_a_decade_is_logarithmic() -> None:
    models = [*MODELS, timed("HF bf16", 16.0, 25.07, 30.0, 300.0)]
    figure = draw(models, ChartOptions(x="speed-batch"))
    assert figure.axes[0].get_xscale() == "log"
    assert "new tokens per second, 32 prompts at once (128 after 512)" in texts(figure)
    assert (4900.0, 25.75) in rings(figure) and (2500.0, 26.18) not in rings(figure)


def test_divergence_against_speed() -> None:
    reference = timed("BF16", 16.0, 25.06, 120.0, is_reference=True)
    others = [
        timed(f"Q{bits}", bits, 26.0, 400.0 - 20 * bits, against_reference=diverging("BF16", 1.5**-bits))
        for bits in (2, 3, 4, 8)
    ]
    figure = draw([reference, *others], ChartOptions(x="speed", y="kld"))
    assert len(rings(figure)) == 4
    assert "KL divergence against speed of generating" in texts(figure)


def test_models_without_speed_are_named() -> None:
    without = record("INT4 no", 4.0, 30.0)
    no_batch = timed("INT4 one", 4.0, 30.0, 200.0)
    found = " ".join(texts(draw([*MODELS, without], ChartOptions(x="speed"))))
    assert "INT4 no (speed not measured)" in found
    found = " ".join(texts(draw([*MODELS, no_batch], ChartOptions(x="speed-batch"))))
    assert "INT4 one (speed not measured)" in found
    with pytest.raises(SpecError, match="speed not measured"):
        draw([without], ChartOptions(x="speed"))


def test_limits_are_in_tokens_per_second() -> None:
    found = " ".join(texts(draw(MODELS, ChartOptions(x="speed", max_x=250.0))))
    assert "EXL3 2.0 (275.00 tok/s, 55.84)" in found


def test_labels_do_not_lie_on_each_other() -> None:
    figure = draw(MODELS, ChartOptions(x="speed"))
    # Name and value are one label: their lines may share the height of a descender.
    pairs = pairs_that_overlap(boxes_of(figure, tags_of(figure)))
    assert [(one, other) for one, other in pairs if one // 2 != other // 2] == []

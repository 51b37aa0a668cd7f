"""The chart by position: what is drawn, what is only named, and that it fits the page."""

import math
from pathlib import Path

import numpy as np
import pytest
from result_records import failed, record

from evalq.errors import SpecError
from evalq.plots import position
from evalq.plots.output import save
from evalq.plots.position import PositionChart
from evalq.results.estimate import Estimate
from evalq.results.record import AgainstReference, AtPosition, ResultRecord

STARTS = (0, 1024, 2048, 4096)


def at(start: int, **values: tuple[float, float]) -> AtPosition:
    metrics = {
        name: Estimate(value=value, stderr=half / 2, low=value - half, high=value + half)
        for name, (value, half) in values.items()
    }
    return AtPosition(start=start, stop=max(1024, 2 * start), tokens=1000, metrics=metrics)


def model(label: str, loss: float | None, kld: float | None = None, **more) -> ResultRecord:
    """A model whose loss in nats against the reference grows with the position; None for the reference."""
    worse = loss or 0.0
    own = tuple(
        at(start, ppl=(16.0 / (i + 1) ** 0.3 * math.exp(worse * (1 + i)), 1.0))
        for i, start in enumerate(STARTS)
    )
    against = None
    if loss is not None:
        buckets = tuple(
            at(
                start,
                ln_ratio=(worse * (1 + i), 0.004),
                **({} if kld is None else {"kld": (kld * (1 + i), 0.1 * kld)}),
            )
            for i, start in enumerate(STARTS)
        )
        metrics = {"ln_ratio": Estimate(value=worse, stderr=0.002, low=worse - 0.004, high=worse + 0.004)}
        if kld is not None:
            metrics["kld"] = Estimate(value=kld, stderr=0.1 * kld, low=0.9 * kld, high=1.1 * kld)
        against = AgainstReference(label="BF16", metrics=metrics, by_position=buckets)
    return record(label, by_position=own, against_reference=against, is_reference=loss is None, **more)


def run() -> list[ResultRecord]:
    losses = {"Q8_0": 0.001, "Q4_0": 0.03, "INT4 g128": 0.02, "FP8": 0.004, "NVFP4": 0.045}
    models = [
        model(label, loss, 3 * loss, engine="gguf" if label.startswith("Q") else "hf")
        for label, loss in losses.items()
    ]
    floor = model("F16 gguf", 0.0004, 0.0009, layer_bpw=16.0, engine="gguf")
    return [model("BF16", None, layer_bpw=16.0), *models, floor]


def lines_of(figure, panel: int) -> list[np.ndarray]:
    """Data of the lines that join points, one a model."""
    found = [line for line in figure.axes[panel].lines if line.get_linestyle() != "None"]
    return [
        np.asarray(line.get_ydata(), dtype=float) for line in found if len(line.get_xdata()) == len(STARTS)
    ]


def texts(figure) -> str:
    return "\n".join(artist.get_text() for artist in figure.findobj() if hasattr(artist, "get_text"))


def test_perplexities_above_and_their_change_below() -> None:
    figure = position.draw(run(), PositionChart())
    assert len(figure.axes) == 2
    own, change = lines_of(figure, 0), lines_of(figure, 1)
    assert len(own) == 7 and len(change) == 6, "the reference has no change"
    assert own[0] == pytest.approx([16.0 / (i + 1) ** 0.3 for i in range(4)])
    assert change[1] == pytest.approx([100 * (math.exp(0.03 * (1 + i)) - 1) for i in range(4)])
    assert "change vs BF16 (%)" in texts(figure) and "95% intervals" in texts(figure)


def test_models_stand_beside_each_other_within_a_step() -> None:
    figure = position.draw(run(), PositionChart())
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_marker() not in ("None", "")]
        x = np.array([line.get_xdata() for line in lines])
        assert np.array_equal(np.floor(x), np.tile(np.arange(4.0), (len(x), 1)))
        assert np.all(np.diff(np.sort(x, axis=0), axis=0) > 0.05)
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines)


@pytest.mark.parametrize("dark", [False, True])
def test_kl_divergence_with_its_floor(dark: bool, tmp_path: Path) -> None:
    figure = position.draw(run(), PositionChart(y="kld", dark=dark))
    assert len(figure.axes) == 1 and len(lines_of(figure, 0)) == 6
    assert figure.axes[0].get_yscale() == "log"
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1 and np.asarray(dashed[0].get_ydata())[0] == pytest.approx(0.0009)
    assert "the floor of its engine (F16 gguf)" in texts(figure)
    save(figure, tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").stat().st_size > 5000


def test_the_axis_holds_all_values_and_ordinary_bars() -> None:
    for options in (PositionChart(), PositionChart(y="kld")):
        for axes in position.draw(run(), options).axes:
            low, high = axes.get_ylim()
            ends = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
            assert low <= ends.min() and ends.max() <= high


def test_who_has_nothing_by_position_is_named() -> None:
    figure = position.draw([*run(), failed("broken"), record("short")], PositionChart())
    assert "not drawn: broken, short" in texts(figure)


def test_nothing_by_position_is_an_error_with_a_remedy() -> None:
    with pytest.raises(SpecError, match="windows longer than 1024.*--protocol long"):
        position.draw([record("short"), failed("broken")], PositionChart())
    with pytest.raises(SpecError, match="no model has a KL divergence"):
        position.draw([model("BF16", None), model("Q4_0", 0.1)], PositionChart(y="kld"))


def test_extreme_values_do_not_stop_the_drawing() -> None:
    broken = model("broken", 30.0)
    wild = broken.model_copy(
        update={"by_position": (at(0, ppl=(1e300, 1e299)), at(1024, ppl=(50.0, math.inf)))}
    )
    figure = position.draw([model("BF16", None), wild, model("Q4_0", 0.01)], PositionChart())
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < high < 1e13

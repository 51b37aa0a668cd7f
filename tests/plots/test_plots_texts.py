"""The chart of means over several texts, and what is not on it."""

import math

import pytest
from matplotlib.figure import Figure
from test_plots import failed, record, texts
from test_plots_kld import dashed

from evalq.errors import SpecError
from evalq.plots.over_texts import ratio_number
from evalq.plots.scatter import ChartOptions, draw_means
from evalq.results.estimate import Estimate
from evalq.results.record import AgainstReference, ResultRecord
from evalq.results.texts import ByText, by_text

NAMES = ("wiki2", "code")


def model(
    label: str, bpw: float, ratios: tuple[float, ...] = (), klds: tuple[float, ...] = (), noise: float = 0.0
) -> list[ResultRecord]:
    """A model on both texts; without ratios, the reference."""
    found = []
    for i, name in enumerate(NAMES):
        against = None
        if ratios:
            metrics = {"ln_ratio": Estimate(value=ratios[i], stderr=0.01, low=-1.0, high=1.0)}
            if klds:
                metrics["kld"] = Estimate(
                    value=klds[i], stderr=0.1 * klds[i], low=0.8 * klds[i], high=1.25 * klds[i]
                )
            against = AgainstReference(label="BF16", quantized=False, metrics=metrics)
        one = record(
            label,
            bpw,
            20.0 + i,
            against_reference=against,
            is_reference=not ratios,
            identity={"engine": "hf", "forward": "hf", "options": {"layer_noise": noise} if noise else {}},
        )
        found.append(one.model_copy(update={"comparison": one.comparison | {"dataset": name}}))
    return found


def over(*models: list[ResultRecord]) -> ByText:
    found = by_text([one for records in models for one in records])
    assert found is not None
    return found


def heights(figure: Figure) -> list[float]:
    """Of the points."""
    return sorted(float(line.get_ydata()[0]) for line in figure.axes[0].lines if len(line.get_xdata()) == 1)


REFERENCE = model("BF16", 16.0)
NOISE = model("BF16 noise floor", 16.0, (0.0, 0.0), (2e-4, 4e-4), noise=2**-9)
INT4 = model("INT4", 4.0, (0.02, 0.06), (0.02, 0.04))
INT8 = model("INT8", 8.0, (0.001, 0.003), (1e-4, 3e-4))


def test_points_are_the_geometric_means_of_the_ratios() -> None:
    figure = draw_means(over(REFERENCE, INT4, INT8), ChartOptions())
    assert heights(figure) == pytest.approx([1.0, math.exp(0.002), math.exp(0.04)])
    found = texts(figure)
    assert "Ratio of perplexities per token, mean of 2 texts, against bits per weight" in found
    assert any("mean of 2 texts, each alike: wiki2, code" in text for text in found)
    assert any("geometric mean" in text and "BF16" in text for text in found)


def test_the_mean_divergence_has_its_floor_and_no_point_for_the_reference() -> None:
    figure = draw_means(over(REFERENCE, NOISE, INT4, INT8), ChartOptions(y="kld"))
    assert heights(figure) == pytest.approx([2e-4, 0.03])
    assert dashed(figure) == pytest.approx([3e-4])
    found = texts(figure)
    assert "KL divergence, mean of 2 texts (nats per token), against bits per weight" in found
    assert any(text.startswith("hollow: at or below") for text in found), "INT8 is below the floor"
    assert not any("BF16 (" in text for text in found if text.startswith("not drawn"))


def test_a_model_without_a_mean_is_named_and_not_drawn() -> None:
    (good, _), comparison = INT8, REFERENCE[1].comparison
    bad = failed("INT8").model_copy(update={"comparison": comparison})
    figure = draw_means(over(REFERENCE, INT4, [good, bad]), ChartOptions())
    assert len(heights(figure)) == 2
    assert any("INT8 (it failed on code)" in text for text in texts(figure))


def test_a_lower_bound_on_one_text_makes_no_mean_divergence() -> None:
    bound = INT8[1].against_reference
    assert bound is not None
    metrics = {"ln_ratio": bound.metrics["ln_ratio"], "kld_bound": bound.metrics["kld"]}
    partly = [
        INT8[0],
        INT8[1].model_copy(update={"against_reference": AgainstReference(label="BF16", metrics=metrics)}),
    ]
    figure = draw_means(over(REFERENCE, INT4, partly), ChartOptions(y="kld"))
    assert len(heights(figure)) == 1
    assert any("INT8 (no KLD on every text)" in text for text in texts(figure))


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(SpecError, match="nothing to draw"):
        draw_means(over(REFERENCE, model("INT4", 4.0, (0.02, 0.06))), ChartOptions(y="kld"))


def test_ratios_keep_the_digits_that_tell_models_apart() -> None:
    assert [ratio_number(r) for r in (1.0, 1.0274, 9.9994, 12.0, 4321.0)] == [
        "1.000", "1.027", "9.999", "12.00", "4321",
    ]  # fmt: skip

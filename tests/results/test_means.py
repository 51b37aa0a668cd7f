"""Means over texts beside values worked out by hand, and where there is none."""

import math

import pytest
from result_records import COMPARISON, failed, record

from evalq.results.estimate import Estimate
from evalq.results.means import degrees_of_freedom, mean_of, mean_over_texts
from evalq.results.record import AgainstReference, ResultRecord
from evalq.results.statistics import LOG, PLAIN, Scale, interval, t_quantile
from evalq.results.texts import by_text, text_names


def figure(value: float, stderr: float | None, degrees: int = 9, scale: Scale = PLAIN) -> Estimate:
    low, high = interval(value, stderr, t_quantile(degrees), scale) or (None, None)
    return Estimate(value=value, stderr=stderr, low=low, high=high)


def on(
    dataset: str, label: str, ln_ratio: Estimate | None, reference: str = "BF16", **metrics: Estimate
) -> ResultRecord:
    """A record on a text; the reference itself without a ratio."""
    against = None
    if ln_ratio is not None:
        against = AgainstReference(label=reference, metrics={"ln_ratio": ln_ratio, **metrics})
    comparison = {"dataset": dataset}
    is_reference = ln_ratio is None
    return record(label, comparison=comparison, against_reference=against, is_reference=is_reference)


NAMES = ("wiki2", "code", "chat")
RATIOS = (figure(0.01, 0.003, 9), figure(0.02, 0.004, 19), figure(0.06, 0.012, 4))


def test_the_mean_is_that_worked_out_by_hand() -> None:
    records = [on(name, "INT4", ratio) for name, ratio in zip(NAMES, RATIOS, strict=True)]
    found = mean_over_texts(records, NAMES)
    assert found.ln_ratio is not None and found.ratio is not None and found.why_not == ""
    assert found.ln_ratio.value == pytest.approx(0.03)
    # sqrt(9 + 16 + 144) / 3 thousandths.
    assert found.ln_ratio.stderr == pytest.approx(0.013 / 3)
    # Degrees of freedom 169**2 / (3**4 / 9 + 4**4 / 19 + 12**4 / 4) = 5.49, t of 5 is 2.570582.
    assert found.ln_ratio.high == pytest.approx(0.03 + 2.570582 * 0.013 / 3, rel=1e-6)
    assert found.ratio.value == pytest.approx(1.0304545)
    assert found.ratio.stderr == pytest.approx(1.0304545 * 0.013 / 3)
    assert found.ratio.low == pytest.approx(math.exp(0.03 - 2.570582 * 0.013 / 3))


def test_each_text_counts_alike_however_long_it_is() -> None:
    records = [on("a", "INT4", figure(0.0, 0.001)), on("b", "INT4", figure(0.2, 0.001))]
    records[1] = records[1].model_copy(update={"tokens_scored": 10**6})
    found = mean_over_texts(records, ("a", "b"))
    assert found.ratio is not None and found.ratio.value == pytest.approx(math.exp(0.1))


def test_the_mean_kld_has_an_interval_above_zero() -> None:
    klds = [figure(value, value / 3, 5, LOG) for value in (0.001, 0.01, 0.1)]
    records = [on(name, "INT4", RATIOS[0], kld=kld) for name, kld in zip(NAMES, klds, strict=True)]
    found = mean_over_texts(records, NAMES).kld
    assert found is not None and found.value == pytest.approx(0.037)
    assert found.stderr == pytest.approx(math.sqrt(0.001**2 + 0.01**2 + 0.1**2) / 9)
    assert found.low is not None and 0 < found.low < 0.037
    missing = [*records[:2], on("chat", "INT4", RATIOS[0], kld_bound=klds[2])]
    assert mean_over_texts(missing, NAMES).kld is None, "a lower bound is another quantity"


@pytest.mark.parametrize("degrees", [1, 2, 7, 19, 400])
@pytest.mark.parametrize("scale", [PLAIN, LOG])
def test_degrees_of_freedom_are_read_back_from_an_interval(degrees: int, scale: Scale) -> None:
    assert degrees_of_freedom(figure(0.03, 0.002, degrees, scale), scale) == degrees


def test_one_text_without_an_error_leaves_the_mean_without() -> None:
    found = mean_of([figure(0.01, 0.003), figure(0.03, None)])
    assert (found.value, found.stderr, found.interval) == (0.02, None, None)


def test_models_that_are_the_same_on_every_token_have_a_ratio_of_one() -> None:
    found = mean_of([figure(0.0, 0.0), figure(0.0, 0.0)])
    assert (found.value, found.stderr, found.interval) == (0.0, 0.0, (0.0, 0.0))


def test_no_mean_is_over_fewer_texts_than_another() -> None:
    bad = failed("INT4").model_copy(update={"comparison": COMPARISON | {"dataset": "chat"}})
    found = mean_over_texts([on("wiki2", "INT4", RATIOS[0]), on("code", "INT4", RATIOS[1]), bad], NAMES)
    assert found.ln_ratio is None and found.kld is None and found.why_not == "it failed on chat"


def test_ratios_to_different_references_have_no_mean() -> None:
    records = [on("a", "INT4", RATIOS[0]), on("b", "INT4", RATIOS[1], reference="Q8_0")]
    found = mean_over_texts(records, ("a", "b"))
    assert found.ln_ratio is None and found.why_not == "the texts have different references: BF16, Q8_0"
    records[1] = on("b", "INT4", None)
    assert mean_over_texts(records, ("a", "b")).why_not == "the texts have different references: BF16, INT4"


def test_texts_of_one_name_are_told_apart_by_what_differs() -> None:
    one = {"dataset": "wiki2", "protocol": "exllamav3", "eval_len": 2048, "text_sha256": "a" * 64}
    assert text_names([one, one | {"dataset": "code"}]) == ["wiki2", "code"]
    assert text_names([one, one | {"protocol": "gptq"}]) == ["wiki2 exllamav3", "wiki2 gptq"]
    assert text_names([one, one | {"eval_len": 512}]) == ["wiki2 len 2048", "wiki2 len 512"]
    three = [one, one | {"protocol": "gptq"}, one | {"protocol": "gptq", "eval_len": 512}]
    assert text_names(three) == ["wiki2 exllamav3", "wiki2 gptq len 2048", "wiki2 gptq len 512"]
    files = [one | {"text_sha256": digest * 64} for digest in "ab"]
    assert text_names(files) == ["wiki2 aaaaaaaa", "wiki2 bbbbbbbb"]


def test_only_the_same_models_on_the_same_texts_make_a_table_of_texts() -> None:
    records = [on(text, label, RATIOS[0]) for label in ("INT4", "INT8") for text in ("a", "b")]
    found = by_text(records)
    assert found is not None and found.names == ("a", "b")
    assert [[r.label for r in of_model] for of_model in found.models] == [["INT4"] * 2, ["INT8"] * 2]
    assert [r.label for r in found.texts["b"]] == ["INT4", "INT8"]
    assert by_text(records[:3]) is None and by_text(records[::2]) is None and by_text([]) is None
    other_tokens = records[3].model_copy(
        update={"comparison": records[3].comparison | {"tokens_sha256": "x"}}
    )
    assert by_text([*records[:3], other_tokens]) is None

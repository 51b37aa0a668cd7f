"""Metrics against answers known analytically, and against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalq.engine.failures import CATEGORIES
from evalq.errors import ModelError
from evalq.results.estimate import Estimate, Sample
from evalq.results.metrics import METRICS, Measured, Metric, TextScale, compute
from evalq.results.paired import Pair, compare
from evalq.results.record import AgainstReference, ResultRecord
from evalq.results.statistics import Clusters


def measured(logprob, window_of=None, *, top1=None, **scale) -> Measured:
    logprob = np.asarray(logprob, np.float32)
    window_of = np.arange(logprob.size) // 4 if window_of is None else np.asarray(window_of)
    top1 = np.zeros(logprob.size, bool) if top1 is None else np.asarray(top1, bool)
    return Measured({"logprob": logprob, "top1": top1}, window_of, TextScale(**scale))


def summary(logprob, window_of=None, **more) -> ResultRecord:
    """The metrics as a record has them."""
    found = measured(logprob, window_of, **more)
    return ResultRecord(
        metrics_version=1,
        label="x",
        group="x",
        status="ok",
        metrics=compute(found),
        tokens_scored=found.n_tokens,
        tokens_nonfinite=found.n_nonfinite,
        engine="fake",
        protocol="gptq",
        comparison={},
        identity={},
    )


def paired_difference(a, b, window_of) -> AgainstReference:
    pair = Pair({"logprob": np.asarray(a)}, {"logprob": np.asarray(b)}, np.asarray(window_of))
    return AgainstReference(label="b", metrics=compare(pair))


def cr1_by_loop(x, window_of) -> float:
    """The formula term by term."""
    mean = math.fsum(x) / len(x)
    groups = sorted(set(window_of))
    total = 0.0
    for group in groups:
        total += math.fsum(value - mean for value, of in zip(x, window_of, strict=True) if of == group) ** 2
    return math.sqrt(len(groups) / (len(groups) - 1) * total / len(x) ** 2)


@st.composite
def clustered(draw) -> tuple[list[float], list[int]]:
    """Values in 2 to 6 windows of any size and order."""
    window_of = draw(st.lists(st.integers(0, 5), min_size=2, max_size=40).filter(lambda w: len(set(w)) > 1))
    value = st.floats(0, 20, allow_nan=False, width=32)
    return draw(st.lists(value, min_size=len(window_of), max_size=len(window_of))), window_of


# --- known models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [2, 50_257, 151_936])
def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(vocab_size):
    result = summary(np.full(40, -math.log(vocab_size)))
    assert result.ppl == pytest.approx(vocab_size, rel=1e-5)
    assert result.ppl_stderr == pytest.approx(0, abs=1e-9)
    assert result.value("nll_nats") == pytest.approx(math.log(vocab_size), rel=1e-6)


def test_a_model_that_knows_every_token_has_perplexity_one():
    result = summary(np.zeros(12), top1=np.ones(12), bytes_per_token=4.0)
    assert (result.ppl, result.ppl_stderr, result.value("nll_nats")) == (1.0, 0.0, 0.0)
    assert (result.value("bits_per_byte"), result.value("byte_ppl"), result.value("top1")) == (0.0, 1.0, 1.0)


def test_a_fair_coin_per_bit_is_one_bit_per_bit():
    """A uniform model over 256 one-byte tokens spends 8 bits on a byte."""
    result = summary(np.full(30, -math.log(256)), bytes_per_token=1.0)
    assert result.value("bits_per_byte") == pytest.approx(8, rel=1e-6)
    assert result.value("byte_ppl") == pytest.approx(256, rel=1e-5)


def test_top1_and_counts():
    result = summary(-np.ones(10), top1=[1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert (result.value("top1"), result.tokens_scored, result.tokens_nonfinite) == (0.3, 10, 0)


def test_whole_text_totals_give_lm_evals_three_numbers():
    logprob = np.array([-1.5, -2.5, -0.25, -3.0], np.float32)
    result = summary(logprob, n_bytes=20, n_words=3)
    assert result.value("word_ppl") == pytest.approx(math.exp(7.25 / 3))
    assert result.value("byte_ppl") == pytest.approx(math.exp(7.25 / 20))
    assert result.value("bits_per_byte") == pytest.approx(7.25 / (20 * math.log(2)))
    assert result.value("byte_ppl") == pytest.approx(2 ** result.value("bits_per_byte"))


def test_without_a_scale_there_is_nothing_per_byte_or_word():
    result = summary(-np.ones(8))
    assert (
        result.value("bits_per_byte") is None
        and result.value("byte_ppl") is None
        and result.value("word_ppl") is None
    )


def test_a_partly_scored_text_uses_bytes_per_token():
    assert summary(np.full(8, -3.0), bytes_per_token=4.5).value("bits_per_byte") == pytest.approx(
        3 / 4.5 / math.log(2)
    )
    assert summary(np.full(8, -3.0), bytes_per_token=4.5).value("word_ppl") is None


def test_a_perplexity_beyond_float64_is_infinite_not_a_crash():
    result = summary([-700.0, -800.0, -900.0, -1000.0], [0, 0, 1, 1], n_words=1)
    assert (
        result.ppl == math.inf and result.value("word_ppl") == math.inf and result.value("nll_nats") == 850.0
    )


# --- the error bar ----------------------------------------------------------------------------------------


def clustered_stderr(x, window_of):
    return Sample(x, Clusters.named(window_of)).mean_stderr


@given(clustered())
def test_clustered_stderr_is_the_formula(case):
    x, window_of = case
    found = clustered_stderr(np.array(x), np.array(window_of))
    assert found == pytest.approx(cr1_by_loop(x, window_of), rel=1e-9, abs=1e-12)


@given(clustered())
def test_stderr_of_ppl_is_ppl_times_that_of_the_mean(case):
    x, window_of = case
    result = summary(np.negative(x), window_of)
    assert result.ppl_stderr == pytest.approx(result.ppl * cr1_by_loop(x, window_of), rel=1e-6, abs=1e-6)


@given(clustered(), st.permutations(range(6)))
def test_names_and_order_of_windows_do_not_matter(case, names):
    x, window_of = np.array(case[0]), np.array(case[1])
    renamed = np.array(names)[window_of] * 1000 + 7
    shuffled = np.argsort(renamed, kind="stable")
    found = clustered_stderr(x[shuffled], renamed[shuffled])
    assert found == pytest.approx(clustered_stderr(x, window_of), rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(0, 20, width=32), min_size=2, max_size=50))
def test_one_token_per_window_is_llama_perplexitys_error(values):
    x = np.array(values, np.float64)
    variance = max(0.0, math.fsum(x * x) / x.size - (math.fsum(x) / x.size) ** 2)
    result = summary(-x, np.arange(x.size))
    assert result.ppl_stderr == pytest.approx(
        result.ppl * math.sqrt(variance / (x.size - 1)), rel=1e-4, abs=1e-4 * result.ppl
    )


def test_a_window_of_copies_counts_as_one_observation():
    """Repeating every token 25 times within its window adds no information, and CR1 does not claim any."""
    x = np.random.default_rng(1).normal(3, 1, 30)
    single, copied = (
        clustered_stderr(x, np.arange(30)),
        clustered_stderr(np.repeat(x, 25), np.repeat(np.arange(30), 25)),
    )
    assert copied == pytest.approx(single, rel=1e-12)
    assert clustered_stderr(np.repeat(x, 25), np.arange(750)) == pytest.approx(single / 5, rel=0.02)


def test_the_error_bar_covers_the_truth_about_as_often_as_it_should():
    """Windows with an effect of their own: 2 SE hold the mean in about 95% of runs, i.i.d. 2 SE do not."""
    rng = np.random.default_rng(7)
    window_of, covered, covered_iid = np.repeat(np.arange(50), 40), 0, 0
    for _ in range(400):
        x = 3 + np.repeat(rng.normal(0, 0.5, 50), 40) + rng.normal(0, 1, 2000)
        covered += abs(x.mean() - 3) < 2 * clustered_stderr(x, window_of)
        covered_iid += abs(x.mean() - 3) < 2 * clustered_stderr(x, np.arange(2000))
    assert 370 <= covered <= 395
    assert covered_iid < 280


@pytest.mark.parametrize("window_of", [[0, 0, 0], [5, 5, 5]])
def test_one_window_has_no_error_bar(window_of):
    assert summary([-1, -2, -3], window_of).ppl_stderr is None
    assert paired_difference(-np.ones(3), -np.ones(3), np.array(window_of)).ln_ratio_stderr is None


def test_overlap_that_is_not_taken_into_account_is_said():
    a = -np.arange(8.0)
    pair = Pair({"logprob": a}, {"logprob": -np.ones(8)}, np.arange(8) // 2, overlap_ignored=True)
    assert all(found.stderr_is_lower_bound for found in compare(pair).values())
    assert not summary(a).ppl_stderr_is_lower_bound


# --- precision --------------------------------------------------------------------------------------------


def test_ten_million_float32_tokens_keep_their_digits():
    """A float32 running sum of these is off in the third digit; x is exact in float32, so is the answer."""
    n = 10_000_000
    logprob = np.full(n, -0.0009765625, np.float32)
    logprob[:1000] = -20.0
    exact = ((n - 1000) * 0.0009765625 + 1000 * 20) / n
    result = summary(logprob, np.arange(n) // 2048)
    assert result.value("nll_nats") == pytest.approx(exact, rel=1e-12)
    assert result.tokens_scored == n


# --- what is not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_a_few_non_finite_tokens_are_counted_and_in_no_mean(broken):
    logprob = np.full(1000, -2.0)
    logprob[17] = logprob[503] = broken
    top1 = np.zeros(1000, bool)
    top1[[17, 20]] = True
    result = summary(logprob, top1=top1, n_words=500)
    assert (result.tokens_scored, result.tokens_nonfinite) == (1000, 2)
    assert result.value("nll_nats") == 2.0 and result.ppl == math.exp(2)
    assert result.value("top1") == pytest.approx(1 / 998)
    assert result.value("word_ppl") == pytest.approx(math.exp(4)), "the missing tokens count as average ones"


def test_one_percent_is_the_limit():
    logprob = np.full(1000, -2.0)
    logprob[:10] = math.nan
    assert summary(logprob).tokens_nonfinite == 10
    logprob[10] = math.nan
    with pytest.raises(
        ModelError, match=r"11 of 1000 log-probabilities are NaN or infinite \(1.1%\)"
    ) as caught:
        summary(logprob)
    assert caught.value.category == "non_finite" and caught.value.category in CATEGORIES


@pytest.mark.parametrize("logprob", [[math.nan] * 5, [-math.inf], []])
def test_nothing_finite_is_a_failed_model(logprob):
    with pytest.raises(ModelError) as caught:
        summary(logprob)
    assert caught.value.category == "non_finite"


def test_a_window_without_a_finite_token_is_no_window():
    logprob = np.full(400, -2.0)
    logprob[:4] = math.nan
    assert summary(logprob).ppl_stderr == summary(logprob[4:]).ppl_stderr


# --- two models -------------------------------------------------------------------------------------------


def correlated_pair(shift: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two models that find the same tokens and windows hard, the first worse by `shift` nats on average."""
    rng = np.random.default_rng(3)
    window_of = np.repeat(np.arange(40), 100)
    hard = rng.gamma(2, 1.5, 4000) + np.repeat(rng.normal(0, 0.4, 40), 100)
    a, b = (-(hard + extra + rng.normal(0, 0.2, 4000)) for extra in (shift, 0.0))
    return a.astype(np.float32), b.astype(np.float32), window_of


def test_the_difference_is_the_log_ratio_of_the_perplexities():
    a, b, window_of = correlated_pair(0.05)
    difference = paired_difference(a, b, window_of)
    ratio = summary(a, window_of).ppl / summary(b, window_of).ppl
    assert difference.ppl_ratio == pytest.approx(ratio, rel=1e-9)
    assert difference.ln_ratio == pytest.approx(math.log(ratio), rel=1e-9)
    assert difference.ln_ratio > 0


def test_pairing_sees_what_two_error_bars_cannot():
    a, b, window_of = correlated_pair(0.05)
    difference = paired_difference(a, b, window_of)
    alone = [summary(x, window_of).ppl_stderr / summary(x, window_of).ppl for x in (a, b)]
    assert difference.ln_ratio_stderr < 0.2 * math.hypot(*alone)
    assert difference.significant
    assert abs(difference.ln_ratio) < 2 * math.hypot(*alone)


@given(clustered(), clustered())
def test_swapping_the_models_flips_the_sign_only(first, second):
    n = min(len(first[0]), len(second[0]))
    a, b, window_of = np.float32(first[0][:n]), np.float32(second[0][:n]), np.array(first[1][:n])
    there, back = paired_difference(-a, -b, window_of), paired_difference(-b, -a, window_of)
    assert there.ln_ratio == -back.ln_ratio and there.ln_ratio_stderr == back.ln_ratio_stderr
    assert there.significant == back.significant


def test_a_model_does_not_differ_from_itself():
    a, _, window_of = correlated_pair(0.0)
    same = paired_difference(a, a, window_of)
    assert (same.ln_ratio, same.ln_ratio_stderr, same.ppl_ratio, same.significant) == (0.0, 0.0, 1.0, False)


def test_noise_alone_is_not_significant_and_no_error_bar_means_not_significant():
    a, b, window_of = correlated_pair(0.0)
    assert not paired_difference(a, b, window_of).significant
    assert not paired_difference(a - 1, a, np.zeros(4000, int)).significant


def test_pairs_with_a_non_finite_half_are_left_out():
    a, b, window_of = correlated_pair(0.0)
    clean = paired_difference(a[10:], b[10:], window_of[10:])
    a[:5], b[5:10] = math.nan, -math.inf
    assert paired_difference(a, b, window_of) == clean
    a[:50] = math.nan
    with pytest.raises(ModelError, match="50 of 4000"):
        paired_difference(a, b, window_of)


# --- the rows ---------------------------------------------------------------------------------------------


def test_a_metric_is_computed_where_its_columns_are_and_nowhere_else():
    found = measured(-np.ones(8))
    surprise = Metric(
        "surprise",
        ("surprise",),
        lambda m: Estimate(value=float(m.columns["surprise"].mean())),
        "nats",
        "",
        3,
        "x",
    )
    assert "surprise" not in compute(found, (*METRICS, surprise))
    found.columns["surprise"] = np.full(8, 2.5)
    assert compute(found, (*METRICS, surprise))["surprise"].value == 2.5


def test_every_metric_has_a_name_of_its_own_and_columns_that_exist():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert {name for metric in METRICS for name in metric.columns} <= {
        "logprob",
        "top1",
        "top1_bound",
        "entropy",
    }


def test_a_lower_bound_has_a_name_of_its_own():
    found = measured(-np.ones(8))
    bound = Measured(
        {"logprob": found.columns["logprob"], "top1_bound": np.arange(8) < 2},
        found.cluster_of,
        TextScale(),
    )
    assert compute(bound)["top1_bound"].value == 0.25 and "top1" not in compute(bound)


@given(clustered())
def test_errors_of_other_units_follow_from_that_of_the_mean(case):
    x, window_of = case
    result = summary(np.negative(x), window_of, bytes_per_token=4.0)
    assert result.stderr("nll_nats") == pytest.approx(cr1_by_loop(x, window_of), rel=1e-6, abs=1e-6)
    per_byte = cr1_by_loop(x, window_of) / 4 / math.log(2)
    assert result.stderr("bits_per_byte") == pytest.approx(per_byte, rel=1e-6, abs=1e-6)

"""Which of many models differ, what is said of each, and how many windows it takes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_records import record

from evalq.results.estimate import Estimate, Sample
from evalq.results.record import AgainstReference, ResultRecord
from evalq.results.resolution import resolution
from evalq.results.significance import Matrix, Scored, holm, matrices, mcnemar_exact, p_value, with_pairs
from evalq.results.statistics import Clusters, t_quantile
from evalq.results.verdict import BROKEN_RULE, verdict

# --- corrections and tests --------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    """Sorted 0.01 0.02 0.03 0.04 times 4 3 2 1 is 0.04 0.06 0.06 0.04; none may be below a smaller one's."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_between_nothing_and_bonferroni(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= c <= min(1, len(p_values) * p) for p, c in zip(p_values, corrected, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert all(np.diff(np.array(corrected)[order]) >= 0)


def binomial_p(first: int, second: int) -> float:
    n = first + second
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test_on_what_only_one_gets_right(first: int, second: int) -> None:
    assert mcnemar_exact(first, second) == pytest.approx(binomial_p(first, second), rel=1e-9)
    assert mcnemar_exact(first, second) == mcnemar_exact(second, first)


def test_mcnemar_of_a_textbook_and_of_many_tokens() -> None:
    assert mcnemar_exact(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar_exact(0, 0) == 1.0
    z = 1000 / math.sqrt(200_000)
    assert mcnemar_exact(99_500, 100_500) == pytest.approx(
        math.erfc((z - 1 / math.sqrt(2e5)) / 2**0.5), rel=0.01
    )
    assert mcnemar_exact(0, 100_000) == 0.0


# --- the matrices -----------------------------------------------------------------------------------------

N, WINDOWS = 4000, 20
CLUSTER_OF = np.arange(N, dtype=np.int64) // (N // WINDOWS)


def run(*worse_by: float, seed: int = 0) -> tuple[list[Scored], Scored]:
    """Models that are worse than the reference by so many nats on average, the reference first."""
    rng = np.random.default_rng(seed)
    ln_p, argmax = -rng.gamma(1, 2, N), rng.integers(0, 4, N).astype(np.int32)
    reference = Scored("R", {"logprob": ln_p, "argmax": argmax, "max_prob": np.full(N, 0.5)})
    models = [reference]
    for i, nats in enumerate(worse_by):
        flips = rng.random(N) < 0.05 + nats
        columns = {
            "logprob": ln_p - nats - rng.normal(0, 0.1, N),
            "kld": np.maximum(rng.gamma(0.5, 2 * nats + 0.02, N), 0),
            "argmax": np.where(flips, 9, argmax).astype(np.int32),
        }
        models.append(Scored(f"m{i}", columns))
    return models, reference


def matrix(found: list[Matrix], quantity: str) -> Matrix:
    (one,) = (one for one in found if one.quantity == quantity)
    return one


def test_each_pair_is_tested_in_each_quantity() -> None:
    models, reference = run(0.0, 0.0, 0.3)
    found = matrices(models, CLUSTER_OF, reference)
    assert [one.quantity for one in found] == ["ppl", "kld", "same_top"]
    assert matrix(found, "ppl").labels == ("R", "m0", "m1", "m2")
    assert matrix(found, "kld").labels == matrix(found, "same_top").labels == ("m0", "m1", "m2")
    for quantity in ("ppl", "kld", "same_top"):
        one = matrix(found, quantity)
        assert len(one.differences) == math.comb(len(one.labels), 2)
        shown = {(d.first, d.second) for d in one.differences if d.shown}
        assert {("m0", "m2"), ("m1", "m2")} <= shown and ("m0", "m1") not in shown


def test_a_difference_is_the_paired_one_and_turns_round() -> None:
    models, reference = run(0.1, 0.3)
    one = matrix(matrices(models, CLUSTER_OF, reference), "ppl")
    there, back = one.between("m1", "m0"), one.between("m0", "m1")
    assert there is not None and back is not None
    expected = (models[1].columns["logprob"] - models[2].columns["logprob"]).mean()
    assert there.estimate.value == pytest.approx(expected) and expected == pytest.approx(0.2, abs=0.01)
    assert back.estimate.value == -there.estimate.value
    assert there.estimate.interval is not None and back.estimate.interval is not None
    assert back.estimate.interval == (-there.estimate.interval[1], -there.estimate.interval[0])
    assert one.between("m0", "m0") is None


def test_same_top_counts_the_tokens_on_which_one_of_two_is_right() -> None:
    models, reference = run(0.0, 0.2)
    found = matrix(matrices(models, CLUSTER_OF, reference), "same_top").between("m0", "m1")
    assert found is not None and found.discordant is not None
    right = [model.columns["argmax"] == reference.columns["argmax"] for model in models[1:]]
    assert found.discordant.first == (right[0] & ~right[1]).sum()
    assert found.discordant.second == (right[1] & ~right[0]).sum()
    assert found.estimate.value == pytest.approx((found.discordant.first - found.discordant.second) / N)
    assert found.discordant.p_tokens == mcnemar_exact(found.discordant.first, found.discordant.second)
    back = matrix(matrices(models, CLUSTER_OF, reference), "same_top").between("m1", "m0")
    assert back is not None and back.discordant is not None
    assert (back.discordant.first, back.discordant.second) == (
        found.discordant.second,
        found.discordant.first,
    )


def test_a_record_holds_its_row_of_every_matrix() -> None:
    models, reference = run(0.01, 0.5)
    found = matrices(models, CLUSTER_OF, reference)
    rows = [one.beside_others for one in with_pairs([record(label="m1"), record(label="-")], found)]
    assert rows[1] == () and {(one.quantity, one.other) for one in rows[0]} == {
        (one.quantity, other) for one in found for other in one.labels if other != "m1"
    }
    for one in rows[0]:
        cell = matrix(found, one.quantity).between("m1", one.other)
        assert cell is not None and (one.difference, one.p_holm) == (cell.estimate, cell.p_holm)
        told = None if cell.discordant is None else (cell.discordant.first, cell.discordant.second)
        assert told == (None if one.only_this is None else (one.only_this, one.only_other))
    again = ResultRecord.model_validate(with_pairs([record(label="m1")], found)[0].model_dump())
    assert again.beside_others == rows[0]


def test_correlated_tokens_do_not_count_as_many() -> None:
    """In ten of twenty windows one model is right throughout: a coin, but 2000 tokens seem to say more."""
    models, reference = run(0.0, 0.0)
    top = reference.columns["argmax"]
    for model, parity in zip(models[1:], (0, 1), strict=True):
        lucky = CLUSTER_OF % 2 == parity if parity else (CLUSTER_OF % 2 == 0) | (CLUSTER_OF == 1)
        model.columns["argmax"][:] = np.where(lucky, top, 9)  # type: ignore[index]
    found = matrix(matrices(models, CLUSTER_OF, reference), "same_top").differences[0]
    assert found.discordant is not None and found.discordant.p_tokens < 0.002
    assert found.p is not None and found.p > 0.5 and not found.shown


def test_among_models_without_any_difference_pairs_are_rarely_marked() -> None:
    """Six models, 15 pairs: in about 5% of the runs some pair is marked; without Holm in far more."""
    runs, marked, uncorrected = 150, 0, 0
    for seed in range(runs):
        models, reference = run(*[0.0] * 6, seed=seed)
        one = matrix(matrices(models[1:], CLUSTER_OF, reference), "ppl")
        marked += any(found.shown for found in one.differences)
        uncorrected += any(found.p is not None and found.p < 0.05 for found in one.differences)
    assert marked / runs < 0.1
    assert uncorrected / runs > 0.2


def test_equal_models_are_not_told_apart_and_one_window_tells_nothing() -> None:
    models, reference = run(0.1)
    twin = Scored("twin", models[1].columns)
    found = matrix(matrices([*models, twin], CLUSTER_OF, reference), "ppl").between("m0", "twin")
    assert found is not None and (found.estimate.value, found.p, found.shown) == (0.0, 1.0, False)
    alone = matrices(models, np.zeros(N, np.int64), reference)
    assert all(one.p is None and not one.shown for one in alone[0].differences)


def test_models_without_the_exact_kld_are_in_no_matrix_of_it() -> None:
    models, reference = run(0.1, 0.2, 0.3)
    bound = dict(models[3].columns)
    bound["kld_bound"] = bound.pop("kld")
    found = matrices([*models[:3], Scored("bound", bound)], CLUSTER_OF, reference)
    assert matrix(found, "kld").labels == ("m0", "m1")
    assert "bound" in matrix(found, "ppl").labels
    assert not matrices([reference], CLUSTER_OF, reference)


def test_p_value_is_that_of_the_interval() -> None:
    """The interval leaves zero out exactly where p is below 5%."""
    rng = np.random.default_rng(3)
    for shift in np.linspace(0, 1, 40):
        sample = Sample(rng.normal(shift, 1, 40), Clusters.named(np.arange(40) // 4))
        low, high = sample.estimate_mean().interval or (0, 0)
        p = p_value(sample)
        assert p is not None and (p < 0.05) == (low > 0 or high < 0)


# --- verdicts ---------------------------------------------------------------------------------------------


def compared(low: float, high: float, **more: Estimate) -> ResultRecord:
    metrics = {"ln_ratio": Estimate(value=(low + high) / 2, stderr=(high - low) / 4, low=low, high=high)}
    return record("m", against_reference=AgainstReference(label="R", metrics=metrics | more))


@pytest.mark.parametrize(
    ("low", "high", "kind", "text"),
    [
        (0.01, 0.02, "worse", "worse by 1.0 to 2.0 %"),
        (0.001, 0.0012, "worse", "worse by 0.100 to 0.120 %"),
        (0.5, 0.9, "worse", "worse by 65 to 146 %"),
        (-0.02, -0.01, "better", "better by 1.00 to 1.98 %"),
        (-0.01, 0.02, "no difference shown", "no difference shown (1.0 % better to 2.0 % worse)"),
        (0.0, 0.0, "no difference shown", "no difference shown: the same on every token"),
        (1.01, 1.2, "broken", "broken: ln of the ratio of the perplexities 1.10 nats per token"),
        (0.9, 1.2, "worse", "worse by 146 to 232 %"),
    ],
)
def test_a_verdict_is_what_the_interval_shows(low: float, high: float, kind: str, text: str) -> None:
    found = verdict(compared(low, high))
    assert found is not None and (found.kind, found.text) == (kind, text)


def test_a_large_divergence_is_broken_although_the_perplexity_is_not() -> None:
    kld = Estimate(value=1.5, stderr=0.1, low=1.3, high=1.7)
    found = verdict(compared(-0.01, 0.01, kld=kld))
    assert found is not None and found.text == "broken: KLD 1.50 nats per token" and "1 nat" in BROKEN_RULE
    unsure = verdict(compared(-0.01, 0.01, kld=kld.model_copy(update={"low": 0.9})))
    assert unsure is not None and unsure.kind == "no difference shown"


def test_without_an_error_a_verdict_says_so_unless_it_is_plain() -> None:
    one = record("m", against_reference=AgainstReference(label="R", ln_ratio=0.1, ln_ratio_stderr=None))
    found = verdict(one)
    assert found is not None and found.kind == "not known"
    broken = record("m", against_reference=AgainstReference(label="R", ln_ratio=3.0, ln_ratio_stderr=None))
    found = verdict(broken)
    assert found is not None and found.kind == "broken"
    assert verdict(record("R")) is None


def test_a_verdict_per_word_is_in_percent_of_the_perplexity_per_word() -> None:
    """ln(word PPL) is 1.5 times ln(PPL) here, so 1% per token is 1.5% per word."""
    metrics = {"ln_ratio": Estimate(value=0.015, stderr=0.001, low=0.01, high=0.02)}
    one = record(
        "m",
        10.0,
        word_ppl=10.0**1.5,
        comparison={"unit": "word"},
        against_reference=AgainstReference(label="R", metrics=metrics),
    )
    found = verdict(one)
    assert found is not None and found.text == "worse by 1.5 to 3.0 %"


# --- how many windows -------------------------------------------------------------------------------------


def sample_of(n_windows: int, spread: float, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    values = np.repeat(rng.normal(0.01, spread, n_windows), 10)
    return Sample(values, Clusters.named(np.repeat(np.arange(n_windows), 10)))


@pytest.mark.parametrize("wanted", [0.0005, 0.005, 0.05])
def test_the_smallest_number_of_windows_with_the_wanted_interval(wanted: float) -> None:
    sample = sample_of(20, 0.02)
    found = resolution(sample, 20, wanted)
    assert found is not None and found.windows_needed is not None and sample.mean_stderr is not None

    def half(n: int) -> float:
        return t_quantile(n - 1) * (sample.mean_stderr or 0.0) * math.sqrt(20 / n)

    assert half(found.windows_needed) <= math.log1p(wanted) < half(found.windows_needed - 1)
    assert found.half_width == pytest.approx(math.expm1(half(20)))


def test_that_many_windows_do_resolve_it() -> None:
    """From 50 windows; fresh ones, as many as it says, have intervals of about the wanted width."""
    found = resolution(sample_of(50, 0.02), 50, 0.002)
    assert found is not None and found.windows_needed is not None
    widths = []
    for seed in range(20):
        low, high = sample_of(found.windows_needed, 0.02, 1 + seed).estimate_mean().interval or (0, 0)
        widths.append((high - low) / 2)
    assert np.mean(widths) == pytest.approx(0.002, rel=0.3)


def test_windows_that_overlap_count_for_less() -> None:
    """80 windows in 20 stretches: it takes four times as many windows as stretches."""
    sample = sample_of(20, 0.02)
    apart, overlapping = resolution(sample, 20, 0.001), resolution(sample, 80, 0.001)
    assert apart is not None and overlapping is not None and apart.windows_needed is not None
    assert overlapping.windows_needed == 4 * apart.windows_needed


def test_what_cannot_be_resolved() -> None:
    assert resolution(sample_of(1, 0.02), 1, 0.01) is None
    hopeless = resolution(sample_of(4, 5.0), 4, 1e-9)
    assert hopeless is not None and hopeless.windows_needed is None
    same = Sample(np.zeros(40), Clusters.named(np.arange(40) // 10))
    found = resolution(same, 4, 0.005)
    assert found is not None and found.windows_needed == 2 and found.half_width == 0

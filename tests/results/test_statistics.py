"""Quantiles of the t distribution, intervals and clusters against tables and plain loops."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalq.results.estimate import Sample
from evalq.results.statistics import (
    FISHER,
    LOG,
    LOGIT,
    PLAIN,
    Clusters,
    interval,
    t_quantile,
    t_two_sided,
    t_within,
)

# Any textbook's table, two-sided 95%.
TABLE = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 19: 2.093, 30: 2.042, 99: 1.984,
    1000: 1.962,
}  # fmt: skip


@pytest.mark.parametrize("degrees", TABLE)
def test_t_quantiles_are_those_of_the_tables(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(TABLE[degrees], abs=6e-4)


@given(st.integers(1, 400), st.floats(0, 30))
def test_t_within_is_the_integral_of_the_density(degrees: int, t: float) -> None:
    ln_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    x = np.linspace(0, t, 20_001)
    density = np.exp(ln_scale - (degrees + 1) / 2 * np.log1p(x * x / degrees))
    assert t_within(t, degrees) == pytest.approx(2 * np.trapezoid(density, x), abs=2e-5)


def test_t_becomes_the_normal_distribution() -> None:
    assert t_quantile(10**9) == pytest.approx(1.959964, abs=1e-6)
    assert t_within(1.5, 19_999) == pytest.approx(t_within(1.5, 20_000), abs=3e-5)


def test_p_values() -> None:
    assert t_two_sided(0.0, 5) == 1.0
    assert t_two_sided(-2.570582, 5) == pytest.approx(0.05, abs=1e-6)
    assert t_two_sided(math.inf, 3) == 0.0
    assert 0 <= t_two_sided(60.0, 50) < 1e-12


@pytest.mark.parametrize(
    ("scale", "value", "low", "high"),
    [
        (PLAIN, 2.0, 1.0, 3.0),
        (LOG, 2.0, 2 * math.exp(-0.5), 2 * math.exp(0.5)),
        (LOGIT, 0.5, 1 / (1 + math.exp(4)), 1 / (1 + math.exp(-4))),
        (FISHER, 0.0, -math.tanh(1), math.tanh(1)),
    ],
)
def test_intervals_are_symmetric_on_their_scale(scale, value: float, low: float, high: float) -> None:
    assert interval(value, 0.5, 2.0, scale) == pytest.approx((low, high))


@given(st.floats(1e-9, 1 - 1e-9), st.floats(0, 10), st.integers(1, 50))
def test_intervals_of_shares_and_correlations_stay_where_those_are(v: float, error: float, df: int) -> None:
    for scale, low in ((LOGIT, 0.0), (FISHER, -1.0)):
        found = interval(v, error, t_quantile(df), scale)
        assert found is not None and low <= found[0] <= v + 1e-12 and v - 1e-12 <= found[1] <= 1


@pytest.mark.parametrize(("value", "error"), [(1.0, None), (math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_without_a_number_or_an_error_there_is_no_interval(value: float, error: float | None) -> None:
    assert interval(value, error, 2.0) is None


def test_a_value_that_has_no_place_on_a_scale_has_a_plain_interval() -> None:
    assert interval(-1.0, 0.5, 2.0, LOG) == (-2.0, 0.0)
    assert interval(1.0, 0.0, 2.0, LOGIT) == (1.0, 1.0)


@given(st.lists(st.integers(-5, 2000), min_size=1, max_size=60))
def test_clusters_have_the_names_they_were_given(names: list[int]) -> None:
    found = Clusters.named(np.array(names))
    assert found.count == len(set(names))
    assert sorted(set(names)).index(names[-1]) == found.of[-1]
    assert set(found.of.tolist()) == set(range(found.count))


def test_degrees_of_freedom_count_windows_by_their_size() -> None:
    assert Clusters.named(np.repeat(np.arange(20), 50)).degrees_of_freedom == 19
    short_last = np.concatenate([np.repeat(np.arange(4), 1000), [4] * 3])
    assert Clusters.named(short_last).degrees_of_freedom == 3
    assert Clusters.named(np.array([0] * 1000 + [1])).degrees_of_freedom == 1


@given(st.lists(st.integers(-8, 8), min_size=2, max_size=40), st.fractions(0, 1))
def test_quantiles_interpolate_between_the_ordered_values(values: list[int], fraction: Fraction) -> None:
    sample = Sample(np.array(values, np.float64), Clusters.named(np.arange(len(values))))
    assert sample.quantile(float(fraction)) == pytest.approx(np.quantile(values, float(fraction)), abs=1e-9)


def test_a_percentile_of_equal_values_is_that_value() -> None:
    sample = Sample(np.zeros(1000), Clusters.named(np.arange(1000) // 100))
    found = sample.estimate_quantile(0.99)
    assert (found.value, found.stderr, found.interval) == (0.0, 0.0, (0.0, 0.0))

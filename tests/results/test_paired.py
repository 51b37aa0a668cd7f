"""What is computed of two models on the same tokens: by hand, as llama-perplexity does, by the jackknife."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evalq.results.paired import CONFIDENCE_BUCKETS, PAIR_METRICS, PERCENTILES, Pair, PairMetric, compare

ROWS = {row.name: row for row in PAIR_METRICS}
LLAMA_PERCENTILES = {
    "max": 1.0, "p99_9": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "p75": 0.75, "median": 0.5,
    "p25": 0.25, "p10": 0.1, "p5": 0.05, "p1": 0.01, "p0_1": 0.001, "min": 0.0,
}  # fmt: skip


def models(n: int = 4000, n_windows: int = 20, seed: int = 5) -> Pair:
    """Two models with every column."""
    rng = np.random.default_rng(seed)
    window_of = np.arange(n, dtype=np.int64) * n_windows // n
    p = np.exp(-rng.gamma(1.0, 2.0, n) - 0.01)
    q = np.clip(p * np.exp(rng.normal(-0.02, 0.3, n) + rng.normal(0, 0.1, n_windows)[window_of]), 1e-9, 1)
    argmax = rng.integers(0, 5, n).astype(np.int32)
    mine = {
        "logprob": np.log(q).astype(np.float32),
        "argmax": np.where(rng.random(n) < 0.9, argmax, 7).astype(np.int32),
        "kld": rng.lognormal(-4, 1.5, n).astype(np.float32),
        "acceptance": rng.uniform(0.7, 1, n).astype(np.float32),
    }
    theirs = {
        "logprob": np.log(p).astype(np.float32),
        "argmax": argmax,
        "max_prob": rng.random(n).astype(np.float32),
    }
    return Pair(mine, theirs, window_of)


def llama_percentile(values: np.ndarray, fraction: float) -> float:
    """perplexity.cpp's lambda, line by line."""
    ordered = sorted(values.tolist())
    if fraction <= 0:
        return ordered[0]
    if fraction >= 1:
        return ordered[-1]
    p = fraction * (len(ordered) - 1)
    ip = int(p)
    p -= ip
    return (1 - p) * ordered[ip] + p * ordered[min(ip + 1, len(ordered) - 1)]


def two(ln_q: list[float], ln_p: list[float], windows: list[int], **mine: list[float]) -> Pair:
    columns = {name: np.asarray(values) for name, values in mine.items()}
    return Pair(columns | {"logprob": np.log(ln_q)}, {"logprob": np.log(ln_p)}, np.asarray(windows))


def test_four_tokens_by_hand() -> None:
    """q = 1/2 1/4 1/8 1/2 beside p = 1/2 1/2 1/4 1/4: x - x_ref = 0, ln 2, ln 2, -ln 2."""
    found = compare(two([0.5, 0.25, 0.125, 0.5], [0.5, 0.5, 0.25, 0.25], [0, 0, 1, 1]))
    ln2 = math.log(2)
    assert found["ln_ratio"].value == pytest.approx(ln2 / 4)
    assert found["recovery"].value == pytest.approx(2**-0.25)
    assert found["ppl_difference"].value == pytest.approx(2 ** (7 / 4) - 2 ** (6 / 4))
    assert found["delta_p"].value == pytest.approx((0 - 0.25 - 0.125 + 0.25) / 4)
    assert found["delta_p_rms"].value == pytest.approx(math.sqrt((0.0625 + 0.015625 + 0.0625) / 4))
    assert [found[f"delta_p_{name}"].value for name in ("min", "median", "max")] == pytest.approx(
        [-0.25, -0.0625, 0.25]
    )
    # Windows sum to ln 2 - 2 ln 2 / 4 and the opposite; CR1 with two of them.
    assert found["ln_ratio"].stderr == pytest.approx(math.sqrt(2 * 2 * (ln2 / 2) ** 2) / 4)
    assert found["ln_ratio"].high == pytest.approx(ln2 / 4 + 12.7062047 * ln2 / 4)


def test_means_and_percentiles_are_llama_perplexitys() -> None:
    pair = models()
    found = compare(pair)
    q, p = (np.exp(side["logprob"].astype(np.float64)) for side in (pair.mine, pair.reference))
    x, x_ref = -np.log(q), -np.log(p)
    n = x.size
    cov = (x * x_ref).sum() / n - x.mean() * x_ref.mean()
    spread = math.sqrt((x * x).mean() - x.mean() ** 2) * math.sqrt((x_ref**2).mean() - x_ref.mean() ** 2)
    assert found["ln_correlation"].value == pytest.approx(cov / spread)
    assert found["ln_ratio"].value == pytest.approx(x.mean() - x_ref.mean())
    assert found["ppl_difference"].value == pytest.approx(math.exp(x.mean()) - math.exp(x_ref.mean()))
    assert found["delta_p"].value == pytest.approx((q - p).mean())
    assert found["delta_p_rms"].value == pytest.approx(math.sqrt(((q - p) ** 2).mean()))
    assert found["kld"].value == pytest.approx(pair.mine["kld"].astype(np.float64).mean())
    assert found["same_top"].value == (pair.mine["argmax"] == pair.reference["argmax"]).mean()
    values = {"delta_p": q - p, "ln_ratio": x - x_ref, "kld": pair.mine["kld"].astype(np.float64)}
    for quantity, of in values.items():
        for suffix, fraction in LLAMA_PERCENTILES.items():
            if quantity == "kld" and suffix in ("p75", "p25"):
                assert f"kld_{suffix}" not in found  # llama-perplexity has none either
                continue
            expected = llama_percentile(of, fraction)
            assert found[f"{quantity}_{suffix}"].value == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert expected == pytest.approx(np.quantile(of, fraction), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "name",
    ["ln_ratio", "recovery", "ppl_difference", "ln_correlation", "delta_p", "delta_p_rms", "kld", "same_top",
     "acceptance", "kld_conf_50_75", "same_top_conf_0_25"],
)  # fmt: skip
def test_every_error_is_that_of_leaving_windows_out(name: str) -> None:
    """The jackknife over windows knows no derivative, and to first order it is the same error."""
    pair, n_windows = models(), 20
    whole = compare(pair, (ROWS[name],))[name]
    left_out = []
    for window in range(n_windows):
        kept = pair.cluster_of != window
        part = Pair(
            {k: v[kept] for k, v in pair.mine.items()},
            {k: v[kept] for k, v in pair.reference.items()},
            pair.cluster_of[kept],
        )
        left_out.append(compare(part, (ROWS[name],))[name].value)
    spread = np.square(np.array(left_out) - np.mean(left_out)).sum()
    assert whole.stderr == pytest.approx(math.sqrt((n_windows - 1) / n_windows * spread), rel=0.03)


@pytest.mark.parametrize("name", ["kld_median", "kld_p90", "ln_ratio_p25", "delta_p_p5"])
def test_errors_of_percentiles_are_those_of_a_bootstrap_over_windows(name: str) -> None:
    pair, n_windows = models(n=20_000, n_windows=50), 50
    found = compare(pair, (ROWS[name],))[name]
    sample = {"kld": pair.kld, "ln_r": pair.ln_ratio, "delt": pair.delta_p}[
        name[: 3 if name[0] == "k" else 4]
    ]
    assert sample is not None
    fraction = {suffix: fraction for suffix, fraction, _ in PERCENTILES}[name.rsplit("_", 1)[1]]
    rng, values = np.random.default_rng(2), sample.values.reshape(n_windows, -1)
    drawn = [np.quantile(values[rng.integers(0, n_windows, n_windows)], fraction) for _ in range(400)]
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.2)
    assert found.low is not None and found.high is not None
    assert [found.low, found.high] == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.5 * np.std(drawn)
    )


def test_extremes_have_no_error() -> None:
    """Of 4000 tokens 4 are beyond 0.1% and 99.9%, too few to say how far out the next one is; of 8000, 8."""
    found = compare(models())
    for quantity in ("kld", "delta_p", "ln_ratio"):
        for suffix in ("max", "p99_9", "p0_1", "min"):
            one = found[f"{quantity}_{suffix}"]
            assert one.stderr is None and one.interval is None
    assert compare(models(n=8000))["kld_p99_9"].interval is not None


def test_buckets_hold_each_token_once_and_average_to_the_whole() -> None:
    pair = models()
    surest = pair.reference["max_prob"]
    surest[:5] = [0.25, 0.5, 0.75, 0.95, 1.0]  # on the edges: each belongs to the upper one
    found = compare(pair)
    shares = {suffix: found[f"tokens_{suffix}"].value for suffix, _, _ in CONFIDENCE_BUCKETS}
    assert sum(shares.values()) == pytest.approx(1)
    edges = np.digitize(surest, np.float32([0.25, 0.5, 0.75, 0.95]))
    for i, suffix in enumerate(shares):
        assert shares[suffix] == (edges == i).mean()
        kld = pair.mine["kld"][edges == i].astype(np.float64)
        assert found[f"kld_{suffix}"].value == pytest.approx(kld.mean())
    for name in ("kld", "same_top"):
        total = sum(share * found[f"{name}_{suffix}"].value for suffix, share in shares.items())
        assert total == pytest.approx(found[name].value)


def test_a_bucket_without_a_token_has_no_number() -> None:
    pair = models()
    pair.reference["max_prob"][:] = 0.6
    found = compare(pair)
    assert "kld_conf_0_25" not in found and found["kld_conf_50_75"].value == pytest.approx(found["kld"].value)
    assert found["tokens_conf_0_25"].value == 0


def test_only_what_is_known_is_computed_and_the_bound_is_apart() -> None:
    pair = models()
    plain = Pair({"logprob": pair.mine["logprob"]}, {"logprob": pair.reference["logprob"]}, pair.cluster_of)
    of_logprob = set(compare(plain))
    assert {"ln_ratio", "recovery", "delta_p_rms", "ln_correlation", "delta_p_p99_9"} <= of_logprob
    assert not [name for name in of_logprob if name.startswith(("kld", "same_top", "acceptance", "tokens"))]
    mine = {"logprob": pair.mine["logprob"], "kld_bound": pair.mine["kld"]}
    mine |= {"kept_mass": pair.mine["acceptance"]}
    found = compare(Pair(mine, pair.reference, pair.cluster_of))
    assert found["kept_mass"].value == pytest.approx(mine["kept_mass"].astype(np.float64).mean())
    assert found["kld_bound"].value == pytest.approx(pair.mine["kld"].astype(np.float64).mean())
    assert [name for name in found if name.startswith("kld")] == ["kld_bound"]


def test_a_model_beside_itself() -> None:
    pair = models()
    own = dict(pair.reference) | {"kld": np.zeros(4000, np.float32), "acceptance": np.ones(4000, np.float32)}
    found = compare(Pair(own, pair.reference, pair.cluster_of))
    for name, value in {"kld": 0, "same_top": 1, "acceptance": 1, "recovery": 1, "delta_p_rms": 0}.items():
        assert (found[name].value, found[name].stderr) == (value, 0), name
        assert found[name].interval == (value, value)
    assert found["ln_correlation"].value == pytest.approx(1)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_kld_that_is_not_finite_is_counted_and_in_no_mean(broken: float) -> None:
    pair, clean = models(), models()
    pair.mine["kld"][[3, 2000]] = broken
    kept = np.delete(clean.mine["kld"].astype(np.float64), [3, 2000])
    found = compare(pair)
    assert found["kld"].value == pytest.approx(kept.mean())
    assert pair.notes() == ["2 of 4000 values of kld are not finite, and left out of its mean"]
    pair.mine["kld"][:41] = broken
    found = compare(Pair(pair.mine, pair.reference, pair.cluster_of))
    assert "kld" not in found and "kld_median" not in found and found["ln_ratio"].value != 0
    assert pair.notes() == ["42 of 4000 values of kld are not finite, so it is left out"]


def test_a_reference_made_again_says_how_exactly() -> None:
    pair = models()
    again = pair.reference["logprob"] + np.float32(0.25) * (np.arange(4000) % 2 * 2 - 1).astype(np.float32)
    found = compare(Pair({**pair.mine, "reference_logprob": again}, pair.reference, pair.cluster_of))
    assert found["reference_drift"].value == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("constant", ["mine", "reference"])
def test_a_correlation_without_spread_is_left_out(constant: str) -> None:
    pair = models()
    getattr(pair, constant)["logprob"][:] = -1
    assert "ln_correlation" not in compare(pair)


def test_one_window_gives_numbers_without_errors() -> None:
    pair = models()
    found = compare(Pair(pair.mine, pair.reference, np.zeros(4000, np.int64)))
    assert set(found) == set(compare(pair))
    assert all(one.stderr is None and one.interval is None for one in found.values())


def test_rows_have_names_of_their_own_and_say_what_they_are() -> None:
    assert len(ROWS) == len(PAIR_METRICS)
    assert all(row.help and "{" not in row.help for row in PAIR_METRICS)
    shown = [row.name for row in PAIR_METRICS if row.header]
    assert shown == ["kld", "kld_p99_9", "same_top", "acceptance", "kld_bound", "kept_mass"]
    assert all(ROWS[name].with_kld for name in shown)


def test_a_row_needs_columns_of_either_side() -> None:
    def compute(pair: Pair) -> Any:
        raise AssertionError("its columns are not there")

    of_mine: Callable[..., PairMetric] = lambda **needs: PairMetric("x", (), compute, "", "x", **needs)  # noqa: E731
    pair = models()
    for row in (
        of_mine(mine=("max_prob",)),
        of_mine(reference=("kld",)),
        PairMetric("x", ("kld",), compute, "", "x"),
    ):
        assert compare(pair, (row,)) == {}

"""Metrics by position in the window, and whether their 95% intervals hold the truth."""

import math

import numpy as np
import pytest

from evalq.data.windows import ProtocolSettings, StreamFacts, plan_windows, positions_of
from evalq.results.by_position import (
    OWN_ROWS,
    bucket_name,
    buckets,
    own_by_position,
    pair_by_position,
)
from evalq.results.estimate import Estimate
from evalq.results.metrics import Measured, TextScale
from evalq.results.paired import Pair


def table(n: int, length: int, name: str = "long", **settings) -> np.ndarray:
    return plan_windows(ProtocolSettings(name, length, **settings), StreamFacts(n)).table


def measured(windows: np.ndarray, x: np.ndarray) -> Measured:
    return Measured({"logprob": -x}, np.zeros(x.size, np.int64), TextScale(bytes_per_token=4.0))


def test_buckets_double_and_hold_each_scored_token_once() -> None:
    windows = table(8192 + 3000, 8192)
    found = buckets(windows)
    assert [(one.start, one.stop) for one in found] == [(0, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]
    # The first window's 8191 targets, then 2999 of the second, which is as long as the rest of the text.
    assert [one.index.size for one in found] == [2 * 1023, 2 * 1024, 2048 + 952, 4096]
    every = np.concatenate([one.index for one in found])
    assert np.array_equal(np.sort(every), np.arange(8191 + 2999))


@pytest.mark.parametrize(
    ("name", "length", "stride", "starts"),
    [
        ("exllamav3", 2048, 512, [0, 1024]),
        ("hf-strided", 4096, 512, [0, 1024, 2048]),
        ("gptq", 1024, None, []),
        ("llama.cpp", 4096, None, []),  # its second half, 2049 to 4095, is one bucket
        ("llama.cpp", 16384, None, []),
    ],
)
def test_any_protocol_with_windows_that_reach_two_buckets(
    name: str, length: int, stride: int | None, starts: list[int]
) -> None:
    found = buckets(table(3 * length, length, name, eval_stride=stride))
    assert [one.start for one in found] == starts


def test_where_windows_overlap_one_token_of_the_text_is_in_one_cluster() -> None:
    windows = table(40_000, 4096, "exllamav3", eval_stride=512)
    places = positions_of(windows) + np.repeat(windows[:, 0], windows[:, 1] - windows[:, 2])
    for one in buckets(windows):
        cluster_of: dict[int, int] = {}
        for place, cluster in zip(places[one.index].tolist(), one.cluster_of.tolist(), strict=True):
            assert cluster_of.setdefault(place, cluster) == cluster


def test_a_buckets_metrics_are_those_of_its_tokens() -> None:
    windows = table(4096, 4096)
    x = np.concatenate([np.full(1023, 3.0), np.full(1024, 2.0), np.full(2048, 1.0)])
    found = own_by_position(measured(windows, x), windows)
    assert [bucket_name(at) for at in found] == ["0-1k", "1k-2k", "2k-4k"]
    assert [at.tokens for at in found] == [1023, 1024, 2048]
    assert [at.metrics["nll_nats"].value for at in found] == [3.0, 2.0, 1.0]
    assert [at.metrics["ppl"].value for at in found] == pytest.approx([math.exp(n) for n in (3, 2, 1)])
    assert all(at.metrics["ppl"].stderr == 0.0 for at in found), "one window: the errors are of its stretches"


def test_buckets_add_up_to_the_whole() -> None:
    rng, windows = np.random.default_rng(0), table(40_000, 8192)
    n = int((windows[:, 1] - windows[:, 2]).sum())
    x, y = rng.gamma(0.6, 4.0, n), rng.gamma(0.6, 4.0, n)
    own = own_by_position(measured(windows, x), windows)
    beside = pair_by_position(Pair({"logprob": -x}, {"logprob": -y}, np.zeros(n, np.int64)), windows)
    shares = np.array([at.tokens for at in own]) / n
    assert float(shares @ [at.metrics["nll_nats"].value for at in own]) == pytest.approx(float(x.mean()))
    ratios = [at.metrics["ln_ratio"].value for at in beside]
    assert float(shares @ ratios) == pytest.approx(float((x - y).mean()))
    assert [at.tokens for at in own] == [at.tokens for at in beside]


def test_a_model_that_breaks_beyond_some_position_has_no_number_there() -> None:
    """Of 100 windows one reaches beyond 8k and is NaN there: 0.5% of all tokens, all of the last bucket."""
    windows = np.concatenate([table(99 * 8192, 8192), [[99 * 8192, 99 * 8192 + 12_000, 99 * 8192 + 1, 0]]])
    n = int((windows[:, 1] - windows[:, 2]).sum())
    x = np.ones(n)
    x[-(12_000 - 8192) :] = np.nan
    found = own_by_position(measured(windows, x), windows)
    assert found[-1].start == 8192 and found[-1].metrics == {} and found[-1].tokens == 12_000 - 8192
    assert all(at.metrics["nll_nats"].value == 1.0 for at in found[:-1])
    pair = Pair({"logprob": -x}, {"logprob": -np.ones(n)}, np.zeros(n, np.int64))
    assert pair_by_position(pair, windows)[-1].metrics == {}


def test_results_that_do_not_say_where_their_windows_lie_have_no_buckets() -> None:
    n = 3000
    pair = Pair({"logprob": -np.ones(n)}, {"logprob": -np.ones(n)}, np.zeros(n, np.int64))
    assert pair_by_position(pair, None) == ()


# --- intervals ----------------------------------------------------------------------------------------------


def held(found: list[Estimate], truth: float) -> float:
    inside = [one.low is not None and one.high is not None and one.low <= truth <= one.high for one in found]
    return sum(inside) / len(inside)


def moving(rng: np.random.Generator, n: int, spread: float, tokens: float) -> np.ndarray:
    """Subjects: a level that wanders with a standard deviation and forgets itself over so many tokens."""
    step = 64
    keep = math.exp(-step / tokens)
    noise = rng.normal(0, spread * math.sqrt(1 - keep**2), -(-n // step))
    level = np.empty(noise.size)
    level[0] = rng.normal(0, spread)
    for i in range(1, noise.size):
        level[i] = keep * level[i - 1] + noise[i]
    return np.repeat(level, step)[:n]


@pytest.mark.parametrize("n_windows", [1, 2, 8, 20])
def test_intervals_of_a_difference_hold(n_windows: int) -> None:
    """Differences to a reference, which wander little: of each bucket, from one window on."""
    rng, windows = np.random.default_rng(n_windows), table(8192 * n_windows, 8192)
    n = int((windows[:, 1] - windows[:, 2]).sum())
    runs = []
    for _ in range(400):
        difference = 0.02 + moving(rng, n, 0.01, 60.0) + 0.2 * (rng.gamma(0.5, 2.0, n) - 1)
        pair = Pair({"logprob": -3 - difference}, {"logprob": np.full(n, -3.0)}, np.zeros(n, np.int64))
        runs.append([at.metrics["ln_ratio"] for at in pair_by_position(pair, windows)])
    for column in zip(*runs, strict=True):
        assert 0.92 <= held(list(column), 0.02) <= 0.98


@pytest.mark.parametrize(("n_windows", "least"), [(1, 0.80), (2, 0.83), (8, 0.92)])
def test_intervals_of_a_perplexity_hold_less_often_with_few_windows(n_windows: int, least: float) -> None:
    """Its own NLL wanders as on WikiText-2: neighbours of 256 tokens correlate by 0.3. The docs say so."""
    rng, windows = np.random.default_rng(50 + n_windows), table(8192 * n_windows, 8192)
    n = int((windows[:, 1] - windows[:, 2]).sum())
    runs = []
    for _ in range(400):
        x = (2.5 + moving(rng, n, 0.25, 300.0)) * rng.gamma(0.6, 1 / 0.6, n)
        runs.append([at.metrics["nll_nats"] for at in own_by_position(measured(windows, x), windows)])
    shares = [held(list(column), 2.5) for column in zip(*runs, strict=True)]
    assert min(shares) >= least and max(shares) <= 0.98
    assert {row.name for row in OWN_ROWS} == {"ppl", "nll_nats"}

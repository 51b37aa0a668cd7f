"""Bits per byte against answers known analytically, and errors of ratios in simulations."""

import math

import numpy as np
import pytest

from evalq.engine.columns import LOGPROB
from evalq.errors import ModelError
from evalq.results.per_byte import ByteScores, ln_ratio
from evalq.results.tokens import TokenColumns


def scores(nats: np.ndarray, n_bytes: np.ndarray, window: int, text_bytes: int | None = None) -> ByteScores:
    """A model that scores every token of windows side by side but the first."""
    starts = np.arange(0, nats.size - window + 1, window)
    table = np.array([(start, start + window, start + 1, 0) for start in starts])
    scored = np.concatenate([np.arange(start + 1, start + window) for start in starts])
    columns = {LOGPROB.name: -nats[scored].astype(np.float32)}
    found = TokenColumns(columns, np.repeat(np.arange(len(table)), window - 1), windows=table)
    return ByteScores.of(found, n_bytes, "gptq", text_bytes)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_uniform_model_over_bytes_needs_8_bits_for_each(length: int) -> None:
    n = 400
    found = scores(np.full(n, length * math.log(256)), np.full(n, length), 20)
    assert found.bits_per_byte == pytest.approx(8)
    assert found.estimates()["byte_ppl"].value == pytest.approx(256, rel=1e-5)
    assert found.bytes_scored == 19 * 20 * length


def test_only_the_bytes_of_scored_tokens_count() -> None:
    n_bytes = np.array([100, 3, 1, 100, 2, 2])  # the first token of each window of three is context
    found = scores(np.array([9.0, 1, 2, 9, 3, 4]), n_bytes, 3)
    assert found.bytes_scored == 8
    assert found.bits_per_byte == pytest.approx(10 / (8 * math.log(2)))


def test_a_rewritten_text_counts_its_original_bytes() -> None:
    found = scores(np.ones(40), np.full(40, 2), 4, text_bytes=120)
    assert found.bits_per_byte == pytest.approx(30 / (120 * math.log(2)))


def test_tokens_that_are_not_finite_take_their_bytes_with_them() -> None:
    nats = np.ones(1000)
    nats[5] = np.inf
    found = scores(nats, np.full(1000, 2), 10)
    assert found.bytes_scored == 2 * 899 and found.bits_per_byte == pytest.approx(0.5 / math.log(2))
    with pytest.raises(ModelError, match="not finite|NaN or infinite"):
        scores(np.full(100, np.nan), np.full(100, 2), 10)


def test_the_same_model_differs_by_nothing() -> None:
    nats = np.random.default_rng(1).exponential(2.0, 600)
    one = scores(nats, np.full(600, 4), 20)
    found = ln_ratio(one, one)
    assert found is not None and (found.value, found.stderr) == (0.0, 0.0)


def test_the_same_predictions_in_other_tokens_differ_by_nothing() -> None:
    """A model that needs the same bits for every byte, once in tokens of 2 bytes and once of 4."""
    per_byte = np.repeat(np.random.default_rng(2).exponential(1.0, 100), 40)
    two = ByteScores(
        per_byte.reshape(-1, 2).sum(1), np.full(2000, 2.0), np.arange(0, 4000, 2), np.arange(2000) // 50
    )
    four = ByteScores(
        per_byte.reshape(-1, 4).sum(1), np.full(1000, 4.0), np.arange(0, 4000, 4), np.arange(1000) // 50
    )
    found = ln_ratio(two, four)
    assert found is not None and found.stderr is not None
    assert found.value == pytest.approx(0, abs=1e-12) and found.stderr < 1e-12
    assert two.bits_per_byte == pytest.approx(four.bits_per_byte)


def test_models_that_share_no_bytes() -> None:
    first = scores(np.ones(40), np.full(40, 2), 20)
    far = ByteScores(first.nats, first.n_bytes, first.at + 10_000, first.names)
    assert ln_ratio(first, far) is None


def _simulated(
    rng: np.random.Generator, n_bytes: int, length: int, difficulty: np.ndarray, bits: float
) -> ByteScores:
    n = n_bytes // length
    at = np.arange(n) * length
    nats = difficulty[at] * bits * length * rng.gamma(1.0, 1.0, n)
    return ByteScores(nats, np.full(n, float(length)), at, at // (n_bytes // 30))


def test_intervals_hold_the_truth_and_are_sharper_than_two_errors() -> None:
    rng, truth, held, sharper, n_bytes = np.random.default_rng(3), math.log(1.05), 0, [], 30 * 360
    for _ in range(400):
        difficulty = np.repeat(rng.lognormal(0, 0.5, 30), n_bytes // 30)
        mine = _simulated(rng, n_bytes, 3, difficulty, 1.05)
        reference = _simulated(rng, n_bytes, 4, difficulty, 1.0)
        found = ln_ratio(mine, reference)
        assert found is not None and found.interval is not None and found.stderr is not None
        held += found.interval[0] <= truth <= found.interval[1]
        assert mine.relative_stderr is not None and reference.relative_stderr is not None
        sharper.append(found.stderr / math.hypot(mine.relative_stderr, reference.relative_stderr))
    assert 0.92 <= held / 400 <= 0.98
    assert np.median(sharper) < 0.5, "what is hard for both cancels"

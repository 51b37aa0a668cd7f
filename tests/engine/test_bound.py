"""A lower bound of KL divergence from a few tokens and one bucket."""

import numpy as np
import pytest

from evalq.engine.bound import bound, logprobs_of

VOCAB = 500


@pytest.fixture(scope="module")
def distributions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities of two models, and their exact KL divergence."""
    rng = np.random.default_rng(0)
    p = rng.standard_normal((40, VOCAB)) * 3
    q = p + rng.standard_normal((40, VOCAB)) * 0.5
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return p, q, (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("chosen_by", ["reference", "model", "nobody"])
def test_it_is_never_above_the_exact_value_and_reaches_it(
    distributions: tuple[np.ndarray, np.ndarray, np.ndarray], chosen_by: str
) -> None:
    p, q, exact = distributions
    by = {"reference": p, "model": q, "nobody": np.random.default_rng(1).random(p.shape)}[chosen_by]
    order = np.argsort(-by, -1)
    means = []
    for k in (1, 8, 32, 128, VOCAB):
        ids = order[:, :k]
        found = bound(np.take_along_axis(p, ids, -1), np.take_along_axis(q, ids, -1))
        assert (found.kld <= exact + 1e-6).all() and (found.kld >= 0).all()
        means.append(found.kld.mean())
        np.testing.assert_allclose(found.mass, np.exp(np.take_along_axis(p, ids, -1)).sum(-1), atol=1e-12)
    assert means == sorted(means)
    np.testing.assert_allclose(means[-1], exact.mean(), rtol=1e-5)


def test_places_without_a_token_count_for_the_bucket() -> None:
    p, q = np.log([[0.5, 0.25]]), np.log([[0.4, 0.4]])
    whole = bound(p, q)
    padded = bound(
        np.pad(p, ((0, 0), (0, 3)), constant_values=-np.inf),
        np.pad(q, ((0, 0), (0, 3)), constant_values=np.nan),
    )
    assert whole.kld == padded.kld and whole.mass == padded.mass == 0.75
    by_hand = 0.5 * np.log(0.5 / 0.4) + 0.25 * np.log(0.25 / 0.4) + 0.25 * np.log(0.25 / 0.2)
    np.testing.assert_allclose(whole.kld, [by_hand])


def test_a_model_that_gives_a_token_nothing_is_infinitely_far() -> None:
    assert bound(np.log([[0.5]]), np.array([[-np.inf]])).kld == np.inf


def test_log_probabilities_of_some_ids() -> None:
    logits = np.random.default_rng(3).standard_normal((4, 50)).astype(np.float32)
    ids = np.array([[0, 49, -1, 50]] * 4)
    found = logprobs_of(logits, ids)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(found[:, :2], exact[:, [0, 49]], atol=1e-6)
    assert (found[:, 2:] == -np.inf).all()

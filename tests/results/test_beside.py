"""Stored results beside their reference: which columns, which clusters, which notes."""

import math
from typing import Any

import numpy as np
import pytest
from result_records import record
from window_cases import plan

from evalq.data.windows import WindowPlan
from evalq.results.record import ResultRecord
from evalq.results.reference import Reference, with_reference
from evalq.results.resolution import resolutions_of
from evalq.results.significance import matrices_of
from evalq.results.store import family_of
from evalq.results.tokens import TokenColumns

REFERENCE = Reference("BF16", quantized=False, by_hand=True)
SIDE_BY_SIDE, OVERLAPPING = plan("gptq", 640, 64), plan("exllamav3", 641, 64, 16)


class Stored:
    """Records with columns of a plan: the reference, and a model beside it."""

    def __init__(self, built: WindowPlan, says_where: bool = True, **old: Any) -> None:
        rng, n = np.random.default_rng(0), built.n_targets
        ln_p, argmax = -rng.gamma(1, 2, n).astype(np.float32), rng.integers(0, 5, n).astype(np.int32)
        self.built, self.says_where = built, says_where
        self.records = [
            record("BF16", identity={"engine": "hf"}, key="0", **old),
            record("INT4", identity={"engine": "vllm"}, key="1", **old),
        ]
        family = family_of(self.records[0].identity)[:16]
        self.columns: dict[str, dict[str, Any]] = {
            "BF16": {"logprob": ln_p, "argmax": argmax, "max_prob": rng.random(n).astype(np.float32)},
            "INT4": {
                "logprob": ln_p - rng.gamma(0.5, 0.1, n).astype(np.float32),
                "argmax": argmax,
                f"kld@{family}": rng.gamma(0.5, 0.1, n).astype(np.float32),
                f"kld@{'f' * 16}": np.full(n, 7.0, np.float32),
            },
        }

    def scores(self, one: ResultRecord) -> TokenColumns:
        windows = self.built.table if self.says_where else None
        return TokenColumns(self.columns[one.label], self.built.window_of, windows=windows)

    def compared(self) -> list[ResultRecord]:
        return with_reference(self.records, REFERENCE, self.scores)


def test_kld_of_this_reference_counts_and_of_no_other() -> None:
    stored = Stored(SIDE_BY_SIDE)
    reference, model = stored.compared()
    assert reference.is_reference and model.against_reference is not None
    found = model.against_reference.metrics
    assert found["kld"].value == pytest.approx(0.05, rel=0.3) and found["same_top"].value == 1
    del stored.columns["INT4"][next(name for name in stored.columns["INT4"] if name.startswith("kld@"))]
    _, model = stored.compared()
    assert model.against_reference is not None and "kld" not in model.against_reference.metrics
    assert "ln_ratio" in model.against_reference.metrics


@pytest.mark.parametrize("built", [SIDE_BY_SIDE, OVERLAPPING])
def test_clusters_follow_from_where_the_windows_lie(built: WindowPlan) -> None:
    stored = Stored(built)
    _, model = stored.compared()
    assert model.against_reference is not None
    found = model.against_reference.metrics["ln_ratio"]
    p, q = (stored.columns[label]["logprob"].astype(np.float64) for label in ("BF16", "INT4"))
    cluster_of = built.cluster_of
    g = int(cluster_of.max()) + 1
    sums = np.bincount(cluster_of, weights=(p - q) - (p - q).mean())
    assert g == 640 // 64 and not found.stderr_is_lower_bound
    assert found.stderr == pytest.approx(math.sqrt(g / (g - 1) * np.square(sums).sum()) / p.size)


@pytest.mark.parametrize("overlapping", [True, False])
def test_windows_of_0_1_that_overlapped_leave_a_lower_bound(overlapping: bool) -> None:
    built = OVERLAPPING if overlapping else SIDE_BY_SIDE
    stored = Stored(built, says_where=False, ppl_stderr_is_lower_bound=overlapping)
    _, model = stored.compared()
    assert model.against_reference is not None
    bounds = {one.stderr_is_lower_bound for one in model.against_reference.metrics.values()}
    assert bounds == {overlapping}


def test_kld_that_is_not_finite_is_a_note_of_the_record() -> None:
    stored = Stored(SIDE_BY_SIDE)
    for name, column in stored.columns["INT4"].items():
        if name.startswith("kld@"):
            column[5] = math.inf
    _, model = stored.compared()
    assert model.notes == ["1 of 630 values of kld are not finite, and left out of its mean"]


def test_matrices_and_resolutions_of_records() -> None:
    stored = Stored(OVERLAPPING)
    records = stored.compared()
    found = matrices_of(records, stored.scores)
    assert [one.quantity for one in found] == ["ppl"]  # KLD and same-top need two models beside the reference
    of_model = records[1].against_reference
    assert of_model is not None
    difference = found[0].between("INT4", "BF16")
    assert difference is not None and difference.estimate.value == pytest.approx(of_model.ln_ratio)
    assert difference.estimate.stderr == pytest.approx(of_model.ln_ratio_stderr)
    ((label, one),) = resolutions_of(records, stored.scores, 0.01)
    assert label == "INT4" and one is not None and one.windows == len(OVERLAPPING.windows)
    low, high = of_model.interval or (0, 0)
    assert one.half_width == pytest.approx(math.expm1((high - low) / 2))


def test_without_a_reference_there_is_nothing_beside() -> None:
    stored = Stored(SIDE_BY_SIDE)
    assert resolutions_of(stored.records, stored.scores, 0.01) == []
    assert [one.quantity for one in matrices_of(stored.records, stored.scores)] == ["ppl"]
    assert matrices_of([], stored.scores) == []

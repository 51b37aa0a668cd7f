"""Results that evalq 0.1 stored keep their numbers, bit for bit, and are not scored again.

`store-0.1` was written by evalq 0.1.0: two models of the fake backend on the sample text, with two protocols.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Runs

from evalq.results.store import Store
from evalq.results.tokens import read_columns
from evalq.run import prepare_model, turn

OLD = Path(__file__).parent / "store-0.1"
DATA = {
    "data": {"dataset": "sample", "tokenize_fn": "fake", "eval_len": 64, "eval_stride": 32, "max_rows": 8},
    "words": {
        "dataset": "sample",
        "tokenize_fn": "fake",
        "protocol": "lm-eval",
        "eval_len": 64,
        "max_rows": 1,
    },
}
MODELS = (
    {"label": "Fake A"},
    {"label": "Fake B", "options": {"seed": 1, "misbehave": "some-nan", "batch_windows": 4}},
)
KEPT = (
    "ppl",
    "nll_nats",
    "bits_per_byte",
    "word_ppl",
    "top1",
    "tokens_scored",
    "tokens_nonfinite",
    "layer_bpw",
    "head_bpw",
    "vram_gb",
)


@pytest.fixture
def old(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A store and a model of 0.1.0. The fake engine's version is evalq's own."""
    shutil.copytree(OLD / "results", runs.folder / "store" / "results")
    shutil.copytree(OLD / "model", runs.folder / "model")
    runs.tiny = runs.folder / "model"
    monkeypatch.setattr(prepare_model, "versions", lambda name, python=None: {"evalq": "0.1.0"})
    return runs


@pytest.mark.parametrize("name", DATA)
def test_numbers_are_those_of_0_1_and_nothing_is_scored(
    old: Runs, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*given: object) -> None:
        raise AssertionError("a stored result is scored again")

    monkeypatch.setattr(turn, "run_worker", refuse)
    spec = old.write("data.json", DATA[name])
    code, records = old.compare(spec, old.models(*MODELS))
    before = json.loads((OLD / f"{name}.records.json").read_text())
    assert code == 0 and [record["label"] for record in records] == ["Fake A", "Fake B"]
    for now, then in zip(records, before, strict=True):
        assert {key: now[key] for key in KEPT} == {key: then[key] for key in KEPT}
        speed = then["tokens_per_second"] if now["label"] == "Fake A" else None
        assert now["tokens_per_second"] == speed  # 0.1 did not keep the options that it was timed with
        assert now["key"] != then["key"]  # it holds the digest of the windows now
        # 0.1 took these windows, which overlap, for independent; its errors were lower bounds.
        assert then["ppl_stderr_is_lower_bound"] and not now["ppl_stderr_is_lower_bound"]
        assert now["metrics"]["ppl"]["low"] < now["ppl"] < now["metrics"]["ppl"]["high"]
        for key in ("ppl_ratio", "ln_ratio"):
            assert (now["against_reference"] or {}).get(key) == (then["against_reference"] or {}).get(key)


def test_every_token_is_kept_as_it_was(old: Runs) -> None:
    spec = old.write("data.json", DATA["data"])
    _, records = old.compare(spec, old.models(*MODELS))
    then = json.loads((OLD / "data.records.json").read_text())
    store = Store(old.folder / "store")
    for now, before in zip(records, then, strict=True):
        mine = store.result(now["key"]).scores()
        theirs = read_columns(OLD / "results" / before["key"] / "scores.safetensors")
        assert mine is not None and theirs is not None and set(mine.columns) == {"logprob", "top1"}
        for column, values in theirs.columns.items():
            assert np.array_equal(mine.columns[column], values, equal_nan=True), column
        assert mine.plan is not None and theirs.plan is None


def test_a_damaged_result_of_0_1_is_scored_anew(old: Runs) -> None:
    for scores in (old.folder / "store" / "results").glob("*/scores.safetensors"):
        scores.write_bytes(scores.read_bytes()[:-5])
    code, records = old.compare(old.write("data.json", DATA["data"]), old.models(*MODELS))
    before = json.loads((OLD / "data.records.json").read_text())
    assert code == 0
    assert [record["ppl"] for record in records] == [record["ppl"] for record in before]

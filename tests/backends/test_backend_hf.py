"""The transformers backend on real models: a tiny random one of each head kind, and SmolLM2."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_calls import score_one
from conftest import Runs
from hf_models import ARCHITECTURES, make
from numpy.typing import NDArray

from evalq.backends import hf
from evalq.engine.backend import LoadRequest
from evalq.errors import ModelError

HF = hf.HfBackend()


def reference(
    folder: Path, ids: NDArray[np.int64], first_target: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The plain way: all logits at once, log-softmax in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)).logits[:, first_target - 1 : -1].double()
    targets = torch.from_numpy(ids[:, first_target:])
    logprob = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return logprob.numpy(), (logits.argmax(-1) == targets).numpy()


def request(folder: Path, **options: Any) -> LoadRequest:
    return LoadRequest(folder, 40, 39, {"dtype": "float32", "device": "cpu"} | options)


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
@pytest.mark.parametrize(("rows", "first_target", "chunk_mib"), [(1, 1, 96), (3, 26, 96), (2, 8, 0)])
def test_scores_are_those_of_the_plain_way(
    tmp_path: Path, kind: str, rows: int, first_target: int, chunk_mib: int
) -> None:
    folder = make(tmp_path / "m", kind)
    ids = np.random.default_rng(1).integers(0, 199, (rows, 40))
    model = HF.load(request(folder, head_chunk_mib=chunk_mib))
    assert model.handle.body is not None, "the head is split off for this architecture"
    scores = score_one(HF, model, ids, first_target)
    logprob, top1 = reference(folder, ids, first_target)
    assert scores["logprob"].shape == (rows, 40 - first_target) and scores["logprob"].dtype == np.float32
    np.testing.assert_allclose(scores["logprob"], logprob, atol=2e-5)
    assert np.array_equal(scores["top1"], top1)
    HF.close(model)
    assert model.handle is None


def test_head_that_cannot_be_split_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m", "GraniteConfig")
    monkeypatch.setattr(hf, "_finish", lambda model, logits: logits * 1.5)  # an unknown scaling
    model = HF.load(request(folder))
    assert model.handle.body is None
    ids = np.random.default_rng(2).integers(0, 199, (2, 30))
    np.testing.assert_allclose(
        score_one(HF, model, ids, 5)["logprob"], reference(folder, ids, 5)[0], atol=2e-5
    )


def test_batches_do_not_change_scores(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "LlamaConfig")
    model = HF.load(request(folder))
    ids = np.random.default_rng(3).integers(0, 199, (4, 40))
    together = score_one(HF, model, ids, 11)["logprob"]
    alone = np.concatenate([score_one(HF, model, row[None], 11)["logprob"] for row in ids])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.array_equal(score_one(HF, model, ids, 11)["logprob"], together), (
        "the same call gives the same bits"
    )


def test_last_token_is_never_an_input(tmp_path: Path) -> None:
    """A window one longer than the model's positions works, as lm-eval's windows need."""
    folder = make(tmp_path / "m", "GPT2Config", max_position_embeddings=39)
    model = HF.load(request(folder))
    assert model.max_positions == 39
    ids = np.random.default_rng(4).integers(0, 199, (1, 40))
    assert score_one(HF, model, ids)["logprob"].shape == (1, 39)


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
@pytest.mark.parametrize(("steps", "first_target"), [(13, 1), (10, 25), (5, 38)])
def test_steps_through_the_cache_give_the_same_scores(
    tmp_path: Path, kind: str, steps: int, first_target: int
) -> None:
    """Sliding windows of 16 (Gemma 2) end within steps and between them."""
    folder = make(tmp_path / "m", kind)
    ids = np.random.default_rng(6).integers(0, 199, (2, 40))
    model = HF.load(replace(request(folder), step_tokens=steps))
    scores = score_one(HF, model, ids, first_target)
    logprob, _ = reference(folder, ids, first_target)
    np.testing.assert_allclose(scores["logprob"], logprob, atol=2e-5)


def test_steps_of_a_head_that_cannot_be_split_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m", "GraniteConfig")
    monkeypatch.setattr(hf, "_finish", lambda model, logits: logits * 1.5)
    model = HF.load(replace(request(folder), step_tokens=7))
    ids = np.random.default_rng(2).integers(0, 199, (2, 30))
    for first_target in (1, 5, 29):
        expected = reference(folder, ids, first_target)[0]
        np.testing.assert_allclose(score_one(HF, model, ids, first_target)["logprob"], expected, atol=2e-5)


def test_steps_feed_no_more_than_they_say(tmp_path: Path) -> None:
    model = HF.load(replace(request(make(tmp_path / "m", "LlamaConfig")), step_tokens=10))
    seen: list[int] = []
    model.handle.body.embed_tokens.register_forward_pre_hook(lambda _, ids: seen.append(ids[0].shape[1]))
    score_one(HF, model, np.zeros((1, 40), np.int64))
    assert seen == [9, 10, 10, 10]


def test_facts_of_a_loaded_model(tmp_path: Path) -> None:
    model = HF.load(request(make(tmp_path / "m", "LlamaConfig"), dtype="bfloat16", batch_windows=5))
    assert (model.vocab_size, model.max_positions, model.dtype) == (199, 128, "bfloat16")
    assert model.batch_windows == 5 and model.device == "cpu" and model.tokenize is None
    assert {parameter.dtype for parameter in model.handle.model.parameters()} == {model.handle.model.dtype}


def test_file_and_overlay_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="use load_fn"):
        HF.load(request(tmp_path / "x.gguf"))
    folder = make(tmp_path / "m", "LlamaConfig")
    with pytest.raises(ModelError, match="EXL3"):
        HF.load(LoadRequest(folder, 40, 39, {}, overlay=folder))


def hf_spec(folder: Path, **more: Any) -> dict[str, Any]:
    return {"load_fn": "hf", "fwd_fn": "transformers", "label": "HF m", "model_dir": str(folder)} | more


def test_remote_code_is_refused_until_allowed(runs: Runs, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "LlamaConfig", max_position_embeddings=512)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text("raise SystemError('its code ran')\n")
    models = runs.models(hf_spec(folder), hf_spec(folder, label="HF trusted", trust_remote_code=True))
    code, (refused, allowed) = runs.compare(runs.data(max_rows=1), models)
    assert code == 1
    assert refused["error"]["category"] == "remote_code" and "trust_remote_code" in refused["error"]["remedy"]
    assert "its code ran" in allowed["error"]["message"]


def test_vocabulary_smaller_than_the_ids(runs: Runs, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "LlamaConfig", vocab_size=64, max_position_embeddings=512)
    code, (failed,) = runs.compare(runs.data(max_rows=1), runs.models(hf_spec(folder)))
    assert code == 1 and failed["error"]["category"] == "tokenizer_mismatch"
    assert "64" in failed["error"]["message"]


@pytest.mark.engine
def test_another_tokenizer_is_noticed(runs: Runs, smollm2: Callable[[str], Path], tmp_path: Path) -> None:
    """SmolLM2 with one merge less is another tokenizer with the same vocabulary."""
    folder = tmp_path / "other"
    folder.mkdir()
    for file in smollm2("bf16").iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:2000]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = runs.data(tokenize_fn=None, tokenizer_dir=str(smollm2("bf16")), max_rows=1)
    code, (failed,) = runs.compare(data, runs.models(hf_spec(folder)))
    assert code == 1 and failed["error"]["category"] == "tokenizer_mismatch"
    assert "from token" in failed["error"]["message"]


@pytest.mark.engine
@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "int4", "nvfp4"])
def test_real_checkpoints_of_every_format(runs: Runs, smollm2: Callable[[str], Path], name: str) -> None:
    data = runs.data(tokenize_fn=None, eval_len=256, eval_stride=256, max_rows=2)
    code, (record,) = runs.compare(data, runs.models(hf_spec(smollm2(name))))
    assert code == 0, record["error"]
    low, high = {
        "bf16": (15.9, 16.1),
        "fp8": (8, 8.1),
        "int8": (8, 8.2),
        "int4": (4.2, 4.3),
        "nvfp4": (4.4, 4.6),
    }[name]
    assert low < record["layer_bpw"] < high
    assert 15 < record["ppl"] < 120
    assert record["identity"]["versions"]["transformers"]
    assert any("activations" in note for note in record["notes"]) == (name == "fp8")

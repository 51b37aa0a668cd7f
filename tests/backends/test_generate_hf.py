"""Continuing prompts in transformers: the ids of a plain loop, whatever the checkpoint asks for."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hf_models import make
from numpy.typing import NDArray

from evalq.backends import hf
from evalq.engine.backend import LoadedModel, LoadRequest
from evalq.errors import ModelError

HF = hf.HfBackend()
KINDS = ("LlamaConfig", "Gemma2Config", "GPT2Config", "Qwen3NextConfig")


def loaded(folder: Path) -> LoadedModel:
    options = {"dtype": "float32", "device": "cpu"}
    return HF.load(LoadRequest(folder, 40, 39, options, generate=4, prompt_tokens=20, new_tokens=12))


def prompts(*lengths: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, 199, n) for n in lengths]


def plainly(model: LoadedModel, prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
    """The most probable token each time, by whole forwards without a cache."""
    import torch

    ids = prompt.tolist()
    with torch.inference_mode():
        for _ in range(new_tokens):
            logits = model.handle.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_different_lengths_is_each_prompt_alone(tmp_path: Path, kind: str) -> None:
    model = loaded(make(tmp_path / "m", kind))
    asked = prompts(5, 20, 11, 5)
    found = HF.generate(model, asked, 12)
    assert [ids.tolist() for ids in found.ids] == [plainly(model, prompt, 12) for prompt in asked]
    assert 0 < found.first_token_seconds <= found.seconds
    assert all(ids.dtype == np.int64 for ids in found.ids)


def test_stop_token_is_the_last_one(tmp_path: Path) -> None:
    model = loaded(make(tmp_path / "m", "LlamaConfig"))
    asked = prompts(5, 9)
    whole = [plainly(model, prompt, 12) for prompt in asked]
    stop = whole[0][3]
    found = HF.generate(model, asked, 12, frozenset({stop}))
    for ids, every in zip(found.ids, whole, strict=True):
        ends = every.index(stop) + 1 if stop in every else 12
        assert ids.tolist() == every[:ends]


def test_what_the_checkpoint_says_of_generation_is_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "LlamaConfig")
    asked = prompts(7)
    want = plainly(loaded(folder), asked[0], 12)
    says = {
        "do_sample": True,
        "temperature": 3.0,
        "repetition_penalty": 50.0,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": [want[0]],
        "eos_token_id": [want[1]],
        "forced_eos_token_id": 5,
        "num_beams": 3,
        "max_length": 9,
    }
    (folder / "generation_config.json").write_text(json.dumps(says))
    model = loaded(folder)
    for _ in range(2):
        assert HF.generate(model, asked, 12).ids[0].tolist() == want


@pytest.mark.parametrize(
    ("asked", "new_tokens", "category", "words"),
    [
        (prompts(5), 0, "bad_option", "at least 1"),
        ([np.zeros(0, np.int64)], 4, "bad_option", "no tokens"),
        (prompts(100), 30, "window_too_long", "129 positions, the model has 128"),
        ([np.array([199])], 4, "tokenizer_mismatch", "token id 199"),
    ],
)
def test_impossible_prompts(
    tmp_path: Path, asked: list[NDArray[np.int64]], new_tokens: int, category: str, words: str
) -> None:
    model = loaded(make(tmp_path / "m", "LlamaConfig"))
    with pytest.raises(ModelError, match=words) as caught:
        HF.generate(model, asked, new_tokens)
    assert caught.value.category == category


def test_all_positions_can_be_used(tmp_path: Path) -> None:
    model = loaded(make(tmp_path / "m", "GPT2Config"))
    assert len(HF.generate(model, prompts(100), 29).ids[0]) == 29


def test_scores_are_the_same_after_generating(tmp_path: Path) -> None:
    from backend_calls import score_one

    model = loaded(make(tmp_path / "m", "LlamaConfig"))
    ids = np.random.default_rng(1).integers(0, 199, (2, 40))
    before = score_one(HF, model, ids)["logprob"]
    HF.generate(model, prompts(5, 8), 4)
    assert np.array_equal(score_one(HF, model, ids)["logprob"], before)


@pytest.mark.engine
def test_smollm2_says_what_transformers_says(smollm2: Callable[[str], Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2("bf16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "Once upon a time there was a little girl who", "def fib(n):"]
    asked = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = loaded(folder)
    found = HF.generate(model, asked, 12)
    for prompt, ids in zip(asked, found.ids, strict=True):
        settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
        want = theirs.generate(torch.from_numpy(prompt)[None], **settings)[0, len(prompt) :]
        assert ids.tolist() == want.tolist()

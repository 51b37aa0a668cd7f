"""Continuing prompts in llama.cpp: the ids are those of its plain use, one prompt and one token at a time."""

from pathlib import Path

import numpy as np
import pytest
from backend_calls import score_one
from numpy.typing import NDArray
from tiny_gguf import TINY_VOCAB, write_tiny

from evalq.backends import gguf
from evalq.engine.backend import LoadedModel, LoadRequest
from evalq.errors import ModelError

GGUF = gguf.GgufBackend()


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path)
    return path


def loaded(path: Path, **options: object) -> LoadedModel:
    return GGUF.load(LoadRequest(path, 33, 32, dict(options), generate=3, prompt_tokens=20, new_tokens=12))


def prompts(*lengths: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(5)
    return [rng.integers(1, TINY_VOCAB, n) for n in lengths]


def plainly(path: Path, prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
    """By llama-cpp-python's own class, all logits of the whole text each time."""
    import llama_cpp

    llm = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, flash_attn=True, verbose=False)
    ids = prompt.tolist()
    for _ in range(new_tokens):
        llm.reset()
        llm.eval(ids)
        ids.append(int(np.argmax(llm.scores[len(ids) - 1])))
    llm.close()
    return ids[len(prompt) :]


@pytest.mark.parametrize("options", [{}, {"n_batch": 16, "n_ubatch": 8}, {"flash_attn": False}])
def test_prompts_side_by_side_are_each_prompt_alone(tiny_file: Path, options: dict[str, object]) -> None:
    model = loaded(tiny_file, **options)
    asked = prompts(5, 20, 1)
    for _ in range(2):
        found = GGUF.generate(model, asked, 12)
        assert [ids.tolist() for ids in found.ids] == [plainly(tiny_file, prompt, 12) for prompt in asked]
        assert 0 < found.first_token_seconds <= found.seconds
    assert GGUF.generate(model, asked[1:2], 12).ids[0].tolist() == found.ids[1].tolist()
    GGUF.close(model)


def test_stop_token_is_the_last_one(tiny_file: Path) -> None:
    model = loaded(tiny_file)
    asked = prompts(5, 9, 14)
    whole = [ids.tolist() for ids in GGUF.generate(model, asked, 12).ids]
    stop = whole[0][4]
    found = GGUF.generate(model, asked, 12, frozenset({stop}))
    for ids, every in zip(found.ids, whole, strict=True):
        ends = every.index(stop) + 1 if stop in every else 12
        assert ids.tolist() == every[:ends]
    GGUF.close(model)


def test_scores_are_the_same_after_generating(tiny_file: Path) -> None:
    model = loaded(tiny_file)
    ids = np.random.default_rng(1).integers(0, TINY_VOCAB, (2, 33))
    before = score_one(GGUF, model, ids)["logprob"]
    GGUF.generate(model, prompts(5, 8), 4)
    assert np.array_equal(score_one(GGUF, model, ids)["logprob"], before)
    GGUF.close(model)


def test_impossible_prompts(tiny_file: Path) -> None:
    model = loaded(tiny_file)
    with pytest.raises(ModelError, match="65 positions, the model has 64") as caught:
        GGUF.generate(model, prompts(60), 6)
    assert caught.value.category == "window_too_long"
    assert len(GGUF.generate(model, prompts(60), 5).ids[0]) == 5
    with pytest.raises(ModelError, match="300 prompts at once, llama.cpp takes at most 256"):
        GGUF.generate(model, prompts(5) * 300, 2)
    with pytest.raises(ModelError, match="at least 1"):
        GGUF.generate(model, prompts(5), 0)
    GGUF.close(model)


@pytest.mark.engine
def test_smollm2_says_what_llama_cpp_says(smollm2_gguf: Path) -> None:
    import llama_cpp

    tokenizer = gguf.load_tokenizer(smollm2_gguf)
    texts = ["The capital of France is", "Once upon a time there was a little girl who", "def fib(n):"]
    asked = [np.array(tokenizer.encode(text)) for text in texts]
    model = loaded(smollm2_gguf)
    found = GGUF.generate(model, asked, 12)
    llm = llama_cpp.Llama(str(smollm2_gguf), n_ctx=64, flash_attn=True, verbose=False)
    for prompt, ids in zip(asked, found.ids, strict=True):
        stream = llm.generate(prompt.tolist(), temp=0.0, top_k=1, repeat_penalty=1.0)
        assert ids.tolist() == [next(stream) for _ in range(12)]
    llm.close()
    GGUF.close(model)

"""transformers' KV cache: unquantized in steps, and quantized by HQQ where it is installed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_calls import score_one
from test_backend_hf import HF, make, request

from evalq.backends import _hf_cache
from evalq.backends._hf_cache import CACHES, cache_bits
from evalq.engine.backend import Batch
from evalq.errors import ModelError

# Heads of 64, as real models have them: HQQ's groups lie along them.
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = np.random.default_rng(8).integers(0, 199, (2, 40))


def test_an_unquantized_cache_is_of_the_models_dtype(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "LlamaConfig")
    whole = score_one(HF, HF.load(request(folder)), IDS)["logprob"]
    model = HF.load(replace(request(folder, kv_cache="f32"), step_tokens=10))
    assert np.allclose(score_one(HF, model, IDS)["logprob"], whole, atol=2e-5)
    with pytest.raises(ModelError, match="keys and values of this model are f32, not bf16") as caught:
        HF.load(replace(request(folder, kv_cache="bf16"), step_tokens=10))
    assert caught.value.category == "bad_option"


def test_without_hqq_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hf_cache.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="a KV cache in hqq4 needs HQQ") as caught:
        cache_bits({"kv_cache": "hqq4"}, "torch.bfloat16")
    assert (caught.value.category, caught.value.remedy) == ("engine_missing", 'pip install "evalq[hqq]"')


@pytest.mark.parametrize("text", ["q8_0", "fp8", "4", "hqq5", "hqq8/hqq4"])
def test_other_types_are_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="transformers (has|stores) .*auto, f32, fp16, bf16, hqq8"):
        CACHES.canonical(text)


@pytest.mark.filterwarnings("default")
def test_fewer_bits_lose_more_and_only_later_steps(tmp_path: Path) -> None:
    pytest.importorskip("hqq")
    folder = make(tmp_path / "m", "LlamaConfig", **WIDE)
    found: dict[str, Any] = {}
    for cache in ("f32", "hqq8", "hqq4", "hqq2"):
        model = HF.load(replace(request(folder, kv_cache=cache), step_tokens=13))
        found[cache] = score_one(HF, model, IDS)["logprob"]
        other = HF.score_other_cache(model, Batch(IDS, 1, ("logprob",)))["logprob"]
        assert np.array_equal(other, found["f32"])
    apart = [np.abs(found[cache] - found["f32"]) for cache in ("hqq8", "hqq4", "hqq2")]
    assert all((one[:, :12] == 0).all() for one in apart), "a step reads its own keys as they are"
    assert 0 < apart[0].mean() < apart[1].mean() < apart[2].mean()
    whole = HF.load(replace(request(folder, kv_cache="hqq4"), step_tokens=64))
    assert np.allclose(score_one(HF, whole, IDS)["logprob"], found["f32"], atol=2e-5)

"""The exl3 backend's KV cache: on a toy engine that stores what it is told, and on the real one."""

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_calls import score_one
from test_backend_exl3 import CASES, EXL3, ToyModel, batches_of, checkpoint, engine, ids, stand_in_engine, toy

from evalq.backends._exl3_cache import CACHES, Steps, types_of
from evalq.backends._exl3_run import INPUT_TOKENS_MIN, Handle, stepped
from evalq.engine.backend import Batch, LoadRequest
from evalq.engine.kv_cache import KvCache
from evalq.errors import ModelError

__all__ = ["checkpoint", "ids", "toy"]  # fixtures


class ToyCache:
    """What a step embeds, kept for later steps; with bits, rounded before anybody reads it."""

    num_recurrent_layers = 0

    def __init__(self, model: Any, max_num_tokens: int, layer_type: Any = None, **how: Any) -> None:
        assert max_num_tokens % 256 == 0
        self.max_num_tokens, self.layer_type, self.how = max_num_tokens, layer_type, how
        self.rows: torch.Tensor | None = None
        self.released: list[Any] = []

    def read(self, x_BTH: torch.Tensor, past: int) -> torch.Tensor:
        """Write a step behind what is there, and give all of it."""
        bits = self.how.get("k_bits")
        stored = x_BTH if bits is None else (x_BTH * 2**bits).round() / 2**bits
        before = stored[:, :0] if past == 0 else self.rows
        assert before is not None and before.shape[1] == past, "a step is left out"
        self.rows = torch.cat([before, stored], dim=1)
        return self.rows

    def release_state(self, state: Any) -> None:
        self.released.append(state)


class CachedToy(ToyModel):
    """The toy model with exllamav3's attention through a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, int]] = []

    def forward(self, ids: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        if params["attn_mode"] == "flash_attn_nc":
            return super().forward(ids, params)
        n_windows, room = params["batch_shape"]
        assert n_windows == len(ids) and n_windows * room <= params["cache"].max_num_tokens
        past, length = params["past_len"], ids.shape[1]
        assert (past == 0) == ("recurrent_states" not in params)
        params["recurrent_states"] = [f"state {i}" for i in range(n_windows)]
        self.steps.append((past, length))
        embedding, mean = (module._weight for module in self.modules[:2])
        seen = params["cache"].read(embedding[ids], past)
        counts = torch.arange(1, past + length + 1)[None, :, None]
        return ((seen.cumsum(1) / counts) @ mean)[:, past:]


def with_cache(toy: Handle, bits: int | None, step_tokens: int = 100) -> Handle:
    for module in toy.model.modules:
        module.load("toy")
    model = CachedToy()
    how = {} if bits is None else {"k_bits": bits, "v_bits": bits}
    cache, plain = ToyCache(model, 4 * 768, **how), ToyCache(model, 4 * 768)
    toy.model, toy.steps = model, Steps(cache, plain, step_tokens, 768)
    return toy


def test_steps_give_the_scores_of_one_pass(toy: Handle) -> None:
    handle = with_cache(toy, None)
    batches = batches_of(*CASES)
    for batch, found in zip(batches, stepped(handle, batches), strict=True):
        wanted, wanted_top1 = handle.model.expected(batch)
        assert np.allclose(found["logprob"].numpy(), wanted, atol=2e-5)
        assert np.array_equal(found["top1"].numpy(), wanted_top1)
    assert handle.steps is not None and len(handle.steps.cache.released) == sum(n for n, _, _ in CASES)


def test_steps_are_equal_and_no_longer_than_they_may_be(toy: Handle) -> None:
    handle = with_cache(toy, None, 512)
    list(stepped(handle, batches_of((1, 700, 1), (1, 20, 1))))
    assert handle.model.steps == [(0, 349), (349, 350), (0, INPUT_TOKENS_MIN)]


def test_quantized_cache_shows_and_the_plain_one_beside_it_does_not(toy: Handle) -> None:
    batch = batches_of((2, 600, 301))[0]
    (plain,) = stepped(with_cache(toy, None), [batch])
    coarse = with_cache(toy, 2)
    (quantized,) = stepped(coarse, [batch])
    (beside,) = stepped(coarse, [batch], plain=True)
    assert not np.array_equal(quantized["logprob"].numpy(), plain["logprob"].numpy())
    assert np.array_equal(beside["logprob"].numpy(), plain["logprob"].numpy())


def caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in engine with the names of exllamav3's caches."""
    import sys

    for name in ("CacheLayer_fp16", "CacheLayer_quant"):
        setattr(sys.modules["exllamav3"], name, types.SimpleNamespace(name=name))
    setattr(sys.modules["exllamav3"], "Cache", ToyCache)  # noqa: B010


@pytest.mark.parametrize(
    ("options", "steps", "kind", "bits"),
    [
        ({"kv_cache": "4"}, 512, "CacheLayer_quant", (4, 4)),
        ({"kv_cache": "8/3"}, 512, "CacheLayer_quant", (8, 3)),
        ({"kv_cache": "fp16"}, 512, "CacheLayer_fp16", (None, None)),
        ({}, 512, "CacheLayer_fp16", (None, None)),
    ],
)
def test_options_become_caches_before_the_model_is_loaded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], steps: int, kind: str, bits: Any
) -> None:
    model = stand_in_engine(monkeypatch)
    caches(monkeypatch)
    made: list[ToyCache] = []
    monkeypatch.setattr(ToyCache, "__init__", noting(made, model))
    handle = EXL3.load(LoadRequest(tiny, 1000, 999, options | {"batch_windows": 2}, step_tokens=steps)).handle
    cache = handle.steps.cache
    assert cache.layer_type.name == kind and cache.max_num_tokens == 2 * 1024
    assert (cache.how.get("k_bits"), cache.how.get("v_bits")) == bits
    assert (handle.steps.plain is not None) == (bits != (None, None)) and len(made) == 1 + (
        bits[0] is not None
    )


def noting(made: list[ToyCache], model: ToyModel) -> Any:
    """ToyCache.__init__ that notes what was made, and that the model was not loaded yet."""
    inner = ToyCache.__init__

    def init(self: ToyCache, *arguments: Any, **how: Any) -> None:
        assert model.loaded_with is None
        made.append(self)
        inner(self, *arguments, **how)

    return init


def test_one_pass_without_a_cache_as_long_as_nobody_asks(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_engine(monkeypatch)
    assert EXL3.load(LoadRequest(tiny, 600, 599, {})).handle.steps is None
    assert EXL3.load(LoadRequest(tiny, 600, 599, {}, step_tokens=8192)).handle.steps is None


def test_loader_of_several_gpus_sees_whole_pages(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stand_in_engine(monkeypatch)
    caches(monkeypatch)
    EXL3.load(LoadRequest(tiny, 2048, 2047, {"kv_cache": "6", "gpu_split": [1, 1]}, step_tokens=512))
    assert model.loaded_with is not None and model.loaded_with["max_chunk_size"] == 512


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache": "fp16/4"}, "both keys and values or neither, not fp16/4"),
        ({"kv_cache": "4", "streaming": True}, "streaming keeps one module at a time and no KV cache"),
    ],
)
def test_what_cannot_go_together_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        EXL3.kv_cache(options)
    assert caught.value.category == "bad_option" and words in caught.value.message


def test_types() -> None:
    assert types_of({"kv_cache": CACHES.canonical("8/4")}) == KvCache("8", "4")
    assert CACHES.types == ("fp16", "8", "7", "6", "5", "4", "3", "2")
    for text in ("1", "9", "q4_0", "fp8"):
        with pytest.raises(ValueError, match="exllamav3 has"):
            CACHES.canonical(text)


def test_layers_without_a_quantized_cache_are_told() -> None:
    cache = types.SimpleNamespace(num_recurrent_layers=5)
    (note,) = Steps(cache, object(), 512, 1024).notes
    assert "5 layers" in note
    assert Steps(cache, None, 512, 1024).notes == []


class TestEngine:
    pytestmark = engine

    def test_steps_alone_change_rounding_and_fewer_bits_more(self, checkpoint: Path, ids: np.ndarray) -> None:
        found: dict[str, np.ndarray] = {}
        for cache in ("auto", "fp16", "8", "4", "2"):
            options = {} if cache == "auto" else {"kv_cache": cache}
            steps = None if cache == "auto" else 256
            model = EXL3.load(LoadRequest(checkpoint, 600, 599, options, n_windows=3, step_tokens=steps))
            found[cache] = score_one(EXL3, model, ids)["logprob"]
            if cache in ("8", "4", "2"):
                beside = EXL3.score_other_cache(model, Batch(ids, 1, ("logprob",)))["logprob"]
                assert np.array_equal(beside, found["fp16"])
            EXL3.close(model)
        assert abs((found["fp16"] - found["auto"]).mean()) < 1e-3
        apart = [float(np.abs(found[cache] - found["fp16"]).mean()) for cache in ("8", "4", "2")]
        assert 0 < apart[0] < apart[1] < apart[2]

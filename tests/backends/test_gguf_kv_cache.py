"""The KV cache of the gguf backend: types, steps, and that it is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from test_backend_gguf import GGUF, prose_ids, tiny
from tiny_gguf import TINY_VOCAB, write_tiny

from evalq.backends import _llama, _llama_plan
from evalq.engine.backend import Batch, LoadRequest, Machine
from evalq.engine.kv_cache import KvCache
from evalq.errors import ModelError

__all__ = ["prose_ids", "tiny"]  # fixtures
LOGPROB = ("logprob",)
IDS = np.random.default_rng(5).integers(3, TINY_VOCAB, (2, 60))


def scored(
    path: Path,
    ids_BT: NDArray[np.int64],
    options: Mapping[str, Any],
    steps: int | None = None,
    other: bool = False,
) -> NDArray[np.float32]:
    """Log-probabilities of all tokens but the first; `other`: with f16 in a second context's cache."""
    n_rows, n_tokens = ids_BT.shape
    chosen = {
        "threads": 1,
        **options,
    }  # waiting for each other at barriers, two threads are slow on a busy machine
    asked = LoadRequest(path, n_tokens, n_tokens - 1, chosen, n_windows=n_rows, step_tokens=steps)
    model = GGUF.load(asked)
    batch = Batch(ids_BT, 1, LOGPROB)
    found = GGUF.score_other_cache(model, batch) if other else next(GGUF.score(model, [batch]))
    GGUF.close(model)
    logprob: NDArray[np.float32] = found["logprob"]
    return logprob


@pytest.mark.parametrize(
    ("options", "types"),
    [
        ({}, KvCache("fp16", "fp16")),
        ({"kv_cache": "q8_0"}, KvCache("q8_0", "q8_0")),
        ({"kv_cache": "q8_0/q4_0"}, KvCache("q8_0", "q4_0")),
        ({"cache_type_k": "q5_1"}, KvCache("q5_1", "fp16")),
        ({"cache_type_k": "f32", "cache_type_v": "bf16"}, KvCache("f32", "bf16")),
    ],
)
def test_types_become_those_of_the_context(options: dict[str, Any], types: KvCache) -> None:
    assert _llama_plan.cache_types(options) == types
    asked = LoadRequest(Path("m.gguf"), 60, 59, options)
    params = _llama_plan.context_params(_llama_plan.make_plan(asked), options)
    expected = [GGMLQuantizationType[t.upper().replace("FP16", "F16")] for t in (types.k, types.v)]
    assert [params.type_k, params.type_v] == expected


def test_every_type_that_is_listed_loads_and_scores(tiny: Path) -> None:
    plain = scored(tiny, IDS, {})
    for name in _llama_plan.CACHES.types:
        found = scored(tiny, IDS, {"kv_cache": name}, 64)
        assert np.isfinite(found).all(), name
        assert np.corrcoef(found.ravel(), plain.ravel())[0, 1] > 0.7, name


def test_record_says_the_types_by_either_name() -> None:
    assert GGUF.kv_cache({}) is None
    assert GGUF.kv_cache({"kv_cache": "fp16"}) == KvCache("fp16", "fp16")
    assert GGUF.kv_cache({"cache_type_v": "q4_0", "cache_type_k": "q8_0"}) == KvCache("q8_0", "q4_0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache": "q8_0", "cache_type_k": "q8_0"}, "kv_cache and cache_type_k say the same thing"),
        ({"kv_cache": "q8_0", "flash_attn": False}, "with flash attention only"),
        ({"kv_cache": "fp16/q4_0", "flash_attn": False}, "reads quantized values (q4_0) with flash"),
    ],
)
def test_what_cannot_go_together_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        GGUF.kv_cache(options)
    assert caught.value.category == "bad_option" and words in caught.value.message


def test_keys_alone_may_be_quantized_without_flash_attention(tiny: Path) -> None:
    options = {"kv_cache": "q8_0/fp16", "flash_attn": False}
    assert np.isfinite(scored(tiny, IDS, options)).all()


@pytest.mark.parametrize("steps", [64, 20, 7])
def test_steps_bound_what_is_decoded_at_once(steps: int) -> None:
    asked = LoadRequest(Path("m.gguf"), 400, 399, {"batch_windows": 2}, n_windows=4, step_tokens=steps)
    plan = _llama_plan.make_plan(asked)
    assert plan.n_batch // plan.batch_windows <= steps and plan.n_ubatch <= plan.n_batch


def test_steps_alone_change_rounding_only(tiny: Path) -> None:
    whole = scored(tiny, IDS, {"flash_attn": False})
    in_steps = scored(tiny, IDS, {"flash_attn": False}, 16)
    np.testing.assert_allclose(in_steps, whole, atol=2e-3)


def test_other_cache_is_the_unquantized_one_in_the_same_steps(tiny: Path) -> None:
    plain = scored(tiny, IDS, {"kv_cache": "fp16"}, 16)
    np.testing.assert_array_equal(scored(tiny, IDS, {"kv_cache": "q4_0"}, 16, other=True), plain)
    assert not np.array_equal(scored(tiny, IDS, {"kv_cache": "q4_0"}, 16), plain)


def test_heads_that_a_block_does_not_divide(tmp_path: Path) -> None:
    """Blocks of 32 elements do not fit heads of 16: the engine's words, as an option's error."""
    write_tiny(tmp_path / "m.gguf", heads=4)
    with pytest.raises(ModelError) as caught:
        scored(tmp_path / "m.gguf", IDS, {"kv_cache": "q8_0"}, 64)
    assert caught.value.category == "bad_option" and "does not divide" in caught.value.message


@pytest.mark.engine
def test_coarser_caches_lose_more(smollm2_gguf: Path, prose_ids: NDArray[np.int64]) -> None:
    ids = prose_ids[None, :300]
    plain = scored(smollm2_gguf, ids, {"kv_cache": "fp16"}, 75)
    whole = scored(smollm2_gguf, ids, {})
    np.testing.assert_allclose(plain, whole, atol=1e-3)
    apart = {
        name: float(np.abs(scored(smollm2_gguf, ids, {"kv_cache": name}, 75) - plain).mean())
        for name in ("q8_0", "q4_0", "q8_0/q4_0")
    }
    assert 1e-3 < apart["q8_0"] < apart["q8_0/q4_0"] < apart["q4_0"] < 1


@pytest.mark.parametrize("cache", ["auto", "q8_0", "q8_0/q4_0", "f32/q5_1"])
def test_planned_cache_is_what_llama_cpp_allocates(tiny: Path, cache: str) -> None:
    options = {} if cache == "auto" else {"kv_cache": cache}
    request = LoadRequest(tiny, 60, 59, options | {"batch_windows": 3}, n_windows=3)
    planned = GGUF.predict(request, Machine((), 1.0, {}))
    assert planned is not None and planned.category is None
    _llama.LOG.clear()
    GGUF.close(GGUF.load(request))
    said = _llama.LOG.matches(r"KV buffer size = +([\d.]+) MiB")
    assert sum(float(match[1]) for match in said) == pytest.approx(
        1024 * planned.memory["kv_cache_gib"], abs=0.006
    )


def test_nothing_is_planned_for_a_header_that_says_too_little(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", heads=0)
    assert GGUF.predict(LoadRequest(tmp_path / "m.gguf", 60, 59, {}), Machine((), 1.0, {})) is None

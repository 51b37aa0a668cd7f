"""The planner against measured vLLM runs: weights, KV memory, tokens, outcomes."""

from dataclasses import replace
from functools import cache

import pytest
from plan_benchmark import measured

from evalq.checkpoint.shape import ModelShape
from evalq.vllm_memory.activation import GIB
from evalq.vllm_memory.gpus import PlannedGpu, gpu_named
from evalq.vllm_memory.plan import PlanSettings, plan
from evalq.vllm_memory.plan_advice import advise

LLAMA_8B = "Llama-3.1-8B-Instruct"


@cache
def shape(name: str) -> ModelShape:
    return measured.shape(name)


def label(row) -> str:
    return f"{row.model} TP{row.settings.tp}"


WEIGHED = [row for row in measured.MEASURED if row.weights]


@pytest.mark.parametrize("row", WEIGHED, ids=label)
def test_weights_are_those_measured(row):
    planned = plan(shape(row.model), row.gpu, row.settings).weights_gib
    # What was logged is rounded to 0.01.
    assert abs(planned - row.weights) <= max(0.005 * row.weights, 0.0051)


@pytest.mark.parametrize("row", [row for row in measured.MEASURED if row.activation], ids=label)
def test_kv_memory_follows_from_the_measured_parts(row):
    planned = measured.given(row, {row.model: shape(row.model)})
    assert planned.kv_gib.low == planned.kv_gib.high
    assert planned.kv_gib.expected == pytest.approx(row.kv, abs=0.05)


@pytest.mark.parametrize("row", [row for row in measured.MEASURED if row.activation], ids=label)
def test_activation_lies_in_the_range(row):
    estimate = plan(shape(row.model), row.gpu, row.settings).activation
    assert estimate.low <= row.activation <= estimate.high
    assert estimate.expected == pytest.approx(row.activation, abs=0.1)


@pytest.mark.parametrize("row", [row for row in measured.MEASURED if row.kv_tokens], ids=label)
def test_tokens_follow_from_the_measured_kv_memory(row):
    planned = plan(shape(row.model), row.gpu, row.settings)
    found = planned.pool.tokens(row.kv * GIB, planned.max_len, row.settings.version)
    # 0.01 GiB of rounding, in tokens.
    assert found == pytest.approx(row.kv_tokens, rel=0.01 / row.kv)


@pytest.mark.parametrize("outcome", measured.OUTCOMES, ids=lambda o: f"{label(o)} {o.status}")
def test_outcomes_are_those_that_happened(outcome):
    planned = plan(shape(outcome.model), outcome.gpu, outcome.settings)
    assert planned.status == outcome.status
    assert planned.fits == (outcome.status == "fits")
    assert (planned.category is None) == planned.fits
    assert planned.is_certain


@pytest.mark.parametrize(
    ("name", "per_token", "state"),
    [
        (LLAMA_8B, 131072, 0),
        ("Llama-3.3-70B-Instruct-FP8-dynamic", 327680, 0),
        ("Qwen3-0.6B", 114688, 0),
        ("Mixtral-8x7B-Instruct-v0.1-FP8", 131072, 0),
        ("gpt-oss-20b", 24576, 0),
        ("DeepSeek-R1", 70272, 0),
        ("opt-125m", 36864, 0),
        ("Llama-4-Scout-17B-16E-w4a16", 49152, 0),
        ("Qwen3-Next-80B-A3B-Instruct-FP8", 24576, 36 * (8192 * 3 + 32 * 128 * 128) * 2),
    ],
)
def test_kv_bytes_of_every_architecture(name, per_token, state):
    planned = plan(shape(name), measured.H200, PlanSettings(max_len=1000))
    assert (planned.kv_bytes_per_token, planned.state_bytes) == (per_token, state)


def test_latent_caches_are_not_divided_and_few_heads_are_repeated():
    latent = [
        plan(shape("DeepSeek-R1"), measured.H200, PlanSettings(tp=tp)).kv_bytes_per_token for tp in (1, 8)
    ]
    assert latent[0] == latent[1] == 70272
    heads = [
        plan(shape(LLAMA_8B), measured.H100, PlanSettings(tp=tp)).kv_bytes_per_token for tp in (1, 8, 16)
    ]
    assert heads == [131072, 131072 // 8, 131072 // 8]


def test_fp8_cache_and_offload_and_pipeline():
    settings = PlanSettings(max_len=16000)
    base = plan(shape(LLAMA_8B), measured.H100, settings)
    fp8 = plan(shape(LLAMA_8B), measured.H100, replace(settings, kv_dtype="fp8"))
    assert fp8.kv_bytes_per_token * 2 == base.kv_bytes_per_token
    assert fp8.kv_tokens == pytest.approx(2 * base.kv_tokens, rel=1e-3)
    offloaded = plan(shape(LLAMA_8B), measured.H100, replace(settings, cpu_offload_gib=5))
    assert offloaded.weights_gib == pytest.approx(base.weights_gib - 5)
    halves = plan(shape(LLAMA_8B), measured.H100, replace(settings, pp=2))
    # Half of the layers, and one of the two vocabulary matrices.
    assert halves.weights_gib == pytest.approx(base.weights_gib / 2, abs=0.02)
    assert halves.kv_bytes_per_token * 2 == base.kv_bytes_per_token


def test_lora_slots():
    base = plan(shape(LLAMA_8B), measured.H100, PlanSettings())
    one = plan(shape(LLAMA_8B), measured.H100, PlanSettings(lora_rank=10))
    four = plan(shape(LLAMA_8B), measured.H100, PlanSettings(lora_rank=16, max_loras=4))
    # Rank 10 takes a slot of 16: A and B of q, k, v, o, gate, up, down, and of two vocabulary matrices.
    hidden, keys, inner = 4096, 1024, 14336
    layer = 4 * hidden + 2 * (hidden + keys) + 3 * (hidden + inner)
    assert one.weights.lora == 2 * 16 * (32 * layer + 2 * (hidden + 128256))
    assert four.weights.lora == 4 * one.weights.lora
    assert one.weights_gib > base.weights_gib


def test_defaults_follow_the_version_and_the_gpu():
    old = plan(shape(LLAMA_8B), measured.H100, PlanSettings(version=(0, 20)))
    new = plan(shape(LLAMA_8B), measured.H100, PlanSettings(version=(0, 33)))
    assert (old.budget_gib, new.budget_gib) == pytest.approx((0.9 * 79.18, 0.92 * 79.18))
    assert old.graphs.high == 0 < new.graphs.low
    assert (
        plan(shape(LLAMA_8B), measured.A100, PlanSettings(max_len=1000))
        .settings.step(measured.A100)
        .sequences
        == 256
    )
    assert PlanSettings().step(measured.H100).tokens == 16384


def test_too_long_names_the_length_that_fits():
    gpu = gpu_named("rtx 4090")
    planned = plan(shape(LLAMA_8B), gpu, PlanSettings())
    assert planned.status == "fits_shorter"
    assert planned.category == "max_len_too_large"
    assert f"fits up to {planned.longest:,} tokens, not 131,072" in planned.verdict
    assert plan(shape(LLAMA_8B), gpu, PlanSettings(max_len=planned.longest)).fits
    assert not plan(shape(LLAMA_8B), gpu, PlanSettings(max_len=planned.longest + 1)).fits


def test_advice_is_what_then_fits():
    name, settings = "Llama-3.3-70B-Instruct-FP8-dynamic", PlanSettings(max_len=16000)
    planned = plan(shape(name), measured.H100, settings)
    advice = advise(shape(name), measured.H100, settings, planned)
    assert advice.smallest_tp == 2
    assert plan(shape(name), measured.H100, replace(settings, tp=2)).fits
    assert advice.bits == pytest.approx(8.003, abs=0.001)
    assert [f.name for f in advice.formats if f.fits] == ["NVFP4", "MXFP4", "INT4 g128"]
    eight = next(f for f in advice.formats if f.name == "FP8 or INT8")
    assert eight.weights_gib == pytest.approx(planned.weights_gib, rel=0.005)


def test_formats_agree_with_a_checkpoint_in_that_format():
    planned = plan(shape("SmolLM2-135M-padded"), measured.H200, PlanSettings())
    advice = advise(shape("SmolLM2-135M-padded"), measured.H200, PlanSettings(), planned)
    int4 = next(f for f in advice.formats if f.name == "INT4 g128")
    real = plan(shape("SmolLM2-135M-padded-w4a16"), measured.H200, PlanSettings())
    assert int4.weights_gib == pytest.approx(real.weights_gib, rel=1e-3)


def test_a_close_call_says_so():
    planned = plan(shape("Llama-3.3-70B-Instruct-FP8-dynamic"), measured.H100, PlanSettings(max_len=2000))
    assert planned.status == "no_kv_memory"
    assert planned.status_best == "fits"
    assert not planned.is_certain
    told = replace(planned.settings, activation_gib=0.8)
    assert plan(shape("Llama-3.3-70B-Instruct-FP8-dynamic"), measured.H100, told).fits


def test_everything_is_json(tmp_path):
    import json

    planned = plan(shape("gpt-oss-20b"), PlannedGpu("mine", 24.0), PlanSettings(tp=2))
    read = json.loads(json.dumps(planned.as_dict()))
    assert read["settings"]["tp"] == 2
    assert read["status"] == planned.status
    assert read["kv_cache_gib"]["expected"] == pytest.approx(planned.kv_gib.expected, abs=1e-3)
    assert sum(read["weights_parts_gib"][k] for k in ("files", "padding", "rope", "derived", "lora")) == (
        pytest.approx(read["weights_gib"], abs=1e-3)
    )


@pytest.mark.parametrize("label", measured.H200_RUNS)
def test_an_h200_used_what_was_predicted(label):
    used = measured.h200_memory()[label]
    planned = plan(shape(measured.H200_RUNS[label]), measured.H200, measured.H200_SETTINGS)
    # The allocator rounds every tensor up: 8 MB in all.
    assert 0 <= used["weights_gib"] - planned.weights_gib < 0.01
    assert planned.activation.low <= used["peak_activation_gib"] <= planned.activation.high
    assert planned.non_torch.low <= used["non_torch_gib"] <= planned.non_torch.high
    assert planned.kv_gib.low <= used["kv_cache_gib"] <= planned.kv_gib.high

"""config.json and headers that no model has: one line, at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import small_config, write_model

from evalq.checkpoint import shape as shape_module
from evalq.checkpoint.shape import SIZE_MAX, ModelShape, make_shape, read_shape
from evalq.checkpoint.shards import RawTensor
from evalq.cli.main import main
from evalq.errors import EvalqError, SpecError
from evalq.vllm_memory.gpus import PlannedGpu, gpu_named
from evalq.vllm_memory.plan import PlanSettings, plan
from evalq.vllm_memory.plan_advice import advise
from evalq.vllm_memory.plan_result import VllmPlan

SHAPES = {
    "model.embed_tokens.weight": ("BF16", (96, 256)),
    "model.layers.0.mlp.down_proj.weight": ("BF16", (256, 512)),
    "model.layers.1.mlp.down_proj.weight": ("BF16", (256, 512)),
    "lm_head.weight": ("BF16", (96, 256)),
}
H100 = gpu_named("H100")
# Nested as deep as json reads it, too large, of another kind: what stands where a number or an object should.
ODD: list[Any] = [
    None, True, -1, 0, 10**7, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "8", "x" * 100_000, [], {},
    [1, None, "a", {}], {"weights": 3}, {"a": [{}], "b": {"weights": []}}, ["full_attention"] * 20_000,
]  # fmt: skip


def planned(tmp_path: Path, **changes: Any) -> VllmPlan:
    folder = write_model(tmp_path / "m", SHAPES, small_config(**changes))
    shape = read_shape(str(folder))
    settings = PlanSettings(max_len=64)
    found = plan(shape, H100, settings)
    json.dumps(found.as_dict() | advise(shape, H100, settings, found).as_dict(), allow_nan=False)
    return found


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**7}, "says 10000000 layers; no model has so many"),
        ({"num_hidden_layers": 3}, "says 3 layers, the files hold 2"),
        ({"num_hidden_layers": "2"}, "says num_hidden_layers = 2"),
        ({"hidden_size": 10**400}, "says hidden_size = a number beyond all sizes"),
        ({"vocab_size": [96]}, "says vocab_size = a list"),
        ({"num_attention_heads": 257}, "says 257 heads for a hidden size of 256"),
        ({"layer_types": ["moe", "mlp"]}, "no layer on the fullest GPU keeps a KV cache"),
        ({"layer_types": [7, "x" * 100_000]}, 'layer of type "\\?" is not known'),
        ({"layer_types": ["x" * 100_000] * 2}, r'layer of type "x{100,117}\.\.\." is not known'),
    ],
)
def test_what_no_model_can_have(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as found:
        planned(tmp_path, **changes)
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


@pytest.mark.timeout(20)
@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize(
    "field",
    [
        "quantization_config", "rope_parameters", "partial_rotary_factor", "layer_types", "sliding_window",
        "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "model_type",
        "num_experts", "kv_lora_rank", "tie_word_embeddings", "text_config", "torch_dtype",
        "num_hidden_layers",
    ],
)  # fmt: skip
def test_an_odd_value_is_read_or_refused(tmp_path: Path, field: str, value: Any) -> None:
    try:
        found = planned(tmp_path, **{field: value})
    except EvalqError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        assert found.weights_gib >= 0 and found.kv_tokens >= 0


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("key", ["config_groups", "bits", "num_bits", "quant_method", "w_bit"])
def test_an_odd_quantization_setting_is_read_or_refused(tmp_path: Path, key: str, value: Any) -> None:
    settings = {"quant_method": "compressed-tensors", key: value}
    try:
        found = planned(tmp_path, quantization_config=settings)
    except EvalqError as error:
        assert "\n" not in str(error)
    else:
        assert found.weights_gib > 0


def test_layers_of_multi_token_prediction_may_follow(tmp_path: Path) -> None:
    assert planned(tmp_path, num_hidden_layers=1).fits


def test_towers_have_layers_of_their_own() -> None:
    vision = "vision_tower.encoder.layers.23.mlp.fc1.weight"
    tensors = [RawTensor(vision, "BF16", (4, 4), Path("f"), 0, 32)]
    assert shape_of(tensors).layers == 2


def shape_of(tensors: list[RawTensor], **changes: Any) -> ModelShape:
    return make_shape("m", small_config(**changes), tensors)


def test_more_tensors_than_any_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_module, "HEADERS_MAX", 100)
    experts = [RawTensor(f"m.layers.0.experts.{i}.w", "BF16", (4, 4), Path("f"), 0, 32) for i in range(200)]
    assert len(shape_of(experts, num_hidden_layers=1).headers) == 1
    others = [RawTensor(f"t{i}", "BF16", (4, 4), Path("f"), 0, 32) for i in range(101)]
    with pytest.raises(SpecError, match="101 different tensors; no model has so many"):
        shape_of(others)


@pytest.mark.parametrize(
    "settings",
    [
        PlanSettings(max_num_seqs=10**400),
        PlanSettings(max_num_batched_tokens=10**400),
        PlanSettings(max_loras=10**400, lora_rank=1),
        PlanSettings(tp=10**400),
        PlanSettings(activation_gib=1e300),
        PlanSettings(cpu_offload_gib=1e300),
    ],
)
def test_settings_beyond_any_machine(settings: PlanSettings) -> None:
    with pytest.raises(SpecError, match="is larger than any machine"):
        plan(shape_of([]), H100, settings)


def test_a_gpu_beyond_any_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m", SHAPES, small_config())
    assert main(["plan", str(folder), "--gpu-memory", "1e308"]) == 2
    assert capsys.readouterr().err == (
        f"evalq: --gpu-memory is larger than any machine (at most {SIZE_MAX})\n"
    )
    assert plan(shape_of([]), PlannedGpu("small", 1e-9), PlanSettings()).category == "oom_load"


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "~nouser/model", "a/" * 3000, "\ud800", "", "a\nb/c"])
def test_names_that_are_no_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name, "--gpu", "H100"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_name_with_escapes_does_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "a\x1b]0;title\x07b", SHAPES, small_config())
    for more in ([], ["--json"], ["--tp", "3"]):
        main(["plan", str(folder), "--gpu", "H100", *more])
        written = capsys.readouterr()
        assert "\x1b" not in written.out + written.err and "\x07" not in written.out + written.err

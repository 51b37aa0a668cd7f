"""Scales of experts that calibration never reached: NaN, zero, or the 1.0 that they were made with."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Shapes, write_model

from evalq.checkpoint.headers import open_checkpoint
from evalq.inspect import check

EXPERTS, LAYERS = 6, 3
NAN, INF = float("nan"), float("inf")


def experts(
    folder: Path, scale: str, value: Callable[[int, int], float], parts=("gate_proj", "down_proj")
) -> Path:
    """An FP8 model with one number per expert: `value(layer, expert)`."""
    shapes: Shapes = {"model.embed_tokens.weight": ("BF16", (64, 32))}
    values = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for part in parts:
                module = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
                shapes |= {
                    f"{module}.weight": ("F8_E4M3", (32, 32)),
                    f"{module}.weight_scale": ("F32", (1,)),
                    f"{module}.input_scale": ("F32", (1,)),
                }
                sound = {"weight_scale": 0.25 + expert / 64, "input_scale": 0.5 + expert / 64}
                for name, number in (sound | {scale: value(layer, expert)}).items():
                    values[f"{module}.{name}"] = struct.pack("<f", number)
    config = {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "fp8"}, "vocab_size": 64}
    return write_model(folder, shapes, config, values)


def found(folder: Path) -> dict[str, str]:
    return {f.name: f.message for f in check(folder) if f.name.startswith("expert-scale")}


@pytest.mark.parametrize(
    ("bad", "name", "words"),
    [
        (NAN, "expert-scale-not-finite", "NaN or infinite"),
        (INF, "expert-scale-not-finite", "NaN or infinite"),
        (-INF, "expert-scale-not-finite", "NaN or infinite"),
        (0.0, "expert-scale-zero", "zero"),
        (-0.0, "expert-scale-zero", "zero"),
        (1.0, "expert-scale-default", "1 exactly"),
    ],
)
def test_layers_and_experts_are_named(tmp_path: Path, bad: float, name: str, words: str) -> None:
    unreached = {(0, 5), (2, 1), (2, 3)}
    folder = experts(
        tmp_path, "input_scale", lambda layer, e: bad if (layer, e) in unreached else 0.5 + e / 64
    )
    (line,) = [message for key, message in found(folder).items() if key == name]
    assert f"input_scale is {words} for 3 experts of 2 layers" in line
    assert "model.layers.0.mlp.experts 5 of 6; model.layers.2.mlp.experts 1, 3 of 6" in line
    assert "calibration seems not to have reached" in line and "\n" not in line
    assert set(found(folder)) == {name}


def test_they_are_notes_of_a_record_and_do_not_stop_it(tmp_path: Path) -> None:
    folder = experts(tmp_path, "input_scale", lambda layer, e: NAN if e == 2 else 0.5)
    notes = open_checkpoint(folder).storage.findings
    assert [note for note in notes if note.startswith("expert-scale-not-finite: input_scale is NaN")]
    assert all(finding.severity == "warning" for finding in check(folder))


def test_sound_scales_have_no_finding(tmp_path: Path) -> None:
    assert found(experts(tmp_path / "apart", "input_scale", lambda layer, e: 0.5 + e / 64)) == {}
    shared = experts(tmp_path / "shared", "input_scale", lambda layer, e: 0.75)
    assert found(shared) == {}, "one scale for all experts of a layer is a choice"


def test_ones_everywhere_are_no_scale_of_weights_but_no_calibration_of_inputs(tmp_path: Path) -> None:
    assert found(experts(tmp_path / "weights", "weight_scale", lambda layer, e: 1.0)) == {}
    line = found(experts(tmp_path / "inputs", "input_scale", lambda layer, e: 1.0))["expert-scale-default"]
    assert "18 experts of 3 layers" in line


def test_many_are_counted(tmp_path: Path) -> None:
    shapes: Shapes = {}
    values = {}
    for layer in range(9):
        for expert in range(40):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.input_global_scale"
            shapes[name], values[name] = ("F32", (1,)), struct.pack("<f", 0.0)
    line = found(write_model(tmp_path, shapes, {}, values))["expert-scale-zero"]
    assert "input_global_scale is zero for 360 experts of 9 layers" in line
    assert "0, 1, 2, 3, 4, 5, 6, 7 and 32 more of 40" in line and "and in 5 more layers" in line
    assert len(line) < 600


@pytest.mark.parametrize("name", ["gate_up_proj_input_scale", "w13_input_scale", "down_proj.input_scale"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_one_tensor_for_all_experts(tmp_path: Path, name: str, dtype: str) -> None:
    numbers = np.array([0.5, NAN, 0.25, 0.0], np.float32)
    raw = {
        "F32": numbers.tobytes(),
        "F16": numbers.astype(np.float16).tobytes(),
        "BF16": (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
    }[dtype]
    tensor = f"model.layers.7.mlp.experts.{name}"
    lines = found(write_model(tmp_path, {tensor: (dtype, (4,))}, {}, {tensor: raw}))
    assert "model.layers.7.mlp.experts 1 of 4" in lines["expert-scale-not-finite"]
    assert "model.layers.7.mlp.experts 3 of 4" in lines["expert-scale-zero"]


def test_layers_that_are_no_experts_are_left_alone(tmp_path: Path) -> None:
    names = ("model.layers.0.mlp.shared_expert.up_proj.input_scale", "model.layers.0.mlp.up_proj.input_scale")
    shapes: Shapes = {name: ("F32", (1,)) for name in names}
    assert found(write_model(tmp_path, shapes, {})) == {}


def test_deep_names_the_experts_whose_groups_are_broken(tmp_path: Path) -> None:
    shapes: Shapes = {}
    values = {}
    for layer in range(2):
        for expert in range(4):
            module = f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
            shapes |= {f"{module}.weight": ("F8_E4M3", (32, 32)), f"{module}.weight_scale": ("F32", (32, 1))}
            number = NAN if (layer, expert) in {(0, 3), (1, 0), (1, 2)} else 0.5
            values[f"{module}.weight_scale"] = struct.pack("<32f", *[number] * 32)
    folder = write_model(tmp_path, shapes, {"quantization_config": {"quant_method": "fp8"}}, values)
    (line,) = [f.message for f in check(folder, deep=True) if f.name == "scale-not-finite"]
    assert "model.layers.0.mlp.experts 3 of 4; model.layers.1.mlp.experts 0, 2 of 4" in line
    assert "weight_scale of 3 experts" in line and "more like it" not in line

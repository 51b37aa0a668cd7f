"""Checkpoints made by the compressed-tensors library itself against sizes computed by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evalq.checkpoint.headers import open_checkpoint

MAKER = Path(__file__).parents[1] / "support" / "compress_llama.py"
HIDDEN, INNER, VOCAB, KEY, LAYERS = 256, 512, 96, 128, 2  # as in compress_llama.py
LINEARS = [(HIDDEN, HIDDEN), (KEY, HIDDEN), (KEY, HIDDEN), (HIDDEN, HIDDEN)]  # q, k, v, o: (out, in)
LINEARS += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]  # gate, up, down
WEIGHTS = LAYERS * sum(out * inn for out, inn in LINEARS)

# name -> (bytes of one linear [O, I] with everything beside it, format of the whole)
CT = "compressed-tensors"
CASES = {
    "W4A16": (
        lambda o, i: o * i // 2 + 2 * o * i // 128 + 16,
        f"{CT} pack-quantized INT4 group 128 symmetric",
    ),
    "W4A16_ASYM": (
        lambda o, i: o * i // 2 + 2 * o * i // 128 + o * i // 128 // 2 + 16,
        f"{CT} pack-quantized INT4 group 128 asymmetric",
    ),
    "W4A16_channel": (lambda o, i: o * i // 2 + 2 * o + 16, f"{CT} pack-quantized INT4 channel symmetric"),
    "W4A16_ASYM_channel": (
        lambda o, i: o * i // 2 + 2 * o + o // 2 + 16,
        f"{CT} pack-quantized INT4 channel asymmetric",
    ),
    "W8A16_channel": (lambda o, i: o * i + 2 * o + 16, f"{CT} pack-quantized INT8 channel symmetric"),
    "W4A16_g32_act": (
        lambda o, i: o * i // 2 + 2 * o * i // 32 + 4 * i + 16,
        f"{CT} pack-quantized INT4 group 32 symmetric",
    ),
    "INT8": (lambda o, i: o * i + 2 * o, f"{CT} int-quantized INT8 channel"),
    "FP8_DYNAMIC": (lambda o, i: o * i + 2 * o, f"{CT} float-quantized FP8 channel"),
    "FP8_BLOCK": (
        lambda o, i: o * i + 2 * (o // 128) * (i // 128),
        f"{CT} float-quantized FP8 block 128x128",
    ),
    "FP8": (lambda o, i: o * i + 2 + 2, f"{CT} float-quantized FP8 tensor"),
    "NVFP4A16": (lambda o, i: o * i // 2 + o * i // 16 + 4, f"{CT} nvfp4-pack-quantized NVFP4"),
    "NVFP4": (lambda o, i: o * i // 2 + o * i // 16 + 4 + 4, f"{CT} nvfp4-pack-quantized NVFP4"),
    "MXFP4A16": (lambda o, i: o * i // 2 + o * i // 32, f"{CT} mxfp4-pack-quantized MXFP4"),
    "MXFP8A16": (lambda o, i: o * i + o * i // 32, f"{CT} mxfp8-quantized MXFP8"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    made = subprocess.run([sys.executable, MAKER, out, *CASES], env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return out


@pytest.mark.parametrize("name", CASES)
def test_bits_of_every_scheme(checkpoints, name):
    linear_bytes, format_line = CASES[name]
    report = open_checkpoint(checkpoints / name).storage
    expected_bytes = LAYERS * sum(linear_bytes(out, inn) for out, inn in LINEARS)
    assert (report.layer_bytes, report.layer_weights) == (expected_bytes, WEIGHTS)
    assert report.layer_bpw == pytest.approx(8 * expected_bytes / WEIGHTS, rel=1e-12)
    assert (report.head_bpw, report.head_weights, report.tied_head) == (16.0, VOCAB * HIDDEN, False)
    assert report.vram_gb == (expected_bytes + 2 * VOCAB * HIDDEN) / 2**30
    norms = (2 * LAYERS + 1) * HIDDEN * 2
    assert report.disk_bytes == expected_bytes + 2 * (2 * VOCAB * HIDDEN) + norms
    assert report.format == format_line
    assert report.findings == ()
    assert report.layer_bpw_true is None


def test_table_values_for_group_128(checkpoints):
    """16 bytes of weight_shape per layer are all that stands between these and 4.125 and 4.15625."""
    shape_bits = 8 * 16 * len(LINEARS) * LAYERS / WEIGHTS
    bpw = {name: open_checkpoint(checkpoints / name).storage.layer_bpw for name in ("W4A16", "W4A16_ASYM")}
    assert bpw["W4A16"] == pytest.approx(4.125 + shape_bits, rel=1e-12)
    assert bpw["W4A16_ASYM"] == pytest.approx(4.15625 + shape_bits)


def test_logical_names_are_the_unquantized_models(checkpoints):
    report = open_checkpoint(checkpoints / "W4A16").storage
    by_kind = {kind: {t.name for t in report.tensors if t.kind == kind} for kind in ("layer", "head", "norm")}
    assert "model.layers.1.mlp.down_proj.weight" in by_kind["layer"]
    assert len(by_kind["layer"]) == len(LINEARS) * LAYERS
    assert by_kind["head"] == {"lm_head.weight"}
    assert len(by_kind["norm"]) == 2 * LAYERS + 1


def test_mixed_checkpoint(checkpoints, tmp_path):
    """One quantized layer replaced by its unquantized twin: 16 bits for that one, no other change."""
    tensors = load_file(checkpoints / "W4A16" / "model.safetensors")
    stem = "model.layers.0.mlp.down_proj"
    removed = [tensors.pop(n) for n in list(tensors) if n.startswith(stem)]
    tensors[f"{stem}.weight"] = torch.zeros(HIDDEN, INNER, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoints / "W4A16" / "config.json").read_bytes())
    before, after = open_checkpoint(checkpoints / "W4A16").storage, open_checkpoint(tmp_path).storage
    assert after.layer_weights == before.layer_weights
    gained = 2 * HIDDEN * INNER - sum(t.nbytes for t in removed)
    assert after.layer_bytes == before.layer_bytes + gained
    share = 100 * HIDDEN * INNER / WEIGHTS
    assert after.format == f"{CASES['W4A16'][1]}, BF16 {share:.0f}%"


def test_padded_rows_are_counted_by_weight_shape(checkpoints, tmp_path):
    """A row of 3 words holds up to 24 codes of 4 bits; weight_shape says that 20 of them are weights."""
    save_file(
        {
            "model.layers.0.mlp.up_proj.weight_packed": torch.zeros(8, 3, dtype=torch.int32),
            "model.layers.0.mlp.up_proj.weight_scale": torch.zeros(8, 1, dtype=torch.bfloat16),
            "model.layers.0.mlp.up_proj.weight_shape": torch.tensor([8, 20]),
        },
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_bytes((checkpoints / "W4A16_channel" / "config.json").read_bytes())
    report = open_checkpoint(tmp_path).storage
    assert (report.layer_weights, report.layer_bytes) == (160, 8 * 3 * 4 + 16 + 16)
    assert "INT4 channel" in report.format


def test_nvfp4_global_scales_that_differ_are_found(checkpoints, tmp_path):
    tensors = load_file(checkpoints / "NVFP4A16" / "model.safetensors")
    for layer, value in ((0, 31638.0), (1, 512.5)):
        tensors[f"model.layers.{layer}.self_attn.k_proj.weight_global_scale"] = torch.tensor([value])
    tensors["model.layers.0.mlp.down_proj.weight_global_scale"] = torch.tensor([1.0])  # fused with nothing
    save_file(tensors, tmp_path / "model.safetensors")
    (finding,) = open_checkpoint(tmp_path).storage.findings
    assert finding.startswith("nvfp4-global-scale-mismatch: model.layers.0.self_attn ")
    assert "q_proj 20000, k_proj 31638, v_proj 20000" in finding
    assert "1 more" in finding
    assert open_checkpoint(checkpoints / "NVFP4A16").storage.findings == ()


def test_checkpoint_describes_itself(checkpoints):
    checkpoint = open_checkpoint(checkpoints / "W4A16")
    assert checkpoint.kind == "safetensors"
    assert [f.name for f in checkpoint.files] == ["model.safetensors", "config.json"]
    assert checkpoint.config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (checkpoint.max_positions, checkpoint.vocab_size) == (2048, VOCAB)
    assert checkpoint.tokenizer_files == ()

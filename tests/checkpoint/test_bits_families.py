"""Families whose libraries need a GPU: the documented tensors, written by hand, against hand-made sums."""

import json
import struct

import pytest
from checkpoints import around, write_model, write_shards

from evalq.checkpoint.headers import open_checkpoint

OUT, INN = 256, 512
LAYER = "model.layers.0.mlp.up_proj"
N = OUT * INN

# name -> (config, tensors of one linear by ending, bytes with sidecars, bits per weight, format)
CASES = {
    "gptq-4": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {".qweight": ("I32", (INN // 8, OUT)), ".qzeros": ("I32", (INN // 128, OUT // 8)),
         ".scales": ("F16", (INN // 128, OUT)), ".g_idx": ("I32", (INN,))},
        4 + 16 / 128 + 4 / 128 + 32 / OUT, "GPTQ INT4 group 128",
    ),
    "gptq-3": (
        {"quant_method": "gptq", "bits": 3, "group_size": 128},
        {".qweight": ("I32", (INN * 3 // 32, OUT)), ".qzeros": ("I32", (INN // 128, OUT * 3 // 32)),
         ".scales": ("F16", (INN // 128, OUT)), ".g_idx": ("I32", (INN,))},
        3 + 16 / 128 + 3 / 128 + 32 / OUT, "GPTQ INT3 group 128",
    ),
    "gptq-8-channel": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1},
        {".qweight": ("I32", (INN // 4, OUT)), ".qzeros": ("I32", (1, OUT // 4)),
         ".scales": ("F16", (1, OUT))},
        8 + 16 / INN + 8 / INN, "GPTQ INT8 channel",
    ),
    "gptq-no-zeros": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64},
        {".qweight": ("I32", (INN // 8, OUT)), ".scales": ("F16", (INN // 64, OUT))},
        4 + 16 / 64, "GPTQ INT4 group 64",
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {".qweight": ("I32", (INN, OUT // 8)), ".qzeros": ("I32", (INN // 128, OUT // 8)),
         ".scales": ("F16", (INN // 128, OUT))},
        4.15625, "AWQ INT4 group 128",
    ),
    "bnb-nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {".weight": ("U8", (N // 2, 1)), ".weight.absmax": ("F32", (N // 64,)),
         ".weight.quant_map": ("F32", (16,)), ".weight.quant_state.bitsandbytes__nf4": ("U8", (80,))},
        4.5 + 8 * (64 + 80) / N, "bitsandbytes NF4",
    ),
    "bnb-nested": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        {".weight": ("U8", (N // 2, 1)), ".weight.absmax": ("U8", (N // 64,)),
         ".weight.quant_map": ("F32", (16,)), ".weight.nested_absmax": ("F32", (N // 64 // 256,)),
         ".weight.nested_quant_map": ("F32", (256,)),
         ".weight.quant_state.bitsandbytes__nf4": ("U8", (90,))},
        4 + 8 / 64 + 32 / (64 * 256) + 8 * (64 + 1024 + 90) / N, "bitsandbytes NF4 nested",
    ),
    "bnb-int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {".weight": ("I8", (OUT, INN)), ".SCB": ("F32", (OUT,)), ".weight_format": ("U8", ())},
        8 + 32 / INN + 8 / N, "bitsandbytes INT8 channel",
    ),
    "deepseek-fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {".weight": ("F8_E4M3", (OUT, INN)), ".weight_scale_inv": ("F32", (OUT // 128, INN // 128))},
        8 + 32 / 128**2, "FP8 block 128x128",
    ),
    "modelopt-nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {".weight": ("U8", (OUT, INN // 2)), ".weight_scale": ("F8_E4M3", (OUT, INN // 16)),
         ".weight_scale_2": ("F32", ()), ".input_scale": ("F32", ())},
        4.5 + 64 / N, "ModelOpt NVFP4",
    ),
    "modelopt-fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {".weight": ("F8_E4M3", (OUT, INN)), ".weight_scale": ("F32", ()), ".input_scale": ("F32", ())},
        8 + 64 / N, "ModelOpt FP8 tensor",
    ),
    "bf16": ({}, {".weight": ("BF16", (OUT, INN))}, 16, "BF16"),
    "fp16": ({}, {".weight": ("F16", (OUT, INN))}, 16, "FP16"),
    "fp32": ({}, {".weight": ("F32", (OUT, INN))}, 32, "FP32"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_family(tmp_path, name):
    settings, endings, bpw, format_line = CASES[name]
    shapes = around({LAYER + ending: tensor for ending, tensor in endings.items()})
    config = {"quantization_config": settings} if settings else {}
    report = open_checkpoint(write_model(tmp_path, shapes, config)).storage
    assert report.layer_weights == N
    assert report.layer_bpw == pytest.approx(bpw, rel=1e-12)
    assert (report.head_bpw, report.head_weights, report.tied_head) == (16, 640, False)
    assert (report.format, report.container, report.findings) == (format_line, "safetensors", ())
    assert [t.name for t in report.tensors if t.kind == "layer"] == [f"{LAYER}.weight"]
    assert report.disk_bytes == report.layer_bytes + 2 * (2 * 640) + 2 * 64 * 2


def test_settings_of_quantizers_that_leave_config_json_alone(tmp_path):
    endings = CASES["modelopt-nvfp4"][1]
    write_model(tmp_path / "nv", {LAYER + e: t for e, t in endings.items()})
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "nv" / "hf_quant_config.json").write_text(json.dumps(settings))
    assert open_checkpoint(tmp_path / "nv").storage.format == "ModelOpt NVFP4"
    gptq = {".qweight": ("I32", (INN // 8, OUT)), ".scales": ("F16", (INN // 64, OUT))}
    write_model(tmp_path / "gptq", {LAYER + e: t for e, t in gptq.items()})
    (tmp_path / "gptq" / "quantize_config.json").write_text('{"bits": 4, "group_size": 64}')
    assert open_checkpoint(tmp_path / "gptq").storage.layer_bpw == 4.25


def test_gpt_oss_blocks(tmp_path):
    experts, rows, columns = 4, 64, 96
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    shapes = around(
        {
            f"{stem}_blocks": ("U8", (experts, rows, columns // 32, 16)),
            f"{stem}_scales": ("U8", (experts, rows, columns // 32)),
            f"{stem}_bias": ("BF16", (experts, rows)),
            "model.layers.0.mlp.router.weight": ("BF16", (experts, columns)),
            "model.layers.0.self_attn.sinks": ("BF16", (8,)),
        }
    )
    report = open_checkpoint(
        write_model(tmp_path, shapes, {"quantization_config": {"quant_method": "mxfp4"}})
    ).storage
    assert report.layer_weights == experts * rows * columns
    assert (report.layer_bpw, report.format) == (4.25, "MXFP4")
    kinds = {t.name: t.kind for t in report.tensors}
    assert kinds[stem] == "layer"
    assert kinds["model.layers.0.mlp.router.weight"] == "router"
    assert kinds[f"{stem}_bias"] == "other"


def test_fp8_experts_without_weight_ending(tmp_path):
    stem = "model.layers.0.mlp.experts.down_proj"
    shapes = {stem: ("F8_E4M3", (2, 128, 256)), f"{stem}_scale_inv": ("F32", (2, 1, 2))}
    report = open_checkpoint(write_model(tmp_path, around(shapes))).storage
    assert (report.layer_weights, report.layer_bytes) == (2 * 128 * 256, 2 * 128 * 256 + 16)


def test_blocks_cut_at_the_edge_keep_the_configured_size(tmp_path):
    shapes = {f"{LAYER}.weight": ("F8_E4M3", (576, 192)), f"{LAYER}.weight_scale_inv": ("F32", (5, 2))}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    report = open_checkpoint(write_model(tmp_path, shapes, config)).storage
    assert report.format == "FP8 block 128x128"
    assert report.layer_bytes == 576 * 192 + 40


def test_tied_head_is_the_embedding(tmp_path):
    shapes = around({f"{LAYER}.weight": ("BF16", (OUT, INN))})
    del shapes["lm_head.weight"]
    shapes["model.embed_tokens_per_layer.weight"] = ("BF16", (50, 64))  # an embedding, but not the head's
    report = open_checkpoint(write_model(tmp_path, shapes)).storage
    assert report.tied_head
    assert (report.head_weights, report.head_bytes) == (640, 1280)
    assert report.vram_gb == (2 * N + 1280) / 2**30


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.0.feed_forward.gate.weight",
    ],
)
def test_router_gates_are_no_layers(tmp_path, name):
    shapes = around({f"{LAYER}.weight": ("F16", (OUT, INN)), name: ("F32", (8, 64))})
    report = open_checkpoint(write_model(tmp_path, shapes)).storage
    assert report.layer_bpw == 16
    assert {t.name: t.kind for t in report.tensors}[name] == "router"


def test_nvfp4_finding_of_modelopt(tmp_path):
    parts = ("gate_proj", "up_proj")
    shapes, values = {}, {}
    for part, scale in zip(parts, (0.25, 0.5), strict=True):
        stem = f"model.layers.3.mlp.{part}"
        shapes |= {f"{stem}.weight": ("U8", (32, 32)), f"{stem}.weight_scale": ("F8_E4M3", (32, 4))}
        shapes[f"{stem}.weight_scale_2"] = ("F32", ())
        values[f"{stem}.weight_scale_2"] = struct.pack("<f", scale)
    (finding,) = open_checkpoint(write_model(tmp_path, shapes, {}, values)).storage.findings
    assert "model.layers.3.mlp has different weight_scale_2" in finding
    assert "gate_proj 0.25, up_proj 0.5" in finding


def test_unknown_packing_and_stray_sidecars_are_findings(tmp_path):
    shapes = around(
        {
            f"{LAYER}.q_weight": ("I32", (16, OUT)),
            "model.layers.0.mlp.down_proj.weight": ("BF16", (64, 64)),
            "model.layers.0.mlp.down_proj.weight_scale": ("BF16", (64, 1)),
        }
    )
    findings = open_checkpoint(write_model(tmp_path, shapes)).storage.findings
    assert findings[0].startswith(f"unknown-packing: {LAYER}.q_weight")
    assert findings[1].startswith("stray-sidecars: model.layers.0.mlp.down_proj.weight_scale")


@pytest.mark.parametrize("bits", [2, 4])
def test_exl3(tmp_path, bits):
    config = {
        "hidden_size": 256, "intermediate_size": 500, "num_attention_heads": 2, "num_key_value_heads": 1,
        "quantization_config": {"quant_method": "exl3", "bits": 4.0},
    }  # fmt: skip
    sides = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (256, 128), "mlp.up_proj": (256, 512)}
    shapes = around({}, hidden=256)
    del shapes["lm_head.weight"]
    stored = 0
    for module, (inputs, outputs) in {**sides, "head": (256, 128)}.items():
        stem = "lm_head" if module == "head" else f"model.layers.0.{module}"
        k = 6 if module == "head" else bits
        shapes[f"{stem}.trellis"] = ("I16", (inputs // 16, outputs // 16, 16 * k))
        shapes[f"{stem}.suh"], shapes[f"{stem}.svh"] = ("F16", (inputs,)), ("F16", (outputs,))
        shapes[f"{stem}.mcg"] = ("I32", ())
        stored += 0 if module == "head" else inputs * outputs * k // 8 + 2 * (inputs + outputs) + 4
    report = open_checkpoint(write_model(tmp_path, shapes, config)).storage
    weights = sum(i * o for i, o in sides.values())
    assert (report.layer_weights, report.layer_bytes) == (weights, stored)
    assert report.head_bpw == pytest.approx(6 + 16 * (256 + 128) / (256 * 128) + 32 / (256 * 128), rel=1e-12)
    assert not report.tied_head
    assert report.format == f"EXL3 {bits}.0 bpw"  # what was made, not config.json's nominal bits
    true = weights - 256 * 12
    assert report.layer_bpw_true == pytest.approx(8 * stored / true, rel=1e-12)


def test_exl3_legacy_signs_and_unknown_shapes(tmp_path):
    shapes = {
        "model.layers.0.mlp.up_proj.trellis": ("I16", (8, 8, 48)),
        "model.layers.0.mlp.up_proj.su": ("I16", (8,)),
        "model.layers.0.mlp.up_proj.sv": ("I16", (8,)),
        "model.layers.0.mlp.down_proj.weight": ("F16", (128, 128)),
    }
    report = open_checkpoint(write_model(tmp_path, shapes)).storage
    assert report.layer_bytes == 8 * 8 * 48 * 2 + 32 + 2 * 128 * 128
    assert report.layer_bpw_true is None  # no config.json shapes
    assert report.format == "EXL3 3.0 bpw, unquantized 50%"


def test_200_shards(tmp_path):
    modules = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    shards = [
        {
            f"model.layers.{n}.{module}.{ending}": tensor
            for module in modules
            for ending, tensor in (("weight", ("F8_E4M3", (128, 128))), ("weight_scale_inv", ("F32", (1, 1))))
        }
        for n in range(200)
    ]
    directory = write_shards(tmp_path, shards)
    report = open_checkpoint(directory).storage
    assert report.layer_weights == 1000 * 128 * 128
    assert report.layer_bytes == 1000 * (128 * 128 + 4)


def test_exl3_agrees_with_exllamav3(tmp_path):
    """exllamav3 1.6.5 reports 4.0377 and 6.0212 for a 4.0/6 bit model of these shapes."""
    hidden, inner, keys, vocab = 768, 1536, 256, 49152
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    shapes = {}
    for module, (inputs, outputs) in {**attention, **mlp, "lm_head": (hidden, vocab)}.items():
        stem, k = ("lm_head", 6) if module == "lm_head" else (f"model.layers.0.x.{module}", 4)
        shapes |= {
            f"{stem}.trellis": ("I16", (inputs // 16, outputs // 16, 16 * k)),
            f"{stem}.suh": ("F16", (inputs,)),
            f"{stem}.svh": ("F16", (outputs,)),
            f"{stem}.mcg": ("I32", ()),
        }
    report = open_checkpoint(write_model(tmp_path, shapes)).storage
    assert (round(report.layer_bpw, 4), round(report.head_bpw, 4)) == (4.0377, 6.0212)

"""The consistency check: one broken checkpoint per finding, and none for a sound one."""

import json
import struct
from pathlib import Path

import pytest
from checkpoints import (
    awq,
    bnb,
    compressed,
    deepseek,
    exl3,
    fp8_block,
    gpt_oss,
    gptq,
    llama,
    llama_config,
    nvfp4,
    packed_int4,
    plain,
    small_config,
    write_file,
    write_model,
    write_shards,
)

from evalq.checkpoint.headers import open_checkpoint
from evalq.errors import ModelError
from evalq.inspect import check

UP = "model.layers.0.mlp.up_proj"
INT4 = {"quantization_config": compressed(4, "pack-quantized")}
NVFP4 = compressed(4, "nvfp4-pack-quantized", "float", strategy="tensor_group", group_size=16)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}


def names(findings) -> list[str]:
    return [finding.name for finding in findings]


def only(path: Path, deep: bool = False):
    """The one finding of a checkpoint; its message is one line."""
    (finding,) = check(path, deep)
    assert "\n" not in finding.message
    assert finding.tensor
    return finding


def int4(path: Path, changes: dict, **config) -> Path:
    """A small packed model with some tensors replaced (None: removed)."""
    facts = small_config(**INT4 | config)
    shapes = llama(facts, packed_int4) | changes
    return write_model(path, {name: what for name, what in shapes.items() if what is not None}, facts)


@pytest.mark.parametrize(
    ("linear", "settings"),
    [
        (plain, None),
        (packed_int4, compressed(4, "pack-quantized")),
        (nvfp4, NVFP4),
        (gptq, GPTQ),
        (awq, AWQ),
        (fp8_block, FP8),
        (bnb, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        (exl3, {"quant_method": "exl3", "bits": 4.0}),
    ],
)
def test_a_sound_model_has_no_findings(tmp_path, linear, settings):
    config = llama_config(**({} if settings is None else {"quantization_config": settings}))
    head = exl3 if linear is exl3 else plain
    assert check(write_model(tmp_path, llama(config, linear, head), config)) == []


def test_sound_mixtures_of_experts_have_no_findings(tmp_path):
    assert check(deepseek(tmp_path / "deepseek", layers=5, experts=4)) == []
    assert check(gpt_oss(tmp_path / "gpt-oss", layers=2, experts=2)) == []


@pytest.mark.engine
@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "int4", "int4-asym", "nvfp4", "Q4_0.gguf"])
def test_the_real_model_is_sound_in_every_format(smollm2, name):
    path = smollm2(name)
    assert check(open_checkpoint(path), deep=True) == []


def test_truncated_shard(tmp_path):
    write_model(tmp_path, llama(small_config()), small_config())
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    finding = only(tmp_path)
    assert (finding.name, finding.tensor, finding.severity) == ("truncated-shard", file.name, "error")
    assert "describes" in finding.message


def test_index_naming_missing_files(tmp_path):
    write_shards(tmp_path, [{f"model.layers.{n}.a.weight": ("BF16", (4, 4))} for n in range(4)])
    for number in (2, 4):
        (tmp_path / f"model-0000{number}-of-00004.safetensors").unlink()
    finding = only(tmp_path)
    assert (finding.name, finding.tensor) == ("missing-shard", "model.safetensors.index.json")
    assert "model-00002-of-00004.safetensors, which is not there (and 1 more)" in finding.message


def test_gap_in_numbered_shards_without_an_index(tmp_path):
    write_shards(tmp_path, [{f"a{n}.weight": ("BF16", (4, 4))} for n in range(3)])
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    finding = only(tmp_path)
    assert (finding.name, finding.severity) == ("missing-shard", "error")
    assert finding.tensor == "model-00002-of-00003.safetensors"


def test_missing_part_of_a_split_gguf(tmp_path, smollm2):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    assert only(tmp_path / "m-00001-of-00002.gguf").name == "missing-shard"


def test_file_and_tensor_that_the_index_does_not_name(tmp_path):
    write_shards(tmp_path, [{"a.weight": ("BF16", (4, 4)), "b.weight": ("BF16", (4, 4))}])
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["b.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    write_file(tmp_path / "left-over.safetensors", {"c.weight": ("BF16", (4, 4))})
    write_file(tmp_path / "consolidated.safetensors", {"c.weight": ("BF16", (4, 4))})
    found = {finding.name: finding for finding in check(tmp_path)}
    assert found["extra-shard"].tensor == "left-over.safetensors"
    assert found["unlisted-tensor"].tensor == "b.weight"
    assert {finding.severity for finding in found.values()} == {"warning"}


def test_packed_weight_without_scale(tmp_path):
    finding = only(int4(tmp_path, {f"{UP}.weight_scale": None}))
    assert (finding.name, finding.severity) == ("missing-scale", "error")
    assert finding.message == f"{UP}.weight_packed has no weight_scale beside it"


@pytest.mark.parametrize(
    ("linear", "settings", "lost", "words"),
    [
        (nvfp4, NVFP4, "weight_global_scale", "has no weight_global_scale"),
        (gptq, GPTQ, "scales", "has no scales"),
        (fp8_block, FP8, "weight_scale_inv", "holds FP8 and no scale"),
        (bnb, {"quant_method": "bitsandbytes"}, "weight.absmax", "holds U8 codes and no scale"),
    ],
)
def test_scale_missing_in_other_families(tmp_path, linear, settings, lost, words):
    config = small_config(quantization_config=settings)
    shapes = llama(config, linear)
    del shapes[f"{UP}.{lost}"]
    found = {finding.name: finding for finding in check(write_model(tmp_path, shapes, config))}
    assert words in found["missing-scale"].message
    assert found["missing-scale"].tensor.startswith(UP)


def test_group_size_that_does_not_divide(tmp_path):
    config = llama_config(576, 1536, 9, 3, 96, 2, head_dim=64, **INT4)
    found = check(write_model(tmp_path, llama(config, packed_int4), config))
    assert {(f.name, f.severity) for f in found} == {("group-size-indivisible", "warning")}
    assert found[0].message == (
        "model.layers.0.self_attn.q_proj.weight_scale has groups of 128, which do not divide 576 columns; "
        "1 more like it"
    )


def test_gptq_with_a_shorter_last_group_is_a_warning(tmp_path):
    config = llama_config(576, 1536, 9, 3, 96, 1, head_dim=64, quantization_config=GPTQ)
    found = check(write_model(tmp_path, llama(config, gptq), config))
    assert {(f.name, f.severity) for f in found} == {("group-size-indivisible", "warning")}


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({f"{UP}.weight_scale": ("BF16", (512, 4))}, "group-size-mismatch", "4 groups for 256 columns"),
        ({f"{UP}.weight_scale": ("BF16", (500, 2))}, "scale-shape", "is 500 x 2, which does not fit"),
        (
            {f"{UP}.weight_zero_point": ("I32", (64, 3))},
            "zero-point-shape",
            "is 64 x 3; its scale is 512 x 2",
        ),
        (
            {f"{UP}.weight_packed": ("I32", (512, 64))},
            "shape-mismatch",
            "512 x 512; config.json makes it 512",
        ),
    ],
)
def test_sidecars_that_do_not_fit(tmp_path, changes, name, words):
    finding = next(f for f in check(int4(tmp_path, changes)) if f.name == name)
    assert words in finding.message
    assert finding.tensor.startswith(UP)


def test_num_bits_that_the_packed_shape_contradicts(tmp_path):
    config = small_config(quantization_config=compressed(8, "pack-quantized"))
    shapes = llama(config, packed_int4)
    query = "model.layers.0.self_attn.q_proj"
    shapes[f"{query}.weight_shape"] = ("I64", (2,))
    path = write_model(tmp_path, shapes, config, {f"{query}.weight_shape": struct.pack("<2q", 256, 256)})
    finding = next(f for f in check(path) if f.name == "num-bits-mismatch")
    assert finding.message.startswith(f"{query}.weight_packed packs 256 columns into 32 words; num_bits is 8")


def test_bits_of_gptq_and_awq(tmp_path):
    for linear, settings in ((gptq, GPTQ), (awq, AWQ)):
        config = small_config(quantization_config=settings | {"bits": 8})
        path = write_model(tmp_path / linear.__name__, llama(config, linear), config)
        finding = next(f for f in check(path) if f.name == "num-bits-mismatch")
        assert "holds 4-bit codes; the quantization config says 8" in finding.message


def test_asymmetric_without_zero_points(tmp_path):
    config = small_config(quantization_config=compressed(4, "pack-quantized", symmetric=False))
    finding = next(f for f in check(write_model(tmp_path, llama(config, packed_int4), config)))
    assert (finding.name, finding.severity) == ("missing-zero-point", "error")


def test_declared_packed_and_weights_plain(tmp_path):
    finding = only(write_model(tmp_path, llama(small_config()), small_config(**INT4)))
    assert (finding.name, finding.severity) == ("declared-format", "error")
    assert "declares compressed-tensors pack-quantized; model.layers.0.self_attn.q_proj" in finding.message
    assert "is BF16, and no weight is quantized" in finding.message


def test_plain_weights_with_a_config_that_means_no_files(tmp_path):
    frozen = compressed(4, "pack-quantized") | {"quantization_status": "frozen"}
    for number, settings in enumerate((frozen, {"quant_method": "bitsandbytes", "load_in_8bit": True})):
        config = small_config(quantization_config=settings)
        assert check(write_model(tmp_path / str(number), llama(config), config)) == []


def test_quantized_and_undeclared(tmp_path):
    config = small_config()
    (first, *_) = check(write_model(tmp_path, llama(config, fp8_block), config))
    assert (first.name, first.severity) == ("undeclared-format", "error")
    assert "no quantization config says so" in first.message


@pytest.mark.parametrize(
    ("linear", "settings", "words"),
    [
        (nvfp4, compressed(4, "pack-quantized"), "is NVFP4; the config declares compressed-tensors pack-qu"),
        (gptq, AWQ, "is GPTQ INT4 group 128; the config declares awq"),
        (packed_int4, compressed(4, "int-quantized"), "is INT4 group 128 symmetric"),
        (fp8_block, GPTQ, "is FP8 block 128x128; the config declares gptq"),
    ],
)
def test_another_format_than_declared(tmp_path, linear, settings, words):
    config = small_config(quantization_config=settings)
    findings = check(write_model(tmp_path, llama(config, linear), config))
    assert words in next(f for f in findings if f.name == "declared-format").message


def test_plain_layer_that_the_config_does_not_ignore(tmp_path):
    changes = {f"{UP}.weight_packed": None, f"{UP}.weight_scale": None, f"{UP}.weight": ("BF16", (512, 256))}
    finding = only(int4(tmp_path / "a", changes))
    assert (finding.name, finding.severity) == ("unquantized-not-ignored", "warning")
    assert finding.tensor == f"{UP}.weight"
    for number, entry in enumerate((UP, "re:.*layers.0.mlp.*", f"language_model.{UP}")):
        settings = compressed(4, "pack-quantized") | {"ignore": ["lm_head", entry]}
        assert check(int4(tmp_path / str(number), changes, quantization_config=settings)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 512}, "is 96 x 256; config.json makes it 96 x 512"),
        ({"intermediate_size": 1024}, "gate_proj.weight is 512 x 256; config.json makes it 1024 x 256"),
        ({"vocab_size": 100}, "embed_tokens.weight is 96 x 256; config.json makes it 100 x 256"),
        ({"num_key_value_heads": 4}, "k_proj.weight is 128 x 256; config.json makes it 256 x 256"),
        ({"num_attention_heads": 8}, "k_proj.weight is 128 x 256; config.json makes it 64 x 256"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_shapes_against_the_config(tmp_path, changes, words, packed):
    config = small_config(**INT4 if packed else {})
    path = write_model(tmp_path, llama(config, packed_int4 if packed else plain), config | changes)
    findings = [f for f in check(path) if f.name == "shape-mismatch"]
    assert any(words in finding.message for finding in findings)
    assert {finding.severity for finding in findings} == {"error"}


def test_shapes_of_an_unknown_architecture_are_not_judged(tmp_path):
    config = small_config(model_type="something_else") | {"intermediate_size": 999}
    assert check(write_model(tmp_path, llama(config | {"intermediate_size": 512}), config)) == []


def test_layers_against_the_config(tmp_path):
    config = small_config()
    shapes = llama(config)
    found = check(write_model(tmp_path / "more", shapes, config | {"num_hidden_layers": 4}))
    assert names(found) == ["missing-layer"]
    assert found[0].message == "model.layers.2 has no tensors; config.json counts 4 layers; 1 more like it"
    found = check(write_model(tmp_path / "less", shapes, config | {"num_hidden_layers": 1}))
    assert [(f.name, f.severity) for f in found] == [("extra-layer", "warning")]


def test_tensor_missing_in_one_layer(tmp_path):
    shapes = llama(small_config())
    del shapes["model.layers.1.mlp.down_proj.weight"]
    finding = only(write_model(tmp_path, shapes, small_config()))
    assert (finding.name, finding.tensor) == ("missing-tensor", "model.layers.1.mlp.down_proj.weight")
    assert finding.severity == "error"


@pytest.mark.parametrize("layers", [2, 5])
def test_a_tensor_that_one_layer_has_alone_is_a_warning(tmp_path, layers):
    """transformers leaves it out and loads the model as it is."""
    config = small_config() | {"num_hidden_layers": layers}
    shapes = llama(config) | plain("model.layers.0.mlp.extra_proj", 8, 256)
    finding = only(write_model(tmp_path, shapes, config))
    assert finding.severity == "warning"
    if layers > 2:
        assert (finding.name, finding.tensor) == ("extra-tensor", "model.layers.0.mlp.extra_proj")


def test_layers_and_heads_of_unknown_architectures_are_warnings(tmp_path):
    config = small_config(model_type="shares_its_layers") | {"num_hidden_layers": 4}
    found = check(write_model(tmp_path, llama(small_config(), head=None), config))
    assert {(f.name, f.severity) for f in found} == {
        ("missing-layer", "warning"),
        ("missing-head", "warning"),
    }


def test_head_against_the_config(tmp_path):
    untied = check(write_model(tmp_path / "a", llama(small_config(), head=None), small_config()))
    assert [(f.name, f.severity) for f in untied] == [("missing-head", "error")]
    config = small_config(tie_word_embeddings=True)
    tied = check(write_model(tmp_path / "b", llama(config), config))
    assert [(f.name, f.tensor) for f in tied] == [("tied-head-stored", "lm_head.weight")]


def test_nvfp4_global_scales_of_a_fused_group(tmp_path):
    config = small_config(quantization_config=NVFP4)
    name = "model.layers.0.self_attn.q_proj.weight_global_scale"
    path = write_model(tmp_path, llama(config, nvfp4), config, {name: struct.pack("<f", 3.0)})
    finding = only(path)
    assert (finding.name, finding.tensor) == ("nvfp4-global-scale-mismatch", "model.layers.0.self_attn")


def test_lora_targets_that_are_not_there(tmp_path):
    config = small_config(lora_compatible=True, lora_target_modules=["q_proj", "wqkv"])
    finding = only(write_model(tmp_path, llama(config), config))
    assert (finding.name, finding.tensor, finding.severity) == ("lora-target-missing", "wqkv", "warning")


def filled(shapes, word: bytes) -> bytes:
    count = 1
    for side in shapes[1]:
        count *= side
    return word * count


@pytest.mark.parametrize(
    ("linear", "settings", "ending", "one", "bad"),
    [
        (packed_int4, compressed(4, "pack-quantized"), "weight_scale", b"\x80\x3f", b"\xc0\x7f"),
        (fp8_block, FP8, "weight_scale_inv", b"\0\0\x80\x3f", b"\0\0\x80\xff"),
        (gptq, GPTQ, "scales", b"\0\x3c", b"\x01\x7e"),
        (nvfp4, NVFP4, "weight_scale", b"\x38", b"\xff"),
    ],
)
def test_scales_that_are_zero_or_not_finite(tmp_path, linear, settings, ending, one, bad):
    config = small_config(quantization_config=settings)
    shapes = llama(config, linear)
    ones = {name: filled(what, one) for name, what in shapes.items() if name.endswith(f".{ending}")}
    ones |= {name: struct.pack("<f", 1) for name in shapes if name.endswith("_global_scale")}
    assert check(write_model(tmp_path / "sound", shapes, config, ones), deep=True) == []

    name = f"{UP}.{ending}"
    path = write_model(tmp_path / "nan", shapes, config, ones | {name: ones[name][len(bad) :] + bad})
    finding = only(path, deep=True)
    assert (finding.name, finding.tensor, finding.severity) == ("scale-not-finite", name, "error")
    assert f"holds 1 of {len(ones[name]) // len(one):,} scales" in finding.message
    assert check(path) == []  # headers do not tell

    zero = ones | {name: b"\0" * len(one) + ones[name][len(one) :]}
    finding = only(write_model(tmp_path / "zero", shapes, config, zero), deep=True)
    assert (finding.name, finding.severity) == ("scale-zero", "warning")
    finding = only(
        write_model(tmp_path / "zeros", shapes, config, ones | {name: bytes(len(ones[name]))}), True
    )
    assert (finding.name, finding.severity) == ("scale-zero", "error")


def test_e8m0_scales_know_nan_and_no_zero(tmp_path):
    path = gpt_oss(tmp_path / "sound", layers=1, experts=2)
    assert check(path, deep=True) == []  # all zeros: 2**-127 each
    file = path / "model.safetensors"
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        name = "model.layers.0.mlp.experts.down_proj_scales"
        stream.seek(8 + length + header[name]["data_offsets"][0])
        stream.write(b"\xff")
    assert (only(path, True).name, only(path, True).tensor) == ("scale-not-finite", name)


def test_what_is_no_checkpoint_is_an_error_not_a_finding(tmp_path):
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ModelError) as error:
            check(path)
        assert error.value.category == "model_missing"


@pytest.mark.parametrize(
    "settings",
    [
        {"config_groups": [1]},
        {"config_groups": {"a": 3}},
        {"config_groups": {"a": {"weights": {"num_bits": [4], "group_size": {}, "strategy": []}}}},
        {"ignore": "re:(", "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}},
        {"ignore": ["re:(", 7], "format": ["x"], "quant_method": {}},
    ],
)
def test_nonsense_in_the_quantization_config(tmp_path, settings):
    """Configs come from strangers: nonsense is refused or found, it never ends in a traceback."""
    config = small_config(
        quantization_config={"quant_method": "compressed-tensors"} | settings,
        num_hidden_layers=2**70,
        model_type=["llama"],
    )
    path = write_model(tmp_path, llama(small_config(), nvfp4), config)
    assert "missing-layer" in names(check(path))


def test_a_file_without_weights(tmp_path):
    finding = only(write_model(tmp_path, {}, {}))
    assert (finding.name, finding.severity) == ("no-weights", "error")

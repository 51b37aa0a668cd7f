"""Configs and adapters that no quantizer writes: one line each, never another exception."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import awq, fp8_block, linear_sides, llama, llama_config, write_file, write_model
from convert_cases import config as config_of

from evalq.convert.dequantize import dequantize
from evalq.convert.merge import merge_lora
from evalq.errors import ModelError

CONFIG = llama_config(hidden=128, inner=256, heads=4, kv_heads=2, vocab=32, layers=1)


@pytest.mark.parametrize("block", [[None, "x"], [0, 128], [128.5, 128], [-1, -1], [[1], 2], "ab", {"0": 1}])
def test_sides_of_a_block_that_are_none(tmp_path: Path, block: Any) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": block}
    config = CONFIG | {"quantization_config": settings}
    source = write_model(tmp_path / "source", llama(CONFIG, fp8_block), config)
    # The shapes of the scales tell the blocks, too.
    assert dequantize(source, tmp_path / "dense").dequantized == 7


@pytest.mark.parametrize("bits", ["four", None, 3, [4], 10**30, float("nan")])
def test_bits_of_awq_are_those_of_its_tensors(tmp_path: Path, bits: Any) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "awq", "bits": bits, "version": ["gemm"]}}
    source = write_model(tmp_path / "source", llama(CONFIG, awq), config)
    try:
        assert dequantize(source, tmp_path / "dense").dequantized == 7
    except ModelError as error:
        assert error.category in ("model_corrupt", "unsupported_format")
        assert "\n" not in str(error)


def adapter(folder: Path, **changes: Any) -> Path:
    shapes = {}
    for module, (out, inputs) in linear_sides(CONFIG).items():
        stem = f"base_model.model.model.layers.0.{module}"
        shapes |= {f"{stem}.lora_A.weight": ("F32", (4, inputs)), f"{stem}.lora_B.weight": ("F32", (out, 4))}
    folder.mkdir()
    write_file(folder / "adapter_model.safetensors", shapes)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "pattern",
    [["q_proj"], "q_proj", {"q_proj": "x"}, {"q_proj": float("inf")}, {"(": 4}, {"^(.|[a-z_.0-9])*[A-Z]": 4}],
)
def test_alphas_by_pattern_that_are_none(tmp_path: Path, pattern: Any) -> None:
    base = write_model(tmp_path / "base", llama(CONFIG), CONFIG)
    given = adapter(tmp_path / "adapter", alpha_pattern=pattern)
    with pytest.raises(ModelError, match="alpha_pattern") as error:
        merge_lora(base, given, tmp_path / "merged")
    assert error.value.category == "bad_adapter"
    assert not (tmp_path / "merged").exists()


def test_nested_configs_lose_their_quantization_at_both_levels(tmp_path: Path) -> None:
    inner = {"quantization_config": {"x": 1}, "dtype": "float16", "text_config": {"quantization_config": {}}}
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}, "text_config": inner}
    source = write_model(tmp_path / "source", llama(CONFIG, fp8_block), config)
    dequantize(source, tmp_path / "dense")
    written = config_of(tmp_path / "dense")
    assert "quantization_config" not in written
    assert written["text_config"] == {"dtype": "bfloat16", "text_config": {"quantization_config": {}}}

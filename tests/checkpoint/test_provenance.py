"""What a converted checkpoint says about itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import linear_sides, llama, llama_config, packed_int4, write_file, write_model
from convert_cases import config as config_of

from evalq.checkpoint.fingerprint import fingerprint
from evalq.checkpoint.headers import open_checkpoint
from evalq.checkpoint.provenance import PROVENANCE_FILE, Provenance, provenance
from evalq.cli.main import main
from evalq.errors import ModelError

CONFIG = llama_config(hidden=128, inner=256, heads=4, kv_heads=2, vocab=32, layers=2)
SETTINGS = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    config = CONFIG | {"quantization_config": SETTINGS}
    shapes = llama(CONFIG, packed_int4)
    packed = {n.removesuffix("_packed"): s for n, (_, s) in shapes.items() if n.endswith(".weight_packed")}
    values = {}
    for name, (out, words) in packed.items():
        stem = name.removesuffix(".weight")
        shapes[f"{stem}.weight_shape"] = ("I64", (2,))
        values[f"{stem}.weight_shape"] = out.to_bytes(8, "little") + (8 * words).to_bytes(8, "little")
    return write_model(tmp_path / "int4", shapes, config, values)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    shapes = {}
    for module in ("self_attn.q_proj", "mlp.up_proj"):
        out, inputs = linear_sides(CONFIG)[module]
        for layer in range(2):
            stem = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{stem}.lora_A.weight"] = ("F32", (4, inputs))
            shapes[f"{stem}.lora_B.weight"] = ("F32", (out, 4))
    folder = tmp_path / "style"
    folder.mkdir()
    write_file(folder / "adapter_model.safetensors", shapes)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


def test_dequantized_and_merged(quantized: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    plain, merged = tmp_path / "plain", tmp_path / "merged"
    assert main(["dequantize", str(quantized), str(plain)]) == 0
    made = provenance(plain)
    assert isinstance(made, Provenance)
    (step,) = made.steps
    assert (step.command, step.source, step.dequantized, step.dtype) == ("dequantize", "int4", 14, "bfloat16")
    assert step.source_digest == fingerprint(open_checkpoint(quantized).files, None).digest
    assert "INT4 group 128" in step.source_format
    assert (step.adapter, step.changed, bool(step.dequantized)) == (None, 0, True)
    assert "quantization_config" not in config_of(plain)

    capsys.readouterr()
    assert main(["merge-lora", str(plain), str(adapter), str(merged)]) == 0
    assert "none was quantized, 4 changed by the adapter" in capsys.readouterr().err
    both = open_checkpoint(merged).provenance
    assert both is not None and both.steps[0] == step
    assert (both.steps[1].command, both.steps[1].adapter, both.steps[1].changed) == ("merge-lora", "style", 4)
    assert both.steps[1].adapter_digest

    assert main(["inspect", str(merged)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "made by evalq dequantize from int4 (compressed-tensors pack-quantized INT4" in shown
    assert "then evalq merge-lora from plain (BF16) and the adapter style" in shown
    assert main(["inspect", str(merged), "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["provenance"]
    assert [step["command"] for step in steps] == ["dequantize", "merge-lora"]
    assert str(tmp_path) not in (merged / PROVENANCE_FILE).read_text(), "no path of the user's is published"


def test_a_merged_model_that_was_never_quantized(adapter: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", llama(CONFIG), CONFIG)
    assert provenance(base) is None and open_checkpoint(base).provenance is None
    assert main(["merge-lora", str(base), str(adapter), str(tmp_path / "merged")]) == 0
    made = provenance(tmp_path / "merged")
    assert made is not None and not any(step.dequantized for step in made.steps)
    assert made.steps[0].dtype is None


@pytest.mark.parametrize(
    "raw",
    ["{}", "[]", '{"version": 1, "steps": []}', '{"version": 2, "steps": [{}]}',
     '{"version": 1, "steps": {}}', '{"version": 1, "steps": [{"command": 1}]}',
     '{"version": 1, "steps": [null]}'],
)  # fmt: skip
def test_a_file_that_evalq_did_not_write(tmp_path: Path, raw: str) -> None:
    base = write_model(tmp_path / "base", llama(CONFIG), CONFIG)
    (base / PROVENANCE_FILE).write_text(raw)
    with pytest.raises(ModelError, match=PROVENANCE_FILE) as error:
        open_checkpoint(base)
    assert error.value.category == "model_corrupt"

"""Which experts a text reached, and scales that were never set, through the whole command."""

import json
import struct
from pathlib import Path
from typing import Any

from checkpoints import Shapes, write_model
from conftest import Runs

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "vocab_size": 258,
    "eos_token_id": 257,
    "pad_token_id": None,
}
LENGTH, ROWS = 32, 3


def make(folder: Path) -> Path:
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=24, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def quantized(source: Path, folder: Path) -> Path:
    """The experts of a checkpoint in FP8 as llm-compressor writes them, one scale a row."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".experts." in name:
            scale = weight.abs().amax(1, keepdim=True) / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[name + "_scale"] = scale
        else:
            tensors[name] = weight
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "float", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"],
        "config_groups": {"group_0": scheme},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def score(runs: Runs, folder: Path, rows: int = ROWS) -> dict[str, Any]:
    data = runs.data(protocol="gptq", eval_len=LENGTH, eval_stride=None, max_rows=rows)
    spec = {"load_fn": "hf", "fwd_fn": "hf", "model_dir": str(folder)}
    spec |= {"options": {"dtype": "float32", "threads": 1}}
    code, (record,) = runs.compare(data, runs.models(spec))
    assert code == 0
    return record


def test_the_record_says_which_experts_the_text_reached(runs: Runs, tmp_path: Path) -> None:
    folder = make(tmp_path / "moe")
    record = score(runs, folder)
    assert [name.endswith(".experts") for name in record["moe"]] == [True, True]
    for found in record["moe"].values():
        assert (found["experts"], found["tokens"]) == (24, ROWS * (LENGTH - 1))
        assert found["reached"] == 24 - len(found["unreached"]) < 24
        assert found["least_share"] == 0 < found["most_share"]
    reached = sum(found["reached"] for found in record["moe"].values())
    (note,) = [note for note in record["notes"] if note.startswith("experts:")]
    assert f"({reached} of 48)" in note and "counted on" not in note
    again = score(runs, folder)
    assert again["moe"] == record["moe"] and again["scored_at"] == record["scored_at"]


def test_windows_that_another_result_lends_are_said_to_be_missing(runs: Runs, tmp_path: Path) -> None:
    folder = make(tmp_path / "moe")
    score(runs, folder, rows=1)
    record = score(runs, folder)
    assert all(found["tokens"] == (ROWS - 1) * (LENGTH - 1) for found in record["moe"].values())
    assert any(f"counted on {2 * 31} of {3 * 31} tokens" in note for note in record["notes"])


def test_experts_of_a_quantized_model_are_counted_too(runs: Runs, tmp_path: Path) -> None:
    source = make(tmp_path / "moe")
    plain = score(runs, source)
    record = score(runs, quantized(source, tmp_path / "fp8"))
    assert record["layer_bpw"] < 32 and record["moe"].keys() == plain["moe"].keys()
    for name, found in record["moe"].items():
        assert found["tokens"] == ROWS * (LENGTH - 1)
        # Rounding moves a few tokens from one expert to another.
        assert abs(found["reached"] - plain["moe"][name]["reached"]) <= 4


def test_scales_that_were_never_set_are_a_note_of_the_record(runs: Runs, tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.experts"
    shapes: Shapes = {"model.embed_tokens.weight": ("BF16", (258, 32))}
    values = {}
    for expert in range(4):
        for name, number in (("weight_scale", 0.5), ("input_scale", float("nan") if expert == 3 else 0.25)):
            shapes[f"{stem}.{expert}.up_proj.weight"] = ("F8_E4M3", (32, 32))
            shapes[f"{stem}.{expert}.up_proj.{name}"] = ("F32", (1,))
            values[f"{stem}.{expert}.up_proj.{name}"] = struct.pack("<f", number)
    config = {"model_type": "mixtral", "vocab_size": 258, "quantization_config": {"quant_method": "fp8"}}
    folder = write_model(tmp_path / "fp8", shapes, config, values)
    code, (record,) = runs.compare(runs.data(), runs.models({"model_dir": str(folder)}))
    assert code == 0, "one expert that the text may never reach does not stop it"
    (note,) = [note for note in record["notes"] if note.startswith("expert-scale-not-finite")]
    assert "input_scale is NaN or infinite for 1 expert of 1 layer" in note and f"{stem} 3 of 4" in note

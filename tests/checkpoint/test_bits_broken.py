"""Directories and safetensors files that hold no model, half of one, or lies."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import around, write_model, write_shards
from safetensors.torch import save_file

from evalq.checkpoint.headers import open_checkpoint
from evalq.errors import ModelError

GOOD = around({"model.layers.0.mlp.up_proj.weight": ("BF16", (64, 64))})


def refused(path: Path, category: str) -> str:
    """The message, naming a file in one line."""
    with pytest.raises(ModelError) as error:
        open_checkpoint(path)
    assert error.value.category == category
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A model.safetensors with this header, whatever it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    count = len(text) if length is None else length
    (path / "model.safetensors").write_bytes(struct.pack("<Q", count) + text + data)
    return path


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"", b"", "broken JSON"),
        (b"{", b"", "broken JSON"),
        (b'{"a": \xff}', b"", "not UTF-8 at byte 6"),
        (b"[1]", b"", "not a JSON object"),
        (b"[" * 100_000, b"", "broken JSON"),
        (b"1" * 5000, b"", "broken JSON"),
        ({"a": 3}, b"", 'entry for "a"'),
        ({"a": {"dtype": "F32"}}, b"", 'entry for "a"'),
        ({"a": entry("F31", [1], 0, 4)}, b"0000", 'entry for "a"'),
        ({"a": entry(["F32"], [1], 0, 4)}, b"0000", 'entry for "a"'),
        ({"a": entry("F32", [-1], 0, 4)}, b"0000", 'entry for "a"'),
        ({"a": entry("F32", [1.0], 0, 4)}, b"0000", 'entry for "a"'),
        ({"a": entry("F32", "1", 0, 4)}, b"0000", 'entry for "a"'),
        ({"a": entry("F32", [True], 0, 4)}, b"0000", 'entry for "a"'),
        ({"a": entry("F32", [2**70], 0, 4)}, b"0000", 'entry for "a"'),
        ({"a": entry("F32", [1] * 1000, 0, 4)}, b"0000", 'entry for "a"'),
        ({"a": entry("F32", [2], 0, 4)}, b"0000", "does not fill bytes 0 to 4"),
        ({"a": entry("F32", [1], 4, 8)}, b"00000000", "leaves a hole"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"0000", "overlaps"),
        ({"a": entry("F32", [1], 0, 4)}, b"000", "truncated"),
        ({"a": entry("F32", [1], 0, 4)}, b"00000", "1 bytes after the last tensor"),
        ({"a\n\x1b[31m" + "x" * 500: 3}, b"", "\\n\\x1b[31mxxx"),
    ],
)
def test_damaged_header(tmp_path, header, data, words):
    message = refused(raw(tmp_path, header, data), "model_corrupt")
    assert words in message
    assert "model.safetensors" in message
    assert len(message) < 400


@pytest.mark.parametrize("length", [2**63, 10**12, 100_000_001, 3000])
def test_absurd_header_length(tmp_path, length):
    message = refused(raw(tmp_path, {}, b"0" * 100, length), "model_corrupt")
    assert f"its header claims {length:,} bytes" in message


def test_truncated_at_any_length(tmp_path):
    write_model(tmp_path, GOOD)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in (*range(0, 600, 7), len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(tmp_path, "model_corrupt")


def test_index_naming_a_missing_shard(tmp_path):
    write_shards(tmp_path, [GOOD, {"b.weight": ("F16", (4, 4))}])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    message = refused(tmp_path, "model_corrupt")
    assert (
        "model.safetensors.index.json: names model-00002-of-00002.safetensors, which is not there" in message
    )


def test_index_naming_a_tensor_that_the_shard_lacks(tmp_path):
    write_shards(tmp_path, [GOOD, {"b.weight": ("F16", (4, 4))}])
    save_file({"c.weight": torch.zeros(4)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match='lacks "b.weight", which the index puts here') as error:
        open_checkpoint(tmp_path)
    assert error.value.category == "model_corrupt"


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "a/b.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "x.bin", ""],
)
def test_index_leaving_the_directory(tmp_path, name):
    directory = tmp_path / "model"
    write_shards(directory, [GOOD])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "no safetensors file of this directory" in refused(directory, "model_corrupt")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {}}', "{'a'}"])
def test_broken_index(tmp_path, text):
    write_shards(tmp_path, [GOOD])
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(tmp_path, "model_corrupt")


@pytest.mark.parametrize(
    ("text", "words"), [(b'{"a": 1,\n "b" 2}', "line 2, column 6"), (b"\xff", "not UTF-8")]
)
def test_broken_config(tmp_path, text, words):
    write_model(tmp_path, GOOD)
    (tmp_path / "config.json").write_bytes(text)
    assert words in refused(tmp_path, "model_corrupt")


def test_nothing_there(tmp_path):
    assert "no such file or directory" in refused(tmp_path / "gone", "model_missing")
    message = refused(tmp_path, "model_missing")
    assert "model.safetensors.index.json" in message
    assert "*.gguf" in message


def test_something_else_there(tmp_path):
    (tmp_path / "adapter").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in refused(tmp_path / "adapter", "model_missing")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "m.gguf").write_bytes(b"GGUF")
    assert "ggufs/m.gguf" in refused(tmp_path / "ggufs", "model_missing")
    write_model(tmp_path / "good", GOOD)
    assert "name its directory" in refused(tmp_path / "good" / "model.safetensors", "model_missing")


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "consolidated.00.pth"],
)
def test_pickles_are_refused_with_a_command_that_works(tmp_path, name):
    torch.save({"model.norm.weight": torch.ones(3), "x.weight": torch.ones(4, 4)}, tmp_path / name)
    message = refused(tmp_path, "unsafe_checkpoint")
    assert name in message
    assert "weights_only=True" in message
    run_remedy(message, tmp_path)
    assert open_checkpoint(tmp_path).storage.layer_weights == 16


@pytest.mark.parametrize("folder", ['a"; touch "x', "a $(touch x) `touch x`", "it's", "a\nb"])
def test_the_command_for_pickles_quotes_names(tmp_path, folder):
    (tmp_path / folder).mkdir()
    name = "model'); open('x', 'w'); ('.bin"
    torch.save({"x.weight": torch.ones(4, 4)}, tmp_path / folder / name)
    with pytest.raises(ModelError) as error:
        open_checkpoint(tmp_path / folder / name)
    run_remedy(str(error.value), tmp_path)
    assert open_checkpoint(tmp_path / folder).storage.layer_weights == 16
    assert not [file for file in tmp_path.rglob("x")]


def run_remedy(message: str, folder: Path) -> None:
    """The command as a shell runs it."""
    command = message.partition("(run: ")[2].rpartition(", or use")[0]
    command = command.replace("python -c", f"{sys.executable} -c", 1)
    environment = os.environ | {"HOME": str(folder)}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_names_that_no_file_system_or_writer_takes(tmp_path):
    write_shards(tmp_path / "long", [GOOD])
    index = {"weight_map": dict.fromkeys(GOOD, "x" * 300 + ".safetensors")}
    (tmp_path / "long" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no safetensors file of this directory" in refused(tmp_path / "long", "model_corrupt")
    (tmp_path / "half").mkdir()
    header = {"a\ud800.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    message = refused(raw(tmp_path / "half", header, bytes(4)), "model_corrupt")
    assert "a\\ud800.weight" in message
    (tmp_path / "deep").mkdir()
    write_model(tmp_path / "deep", GOOD)
    (tmp_path / "deep" / "config.json").write_text('{"text_config":' * 500 + "{}" + "}" * 500)
    assert "nests deeper than 64 levels" in refused(tmp_path / "deep", "model_corrupt")


def test_a_pickle_file_itself_is_refused(tmp_path):
    torch.save({}, tmp_path / "model.pt")
    assert "safetensors" in refused(tmp_path / "model.pt", "unsafe_checkpoint")


def test_a_pickle_beside_safetensors_is_ignored(tmp_path):
    write_model(tmp_path, GOOD)
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever")
    assert open_checkpoint(tmp_path).storage.layer_bpw == 16


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"a.weight_packed": ("I32", (8, 3)), "a.weight_scale": ("F16", (8, 1))}, "neither weight_shape"),
        (
            {
                "a.weight_packed": ("I32", (8, 3)),
                "a.weight_scale": ("F16", (8, 1)),
                "a.weight_shape": ("I64", (2,)),
            },
            "does not hold the [0, 0] weights",
        ),
        ({"a.qweight": ("I32", (8,)), "a.scales": ("F16", (8, 1))}, "should have 2 dimensions"),
        ({"a.qweight": ("I32", (8, 8)), "a.scales": ("F16", (1, 8))}, "does not go with 8 columns"),
        ({"a.trellis": ("I16", (8, 8))}, "should have 3 dimensions"),
        ({"a.trellis": ("I16", (8, 8, 17))}, "is no trellis"),
    ],
)
def test_layers_that_contradict_their_family(tmp_path, shapes, words):
    write_model(tmp_path, shapes)
    with pytest.raises(ModelError) as error:
        open_checkpoint(tmp_path)
    assert words in str(error.value)
    assert error.value.category == "model_corrupt"


def test_remote_code_and_files_of_a_checkpoint(tmp_path):
    config = {
        "auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"},
        "text_config": {"max_position_embeddings": 777, "vocab_size": 99},
    }
    write_model(tmp_path, GOOD, config)
    for name in (
        "modeling_x.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "README.md",
    ):
        (tmp_path / name).write_text("{}")
    (tmp_path / "quantize_config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    names = {f.name for f in checkpoint.files}
    assert names == {"model.safetensors", "config.json", "quantize_config.json", "modeling_x.py"}
    assert [f.name for f in checkpoint.tokenizer_files] == ["tokenizer.json", "tokenizer_config.json"]
    assert (checkpoint.max_positions, checkpoint.vocab_size) == (777, 99)


def test_files_of_a_sharded_checkpoint(tmp_path):
    write_shards(tmp_path, [GOOD, {"b.weight": ("F16", (4, 4))}])
    save_file({"stray": torch.zeros(1)}, tmp_path / "unrelated.safetensors")
    names = [f.name for f in open_checkpoint(tmp_path).files]
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert names == [*shards, "model.safetensors.index.json", "config.json"]

"""Readers of a model's files: safetensors headers, index, config.json, GGUF, adapters, unpacking."""

import io
import json
import math
import struct
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import checkpoints as made
import gguf
import numpy as np
from fuzz.harness import Target
from fuzz.mutators import mutate_bytes, mutate_json
from rich.console import Console

from evalq.checkpoint.adapter import read_adapter, require_fits
from evalq.checkpoint.headers import open_checkpoint
from evalq.checkpoint.shards import DTYPE_BITS
from evalq.convert.dequantize import dequantize
from evalq.convert.merge import merge_lora
from evalq.inspect import inspect_checkpoint
from evalq.show.inspection import as_json, print_inspection

_CONTROLS = {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))} | {"\u202e"}
# Stands between two files in one input, as no JSON text can hold it.
_BETWEEN = b"\0"
_CONFIG = made.llama_config(hidden=128, inner=256, heads=4, kv_heads=2, vocab=32, layers=1)
# A family of tests/support/checkpoints.py -> the quantization config that says so.
_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed_int4": made.compressed(4, "pack-quantized"),
    "int8": made.compressed(8, "int-quantized", strategy="channel", group_size=None),
    "nvfp4": made.compressed(4, "nvfp4-pack-quantized", "float", group_size=16),
    "mxfp4": made.compressed(4, "mxfp4-pack-quantized", "float", group_size=32),
    "fp8_block": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "exl3": {"quant_method": "exl3", "bits": 4.0},
}


@cache
def _shapes(family: str) -> made.Shapes:
    return made.llama(_CONFIG, getattr(made, family))


def _config(family: str) -> dict[str, Any]:
    settings = _SETTINGS[family]
    return _CONFIG | ({"quantization_config": settings} if settings else {})


def _header(shapes: made.Shapes) -> dict[str, Any]:
    header, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return header


def _joined(config: dict[str, Any], header: dict[str, Any]) -> bytes:
    """Two files in one input."""
    return json.dumps(config).encode() + _BETWEEN + json.dumps(header).encode()


def _data_bytes(header: bytes) -> int:
    """Where the last tensor ends, if that is a size that a test may write."""
    try:
        entries = json.loads(header).values()
        return min(max(int(entry["data_offsets"][1]) for entry in entries), 2**24)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        return 2**16


def _write(file: Path, header: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + max(_data_bytes(header), 0))


def _show(folder: Path) -> None:
    """All that `evalq inspect --deep` does."""
    found = inspect_checkpoint(open_checkpoint(folder), deep=True)
    as_json(found, per_tensor=True).encode()
    shown = io.BytesIO()
    with io.TextIOWrapper(shown, "utf-8") as stream:
        print_inspection(found, Console(file=stream, width=120), per_tensor=True)
        stream.flush()
        assert not set(shown.getvalue().decode()) & _CONTROLS, "a terminal would obey this"


def _in_folder(run: Callable[[Path, bytes], None]) -> Callable[[bytes], None]:
    """The function with a folder of its own."""

    def with_folder(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), data)

    return with_folder


def _run_config(folder: Path, data: bytes) -> None:
    """config.json beside whole weights of every family in turn."""
    family = sorted(_SETTINGS)[sum(data) % len(_SETTINGS)]
    made.write_model(folder / "model", _shapes(family), {})
    (folder / "model" / "config.json").write_bytes(data)
    _show(folder / "model")


def _run_unpacking(folder: Path, data: bytes) -> None:
    """A quantized checkpoint, config and header, through inspect and dequantize."""
    config, _, header = data.partition(_BETWEEN)
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_bytes(config)
    _write(model / "model.safetensors", header)
    _show(model)
    dequantize(model, folder / "dense")


def _run_index(folder: Path, data: bytes) -> None:
    shapes = list(_shapes("plain").items())
    made.write_shards(folder / "model", [dict(shapes[::2]), dict(shapes[1::2])], _config("plain"))
    (folder / "model" / "model.safetensors.index.json").write_bytes(data)
    _show(folder / "model")


def _index_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        shapes = list(_shapes("plain").items())
        path = made.write_shards(Path(folder) / "model", [dict(shapes[::2]), dict(shapes[1::2])], {})
        return [(path / "model.safetensors.index.json").read_bytes()]


def _run_safetensors(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_text(json.dumps(_config("packed_int4")))
    (folder / "model.safetensors").write_bytes(data)
    _show(folder)


def _safetensors_seeds() -> list[bytes]:
    shapes = made.packed_int4("model.layers.0.mlp.up_proj", 16, 128) | made.plain("model.embed_tokens", 8, 16)
    with tempfile.TemporaryDirectory() as folder:
        made.write_file(Path(folder) / "x", shapes)
        return [(Path(folder) / "x").read_bytes()]


def _run_gguf(folder: Path, data: bytes) -> None:
    (folder / "model.gguf").write_bytes(data)
    _show(folder / "model.gguf")


def _gguf_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        made.write_gguf(Path(folder) / "m.gguf", {"blk.0.ffn_up.weight": np.zeros((8, 32), np.float32)})
        return [(Path(folder) / "m.gguf").read_bytes()]


def _adapter_seeds() -> list[bytes]:
    shapes: made.Shapes = {}
    for module, (out, inputs) in made.linear_sides(_CONFIG).items():
        stem = f"base_model.model.model.layers.0.{module}"
        shapes |= {f"{stem}.lora_A.weight": ("F32", (4, inputs)), f"{stem}.lora_B.weight": ("F32", (out, 4))}
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": False,
        "target_modules": ["q_proj"], "rank_pattern": {}, "alpha_pattern": {"q_proj": 16},
        "init_lora_weights": True, "fan_in_fan_out": False,
    }  # fmt: skip
    return [_joined(config, _header(shapes))]


def _run_adapter(folder: Path, data: bytes) -> None:
    """A PEFT adapter: read, compared with its base, merged."""
    config, _, header = data.partition(_BETWEEN)
    base = made.write_model(folder / "base", _shapes("plain"), _CONFIG)
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes(config)
    _write(adapter / "adapter_model.safetensors", header)
    require_fits(read_adapter(adapter), open_checkpoint(base).linear_shapes)
    merge_lora(base, adapter, folder / "merged")


def _run_gguf_adapter(folder: Path, data: bytes) -> None:
    (folder / "adapter.gguf").write_bytes(data)
    read_adapter(folder / "adapter.gguf")


def _gguf_adapter_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 16.0)
        for part, shape in (("a", (4, 32)), ("b", (64, 4))):
            writer.add_tensor(f"blk.0.ffn_down.weight.lora_{part}", np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [path.read_bytes()]


def _unpacking_seeds() -> list[bytes]:
    return [_joined(_config(family), _header(_shapes(family))) for family in _SETTINGS]


def _mutate_both(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Mostly the config, and in it mostly the quantization; a header has more places than both."""
    config, _, header = random.choice(seeds).partition(_BETWEEN)
    choice = random.random()
    settings = json.loads(config).get("quantization_config")
    if choice < 0.5 and settings:
        whole = json.dumps(json.loads(config) | {"quantization_config": "@"}).encode()
        config = whole.replace(b'"@"', mutate_json(random, [json.dumps(settings).encode()]))
    elif choice < 0.7:
        config = mutate_json(random, [config])
    else:
        header = mutate_json(random, [header])
    return config + _BETWEEN + header


TARGETS = (
    Target("checkpoint-config", lambda: [json.dumps(_config(f)).encode() for f in _SETTINGS],
           _in_folder(_run_config), mutate_json),
    Target("checkpoint-unpacking", _unpacking_seeds, _in_folder(_run_unpacking), _mutate_both),
    Target("checkpoint-index", _index_seeds, _in_folder(_run_index), mutate_json),
    Target("checkpoint-safetensors", _safetensors_seeds, _in_folder(_run_safetensors), mutate_bytes),
    Target("checkpoint-gguf", _gguf_seeds, _in_folder(_run_gguf), mutate_bytes),
    Target("adapter", _adapter_seeds, _in_folder(_run_adapter), _mutate_both),
    Target("adapter-gguf", _gguf_adapter_seeds, _in_folder(_run_gguf_adapter), mutate_bytes),
)  # fmt: skip

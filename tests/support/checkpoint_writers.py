"""Small checkpoints for the storage tests, written with the safetensors library itself."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8": torch.float8_e4m3fn,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def zeros(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in shapes.items()}


def write_checkpoint(
    directory: Path, shapes: Shapes, config: dict | None = None, values: dict | None = None
) -> Path:
    """One model.safetensors of zeros (but for `values`) and a config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(zeros(shapes) | (values or {}), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config or {}))
    return directory


def write_shards(directory: Path, shards: list[Shapes]) -> Path:
    """A sharded checkpoint with its index, named as transformers names it."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(zeros(shapes), directory / name)
        weight_map.update(dict.fromkeys(shapes, name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")
    return directory


def around(layers: Shapes, vocab: int = 10, hidden: int = 64) -> Shapes:
    """The layers with an embedding, a head, a norm and a bias, none of which may count as a layer."""
    return {
        "model.embed_tokens.weight": ("BF16", (vocab, hidden)),
        "lm_head.weight": ("F16", (vocab, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
        "model.layers.0.self_attn.q_proj.bias": ("BF16", (hidden,)),
        **layers,
    }

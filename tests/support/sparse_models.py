"""Checkpoints of any size that take no room on the disk: headers, and holes for weights."""

import json
import os
import struct
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 65536,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def headers_only(folder: Path, gib: int) -> Path:
    """A checkpoint of that many GiB that takes no room on the disk."""
    folder.mkdir()
    shape = [LLAMA["intermediate_size"], LLAMA["hidden_size"]]
    n_layers = gib * 2**30 // (2 * shape[0] * shape[1])
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": shape for i in range(n_layers)}
    shapes |= {"model.embed_tokens.weight": [65536, 4096]}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": n_layers}))
    return folder

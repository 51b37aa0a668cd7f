"""What the tests of conversions share: tiny real checkpoints, and what a directory holds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

FLOATS = {torch.bfloat16, torch.float16, torch.float32}


def compress(folder: Path, *schemes: str) -> None:
    """Tiny Llama checkpoints (hidden size 256) in compressed-tensors formats, one directory each."""
    script = ROOT / "tests" / "support" / "compress_llama.py"
    subprocess.run(
        [sys.executable, str(script), str(folder), *schemes], check=True, capture_output=True, timeout=300
    )


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def config(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


def split(directory: Path, out: Path, shards: int) -> Path:
    """A copy whose tensors are dealt out over several shards, so that a layer's lie in different ones."""
    out.mkdir()
    dealt: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for index, (name, tensor) in enumerate(sorted(tensors(directory).items())):
        dealt[index % shards][name] = tensor
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for file, part in zip(files, dealt, strict=True):
        save_file(part, out / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(files, dealt, strict=True) for name in part}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "config.json").write_bytes((directory / "config.json").read_bytes())
    return out


def write_layers(directory: Path, layers: dict[str, torch.Tensor], **facts: Any) -> Path:
    """A checkpoint of a few tensors that no model class has to load."""
    directory.mkdir()
    save_file(layers, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"} | facts))
    return directory


def loaded(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model as transformers loads it, decompressed."""
    packed = "quantization_config" in config(directory)
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **more).eval()

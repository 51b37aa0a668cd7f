"""Adapters for tests, written as PEFT and llama.cpp store them, and their base with them merged in."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

# Enough to change the perplexity of SmolLM2 clearly, not enough to break it.
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
ALPHA, RANK = 32.0, 8


def write_peft(folder: Path, base: Path, rank: int = RANK, std: float = 0.03, **config: Any) -> Path:
    """A PEFT directory with random A and B for some layers of a dense checkpoint."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(MODULES):
            out_features, in_features = weight.shape
            a = torch.randn(rank, in_features, generator=generator) * std
            b = torch.randn(out_features, rank, generator=generator) * std
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
    return write_peft_tensors(folder, tensors, rank, **config)


def write_peft_tensors(folder: Path, tensors: dict[str, torch.Tensor], rank: int, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = sorted({name.split(".")[-3] for name in tensors if ".lora_A" in name})
    facts = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": ALPHA, "bias": "none"}
    facts |= {"target_modules": modules, "lora_dropout": 0.0, "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(facts | config))
    return folder


def deltas(adapter: Path) -> dict[str, torch.Tensor]:
    """Module -> alpha / r * B A (rsLoRA: alpha / sqrt(r)), float32."""
    rslora = json.loads((adapter / "adapter_config.json").read_text()).get("use_rslora")
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            scale = ALPHA / (math.sqrt(len(a)) if rslora else len(a))
            found[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = scale * b @ a
    return found


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """The base, decompressed by transformers if need be, with the adapter in its weights, float32.

    In a process of its own, because libraries warn while they decompress.
    """
    subprocess.run([sys.executable, "-W", "ignore", __file__, base, adapter, folder], check=True)
    return folder


def _merge(base: Path, adapter: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    packed = "quantization_config" in json.loads((base / "config.json").read_text())
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(base, **how)
    config = model.config.__class__.from_pretrained(base)
    config.dtype = "float32"
    vars(config).pop("quantization_config", None)
    dense = AutoModelForCausalLM.from_config(config)
    names = dense.state_dict().keys()
    state = {name: tensor.float() for name, tensor in model.state_dict().items() if name in names}
    for module, delta in deltas(adapter).items():
        state[f"{module}.weight"] += delta
    dense.load_state_dict(state)
    dense.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)


def write_gguf(file: Path, adapter: Path) -> Path:
    """The down-projections of a PEFT adapter as llama.cpp stores them; other layers would be permuted."""
    import gguf

    tensors = load_file(adapter / "adapter_model.safetensors")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, tensor in tensors.items():
        layer = name.split(".layers.")[1].split(".")[0]
        if ".mlp.down_proj." in name:
            part = "a" if ".lora_A." in name else "b"
            writer.add_tensor(
                f"blk.{layer}.ffn_down.weight.lora_{part}", np.ascontiguousarray(tensor.numpy())
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


if __name__ == "__main__":
    _merge(*map(Path, sys.argv[1:]))

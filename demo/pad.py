"""Pad a Llama checkpoint with zeros to multiples of 128, without changing what it computes.

    python demo/pad.py SOURCE TARGET

EXL3 and groups of 128 need dimensions that are multiples of 128; SmolLM2-135M has a width of 576 and 9 heads.
Added heads have zero projections, added channels are zero everywhere. RMSNorm averages over all channels, so
with H of H' channels real its weights are scaled by sqrt(H / H') and its epsilon by H / H'. The width stays a
multiple of the number of heads, which transformers wants.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128


def padded_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with every dimension that a linear layer has a multiple of 128."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    group = heads // kv_heads
    while kv_heads * head_dim % BLOCK or kv_heads * group * head_dim % BLOCK:
        kv_heads += 1
    hidden = _up(config["hidden_size"], math.lcm(BLOCK, kv_heads * group))
    return config | {
        "hidden_size": hidden,
        "intermediate_size": _up(config["intermediate_size"], BLOCK),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": config["rms_norm_eps"] * config["hidden_size"] / hidden,
    }


def padded(name: str, weight: torch.Tensor, config: dict[str, Any], target: dict[str, Any]) -> torch.Tensor:
    """A weight of the source in the target's shape, in its own dtype."""
    hidden, inner = target["hidden_size"], target["intermediate_size"]
    queries = target["num_attention_heads"] * target["head_dim"]
    keys = target["num_key_value_heads"] * target["head_dim"]
    shapes = {
        "embed_tokens": (len(weight), hidden),
        "lm_head": (len(weight), hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    module = name.removesuffix(".weight").rpartition(".")[2]
    is_norm = module.endswith("norm")
    full = torch.zeros((hidden,) if is_norm else shapes[module])
    scale = math.sqrt(config["hidden_size"] / hidden) if is_norm else 1.0
    full[tuple(slice(0, side) for side in weight.shape)] = weight.float() * scale
    return full.to(weight.dtype)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, help="a dense Llama checkpoint in one safetensors file")
    parser.add_argument("target", type=Path, help="directory to make")
    arguments = parser.parse_args()
    config = json.loads((arguments.source / "config.json").read_text(encoding="utf-8"))
    target = padded_config(config)
    weights = load_file(arguments.source / "model.safetensors")
    full = {name: padded(name, weight, config, target) for name, weight in weights.items()}
    arguments.target.mkdir(parents=True)
    save_file(full, arguments.target / "model.safetensors", metadata={"format": "pt"})
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json"):
        for file in arguments.source.glob(pattern):
            shutil.copy(file, arguments.target / file.name)
    (arguments.target / "config.json").write_text(json.dumps(target, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

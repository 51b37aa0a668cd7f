"""Write tiny Llama checkpoints with the compressed-tensors library, in a process of its own.

usage: compress_llama.py OUT_DIR NAME...     (names are keys of SCHEMES; one directory each)

Round to nearest over the weights as they are; nothing is calibrated, since only the layout matters.
"""

import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling the 4-bit packers takes longer than everything else

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, is_module_quantized
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, LAYERS = 256, 512, 96, 2, 1, 2


def _integers(bits: int, strategy: str, group: int | None, symmetric: bool, order: str | None = None):
    args = QuantizationArgs(
        num_bits=bits, strategy=strategy, group_size=group, symmetric=symmetric, actorder=order
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


SCHEMES = {
    name: lambda name=name: preset_name_to_scheme(name, ["Linear"])
    for name in ("W4A16", "W4A16_ASYM", "INT8", "FP8_DYNAMIC", "FP8_BLOCK", "FP8", "NVFP4A16", "NVFP4")
}
SCHEMES |= {
    name: lambda name=name: preset_name_to_scheme(name, ["Linear"]) for name in ("MXFP4A16", "MXFP8A16")
}
SCHEMES |= {
    "W4A16_channel": lambda: _integers(4, "channel", None, True),
    "W4A16_ASYM_channel": lambda: _integers(4, "channel", None, False),
    "W8A16_channel": lambda: _integers(8, "channel", None, True),
    "W4A16_g32_act": lambda: _integers(4, "group", 32, True, "group"),
}


def _groups(weight: torch.Tensor, args: QuantizationArgs, scale_shape: torch.Size) -> torch.Tensor:
    """The weight with all elements that share a scale in the last dimension."""
    if args.strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.reshape(scale_shape[0], rows, scale_shape[1], columns)
        return blocks.permute(0, 2, 1, 3).reshape(*scale_shape, -1)
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    return weight.reshape(*scale_shape, -1)


def compress(name: str, out: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": SCHEMES[name]()}, ignore=["lm_head"])
    )
    for module in filter(is_module_quantized, model.modules()):
        args, weight, scale = module.quantization_scheme.weights, module.weight.data, module.weight_scale.data
        global_scale = None
        if hasattr(module, "weight_global_scale"):
            global_scale = generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
            # One for the whole model, so that fused layers agree.
            global_scale = torch.full_like(global_scale, 20000.0)
            module.weight_global_scale.data.copy_(global_scale)
        grouped = _groups(weight, args, scale.shape)
        new_scale, zero_point = calculate_qparams(
            grouped.amin(-1), grouped.amax(-1), args, global_scale=global_scale
        )
        scale.copy_(new_scale.reshape(scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero_point.reshape(scale.shape))
        if hasattr(module, "weight_g_idx"):
            module.weight_g_idx.data.copy_(torch.arange(weight.shape[1]) // args.group_size)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for scheme in sys.argv[2:]:
        compress(scheme, Path(sys.argv[1]) / scheme)

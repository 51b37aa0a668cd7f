"""Data-free quantization of a Hugging Face checkpoint with compressed-tensors alone.

Every linear layer except the head is rounded to nearest; embeddings, norms and the (tied) head stay as they
are. The files are those of llm-compressor, so transformers and vLLM load them. Formats and schemes:
https://github.com/vllm-project/compressed-tensors

NVFP4 has a second scale, `weight_global_scale`. An engine that fuses q/k/v or gate/up into one matrix keeps
only one of them, so every member of such a group gets the same, computed over the whole group.

Axes in names: O output features, I input features, G groups of a row that share a scale.
"""

import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStrategy,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    is_module_quantized,
)
from transformers import AutoModelForCausalLM

FUSED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is quantized.

    Args:
        scheme: a preset of compressed-tensors, "W4A16", "FP8_DYNAMIC", ...
        weights: what differs from the preset's weights, {"group_size": 64}.
    """

    scheme: str
    weights: dict[str, Any] = field(default_factory=dict)


# Groups of 64 where the presets say 128: SmolLM2's hidden size is 576 = 9 * 64.
RECIPES = {
    "fp8": Recipe("FP8_DYNAMIC"),
    "int8": Recipe("W8A16", {"strategy": "channel", "group_size": None}),
    "int4": Recipe("W4A16", {"group_size": 64}),
    "int4-asym": Recipe("W4A16_ASYM", {"group_size": 64}),
    "nvfp4": Recipe("NVFP4A16"),
}


def quantize_checkpoint(source: Path, out: Path, recipe: Recipe) -> None:
    """Write a quantized copy of a checkpoint.

    Args:
        source: a directory of transformers with a dense causal language model and its tokenizer.
        out: the directory to write; made if it does not exist.
        recipe: the format.

    Raises:
        ValueError: a linear layer's input features are no multiple of the recipe's group size.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True)
    compressor = quantize_model(model, recipe)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, out / path.name)


def quantize_model(model: Any, recipe: Recipe) -> ModelCompressor:
    """Attach a scheme, scales and zero points to every linear layer but the head; its weights stay dense.

    Returns:
        The compressor that packs the weights (`compress_model`) and writes the config (`update_config`).
    """
    scheme = preset_name_to_scheme(recipe.scheme, ["Linear"])
    if recipe.weights:
        scheme.weights = QuantizationArgs(**{**scheme.weights.model_dump(), **recipe.weights})
    _require_whole_groups(model, scheme.weights.group_size)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    linears = {name: module for name, module in model.named_modules() if is_module_quantized(module)}
    if scheme.weights.strategy == QuantizationStrategy.TENSOR_GROUP:
        for group in _fused_groups(linears):
            _share_global_scale(group)
    for module in linears.values():
        _set_scales(module, scheme.weights)
        # For rounding: in bfloat16 weight / scale is itself off by up to a quarter of an INT8 step.
        module.weight.data = module.weight.data.float()
    return ModelCompressor.from_pretrained_model(model)


def _require_whole_groups(model: Any, group_size: int | None) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and group_size and module.in_features % group_size:
            raise ValueError(f"{name}: {module.in_features} input features are no multiple of {group_size}")


def _fused_groups(linears: dict[str, Any]) -> list[list[Any]]:
    """Layers that engines merge into one matrix; a layer of its own is a group of one."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for name, module in linears.items():
        parent, _, leaf = name.rpartition(".")
        fused = next((leaves for leaves in FUSED_LAYERS if leaf in leaves), (leaf,))
        groups[f"{parent}.{fused[0]}"].append(module)
    return list(groups.values())


def _share_global_scale(modules: list[Any]) -> None:
    low = torch.stack([m.weight.detach().float().min() for m in modules]).min()
    high = torch.stack([m.weight.detach().float().max() for m in modules]).max()
    for module in modules:
        module.weight_global_scale.data.copy_(generate_gparam(low, high))


def _set_scales(module: Any, args: QuantizationArgs) -> None:
    """Fill `weight_scale` [O, G] (and `weight_zero_point`) so that each group's range is just covered."""
    n_groups = module.weight_scale.shape[-1]
    weight_OGI = module.weight.detach().float().unflatten(-1, (n_groups, -1))
    global_scale = getattr(module, "weight_global_scale", None)
    scale_OG, zero_OG = calculate_qparams(weight_OGI.amin(-1), weight_OGI.amax(-1), args, global_scale)
    module.weight_scale.data.copy_(scale_OG)
    if not args.symmetric:
        module.weight_zero_point.data.copy_(zero_OG)

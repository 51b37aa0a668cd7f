"""Checkpoints in the formats that vLLM serves, made of one unquantized checkpoint for the measurements here.

    python benchmarks/gpu/checkpoints.py --hf CHECKPOINT --out DIR [--only fp8 nvfp4 ...]

Weights are rounded to nearest by demo/quantize.py; groups are those of the presets, so the checkpoint's
dimensions must be multiples of 128. NVFP4 with 4-bit activations ("nvfp4") needs one number per layer that
says how large its inputs get: the largest seen in the sample text that ships with evalq.
"""

import argparse
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization.utils import generate_gparam
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
from quantize import TOKENIZER_FILES, Recipe, quantize_checkpoint, quantize_model  # noqa: E402

RECIPES = {
    "fp8": Recipe("FP8_DYNAMIC"),
    "int8": Recipe("W8A16", {"strategy": "channel", "group_size": None}),
    "int4": Recipe("W4A16"),
    "int4-asym": Recipe("W4A16_ASYM"),
    "nvfp4a16": Recipe("NVFP4A16"),
    "nvfp4": Recipe("NVFP4"),
}
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 8, 512


def calibrated_checkpoint(source: Path, out: Path, recipe: Recipe) -> None:
    """Like quantize_checkpoint(), for a recipe whose activations have a global scale."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True)
    largest = largest_inputs(model, sample_windows(source))
    compressor = quantize_model(model, recipe)
    for name, module in model.named_modules():
        if hasattr(module, "input_global_scale"):
            module.input_global_scale.data.copy_(generate_gparam(-largest[name], largest[name]))
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, out / file.name)


def sample_windows(source: Path) -> torch.Tensor:
    """The first windows of evalq's sample text, int64 [W, T]."""
    text = resources.files("evalq.data").joinpath("sample.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False).input_ids
    count = CALIBRATION_WINDOWS * CALIBRATION_TOKENS
    return torch.tensor(ids[:count]).reshape(CALIBRATION_WINDOWS, CALIBRATION_TOKENS)


def largest_inputs(model: Any, ids_WT: torch.Tensor) -> dict[str, torch.Tensor]:
    """The largest magnitude that went into each linear layer, float32.

    Layers that engines fuse (q/k/v, gate/up) have one input, so they get one value.
    """
    largest: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def note(module: Any, inputs: tuple[torch.Tensor]) -> None:
            now = inputs[0].abs().max().float()
            largest[name] = torch.maximum(largest.get(name, now), now)

        return note

    linears = [(name, module) for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    with torch.inference_mode():
        for ids_T in ids_WT:
            model(ids_T[None].to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="the unquantized checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="a folder; each format gets one in it")
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    arguments = parser.parse_args()
    for name in arguments.only:
        make = calibrated_checkpoint if name == "nvfp4" else quantize_checkpoint
        make(arguments.hf, arguments.out / name, RECIPES[name])
        print(name, flush=True)


if __name__ == "__main__":
    main()

"""GPTQ and AWQ checkpoints for tests: the codes of compressed-tensors ones in the other two layouts.

    python tests/support/other_int4.py {gptq,awq} SOURCE TARGET

Run in a process of its own, because libraries warn while they are imported. Layouts: AutoGPTQ's
`QuantLinear.pack` (zero points are stored less one) and AutoAWQ's `WQLinear_GEMM.from_linear` (outputs
interleaved).
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 64
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}


def packed(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight codes of 0 to 15 along `dim` in each int32."""
    parts = codes.to(torch.int64).movedim(dim, -1).unflatten(-1, (-1, 8))
    words = (parts << (4 * torch.arange(8))).sum(-1)
    return (words - (words >> 31 << 32)).to(torch.int32).movedim(-1, dim).contiguous()


def layer(
    kind: str, codes_OI: torch.Tensor, zeros_OG: torch.Tensor, scale_OG: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tensors of one linear layer."""
    scales = scale_OG.T.to(torch.float16).contiguous()
    if kind == "gptq":
        groups = torch.arange(codes_OI.shape[1], dtype=torch.int32) // GROUP
        zeros = packed((zeros_OG - 1).T, 1)
        return {"qweight": packed(codes_OI.T, 0), "qzeros": zeros, "scales": scales, "g_idx": groups}

    def interleaved(codes: torch.Tensor) -> torch.Tensor:
        return packed(codes.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2), 1)

    return {"qweight": interleaved(codes_OI.T), "qzeros": interleaved(zeros_OG.T), "scales": scales}


def write(kind: str, source: Path, target: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    target.mkdir(parents=True)
    stored = load_file(source / "model.safetensors")
    tensors = {name: t for name, t in stored.items() if ".weight_" not in name}
    for name in stored:
        if not name.endswith(".weight_packed"):
            continue
        stem = name.removesuffix(".weight_packed")
        shape = torch.Size(stored[f"{stem}.weight_shape"].tolist())
        scale = stored[f"{stem}.weight_scale"]
        codes = unpack_from_int32(stored[name], 4, shape) + 8
        zeros = torch.full(scale.shape, 8, dtype=torch.int8)
        if f"{stem}.weight_zero_point" in stored:
            words = stored[f"{stem}.weight_zero_point"]
            zeros = unpack_from_int32(words, 4, torch.Size(scale.shape), packed_dim=0) + 8
        tensors |= {f"{stem}.{part}": t for part, t in layer(kind, codes, zeros, scale).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": CONFIGS[kind]}
    (target / "config.json").write_text(json.dumps(config))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target / file.name)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

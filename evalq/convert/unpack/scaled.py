"""Weights of 8 bits with scales: FP8, INT8 and MXFP8 -> dense. w = (q - zero_point) * scale.

What shares a scale is in the scale's shape: one number (tensor), [O] or [O, 1] (channel), [O, G] (groups of a
row), [R, C] (blocks, the last of a row or column cut short). Source: compressed-tensors, and DeepSeek-V3,
whose `weight_scale_inv` multiplies like any other.
"""

import math

import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize

from evalq.errors import ModelError


def unpack_scaled_weights(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Dequantize 8-bit weights.

    Args:
        weight: [O, I], FP8 or int8.
        scale: of the shapes above; uint8 for MXFP8's exponents.
        zero_point: int8, of the scale's shape; None for symmetric weights.
        block: sides of a block where the checkpoint declares them.
        dtype: of the result, None for the scale's.

    Returns:
        The weights [O, I].

    Raises:
        ModelError: model_corrupt for a scale whose shape does not go with the weight's.
    """
    if scale.dtype == torch.uint8:
        scale = decompress_mx_scale(scale)
    if scale.ndim == 1 and scale.numel() == weight.shape[0]:
        scale = scale[:, None]
    args = _args(tuple(weight.shape), tuple(scale.shape), block)
    if args is None:
        raise ModelError(
            f"weight_scale {list(scale.shape)} does not go with a weight {list(weight.shape)}",
            "model_corrupt",
        )
    return dequantize(weight, scale, zero_point, args=args, dtype=dtype)


def _args(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None
) -> QuantizationArgs | None:
    """How scales lie over a weight; None where they do not."""
    if math.prod(scale) == 1 and block is None:
        return QuantizationArgs(strategy="tensor")
    if len(weight) != 2 or len(scale) != 2 or 0 in scale:
        return None
    rows, columns = weight
    if scale == (rows, 1):
        return QuantizationArgs(strategy="channel")
    if scale[0] == rows and columns % scale[1] == 0:
        return QuantizationArgs(strategy="group", group_size=columns // scale[1])
    height, width = block or (math.ceil(rows / scale[0]), math.ceil(columns / scale[1]))
    if scale != (math.ceil(rows / height), math.ceil(columns / width)):
        return None
    return QuantizationArgs(strategy="block", block_structure=[height, width])

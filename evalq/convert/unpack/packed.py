"""Weights of fewer than 8 bits: compressed-tensors' int32 and uint8 layouts -> dense.

INT (`pack-quantized`): w = (q - zero_point) * scale. q is stored as q + 2^(bits-1), element i of a row in
bits [i * bits, (i + 1) * bits) of the row's little-endian int32 words; zero points alike, packed along the
rows. NVFP4: w = fp4 * scale / global_scale, groups of 16. MXFP4: w = fp4 * 2^(scale - 127), groups of 32.

The unpacking itself is compressed-tensors' own, from 0.15 on.

Axes in names: O output features, I input features, G groups of a row that share a scale.
"""

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize

from evalq.errors import ModelError

# Widths that fill an int32 without a rest: all versions of compressed-tensors pack these alike.
WHOLE_BITS = (1, 2, 4, 8)
NVFP4_GROUP = 16
MXFP4_GROUP = 32


def unpack_int4_weights(
    packed: torch.Tensor,
    scale: torch.Tensor,
    shape: Sequence[int] | torch.Tensor,
    zero_point: torch.Tensor | None = None,
    group_size: int | None = None,
    num_bits: int = 4,
    dtype: torch.dtype | None = None,
    g_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """Unpack and dequantize integers packed into int32.

    Args:
        packed: `weight_packed`, int32 [O, ceil(I * num_bits / 32)].
        scale: `weight_scale`, [O, G], [O, 1] for channels, or one number.
        shape: `weight_shape`, (O, I).
        zero_point: `weight_zero_point`, int32 [ceil(O * num_bits / 32), G]; None for symmetric weights.
        group_size: weights of a row that share a scale; None takes I / G.
        num_bits: 4, or 1, 2, 8.
        dtype: of the result, None for the scale's.
        g_idx: `weight_g_idx`, the group of each input feature, [I]; None for groups in order.

    Returns:
        The weights [O, I].

    Raises:
        ModelError: model_corrupt, naming the tensor that does not fit; unsupported_format for other widths,
            or a g_idx that the installed compressed-tensors no longer knows.
    """
    if num_bits not in WHOLE_BITS:
        raise ModelError(
            f"integers of {num_bits} bits: how they are packed depends on the version that wrote them",
            "unsupported_format",
            "widths of 1, 2, 4 and 8 bits can be unpacked",
        )
    rows, columns = _two(shape)
    _require(packed, "weight_packed", torch.int32, (rows, _words(columns, num_bits)))
    args = _int_args(scale, (rows, columns), group_size, num_bits)
    order = {}
    if g_idx is not None:
        _require(g_idx, "weight_g_idx", None, (columns,))
        if "g_idx" not in signature(dequantize).parameters:
            raise ModelError(
                "weight_g_idx (activation ordering): the installed compressed-tensors cannot apply it",
                "unsupported_format",
                'pip install "compressed-tensors<0.19"',
            )
        order = {"g_idx": g_idx}
    codes = unpack_from_int32(packed, num_bits, torch.Size((rows, columns)))
    if zero_point is not None:
        groups = scale.shape[-1] if scale.ndim == 2 else 1
        _require(zero_point, "weight_zero_point", torch.int32, (_words(rows, num_bits), groups))
        # Packed along the rows: turned over, into memory of its own, since compressed-tensors 0.20 cannot
        # view a column of single words as bytes.
        columns_GO = zero_point.T.clone(memory_format=torch.contiguous_format)
        zero_point = unpack_from_int32(columns_GO, num_bits, torch.Size((groups, rows))).T
    return dequantize(codes, scale, zero_point, args=args, dtype=dtype, **order)


def unpack_nvfp4_weights(
    packed: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Unpack and dequantize NVFP4.

    Args:
        packed: `weight_packed`, uint8 [O, I / 2], the even element in the low half of a byte.
        scale: `weight_scale`, FP8 E4M3 [O, I / 16].
        global_scale: `weight_global_scale`, one float32; it divides (ModelOpt's `weight_scale_2` multiplies).
        dtype: of the result.

    Returns:
        The weights [O, I].

    Raises:
        ModelError: model_corrupt, naming the tensor that does not fit.
    """
    _require(scale, "weight_scale", torch.float8_e4m3fn, None)
    if global_scale is None or global_scale.numel() != 1:
        raise _misfit("weight_global_scale", global_scale, "one float32")
    return _unpack_fp4(packed, scale.to(dtype), NVFP4_GROUP, dtype, global_scale.reshape(1).float())


def unpack_mxfp4_weights(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Unpack and dequantize MXFP4.

    Args:
        packed: `weight_packed`, uint8 [O, I / 2], the even element in the low half of a byte.
        scale: `weight_scale`, uint8 [O, I / 32], exponents with a bias of 127 (E8M0).
        dtype: of the result.

    Returns:
        The weights [O, I].

    Raises:
        ModelError: model_corrupt, naming the tensor that does not fit.
    """
    _require(scale, "weight_scale", torch.uint8, None)
    return _unpack_fp4(packed, decompress_mx_scale(scale).to(dtype), MXFP4_GROUP, dtype, None)


def _unpack_fp4(
    packed: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
    global_scale: torch.Tensor | None,
) -> torch.Tensor:
    _require(packed, "weight_packed", torch.uint8, None)
    rows, columns = packed.shape[0], 2 * packed.shape[-1]
    _require(scale, "weight_scale", None, (rows, columns / group_size))
    values = unpack_fp4_from_uint8(packed, rows, columns, dtype)
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=group_size)
    return dequantize(values, scale, args=args, dtype=dtype, global_scale=global_scale)


def _int_args(
    scale: torch.Tensor, shape: tuple[int, int], group_size: int | None, num_bits: int
) -> QuantizationArgs:
    """How many weights share a scale, by its shape. Raises ModelError where that is no whole number."""
    rows, columns = shape
    if scale is None or not scale.is_floating_point():
        raise _misfit("weight_scale", scale, "floating-point numbers")
    if scale.numel() == 1 and rows > 1:
        return QuantizationArgs(num_bits=num_bits, strategy="tensor")
    groups = scale.shape[-1] if scale.ndim == 2 and scale.shape[0] == rows else 0
    if not groups:
        raise _misfit("weight_scale", scale, f"[{rows}, groups]")
    if groups == 1 and group_size in (None, -1, columns):
        return QuantizationArgs(num_bits=num_bits, strategy="channel")
    size = group_size or columns // groups
    if size < 1 or columns % size:
        raise ModelError(
            f"groups of {group_size or f'{columns}/{groups}'} do not divide {columns} input features",
            "model_corrupt",
        )
    if groups != columns // size:
        raise _misfit("weight_scale", scale, f"[{rows}, {columns // size}] for groups of {size}")
    return QuantizationArgs(num_bits=num_bits, strategy="group", group_size=size)


def _words(count: int, num_bits: int) -> int:
    """int32 words that hold so many integers."""
    return math.ceil(count * num_bits / 32)


def _two(shape: Sequence[int] | torch.Tensor) -> tuple[int, int]:
    """`weight_shape` as (O, I)."""
    sizes = [int(size) for size in shape]
    if len(sizes) != 2 or min(sizes) < 1:
        raise ModelError(f"weight_shape is {sizes}, not the [out, in] of a linear layer", "model_corrupt")
    return sizes[0], sizes[1]


def _require(
    tensor: torch.Tensor | None, name: str, dtype: torch.dtype | None, shape: tuple[float, ...] | None
) -> None:
    """Raise ModelError unless the tensor has this dtype and shape."""
    right_dtype = tensor is not None and dtype in (None, tensor.dtype)
    right_shape = tensor is not None and (tensor.ndim == 2 if shape is None else tuple(tensor.shape) == shape)
    if not (right_dtype and right_shape):
        sides = [f"{side:g}" for side in shape] if shape is not None else ["rows", "columns"]
        raise _misfit(name, tensor, f"{_short(dtype)} [{', '.join(sides)}]".strip())


def _misfit(name: str, tensor: torch.Tensor | None, wanted: str) -> ModelError:
    if tensor is None:
        return ModelError(f"{name} is missing: should be {wanted}", "model_corrupt")
    found = f"{_short(tensor.dtype)} {list(tensor.shape)}"
    return ModelError(f"{name} is {found}, should be {wanted}", "model_corrupt")


def _short(dtype: Any) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")

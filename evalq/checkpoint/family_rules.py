"""What differs between the families of `evalq.checkpoint.families` and is no name.

The shape of the weights that a tensor of codes stands for, and how the weight's format is called. All from
shapes; the one exception is `weight_shape` of compressed-tensors, two integers that are read because a packed
row may end in padding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evalq.checkpoint.damage import clipped, corrupt
from evalq.checkpoint.shards import RawTensor, read_scalars
from evalq.errors import ModelError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """What all layers of a checkpoint share.

    Args:
        config: the quantization config, {} without one.
        shapes: logical shapes of packed tensors already looked up, keyed by everything their shape shows.
        readable: the files are here, so that small tensors can be read; False for headers from the hub.
    """

    config: dict[str, Any]
    shapes: dict[tuple[tuple[int, ...], ...], Shape]
    readable: bool = True

    def schemes(self) -> list[dict[str, Any]]:
        """The weight schemes of compressed-tensors' config groups."""
        groups = self.config.get("config_groups")
        found = groups.values() if isinstance(groups, dict) else ()
        schemes = [group.get("weights") for group in found if isinstance(group, dict)]
        return [scheme for scheme in schemes if isinstance(scheme, dict)]

    def only_bits(self) -> int | None:
        """The one num_bits of all config groups, None when they differ or say nothing."""
        declared = [scheme.get("num_bits") for scheme in self.schemes()]
        bits = declared[0] if declared and all(one == declared[0] for one in declared) else None
        return bits if type(bits) is int and 0 < bits <= 16 else None

    def integer(self, key: str) -> int | None:
        """A positive integer of the config, None when it is not one."""
        value = self.config.get(key)
        return value if type(value) is int and value > 0 else None


@dataclass(frozen=True)
class Parts:
    """The tensors of one linear layer: its codes, and its sidecars by name ending."""

    codes: RawTensor
    sidecars: dict[str, RawTensor]
    context: Context


def always(parts: Parts) -> bool:
    """Names and dtypes are enough."""
    return True


def one_each(parts: Parts) -> Shape:
    """One weight per element."""
    return parts.codes.shape


def two_per_byte(parts: Parts) -> Shape:
    """Two 4-bit weights per byte."""
    *rows, row_bytes = parts.codes.shape or (1,)
    return (*rows, 2 * row_bytes)


def flat_two_per_byte(parts: Parts) -> Shape:
    """NF4, FP4 of bitsandbytes: a column of bytes, which does not tell the sides of the matrix."""
    return (2 * parts.codes.numel,)


def blocks(parts: Parts) -> Shape:
    """gpt-oss: [..., in / 32, 16 bytes] of 4-bit weights."""
    if len(parts.codes.shape) < 2:
        return two_per_byte(parts)
    *rows, n_blocks, block_bytes = parts.codes.shape
    return (*rows, 2 * n_blocks * block_bytes)


def trellis(parts: Parts) -> Shape:
    """EXL3: 16 x 16 weights per tile, [in/16, out/16, 16 K] (padded dimensions)."""
    _require_dimensions(parts.codes, 3)
    return 16 * parts.codes.shape[1], 16 * parts.codes.shape[0]


def trellis_bits(parts: Parts) -> int:
    """EXL3: K, the bits of one code."""
    _require_dimensions(parts.codes, 3)
    if parts.codes.shape[2] % 16 or not parts.codes.shape[2]:
        raise _misshapen(parts.codes, "is no trellis")
    return parts.codes.shape[2] // 16


def packed_int32(parts: Parts) -> Shape:
    """compressed-tensors pack-quantized [out, ceil(in * bits / 32)]: weight_shape, [out, in].

    Where all layers have the same bits, one `weight_shape` is read for all whose packed tensor and scales
    look alike: rows of different lengths that pack to the same number of words do not occur in one model.
    """
    alike = (parts.codes.shape, parts.sidecars[".weight_scale"].shape)
    if parts.context.only_bits() is None:
        return _read_packed_shape(parts)
    if alike not in parts.context.shapes:
        parts.context.shapes[alike] = _read_packed_shape(parts)
    return parts.context.shapes[alike]


def _read_packed_shape(parts: Parts) -> Shape:
    """Read weight_shape and hold it against the packed tensor; without it, num_bits tells."""
    codes, shape = parts.codes, parts.sidecars.get(".weight_shape")
    if shape is None or not parts.context.readable:
        bits = parts.context.only_bits()
        if bits is None or not codes.numel:
            raise _misshapen(codes, "neither weight_shape nor num_bits tells how many weights that is")
        return *codes.shape[:-1], codes.shape[-1] * 32 // bits
    _require_dimensions(codes, 2)
    values = read_scalars([shape])[shape.name]
    rows, row_words = codes.shape
    if len(values) != 2 or values[0] != rows or not rows or not row_words <= values[1] <= 32 * row_words:
        raise _misshapen(codes, f"does not hold the {list(values)} weights of weight_shape")
    return int(values[0]), int(values[1])


def packed_label(parts: Parts) -> str:
    """INT bits, grouping, symmetry of a pack-quantized layer."""
    *rows, columns = packed_int32(parts)
    bits = parts.context.only_bits() or parts.codes.shape[-1] * 32 // columns
    grouping = _grouping(parts.sidecars[".weight_scale"].shape, (math.prod(rows), columns), parts.context)
    symmetry = "asymmetric" if ".weight_zero_point" in parts.sidecars else "symmetric"
    return f"INT{bits} {grouping} {symmetry}"


def code_bits(parts: Parts) -> int:
    """GPTQ, AWQ: bits of one code. The shapes know it; the config may speak of other layers."""
    codes, scales, zeros = parts.codes, parts.sidecars[".scales"], parts.sidecars.get(".qzeros")
    _require_dimensions(codes, 2)
    _require_dimensions(scales, 2)
    columns = scales.shape[1]
    if codes.shape[1] != columns:
        bits = 32 * codes.shape[1] // columns
    elif zeros is not None:
        _require_dimensions(zeros, 2)
        bits = 32 * zeros.shape[1] // columns
    else:  # symmetric, without zero points
        bits = parts.context.integer("bits") or parts.context.integer("w_bit") or 0
    if not 1 <= bits <= 16:
        raise _misshapen(codes, f"does not go with {columns} columns of scales")
    return bits


def columns_int32(parts: Parts) -> Shape:
    """GPTQ [in * bits / 32, out], AWQ [in, out * bits / 32]: 32 / bits codes per word."""
    bits, columns = code_bits(parts), parts.sidecars[".scales"].shape[-1]
    return columns, parts.codes.numel * 32 // bits // columns


def columns_label(parts: Parts) -> str:
    """INT bits and grouping of a GPTQ or AWQ layer."""
    bits, scales = code_bits(parts), parts.sidecars[".scales"]
    _, rows = columns_int32(parts)
    groups = scales.shape[0]
    if groups <= 1:
        return f"INT{bits} channel"
    return f"INT{bits} group {parts.context.integer('group_size') or -(-rows // groups)}"


def is_awq(parts: Parts) -> bool:
    """AWQ packs along the outputs, so its codes have fewer columns than its scales."""
    scales = parts.sidecars.get(".scales")
    return scales is not None and parts.codes.shape[-1:] != scales.shape[-1:]


def bnb4_label(parts: Parts) -> str:
    """NF4 or FP4, and whether the scales are quantized as well."""
    name = "FP4" if any(ending.endswith("__fp4") for ending in parts.sidecars) else "NF4"
    return f"{name} nested" if ".weight.nested_absmax" in parts.sidecars else name


def exl3_label(parts: Parts) -> str:
    """Bits of one code."""
    return f"EXL3 K={trellis_bits(parts)}"


def named(name: str) -> Callable[[Parts], str]:
    """A format that one word describes."""
    return lambda parts: name


def scaled(name: str, scale: str) -> Callable[[Parts], str]:
    """An 8-bit format and the shape of its scale."""

    def label(parts: Parts) -> str:
        rows, columns = (1, 1, *parts.codes.shape)[-2:]
        return f"{name} {_grouping(parts.sidecars[scale].shape, (rows, columns), parts.context)}"

    return label


def _grouping(scale: tuple[int, ...], weight: tuple[int, int], context: Context) -> str:
    """What shares one scale: "tensor", "channel", "group 128" or "block 128x128"."""
    rows, columns = weight
    if len(scale) < 2:
        return "channel" if scale == (rows,) and rows > 1 else "tensor"
    if math.prod(scale) == 1 and rows > 1 and not declared_blocks(context):
        return "tensor"
    if scale[-2] == rows:
        groups = max(scale[-1], 1)
        if groups > 1 or _only_groups(context):
            return f"group {-(-columns // groups)}"
        return "channel"
    declared = declared_blocks(context)
    if declared is not None:
        return f"block {declared[0]}x{declared[1]}"
    if scale[-2] <= 1 or not scale[-1]:
        return "channel" if scale[-1] == rows else "tensor"
    return f"block {-(-rows // scale[-2])}x{-(-columns // scale[-1])}"


def _only_groups(context: Context) -> bool:
    """Whether the config knows no other strategy than groups (a group may span a whole row)."""
    schemes = context.schemes()
    return bool(schemes) and all(scheme.get("strategy") == "group" for scheme in schemes)


def declared_blocks(context: Context) -> tuple[int, int] | None:
    """Block sizes of the config: a matrix whose sides are no multiples has a cut block at its edge."""
    sizes = [context.config.get("weight_block_size"), *(s.get("block_structure") for s in context.schemes())]
    for size in sizes:
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            return size[0], size[1]
    return None


def _require_dimensions(tensor: RawTensor, dimensions: int) -> None:
    """Refuse a shape that the family does not have."""
    if len(tensor.shape) != dimensions or not tensor.numel:
        raise _misshapen(tensor, f"should have {dimensions} dimensions, none of them empty")


def _misshapen(tensor: RawTensor, what: str) -> ModelError:
    """A tensor whose shape its family does not have."""
    return corrupt(tensor.file, f'"{clipped(tensor.name)}", {list(tensor.shape)}: {what}')

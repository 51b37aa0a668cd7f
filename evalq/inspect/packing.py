"""Packed weights against their sidecars: bits, groups, zero points, and scales that are not there.

Codes and scales each imply a shape; where they disagree an engine refuses the file or, worse, reads scales of
the wrong group. Layouts: `evalq.checkpoint.families`.
"""

import math
from collections.abc import Iterator

from evalq.checkpoint.families import PLAIN_LABELS
from evalq.checkpoint.family_rules import Context, Parts, code_bits, declared_blocks
from evalq.checkpoint.findings import Finding, Severity
from evalq.checkpoint.safetensors import Contents, Logical
from evalq.checkpoint.shards import RawTensor

# 4-bit floats have groups of a fixed size (OCP Microscaling Formats 1.0; NVFP4 of NVIDIA).
_FIXED_GROUPS = {"NVFP4": 16, "MXFP4": 32, "MXFP8": 32}
_SCALE_OF = {".weight_packed": ".weight_scale", ".qweight": ".scales", "_blocks": "_scales"}
_CODE_DTYPES = ("U8", "I8", "I32")


def packing_findings(contents: Contents) -> Iterator[Finding]:
    """Weights whose codes and sidecars do not fit together."""
    for weight in contents.logical:
        if weight.parts is None:
            yield from _missing_scale(weight, contents)
            continue
        yield from _bit_findings(weight, weight.parts)
        yield from _zero_point_findings(weight, weight.parts)
        yield from _group_findings(weight, weight.parts)
        nvfp4 = weight.bits.format == "NVFP4" and weight.parts.codes.name.endswith(".weight_packed")
        if nvfp4 and ".weight_global_scale" not in weight.parts.sidecars:
            name = weight.parts.codes.name
            yield _finding("missing-scale", name, "has no weight_global_scale beside it")


def _finding(name: str, tensor: str, what: str, severity: Severity = "error") -> Finding:
    return Finding(name, tensor, f"{tensor} {what}", severity)


def _missing_scale(weight: Logical, contents: Contents) -> Iterator[Finding]:
    """Codes that no family explains because their scale is missing."""
    tensor = contents.tensors[weight.bits.name]
    for ending, scale in _SCALE_OF.items():
        if tensor.name.endswith(ending) and tensor.dtype in _CODE_DTYPES:
            yield _finding("missing-scale", tensor.name, f"has no {scale.lstrip('._')} beside it")
            return
    if not tensor.name.endswith(".weight") or weight.bits.kind not in ("layer", "head"):
        return
    if tensor.dtype in ("U8", "I8"):
        yield _finding("missing-scale", tensor.name, f"holds {tensor.dtype} codes and no scale beside them")
    elif PLAIN_LABELS.get(tensor.dtype) == "FP8":
        severity: Severity = "error" if contents.settings else "warning"
        yield _finding("missing-scale", tensor.name, "holds FP8 and no scale beside it", severity)


def _bit_findings(weight: Logical, parts: Parts) -> Iterator[Finding]:
    """Bits per code as the config declares them against those of the packed shape."""
    codes, context = parts.codes, parts.context
    if codes.name.endswith(".weight_packed") and codes.dtype == "I32":
        declared = {bits for s in context.schemes() if type(bits := s.get("num_bits")) is int and bits > 0}
        words, columns = codes.shape[-1], weight.shape[-1]
        # Releases before 0.18 leave the rest of a word empty where bits do not divide 32.
        if declared and all(words not in _row_words(columns, bits) for bits in declared):
            says = f"packs {columns} columns into {words} words; num_bits is {_listed(declared)}"
            yield _finding("num-bits-mismatch", codes.name, says)
    elif codes.name.endswith(".qweight"):
        bits = context.integer("bits") or context.integer("w_bit")
        if bits is not None and bits != code_bits(parts):
            says = f"holds {code_bits(parts)}-bit codes; the quantization config says {bits}"
            yield _finding("num-bits-mismatch", codes.name, says)


def _row_words(columns: int, bits: int) -> tuple[int, int]:
    """32-bit words of a row, without and with gaps."""
    return math.ceil(columns * bits / 32), math.ceil(columns / max(32 // bits, 1))


def _zero_point_findings(weight: Logical, parts: Parts) -> Iterator[Finding]:
    """Asymmetric schemes need zero points, of as many groups as the scales."""
    if not parts.codes.name.endswith(".weight_packed") or parts.codes.dtype != "I32":
        return
    schemes = parts.context.schemes()
    zeros, scale = parts.sidecars.get(".weight_zero_point"), parts.sidecars[".weight_scale"]
    if zeros is None:
        if schemes and all(scheme.get("symmetric") is False for scheme in schemes):
            yield _finding(
                "missing-zero-point", parts.codes.name, "is asymmetric and has no weight_zero_point"
            )
    elif zeros.shape[1:] != scale.shape[1:]:
        says = f"is {_shown(zeros)}; its scale is {_shown(scale)}"
        yield _finding("zero-point-shape", zeros.name, says)


def _group_findings(weight: Logical, parts: Parts) -> Iterator[Finding]:
    """The scale's shape against the weight's and the declared group size."""
    scale = _scale_of(weight, parts)
    if scale is None or len(weight.shape) < 2:
        return
    shape, columns = scale.shape, weight.shape[-1]
    if scale.name.endswith(".scales"):  # GPTQ and AWQ: [groups, out]
        shape = shape[::-1]
    fixed = _FIXED_GROUPS.get(weight.bits.format)
    sizes = {fixed} if fixed else _declared_groups(parts.context)
    if len(shape) < 2 or math.prod(shape) == 1 or (shape[-1] == 1 and not sizes):
        if fixed or math.prod(shape) not in (1, weight.shape[-2]):
            yield _wrong_shape(weight, scale)
    elif shape[:-1] == weight.shape[:-1]:
        yield from _wrong_groups(scale, columns, shape[-1], sizes)
    elif fixed or sizes or len(weight.shape) > 2 or not _is_block_scale(shape, weight, parts.context):
        yield _wrong_shape(weight, scale)


def _scale_of(weight: Logical, parts: Parts) -> RawTensor | None:
    """The scale whose shape follows from the weight's; None where the family's does not or is free."""
    assert weight.family is not None
    ending = next(iter(weight.family.needs), None)
    if ending is None or weight.family.maker == "bitsandbytes":
        return None
    # Experts in one tensor: engines differ in the order of the sides.
    if len(weight.shape) > 2 and ending != "_scales":
        return None
    return parts.sidecars[ending]


def _wrong_groups(scale: RawTensor, columns: int, groups: int, sizes: set[int]) -> Iterator[Finding]:
    """Groups of a row that are not of the declared size, or do not fill it."""
    fitting = [size for size in sizes if math.ceil(columns / size) == groups]
    if sizes and not fitting:
        says = f"has {groups} groups for {columns} columns; the group size is {_listed(sizes)}"
        yield _finding("group-size-mismatch", scale.name, says)
    elif not sizes and groups and columns % groups:
        says = f"has {groups} groups, which do not divide {columns} columns"
        yield _finding("group-size-indivisible", scale.name, says)
    elif fitting and all(columns % size for size in fitting):
        says = f"has groups of {fitting[0]}, which do not divide {columns} columns"
        # A shorter last group is allowed by GPTQ and by older releases of compressed-tensors, not by kernels.
        yield _finding("group-size-indivisible", scale.name, says, "warning")


def _declared_groups(context: Context) -> set[int]:
    """Group sizes of the quantization config, empty where any layer may have channels or tensors instead."""
    if context.schemes():
        declared = [scheme.get("group_size") for scheme in context.schemes()]
    else:
        declared = [context.config.get("group_size", context.config.get("q_group_size"))]
    sizes = [size for size in declared if type(size) is int and size > 0]
    return set(sizes) if len(sizes) == len(declared) else set()


def _is_block_scale(shape: tuple[int, ...], weight: Logical, context: Context) -> bool:
    """Whether a scale is one number per block of the matrix."""
    rows, columns = weight.shape[-2:]
    blocks = declared_blocks(context)
    if blocks is not None:
        return shape == (math.ceil(rows / blocks[0]), math.ceil(columns / blocks[1]))
    return len(shape) == 2 and 0 < shape[0] <= rows and 0 < shape[1] <= columns


def _wrong_shape(weight: Logical, scale: RawTensor) -> Finding:
    says = f"is {_shown(scale)}, which does not fit a weight of {' x '.join(map(str, weight.shape))}"
    return _finding("scale-shape", scale.name, says)


def _shown(tensor: RawTensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _listed(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))

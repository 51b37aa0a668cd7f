"""A stored weight -> a dense tensor, for every family whose library can unpack it on a CPU.

compressed-tensors unpacks its own formats, AWQ and (the same arithmetic under other names) DeepSeek's FP8 and
ModelOpt's FP8 and NVFP4; transformers unpacks gpt-oss. Others are refused by name before anything is read:
GPTQ and bitsandbytes need packages of their own, EXL3 its CUDA kernels.
"""

import math
from io import BufferedReader

import torch

from evalq.checkpoint.damage import clipped, corrupt
from evalq.checkpoint.family_rules import Context, Parts, code_bits, declared_blocks
from evalq.checkpoint.safetensors import Contents, Logical
from evalq.checkpoint.shards import RawTensor
from evalq.convert.unpack.packed import unpack_int4_weights, unpack_mxfp4_weights, unpack_nvfp4_weights
from evalq.convert.unpack.scaled import unpack_scaled_weights
from evalq.convert.unpack.tensors import read_tensor
from evalq.errors import ModelError

KNOWN = (
    "compressed-tensors (INT4, INT8, FP8, NVFP4, MXFP4, MXFP8), DeepSeek FP8, ModelOpt FP8 and NVFP4, AWQ "
    "and gpt-oss MXFP4"
)
_SCALES = (".weight_scale", ".weight_scale_inv", ".scale")
_FLOATS = ("F16", "BF16", "F32", "F64")
# A tensor with one of these endings holds codes, which mean nothing without their scales.
_CODES_ENDINGS = (".weight_packed", ".qweight", ".weight", "_blocks")


def require_decodable(contents: Contents) -> None:
    """Check that every weight of a checkpoint can be made dense.

    Raises:
        ModelError: unsupported_format for the first of a family that nothing here can unpack, model_corrupt
            for codes without their scales.
    """
    for weight in contents.logical:
        name, tensor = clipped(weight.bits.name), codes_of(weight, contents)
        family = _refused(weight)
        if family is not None:
            raise ModelError(
                f"{tensor.file}: {name} is {family}, which cannot be dequantized here",
                "unsupported_format",
                f"these can: {KNOWN}",
            )
        if weight.family is None and tensor.dtype not in _FLOATS and tensor.name.endswith(_CODES_ENDINGS):
            raise corrupt(tensor.file, f'"{name}" holds {tensor.dtype} codes, and no scale is there for them')


def codes_of(weight: Logical, contents: Contents) -> RawTensor:
    """The tensor that holds a weight's codes, or the plain weight itself."""
    return contents.tensors[weight.bits.name] if weight.parts is None else weight.parts.codes


def _refused(weight: Logical) -> str | None:
    """The name of a family that cannot be unpacked, None for those that can."""
    family = weight.family
    if family is None or family.maker == "AWQ":
        return None
    if not family.ending and family.codes != "_blocks":
        return "a stack of quantized experts"
    # ModelOpt's linear layers are compressed-tensors' under other names.
    return None if family.maker in ("", "ModelOpt") else family.maker


def read_weight(
    file: BufferedReader, weight: Logical, contents: Contents, exact: bool = False
) -> torch.Tensor:
    """Read a weight and make it dense.

    Args:
        file: the shard with its codes, open; sidecars in other shards are opened for the moment.
        weight: one of the checkpoint's.
        contents: the checkpoint.
        exact: quantized weights in float32, for whoever goes on computing and rounds at the end.

    Returns:
        The weight; a quantized one in the dtype its own library gives it, a plain one as it is stored.

    Raises:
        ModelError: model_corrupt or unsupported_format, naming the file, the layer and the tensor.
    """
    stored = codes_of(weight, contents)
    codes = read_tensor(file, stored)
    if weight.parts is None:
        return codes
    parts = {ending: _sidecar(file, stored, tensor) for ending, tensor in weight.parts.sidecars.items()}
    try:
        return _decode(weight, codes, parts, exact)
    except ModelError as error:
        where = f"{stored.file}: {clipped(weight.bits.name)}: {error.message}"
        raise ModelError(where, error.category, error.remedy) from None
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        # The libraries check little; what does not fit together ends in whatever error comes first.
        first = clipped((str(error).strip().splitlines() or [type(error).__name__])[0])
        what = f"{clipped(weight.bits.name)}: its tensors do not fit together: {first}"
        raise corrupt(stored.file, what) from None


def _sidecar(file: BufferedReader, codes: RawTensor, tensor: RawTensor) -> torch.Tensor:
    if tensor.file == codes.file:
        return read_tensor(file, tensor)
    with tensor.file.open("rb") as other:
        return read_tensor(other, tensor)


def _decode(
    weight: Logical, codes: torch.Tensor, parts: dict[str, torch.Tensor], exact: bool
) -> torch.Tensor:
    """The library's function for what the tensors are."""
    assert weight.parts is not None
    context, dtype = weight.parts.context, torch.float32 if exact else torch.bfloat16
    if "_scales" in parts:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return convert_moe_packed_tensors(codes, parts["_scales"], dtype=dtype)
    if ".scales" in parts:
        return _awq(weight.parts, codes, parts, exact)
    scale = next(parts[ending] for ending in _SCALES if ending in parts)
    if codes.dtype != torch.uint8:
        if exact and scale.dtype != torch.uint8:
            scale = scale.float()
        zero_point = parts.get(".weight_zero_point")
        if codes.dtype != torch.int32:
            return unpack_scaled_weights(codes, scale, zero_point, declared_blocks(context))
        num_bits = _num_bits(codes.shape[-1], weight.shape[-1], context)
        g_idx = parts.get(".weight_g_idx")
        return unpack_int4_weights(codes, scale, weight.shape, zero_point, num_bits=num_bits, g_idx=g_idx)
    if scale.dtype == torch.uint8:
        return unpack_mxfp4_weights(codes, scale, dtype)
    if ".weight_scale_2" in parts:
        return unpack_nvfp4_weights(codes, scale, 1 / parts[".weight_scale_2"], dtype)
    return unpack_nvfp4_weights(codes, scale, parts.get(".weight_global_scale"), dtype)


def _awq(stored: Parts, codes: torch.Tensor, parts: dict[str, torch.Tensor], exact: bool) -> torch.Tensor:
    """AutoAWQ's layout, [in, out] with the outputs interleaved, by way of compressed-tensors' own."""
    try:
        from compressed_tensors.entrypoints.convert import AutoAWQConverter
    except ImportError:
        raise ModelError(
            "AWQ: the installed compressed-tensors cannot convert it",
            "unsupported_format",
            'pip install "compressed-tensors>=0.16"',
        ) from None
    layer = {f"layer{ending}": parts[ending] for ending in (".scales", ".qzeros") if ending in parts}
    try:
        converter = AutoAWQConverter(
            bits=code_bits(stored),
            zero_point=".qzeros" in parts,
            version=str(stored.context.config.get("version", "gemm")).lower(),
            targets=["re:.*"],
        )
        packed = converter.process({"layer.qweight": codes} | layer)
    except ValueError as error:
        raise ModelError(f"AWQ: {error}", "unsupported_format") from None
    scale = packed["layer.weight_scale"]
    return unpack_int4_weights(
        packed["layer.weight_packed"],
        scale.float() if exact else scale,
        packed["layer.weight_shape"],
        packed.get("layer.weight_zero_point"),
    )


def _num_bits(words: int, columns: int, context: Context) -> int:
    """The declared width that fills the packed rows; 4 where nothing is declared."""
    declared = sorted({n for s in context.schemes() if type(n := s.get("num_bits")) is int}) or [4]
    return next((bits for bits in declared if math.ceil(columns * bits / 32) == words), declared[0])

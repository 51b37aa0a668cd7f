"""How quantized linear layers lie in safetensors files: one table, one row per family.

A family is recognised by the name ending and dtype of the tensor that holds the codes and by the sidecars
beside it, never by the config alone: mixed checkpoints quantize some layers and not others. `rules` has what
differs between families and is no name: which weights the codes stand for, and how to call them.

Sources: compressed-tensors (https://github.com/vllm-project/compressed-tensors), AutoGPTQ and AutoAWQ
checkpoints as transformers reads them, bitsandbytes `Params4bit`, gpt-oss
(https://huggingface.co/openai/gpt-oss-20b), DeepSeek-V3, ModelOpt
(https://github.com/NVIDIA/Model-Optimizer), exllamav3 `doc/exl3.md`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evalq.checkpoint import family_rules as rules
from evalq.checkpoint.family_rules import Parts

_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_U8 = frozenset({"U8"})
_I8 = frozenset({"I8"})
_I32 = frozenset({"I32"})
_I16 = frozenset({"I16"})
_ANY: frozenset[str] = frozenset()

_ACTIVATION = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".pre_quant_scale",
)  # fmt: skip
_WEIGHT = (
    ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_zero_point", ".weight_g_idx",
    ".weight_shape", ".weight_global_scale",
)  # fmt: skip
_BNB4 = (
    ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
)  # fmt: skip
_FUSED = ("_scale", "_scale_inv", "_scale_2", "_weight_scale", "_weight_scale_2", "_input_scale")


@dataclass(frozen=True)
class Family:
    """One way to store a linear layer.

    Args:
        codes: ending of the tensor that holds the codes; what stands before it is the stem.
        dtypes: the codes' dtypes.
        needs: sidecar ending -> its dtypes (empty: any) that must all be there; the first is the scale.
        sidecars: endings of everything else that belongs to the weight when present.
        shape: of the weights that the codes stand for, [out, in] where the family keeps the sides.
        label: the weight's format in a few words.
        maker: put before the label in a checkpoint's one line; "" takes it from the config.
        ending: the logical weight's name is the stem plus this.
        when: tells apart what names and dtypes cannot.
    """

    codes: str
    dtypes: frozenset[str]
    needs: Mapping[str, frozenset[str]]
    shape: Callable[[Parts], rules.Shape]
    label: Callable[[Parts], str]
    sidecars: tuple[str, ...] = _WEIGHT + _ACTIVATION
    maker: str = ""
    ending: str = ".weight"
    when: Callable[[Parts], bool] = rules.always


# The first row that fits wins, so a row with more needs stands above one with fewer.
FAMILIES: tuple[Family, ...] = (
    Family(".trellis", _I16, {}, rules.trellis, rules.exl3_label,
           (".suh", ".svh", ".su", ".sv", ".mcg", ".mul1"), maker="EXL3"),
    Family(".weight_packed", _U8, {".weight_scale": _U8}, rules.two_per_byte, rules.named("MXFP4")),
    Family(".weight_packed", _U8, {".weight_scale": _ANY}, rules.two_per_byte, rules.named("NVFP4")),
    Family(".weight_packed", _I32, {".weight_scale": _ANY}, rules.packed_int32, rules.packed_label),
    Family(".qweight", _I32, {".scales": _ANY}, rules.columns_int32, rules.columns_label,
           (".qzeros", ".g_idx"), maker="AWQ", when=rules.is_awq),
    Family(".qweight", _I32, {".scales": _ANY}, rules.columns_int32, rules.columns_label,
           (".qzeros", ".g_idx"), maker="GPTQ"),
    Family(".weight", _U8, {".weight.absmax": _ANY}, rules.flat_two_per_byte, rules.bnb4_label, _BNB4,
           maker="bitsandbytes"),
    Family(".weight", _I8, {".SCB": _ANY}, rules.one_each, rules.named("INT8 channel"), (".weight_format",),
           maker="bitsandbytes"),
    Family(".weight", _U8, {".weight_scale": _FP8, ".weight_scale_2": _ANY}, rules.two_per_byte,
           rules.named("NVFP4"), maker="ModelOpt"),
    Family(".weight", _U8, {".weight_scale": _U8}, rules.two_per_byte, rules.named("MXFP4")),
    Family(".weight", _FP8, {".weight_scale": _U8}, rules.one_each, rules.named("MXFP8")),
    Family(".weight", _FP8, {".weight_scale_inv": _ANY}, rules.one_each,
           rules.scaled("FP8", ".weight_scale_inv")),
    Family(".weight", _FP8, {".weight_scale": _ANY}, rules.one_each, rules.scaled("FP8", ".weight_scale")),
    Family(".weight", _FP8, {".scale": _ANY}, rules.one_each, rules.scaled("FP8", ".scale")),
    Family(".weight", _I8, {".weight_scale": _ANY}, rules.one_each, rules.scaled("INT8", ".weight_scale")),
    Family("_blocks", _U8, {"_scales": _U8}, rules.blocks, rules.named("MXFP4"), (), ending=""),
    Family("", _U8, {"_weight_scale": _FP8, "_weight_scale_2": _ANY}, rules.two_per_byte,
           rules.named("NVFP4"), _FUSED, maker="ModelOpt", ending=""),
    Family("", _FP8, {"_scale_inv": _ANY}, rules.one_each, rules.scaled("FP8", "_scale_inv"), _FUSED,
           ending=""),
    Family("", _FP8, {"_scale": _ANY}, rules.one_each, rules.scaled("FP8", "_scale"), _FUSED,
           ending=""),
)  # fmt: skip

# Most tensors of a checkpoint are scales and norms, whose dtype no row starts from.
FAMILIES_BY_DTYPE = {
    dtype: tuple(family for family in FAMILIES if dtype in family.dtypes)
    for dtype in sorted({dtype for family in FAMILIES for dtype in family.dtypes})
}

# A plain tensor of one of these dtypes is a weight as it stands; other dtypes belong to a format that the
# table does not know, and the report says so.
PLAIN_LABELS = {"BF16": "BF16", "F16": "FP16", "F32": "FP32", "F64": "FP64"} | {d: "FP8" for d in _FP8}

# Sidecars whose weight is not quantized (any more): dequantized checkpoints leave them behind.
STRAY_ENDINGS = _WEIGHT + _ACTIVATION

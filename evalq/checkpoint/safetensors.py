"""A safetensors checkpoint from its headers: tensors -> logical weights -> bit accounting.

Convention: `evalq.checkpoint.bits`. Which tensors make one weight: `evalq.checkpoint.families`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalq.checkpoint import exl3
from evalq.checkpoint.bits import StorageReport, TensorBits, assemble, percent, shares
from evalq.checkpoint.expert_scales import expert_scale_findings
from evalq.checkpoint.families import FAMILIES_BY_DTYPE, PLAIN_LABELS, STRAY_ENDINGS, Family
from evalq.checkpoint.family_rules import Context, Parts, Shape
from evalq.checkpoint.findings import Finding
from evalq.checkpoint.fused_scales import global_scale_findings
from evalq.checkpoint.shards import RawTensor, ShardSet, find_shards, read_json, read_tensors
from evalq.checkpoint.weight_kinds import kind_of

# Where quantizers leave their settings when config.json has none, the first that exists wins.
QUANTIZATION_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
)
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Logical:
    """A logical weight.

    Args:
        bits: its name, part and size.
        shape: of the weights it stands for.
        family: the row of the table that explains it, None for a plain tensor.
        parts: its codes and sidecars, None for a plain tensor.
    """

    bits: TensorBits
    shape: Shape
    family: Family | None = None
    parts: Parts | None = None


@dataclass(frozen=True)
class Contents:
    """What the headers of a checkpoint say.

    Args:
        config: config.json, {} without one.
        settings: the quantization settings, {} without any.
        shards: the files, None for headers from the hub.
        tensors: every stored tensor by name.
        logical: every logical weight, in the order of the files.
        strays: sidecars that belong to no quantized weight.
    """

    config: dict[str, Any]
    settings: dict[str, Any]
    shards: ShardSet | None
    tensors: Mapping[str, RawTensor]
    logical: tuple[Logical, ...]
    strays: tuple[str, ...]

    @property
    def linear_shapes(self) -> dict[str, Shape]:
        """Module -> [out, in] of every weight; of other dimensions where the file keeps no sides."""
        return {
            # EXL3 pads both sides, and its files do not say from what.
            w.bits.name.removesuffix(".weight"): ()
            if w.family is not None and w.family.maker == "EXL3"
            else w.shape
            for w in self.logical
            if w.bits.name.endswith(".weight")
        }


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json; {} where there is none.

    Raises:
        ModelError: model_corrupt if it is not a JSON object.
    """
    path = directory / "config.json"
    return read_json(path) if path.is_file() else {}


def quantization_config(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The quantization settings, wherever the quantizer wrote them; {} without any."""
    found = config.get("quantization_config")
    if found is None and isinstance(config.get("text_config"), dict):
        found = config["text_config"].get("quantization_config")
    if isinstance(found, dict):
        return found
    for name in QUANTIZATION_FILES:
        if (directory / name).is_file():
            settings = read_json(directory / name)
            nested = settings.get("quantization")
            return nested if isinstance(nested, dict) else settings
    return {}


def read_contents(directory: Path) -> Contents:
    """Read the headers of a checkpoint directory and group its tensors into logical weights.

    Raises:
        ModelError: model_missing, model_corrupt or unsafe_checkpoint, naming the file.
    """
    shards = find_shards(directory)
    tensors = read_tensors(shards)
    config = read_config(directory)
    return group(tensors, config, quantization_config(directory, config), shards)


def group(
    tensors: Mapping[str, RawTensor],
    config: dict[str, Any],
    settings: dict[str, Any],
    shards: ShardSet | None,
) -> Contents:
    """Group tensors into logical weights.

    Args:
        tensors: by name.
        config: config.json.
        settings: the quantization settings.
        shards: the files, None where they are not here; nothing is read from them then.

    Raises:
        ModelError: model_corrupt for a shape that its family does not have.
    """
    context = Context(settings, {}, readable=shards is not None)
    logical, strays = _logical_weights(tensors, context)
    return Contents(config, settings, shards, tensors, tuple(logical), tuple(strays))


def measure(contents: Contents) -> StorageReport:
    """Add up the bits of a checkpoint. Raises ModelError if a scale cannot be read."""
    bits = tuple(weight.bits for weight in contents.logical)
    is_exl3 = any(weight.family is not None and weight.family.maker == "EXL3" for weight in contents.logical)
    tensors = contents.tensors
    return assemble(
        bits,
        format_line=_format_line(contents.logical, contents.settings),
        container="safetensors",
        disk_bytes=sum(t.bytes for t in tensors.values()),
        findings=tuple(map(str, storage_findings(contents))),
        layer_weights_true=exl3.true_layer_weights(tensors, bits, contents.config) if is_exl3 else None,
    )


def storage_findings(contents: Contents) -> list[Finding]:
    """Fused NVFP4 scales that differ, scales of experts without calibration, tensors nothing explains."""
    if contents.shards is None:
        return list(_unexplained(contents))
    scales = (*global_scale_findings(contents.tensors), *expert_scale_findings(contents.tensors))
    return [*scales, *_unexplained(contents)]


def _logical_weights(tensors: Mapping[str, RawTensor], context: Context) -> tuple[list[Logical], list[str]]:
    """Group tensors into logical weights; the second part names sidecars without a quantized weight."""
    quantized: dict[str, Logical] = {}
    claimed: set[str] = set()
    for name in tensors:
        found = _match(name, tensors, context)
        if found is None:
            continue
        family, parts = found
        claimed.update(t.name for t in parts.sidecars.values())
        logical_name = name[: len(name) - len(family.codes)] + family.ending
        shape = family.shape(parts)
        stored = parts.codes.bytes + sum(t.bytes for t in parts.sidecars.values())
        kind, numel = kind_of(logical_name, 2), math.prod(shape)
        bits = TensorBits(logical_name, kind, numel, stored, family.label(parts))
        quantized[name] = Logical(bits, shape, family, parts)
    logical: list[Logical] = []
    strays: list[str] = []
    for name, tensor in tensors.items():
        if name in quantized:
            logical.append(quantized[name])
        elif name not in claimed:
            stray = name.endswith(STRAY_ENDINGS)
            kind = "other" if stray or tensor.dtype in ("BOOL", "I64") else kind_of(name, len(tensor.shape))
            label = PLAIN_LABELS.get(tensor.dtype, tensor.dtype)
            bits = TensorBits(name, kind, tensor.numel, tensor.bytes, label)
            logical.append(Logical(bits, tensor.shape))
            if stray:
                strays.append(name)
    return logical, strays


def _match(name: str, tensors: Mapping[str, RawTensor], context: Context) -> tuple[Family, Parts] | None:
    """The family whose codes this tensor holds, with the sidecars that are there."""
    codes = tensors[name]
    for family in FAMILIES_BY_DTYPE.get(codes.dtype, ()):
        if not name.endswith(family.codes):
            continue
        stem = name[: len(name) - len(family.codes)]
        if not all(
            stem + ending in tensors and (not dtypes or tensors[stem + ending].dtype in dtypes)
            for ending, dtypes in family.needs.items()
        ):
            continue
        endings = dict.fromkeys((*family.needs, *family.sidecars))
        sidecars = {e: tensors[stem + e] for e in endings if stem + e in tensors and stem + e != name}
        parts = Parts(codes, sidecars, context)
        if family.when(parts):
            return family, parts
    return None


def _unexplained(contents: Contents) -> list[Finding]:
    """Findings about tensors that the table does not explain."""
    findings = []
    unknown = [
        w.bits.name
        for w in contents.logical
        if w.family is None
        and w.bits.kind in ("layer", "head")
        and contents.tensors[w.bits.name].dtype not in PLAIN_LABELS
    ]
    if unknown:
        message = (
            f"{_some(unknown)} hold integers of no known format; "
            "bits per weight count each element as one weight"
        )
        findings.append(Finding("unknown-packing", unknown[0], message, "warning"))
    if contents.strays:
        message = f"{_some(contents.strays)} belong to no quantized weight and are not counted"
        findings.append(Finding("stray-sidecars", contents.strays[0], message, "warning"))
    return findings


def _some(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _format_line(logical: Sequence[Logical], settings: dict[str, Any]) -> str:
    """One line for the whole checkpoint: the quantized format first, then what else the layers hold."""
    makers = {w.bits.format: w.family for w in logical if w.family is not None}
    layers = shares([w.bits for w in logical])
    if any(family.maker == "EXL3" for family in makers.values()):
        return exl3.format_line([w.bits for w in logical])
    if not layers:
        return "no layers"
    # A few quantized layers among plain ones still make a quantized checkpoint.
    first = next((name for name, _ in layers if name in makers), layers[0][0])
    maker = (makers[first].maker or _maker(settings)) if first in makers else ""
    return ", ".join([f"{maker} {first}".strip(), *(f"{n} {percent(s)}" for n, s in layers if n != first)])


def _maker(settings: dict[str, Any]) -> str:
    """The quantizer by the config, for families that several write."""
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        return f"compressed-tensors {settings.get('format', '')}".strip()
    return {"modelopt": "ModelOpt", "quark": "Quark", "fbgemm_fp8": "FBGEMM"}.get(str(method), "")

"""Bit accounting of a safetensors checkpoint: tensors -> logical weights -> one report.

Convention: `evalq.storage.report`. Which tensors make one weight: `evalq.storage.families`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalq.storage import exl3
from evalq.storage.families import FAMILIES_BY_DTYPE, PLAIN_LABELS, STRAY_ENDINGS, Family
from evalq.storage.fused import global_scale_findings
from evalq.storage.kinds import kind_of
from evalq.storage.report import StorageReport, TensorBits, assemble, percent, shares
from evalq.storage.rules import Context, Parts
from evalq.storage.shards import RawTensor, find_shards, read_json, read_tensors

# Where quantizers leave their settings when config.json has none, the first that exists wins.
QUANTIZATION_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
)
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Logical:
    """A logical weight and, if it is quantized, the row of the table that explains it."""

    bits: TensorBits
    family: Family | None


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


def measure_directory(directory: Path) -> StorageReport:
    """Measure a checkpoint directory from the headers of its safetensors files.

    Raises:
        ModelError: model_missing, model_corrupt or unsafe_checkpoint, naming the file.
    """
    tensors = read_tensors(find_shards(directory))
    config = read_config(directory)
    settings = quantization_config(directory, config)
    logical, strays = _logical_weights(tensors, Context(settings, {}))
    bits = tuple(weight.bits for weight in logical)
    findings = [*global_scale_findings(tensors), *_unexplained(logical, strays, tensors)]
    is_exl3 = any(weight.family is not None and weight.family.maker == "EXL3" for weight in logical)
    return assemble(
        bits,
        format_line=_format_line(logical, settings),
        container="safetensors",
        disk_bytes=sum(t.bytes for t in tensors.values()),
        findings=tuple(findings),
        layer_weights_true=exl3.true_layer_weights(tensors, bits, config) if is_exl3 else None,
    )


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
        numel = family.weights(parts)
        stored = parts.codes.bytes + sum(t.bytes for t in parts.sidecars.values())
        bits = TensorBits(logical_name, kind_of(logical_name, 2), numel, stored, family.label(parts))
        quantized[name] = Logical(bits, family)
    logical: list[Logical] = []
    strays: list[str] = []
    for name, tensor in tensors.items():
        if name in quantized:
            logical.append(quantized[name])
        elif name not in claimed:
            stray = name.endswith(STRAY_ENDINGS)
            kind = "other" if stray or tensor.dtype in ("BOOL", "I64") else kind_of(name, len(tensor.shape))
            label = PLAIN_LABELS.get(tensor.dtype, tensor.dtype)
            logical.append(Logical(TensorBits(name, kind, tensor.numel, tensor.bytes, label), None))
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


def _unexplained(logical: list[Logical], strays: list[str], tensors: Mapping[str, RawTensor]) -> list[str]:
    """Findings about tensors that the table does not explain."""
    findings = []
    unknown = [
        w.bits.name
        for w in logical
        if w.family is None
        and w.bits.kind in ("layer", "head")
        and tensors[w.bits.name].dtype not in PLAIN_LABELS
    ]
    if unknown:
        findings.append(
            f"unknown-packing: {_some(unknown)} hold integers of no known format; "
            "bits per weight count each element as one weight"
        )
    if strays:
        findings.append(f"stray-sidecars: {_some(strays)} belong to no quantized weight and are not counted")
    return findings


def _some(names: list[str]) -> str:
    """The first few names and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _format_line(logical: list[Logical], settings: dict[str, Any]) -> str:
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

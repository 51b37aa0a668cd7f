"""Kinds of layer: where a model's weights and bytes are, and which of its layers are not quantized.

Finer than the parts of `evalq.checkpoint.bits`, which a comparison counts: here attention, MLP and experts
stand apart. From names alone: Hugging Face's and GGUF's.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from evalq.checkpoint.bits import Kind, StorageReport, TensorBits, percent

Part = Literal[
    "attention",
    "MLP",
    "experts",
    "shared experts",
    "state space",
    "vision and audio",
    "other layers",
    "head",
    "embedding",
    "router",
    "norms",
    "other",
]
PARTS: tuple[Part, ...] = get_args(Part)
UNQUANTIZED = frozenset({"BF16", "FP16", "FP32", "FP64", "F16", "F32", "F64"})

_OTHER_TOWERS = re.compile(r"(^|[._])(vision|visual|audio|speech|image)")
# The first pattern found in a layer's name decides.
_LAYERS: tuple[tuple[Part, re.Pattern[str]], ...] = (
    ("vision and audio", re.compile(_OTHER_TOWERS.pattern + r"|^v\.blk|multi_modal_projector|mm_projector")),
    ("shared experts", re.compile(r"shared_expert|_shexp\b")),
    ("experts", re.compile(r"\bexperts\b|_exps\b")),
    ("state space", re.compile(r"\bmamba|\bssm_|\bmixer\b")),
    ("attention", re.compile(r"attn|attention|\b[qkvo]_proj\b|\bw(q|k|v|o|qkv)\b")),
    ("MLP", re.compile(r"mlp|feed_forward|ffn|\bfc\d?\b|dense_(h_to_4h|4h_to_h)")),
)
_KINDS: dict[Kind, Part] = {
    "head": "head",
    "embedding": "embedding",
    "router": "router",
    "norm": "norms",
    "other": "other",
}


@dataclass(frozen=True)
class PartBits:
    """One row of the table.

    Args:
        part: kind of layer.
        tensors: how many logical weights.
        weights: how many parameters they have, padding included where the file stores padding.
        bytes: of the weights and all their sidecars.
        formats: bytes by format, the largest first.
    """

    part: Part
    tensors: int
    weights: int
    bytes: int
    formats: tuple[tuple[str, int], ...]

    @property
    def bpw(self) -> float | None:
        """Bits per weight; None without weights."""
        return 8 * self.bytes / self.weights if self.weights else None

    @property
    def format_line(self) -> str:
        """The formats, with their share of the bytes where there are several."""
        if len(self.formats) == 1:
            return self.formats[0][0]
        return ", ".join(f"{name} {percent(n / self.bytes)}" for name, n in self.formats if self.bytes)


def part_of(tensor: TensorBits) -> Part:
    """The kind of layer a logical weight belongs to."""
    return _layer_part(tensor.name) if tensor.kind == "layer" else _KINDS[tensor.kind]


@lru_cache(maxsize=2**18)  # asked several times about each of up to 100,000 experts
def _layer_part(name: str) -> Part:
    return next((part for part, pattern in _LAYERS if pattern.search(name)), "other layers")


def part_name(part: Part, tied_head: bool) -> str:
    """What a table calls a kind of layer: the embedding of a tied model is its head too."""
    return "embedding, head" if part == "embedding" and tied_head else part


def is_language_model(name: str) -> bool:
    """Whether a tensor belongs to the language model, as opposed to a tower for pictures or sound."""
    return _OTHER_TOWERS.search(name) is None


def parts_of(storage: StorageReport) -> tuple[PartBits, ...]:
    """Weights and bytes of every kind of layer that is there, in a fixed order."""
    members: dict[Part, list[TensorBits]] = defaultdict(list)
    for tensor in storage.tensors:
        members[part_of(tensor)].append(tensor)
    return tuple(_row(part, members[part]) for part in PARTS if part in members)


def _row(part: Part, tensors: Sequence[TensorBits]) -> PartBits:
    formats: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        formats[tensor.format] += tensor.bytes
    return PartBits(
        part=part,
        tensors=len(tensors),
        weights=sum(t.numel for t in tensors),
        bytes=sum(t.bytes for t in tensors),
        formats=tuple(sorted(formats.items(), key=lambda item: -item[1])),
    )


def unquantized(storage: StorageReport) -> tuple[str, ...]:
    """Linear layers left as they were in a quantized model, those of one name in all layers as one line.

    Embedding and norms, which hardly any format quantizes, are not named; nor is anything of a model without
    quantized layers.
    """
    linear = [t for t in storage.tensors if t.kind in ("layer", "head", "router")]
    if all(t.format in UNQUANTIZED for t in linear if t.kind == "layer"):
        return ()
    alike: dict[str, list[TensorBits]] = defaultdict(list)
    for tensor in linear:
        alike[_pattern(tensor.name)].append(tensor)
    lines = []
    for pattern, tensors in alike.items():
        plain = [t.name for t in tensors if t.format in UNQUANTIZED]
        if len(plain) == len(tensors) > 1:
            lines.append(f"{pattern} ({len(plain)})")
        elif plain:
            lines.append(f"{pattern} of layer {_ranges(plain)}" if "*" in pattern else pattern)
    return tuple(lines)


def _pattern(name: str) -> str:
    """A weight's module, with "*" for every number."""
    return re.sub(r"\b\d+\b", "*", name.removesuffix(".weight"))


def _ranges(names: Sequence[str]) -> str:
    """Numbers of the layers that the names belong to: "0-2, 31"."""
    numbers = sorted({int(found[0]) for name in names if (found := re.search(r"\b\d+\b", name))})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

"""Whether a LoRA adapter can go on a checkpoint, and on which of its modules.

A checkpoint may say so itself: `lora_compatible` and `lora_target_modules` in config.json, or a file
lora_metadata.json (https://github.com/vllm-project/llm-compressor/pull/2037). Where it does not, it follows
from the modules: an adapter adds B A x to the output of a linear layer, whatever format its weight is in.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from evalq.checkpoint.findings import Finding
from evalq.checkpoint.headers import LORA_FILE, Checkpoint
from evalq.inspect.layers import Part, is_language_model, part_of

_ADAPTABLE: tuple[Part, ...] = (
    "attention",
    "MLP",
    "experts",
    "shared experts",
    "state space",
    "other layers",
)


@dataclass(frozen=True)
class Lora:
    """LoRA compatibility.

    Args:
        compatible: whether any module can take an adapter.
        target_modules: names for `target_modules` of an adapter's configuration.
        origin: where that stands: config.json, lora_metadata.json, or "derived from the modules".
        metadata: lora_metadata.json as it is, {} without one.
    """

    compatible: bool
    target_modules: tuple[str, ...]
    origin: str
    metadata: dict[str, Any]


def lora_of(checkpoint: Checkpoint) -> Lora:
    """What the checkpoint declares, else what its modules allow."""
    derived = derived_targets(checkpoint)
    metadata = checkpoint.lora_metadata
    for origin, declared in ((LORA_FILE, metadata), ("config.json", checkpoint.config)):
        if {"lora_compatible", "lora_target_modules"} & declared.keys():
            targets = _names(declared.get("lora_target_modules"))
            compatible = declared.get("lora_compatible", bool(targets))
            return Lora(bool(compatible), targets or (derived if compatible else ()), origin, metadata)
    return Lora(bool(derived), derived, "derived from the modules", metadata)


def derived_targets(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Last names of the language model's linear layers, in the order of the files.

    The head is left out: engines disagree on adapters there. So are routers, and experts stored as one
    tensor of three dimensions, which are no modules.
    """
    if checkpoint.contents is not None:
        shapes: Iterable[tuple[Any, int]] = ((w.bits, len(w.shape)) for w in checkpoint.contents.logical)
    else:
        dimensions = {t.name: len(t.shape) for header in checkpoint.gguf for t in header.tensors}
        shapes = ((t, dimensions[t.name]) for t in checkpoint.storage.tensors)
    names = [
        bits.name.removesuffix(".weight").rpartition(".")[2]
        for bits, sides in shapes
        if sides < 3 and part_of(bits) in _ADAPTABLE and bits.name.endswith(".weight")
        and is_language_model(bits.name)
    ]  # fmt: skip
    return tuple(dict.fromkeys(names))


def lora_findings(checkpoint: Checkpoint) -> list[Finding]:
    """Modules that the checkpoint declares as targets and does not have."""
    lora = lora_of(checkpoint)
    modules = {part for t in checkpoint.storage.tensors for part in t.name.split(".")}
    # A pattern or "all-linear" names no module.
    names = [n for n in lora.target_modules if n.replace(".", "_").isidentifier()]
    absent = [name for name in names if name.split(".")[-1] not in modules]
    if not absent:
        return []
    message = f"{lora.origin} names {', '.join(absent)} as lora_target_modules; the model has no such module"
    return [Finding("lora-target-missing", absent[0], message, "warning")]


def _names(value: Any) -> tuple[str, ...]:
    """A list of names, or one name."""
    if isinstance(value, str):
        return (value,)
    return tuple(map(str, value)) if isinstance(value, list) else ()

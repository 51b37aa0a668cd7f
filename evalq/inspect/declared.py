"""The declared format against the tensors: what a config says and what the files hold.

Engines choose their kernels by the config and look for tensors of that format; one that is not there is left
as it was initialised, or the load fails. Names of methods and formats are those of transformers' quantizers
(https://huggingface.co/docs/transformers/main_classes/quantization) and compressed-tensors.
"""

from collections.abc import Iterator
from typing import Any

from evalq.checkpoint.findings import Finding, Severity
from evalq.checkpoint.headers import Checkpoint, config_groups
from evalq.checkpoint.name_patterns import NamePatterns
from evalq.checkpoint.safetensors import Logical
from evalq.inspect.layers import UNQUANTIZED, Part, is_language_model, part_of

# What a format's weights are called, as the beginning of `TensorBits.format`, and whether they are packed.
_COMPRESSED_FORMATS = {
    "pack-quantized": ("INT", True),
    "int-quantized": ("INT8", False),
    "float-quantized": ("FP8", False),
    "nvfp4-pack-quantized": ("NVFP4", True),
    "mxfp4-pack-quantized": ("MXFP4", True),
    "mxfp8-quantized": ("MXFP8", False),
}
_METHODS = {
    "gptq": ("GPTQ",), "awq": ("AWQ",), "exl3": ("EXL3",), "bitsandbytes": ("bitsandbytes",),
    "mxfp4": ("MXFP4",), "fp8": ("FP8", "MXFP8"),
}  # fmt: skip
_QUANTIZED_PARTS: tuple[Part, ...] = ("attention", "MLP", "experts", "shared experts")


def declared_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Contradictions between the quantization config and the tensors."""
    assert checkpoint.contents is not None
    quantized = [weight for weight in checkpoint.contents.logical if weight.family is not None]
    settings = checkpoint.settings
    if not settings:
        if quantized:
            first = quantized[0]
            message = f"{first.bits.name} is {first.bits.format}; no quantization config says so"
            yield Finding("undeclared-format", first.bits.name, message, "error")
        return
    if not quantized:
        yield from _all_plain(checkpoint)
        return
    for weight in quantized:
        if not _is_declared(weight, settings):
            message = (
                f"{weight.bits.name} is {_spelled(weight)}; the config declares {_declaration(settings)}"
            )
            yield Finding("declared-format", weight.bits.name, message, "error")
    yield from _not_ignored(checkpoint.contents.logical, settings)


def _declaration(settings: dict[str, Any]) -> str:
    """What a config declares, in a few words."""
    words = (settings.get("quant_method"), settings.get("format"), settings.get("quant_algo"))
    return " ".join(str(word) for word in words if word) or "a quantized format"


def _spelled(weight: Logical) -> str:
    maker = weight.family.maker if weight.family is not None else ""
    return weight.bits.format if weight.bits.format.startswith(maker) else f"{maker} {weight.bits.format}"


def _all_plain(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A config that declares a format none of the weights has."""
    settings = checkpoint.settings
    # bitsandbytes quantizes plain weights while it loads them; the others mean what is in the files.
    status, method = settings.get("quantization_status"), settings.get("quant_method")
    if method == "bitsandbytes" or status not in (None, "compressed") or settings.get("format") == "dense":
        return
    plain = [t for t in checkpoint.storage.tensors if t.kind == "layer" and t.format in UNQUANTIZED]
    if plain:
        message = f"the config declares {_declaration(settings)}; {plain[0].name} is {plain[0].format}"
        # A method unknown here may quantize plain weights while it loads them, as bitsandbytes does.
        severity: Severity = "error" if method in ("compressed-tensors", *_METHODS) else "warning"
        yield Finding("declared-format", plain[0].name, f"{message}, and no weight is quantized", severity)


def _is_declared(weight: Logical, settings: dict[str, Any]) -> bool:
    """Whether a quantized weight is of a declared format; True where the config names one unknown here."""
    method = str(settings.get("quant_method"))
    if method != "compressed-tensors":
        wanted = _METHODS.get(method)
        return wanted is None or _spelled(weight).startswith(wanted)
    formats = _formats(settings)
    if not formats or not formats <= _COMPRESSED_FORMATS.keys():
        return True
    assert weight.parts is not None
    packed = weight.parts.codes.name.endswith("_packed")
    return any(
        _spelled(weight).startswith(start) and packed == is_packed
        for start, is_packed in map(_COMPRESSED_FORMATS.__getitem__, formats)
    )


def _formats(settings: dict[str, Any]) -> set[str]:
    """Formats of a compressed-tensors config: those of its groups, else the one for all."""
    own = {str(group["format"]) for group in config_groups(settings) if group.get("format")}
    return own or ({str(settings["format"])} if settings.get("format") else set())


def _not_ignored(logical: tuple[Logical, ...], settings: dict[str, Any]) -> Iterator[Finding]:
    """Plain linear layers that a compressed-tensors config neither quantizes nor ignores."""
    targets = [group.get("targets") for group in config_groups(settings)]
    if not targets or any(one != ["Linear"] for one in targets):
        return
    ignore = settings.get("ignore")
    ignored = _Ignored(ignore if isinstance(ignore, list) else [])
    for weight in logical:
        name = weight.bits.name
        plain = weight.bits.format in UNQUANTIZED and len(weight.shape) == 2 and name.endswith(".weight")
        if not plain or part_of(weight.bits) not in _QUANTIZED_PARTS or not is_language_model(name):
            continue
        if not ignored.covers(name.removesuffix(".weight")):
            message = f"{name} is {weight.bits.format}; the config quantizes every Linear it does not ignore"
            yield Finding("unquantized-not-ignored", name, message, "warning")


class _Ignored:
    """The entries of "ignore": names of modules, and patterns after "re:"."""

    def __init__(self, entries: list[Any]) -> None:
        words = [entry for entry in entries if isinstance(entry, str)]
        self._patterns = NamePatterns()
        self._expressions = [word.removeprefix("re:") for word in words if word.startswith("re:")]
        names = [word for word in words if not word.startswith("re:")]
        self._names = frozenset(names)
        # Prefixes differ between releases of transformers ("model.language_model.", "language_model.model.").
        self._tails = frozenset(map(_in_layers, names)) - {""}

    def covers(self, module: str) -> bool:
        """Whether an entry names this module."""
        if module in self._names or _in_layers(module) in self._tails:
            return True
        return any(self._patterns.found(expression, module) for expression in self._expressions)


def _in_layers(module: str) -> str:
    """The name inside its stack of layers; "" outside of one."""
    return module.partition("layers.")[2]

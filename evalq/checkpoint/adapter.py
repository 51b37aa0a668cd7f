"""LoRA adapters: what is in one, and whether it goes on a base model. Headers only, no torch.

An adapter adds (alpha / r) B A to the weights of linear layers: A is [r, in], B is [out, r]. PEFT's is a
directory (adapter_config.json, adapter_model.safetensors), llama.cpp's a GGUF file. What goes beyond plain
LoRA has a name here, because engines that do not know a feature mostly skip it without a word.

Source: https://huggingface.co/docs/peft, llama.cpp's convert_lora_to_gguf.py
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalq.checkpoint.damage import clipped, pickled
from evalq.checkpoint.gguf_header import read_gguf_header
from evalq.checkpoint.shards import RawTensor, read_header, read_json
from evalq.errors import ModelError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
NUMBER_MAX = 2**31
# Feature -> what it is, for the message that refuses it.
FEATURES: dict[str, str] = {
    "rslora": "scaling by alpha / sqrt(r)",
    "dora": "DoRA magnitudes",
    "rank_pattern": "ranks that differ between modules",
    "alpha_pattern": "alphas that differ between modules",
    "bias": "trained biases",
    "modules_to_save": "whole modules trained beside LoRA",
    "embedding": "LoRA on the token embedding",
    "lm_head": "LoRA on the head",
    "target_parameters": "LoRA on parameters that are no linear layer's",
    "layer_replication": "layers of the base used several times",
    "trainable_tokens": "single token embeddings trained beside LoRA",
    "alora": "activation at invocation tokens (aLoRA)",
    "base_changed": "an initialization that changes the base's weights (PiSSA, OLoRA, CorDA, LoftQ)",
    "variant": "a variant of LoRA with another forward (QALoRA, BD-LoRA, Arrow, ...)",
}
_TENSOR = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB])(\.\w+)?(\.weight)?$"
)
_GGUF_TENSOR = re.compile(r"^(?P<module>.+)\.weight\.lora_(?P<part>[ab])$")
_MAGNITUDE = "lora_magnitude_vector"
# Initializations that leave the base as it is (PEFT's own list of plain ones).
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_VARIANTS = ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as its files describe it.

    Args:
        path: PEFT directory, or GGUF file.
        name: for labels and requests.
        kind: the container.
        rank: the largest r of any module.
        alpha: the default scaling numerator.
        shapes: module -> (out, in) of the layer it goes on; names as in the base model (GGUF: llama.cpp's).
        features: what goes beyond plain LoRA, keys of FEATURES, sorted.
        files: everything its effect depends on.
        bytes: of all its tensors.
    """

    path: Path
    name: str
    kind: str
    rank: int
    alpha: float
    shapes: dict[str, tuple[int, int]]
    features: tuple[str, ...]
    files: tuple[Path, ...]
    bytes: int


def read_adapter(path: Path, name: str | None = None) -> Adapter:
    """Read an adapter's configuration and headers.

    Args:
        path: a PEFT directory, or a GGUF file.
        name: None takes the path's own.

    Raises:
        ModelError: model_missing, model_corrupt, unsafe_checkpoint or bad_adapter, naming the file.
    """
    if path.is_dir():
        return _read_peft(path, name or path.name)
    if path.is_file() and path.suffix == ".gguf":
        return _read_gguf(path, name or path.stem)
    what = "is no PEFT directory and no GGUF file" if path.exists() else "no such file or directory"
    remedy = f"name a directory with {CONFIG_FILE}, or a GGUF adapter"
    raise ModelError(f"{path}: {what}", "model_missing", remedy)


def require_features(adapter: Adapter, known: Collection[str], engine: str) -> None:
    """Raise ModelError (bad_adapter) if the adapter has a feature that the engine would get wrong."""
    for feature in adapter.features:
        if feature not in known:
            raise ModelError(
                f"adapter {adapter.name} uses {feature} ({FEATURES[feature]}), "
                f"which {engine} would not apply as it was trained",
                "bad_adapter",
                'merge it into the base ("evalq merge-lora") or score it with load_fn "hf"',
            )


def require_fits(adapter: Adapter, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check an adapter against the linear layers of a base model.

    Args:
        adapter: whose modules must all be there.
        base_shapes: module -> (out, in) of the base's layers; one of other dimensions is not compared.

    Raises:
        ModelError: bad_adapter, naming the first module that is missing or of another shape (shows both).
    """
    by_layer: dict[str, list[tuple[int, ...]]] = {}
    for name, sides in base_shapes.items():
        by_layer.setdefault(_in_layer(name), []).append(sides)
    for module, shape in adapter.shapes.items():
        # A vision tower may have layers of the same names: one that fits is enough.
        found = [base_shapes[module]] if module in base_shapes else by_layer.get(_in_layer(module), [])
        if not found:
            raise ModelError(
                f"adapter {adapter.name} is for another model: the base has no {clipped(module)}",
                "bad_adapter",
            )
        # Conv1D layers (GPT-2) keep their weight as [in, out].
        if all(len(sides) == 2 and sides not in (shape, shape[::-1]) for sides in found):
            raise ModelError(
                f"adapter {adapter.name} is for another model: {clipped(module)} is "
                f"{list(found[0])} in the base, {list(shape)} in the adapter (out, in)",
                "bad_adapter",
            )


def _in_layer(module: str) -> str:
    """The name from its layer's number on: wrappers of one model put different prefixes before it."""
    found = re.search(r"(?:^|\.)(layers|h|blocks|blk)\.\d+\..+$", module)
    return found.group().lstrip(".") if found else module


def _read_peft(directory: Path, name: str) -> Adapter:
    config_file, weights_file = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    if not config_file.is_file():
        raise ModelError(f"{directory} has no {CONFIG_FILE}: no PEFT adapter", "model_missing")
    if not weights_file.is_file():
        pickle = directory / "adapter_model.bin"
        if pickle.is_file():
            raise pickled(pickle, directory, pickle.name, WEIGHTS_FILE)
        raise ModelError(f"{directory} has no {WEIGHTS_FILE}", "model_missing")
    config = read_json(config_file)
    if config.get("peft_type") != "LORA":
        kind = clipped(str(config.get("peft_type")))
        raise ModelError(f"{config_file}: peft_type is {kind}, only LORA is supported", "bad_adapter")
    tensors = read_header(weights_file)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    features = set(_config_features(config))
    for tensor in tensors:
        features |= _take(tensor, parts)
    rank, alpha = _number(config, "r", config_file, int), _number(config, "lora_alpha", config_file, float)
    return Adapter(
        path=directory,
        name=name,
        kind="peft",
        rank=max([int(rank), *_ranks(parts)]),
        alpha=alpha,
        shapes=_shapes(parts, weights_file),
        features=tuple(sorted(features)),
        files=(config_file, weights_file),
        bytes=sum(tensor.bytes for tensor in tensors),
    )


def _take(tensor: RawTensor, parts: dict[str, dict[str, tuple[int, ...]]]) -> set[str]:
    """Sort one tensor of a PEFT file into its module; what it is beyond A and B is a feature."""
    found = _TENSOR.match(tensor.name)
    if found is None:
        if _MAGNITUDE in tensor.name:
            return {"dora"}
        return {"bias" if tensor.name.endswith((".bias", ".lora_bias")) else "modules_to_save"}
    module, part = found["module"], found["part"]
    if part.startswith("lora_embedding"):
        return {"embedding"}
    parts.setdefault(module, {})[part[-1]] = tensor.shape
    if module.endswith(("lm_head", "embed_out")):
        return {"lm_head"}
    if ".experts" in module and not re.search(r"\.experts\.\d+\.", module):
        return {"target_parameters"}
    return set()


def _config_features(config: Mapping[str, Any]) -> list[str]:
    """Features that adapter_config.json names."""
    init = config.get("init_lora_weights", True)
    asked = {
        "rslora": config.get("use_rslora"),
        "dora": config.get("use_dora"),
        "rank_pattern": config.get("rank_pattern"),
        "alpha_pattern": config.get("alpha_pattern"),
        "bias": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "modules_to_save": config.get("modules_to_save"),
        "target_parameters": config.get("target_parameters"),
        "layer_replication": config.get("layer_replication"),
        "trainable_tokens": config.get("trainable_token_indices"),
        "alora": config.get("alora_invocation_tokens"),
        "base_changed": isinstance(init, str) and init.lower() not in _PLAIN_INITS,
        "variant": any(config.get(key) for key in _VARIANTS),
    }
    return [feature for feature, is_used in asked.items() if is_used]


def _read_gguf(path: Path, name: str) -> Adapter:
    header = read_gguf_header(path)
    kind, alpha = header.metadata.get("adapter.type"), "adapter.lora.alpha"
    if header.metadata.get("general.type") != "adapter" or kind != "lora":
        raise ModelError(f"{path} is a GGUF file, but no LoRA adapter", "bad_adapter")
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    features: set[str] = set()
    for tensor in header.tensors:
        found = _GGUF_TENSOR.match(tensor.name)
        if found is None:
            features.add("modules_to_save")
            continue
        # GGUF lists the fastest-varying dimension first.
        parts.setdefault(found["module"], {})[found["part"].upper()] = tensor.shape[::-1]
    return Adapter(
        path=path,
        name=name,
        kind="gguf",
        rank=max(_ranks(parts), default=0),
        # Without one, or with zero, llama.cpp scales by 1.
        alpha=_number(header.metadata, alpha, path, float) if header.metadata.get(alpha) else 0.0,
        shapes=_shapes(parts, path),
        features=tuple(sorted(features)),
        files=(path,),
        bytes=sum(tensor.bytes for tensor in header.tensors),
    )


def _ranks(parts: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[int]:
    return [pair["A"][0] for pair in parts.values() if "A" in pair and pair["A"]]


def _shapes(parts: Mapping[str, Mapping[str, tuple[int, ...]]], file: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of each module. Raises ModelError: an A without a B, or of another rank."""
    if not parts:
        raise ModelError(f"{file} holds no LoRA tensors", "bad_adapter")
    shapes = {}
    for module, pair in parts.items():
        a, b = pair.get("A", ()), pair.get("B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ModelError(
                f"{file}: {clipped(module)} has A {list(a)} and B {list(b)}, not [r, in] and [out, r]",
                "model_corrupt",
            )
        shapes[module] = (b[0], a[1])
    return shapes


def _number(config: Mapping[str, Any], key: str, file: Path, kind: type[int] | type[float]) -> float:
    """A positive number of the configuration. Raises ModelError (bad_adapter)."""
    value = config.get(key)
    kinds = int if kind is int else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < NUMBER_MAX:
        wanted = "a positive integer" if kind is int else "a positive number"
        raise ModelError(f"{file}: {key} should be {wanted}, not {clipped(str(value))}", "bad_adapter")
    return float(value)

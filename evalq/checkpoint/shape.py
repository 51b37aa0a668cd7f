"""What a plan needs to know of a model: its configuration and the headers of its weights, never the weights.

A directory is read where it lies; of a hub name only config.json and the headers are fetched.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from evalq.checkpoint.damage import clipped
from evalq.checkpoint.headers import POSITION_KEYS, TEXT_CONFIGS, is_gguf, positive
from evalq.checkpoint.hub import existing_path, open_model
from evalq.checkpoint.shards import RawTensor
from evalq.errors import SpecError

_ORIGINAL = "take the files of the original model"
_EXPERT = re.compile(r"experts\.\d+\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,6})\.")
OTHER_TOWERS = ("vision", "visual", "audio", "speech")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_VOCABULARY = ("vocab_size",)
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp")

# More than any model has, and few enough to plan each: a number of layers is not believed beyond it.
LAYERS_MAX = 10_000
# Of different tensors, experts of a layer counted once; the largest models have some thousands.
HEADERS_MAX = 200_000
# No size of a model is larger; products of several stay far below the largest float.
SIZE_MAX = 2**40


@dataclass(frozen=True)
class Header:
    """Tensors that differ in the number of their expert alone.

    Args:
        name: with "*" for that number.
        dtype: as safetensors calls it.
        shape: of one.
        bytes: of one.
        count: how many there are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    count: int

    @property
    def numel(self) -> int:
        """Elements of one, as stored."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Args:
        name: for people.
        config: config.json, of a multimodal model the language model's part.
        quantization: the quantization settings, {} without any.
        headers: of every tensor.
        layers: hidden layers.
        hidden: width of the hidden states.
        heads: query heads, 0 for a model without attention.
        kv_heads: key/value heads.
        head_dim: width of one head.
        vocab: rows of the vocabulary, padding included.
        intermediate: width of a dense MLP.
        max_positions: the longest input by the configuration, None when it does not say.
    """

    name: str
    config: dict[str, Any]
    quantization: dict[str, Any]
    headers: tuple[Header, ...]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int
    max_positions: int | None

    @property
    def is_mla(self) -> bool:
        """Multi-head latent attention (DeepSeek V2, V3, R1)."""
        return integer(self.config, "kv_lora_rank") is not None


def make_shape(
    name: str,
    config: dict[str, Any],
    tensors: Iterable[RawTensor],
    quantization: dict[str, Any] | None = None,
) -> ModelShape:
    """A shape from a parsed config.json and headers.

    Args:
        name: for people and messages.
        config: the whole of config.json.
        tensors: as the files describe them.
        quantization: settings that stand in a file of their own; None takes those of the config.

    Raises:
        SpecError: naming the fields that a plan needs and the config lacks, or what no model can have.
    """
    inner = (config.get(part) for part in TEXT_CONFIGS)
    text = next((part for part in inner if isinstance(part, dict)), config)
    layers, hidden, heads, vocab = _required(name, text)
    if heads > hidden:
        raise SpecError(
            f"{name}: its config.json says {heads} heads for a hidden size of {hidden}", _ORIGINAL
        )
    if quantization is None:
        settings = config.get("quantization_config") or text.get("quantization_config")
        quantization = settings if isinstance(settings, dict) else {}
    headers = _collapsed(tensors)
    if len(headers) > HEADERS_MAX:
        raise SpecError(f"{name}: {len(headers):,} different tensors; no model has so many", _ORIGINAL)
    _require_layers(name, layers, headers)
    return ModelShape(
        name=name,
        config=text,
        quantization=quantization,
        headers=headers,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=1 if text.get("multi_query") is True else _first(text, _KV_HEADS) or heads,
        head_dim=integer(text, "head_dim") or (hidden // heads if heads else 0),
        vocab=vocab,
        intermediate=_first(text, _WIDTHS) or 4 * hidden,
        max_positions=_first(text, POSITION_KEYS),
    )


def _required(name: str, text: dict[str, Any]) -> tuple[int, int, int, int]:
    """Layers, hidden size, heads and vocabulary. Raises SpecError."""
    fields = (_LAYERS, _HIDDEN, _HEADS, _VOCABULARY)
    layers, hidden, heads, vocab = (_first(text, keys) for keys in fields)
    if heads is None and model_type(text).startswith("mamba"):
        heads = 0
    if layers is not None and hidden is not None and heads is not None and vocab is not None:
        return layers, hidden, heads, vocab
    found = zip(fields, (layers, hidden, heads, vocab), strict=True)
    lacking = [keys for keys, value in found if value is None]
    for key in (key for keys in lacking for key in keys if text.get(key) is not None):
        raise SpecError(f"{name}: its config.json says {key} = {_clipped_value(text[key])}", _ORIGINAL)
    raise SpecError(f"{name}: its config.json lacks {', '.join(keys[0] for keys in lacking)}", _ORIGINAL)


def _require_layers(name: str, layers: int, headers: Iterable[Header]) -> None:
    """Refuse more layers than the files hold. Raises SpecError."""
    numbers = [number for header in headers if (number := layer_number(header.name)) is not None]
    if layers > LAYERS_MAX:
        raise SpecError(f"{name}: its config.json says {layers} layers; no model has so many", _ORIGINAL)
    if numbers and layers > max(numbers) + 1:
        raise SpecError(
            f"{name}: its config.json says {layers} layers, the files hold {max(numbers) + 1}",
            "take config.json and weights of the same model",
        )


def layer_number(tensor: str) -> int | None:
    """The hidden layer that a tensor belongs to by its name, None for one outside the text model's layers."""
    found = _LAYER.search(tensor)
    return int(found[1]) if found and not any(tower in tensor for tower in OTHER_TOWERS) else None


def model_type(config: dict[str, Any]) -> str:
    """The architecture as config.json names it, "" where it does not."""
    named = config.get("model_type")
    return named if isinstance(named, str) else ""


def read_shape(name: str) -> ModelShape:
    """The shape of a checkpoint directory, or of a hub name from its metadata alone.

    Raises:
        SpecError: a GGUF file, an EXL3 checkpoint, or a config.json without the fields a plan needs.
        ModelError: model_missing, model_corrupt, model_gated or download_failed.
    """
    path = existing_path(name)
    if name.endswith(".gguf") or (path is not None and is_gguf(path)):
        raise SpecError(
            f"{name} is a GGUF file: llama.cpp allocates its layers and KV cache, not vLLM",
            "plan the original safetensors checkpoint, or see the file's size with ls -l",
        )
    checkpoint = open_model(name)
    if not checkpoint.config:
        raise SpecError(f"{name} has no config.json", "a plan needs it: take it from the original model")
    assert checkpoint.contents is not None
    shown = name if path is None else path.resolve().name
    tensors = checkpoint.contents.tensors.values()
    return _checked(make_shape(shown, checkpoint.config, tensors, checkpoint.settings))


def _checked(shape: ModelShape) -> ModelShape:
    if shape.quantization.get("quant_method") == "exl3" or any(
        header.name.endswith(".trellis") for header in shape.headers
    ):
        raise SpecError(
            f"{shape.name} is an EXL3 checkpoint: exllamav3 runs it, not vLLM",
            "plan the original checkpoint: what would fit lists the other formats",
        )
    return shape


def _collapsed(tensors: Iterable[RawTensor]) -> tuple[Header, ...]:
    """One header for all experts of a layer: a model has up to 90,000 tensors, and 1,500 kinds of them."""
    kinds = Counter((_EXPERT.sub("experts.*.", t.name), t.dtype, t.shape, t.bytes) for t in tensors)
    return tuple(Header(*kind, count) for kind, count in kinds.items())


def integer(config: dict[str, Any], key: str) -> int | None:
    """A positive integer of a configuration, as large as a size can be, else None."""
    value = positive(config.get(key))
    return value if value is not None and value <= SIZE_MAX else None


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((value for key in keys if (value := integer(config, key)) is not None), None)


def _clipped_value(value: Any) -> str:
    """A value for a message: a short one as it is, of a long one its kind."""
    if isinstance(value, int) and abs(value) > SIZE_MAX:
        return "a number beyond all sizes"
    if isinstance(value, int | float | str | bool):
        return clipped(str(value), 40)
    return f"a {type(value).__name__}"

"""What a plan needs to know of a model: its configuration and the headers of its weights, never the weights.

A directory is read where it lies; of a hub name only config.json and the headers are fetched.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from evalq.checkpoint.headers import is_gguf
from evalq.checkpoint.hub import existing_path, open_model
from evalq.checkpoint.shards import RawTensor
from evalq.errors import SpecError

_EXPERT = re.compile(r"experts\.\d+\.")
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp")


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
        SpecError: naming the fields that a plan needs and the config lacks.
    """
    parts = (config.get(part) for part in _TEXT_PARTS)
    text = next((part for part in parts if isinstance(part, dict)), config)
    layers, hidden, vocab = (_first(text, names) for names in (_LAYERS, _HIDDEN, ("vocab_size",)))
    heads = _first(text, _HEADS)
    if heads is None and str(text.get("model_type", "")).startswith("mamba"):
        heads = 0
    found = {_LAYERS[0]: layers, _HIDDEN[0]: hidden, _HEADS[0]: heads, "vocab_size": vocab}
    if layers is None or hidden is None or heads is None or vocab is None:
        lacking = ", ".join(field for field, value in found.items() if value is None)
        raise SpecError(
            f"{name}: its config.json lacks {lacking}", "a plan needs these fields: take the original file"
        )
    kv_heads = 1 if text.get("multi_query") is True else _first(text, _KV_HEADS) or heads
    if quantization is None:
        settings = config.get("quantization_config") or text.get("quantization_config")
        quantization = settings if isinstance(settings, dict) else {}
    return ModelShape(
        name=name,
        config=text,
        quantization=quantization,
        headers=_collapsed(tensors),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=integer(text, "head_dim") or (hidden // heads if heads else 0),
        vocab=vocab,
        intermediate=_first(text, _WIDTHS) or 4 * hidden,
        max_positions=_first(text, _POSITIONS),
    )


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
    """A positive integer of a configuration, else None."""
    value = config.get(key)
    return value if type(value) is int and value > 0 else None


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((value for key in keys if (value := integer(config, key)) is not None), None)

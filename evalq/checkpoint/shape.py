"""What a plan needs to know of a model: its configuration and the headers of its weights, never the weights.

A directory is read where it lies. Of a hub name only config.json and the headers are fetched, a few hundred
kB (`HfApi.get_safetensors_metadata`, https://huggingface.co/docs/huggingface_hub/package_reference/hf_api).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalq.checkpoint.headers import is_gguf
from evalq.checkpoint.safetensors import quantization_config, read_config
from evalq.checkpoint.shards import RawTensor, find_shards, read_json, read_tensors
from evalq.errors import ModelError, SpecError

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
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
    path = Path(name).expanduser()
    if not path.exists() and _HUB_NAME.match(name):
        return _checked(hub_shape(name))
    if name.endswith(".gguf") or is_gguf(path):
        raise SpecError(
            f"{name} is a GGUF file: llama.cpp allocates its layers and KV cache, not vLLM",
            "plan the original safetensors checkpoint, or see the file's size with ls -l",
        )
    shards = find_shards(path)
    config = read_config(path)
    if not config:
        raise SpecError(f"{path} has no config.json", "a plan needs it: take it from the original model")
    settings = quantization_config(path, config)
    return _checked(make_shape(path.resolve().name, config, read_tensors(shards).values(), settings))


def _checked(shape: ModelShape) -> ModelShape:
    if shape.quantization.get("quant_method") == "exl3" or any(
        header.name.endswith(".trellis") for header in shape.headers
    ):
        raise SpecError(
            f"{shape.name} is an EXL3 checkpoint: exllamav3 runs it, not vLLM",
            "plan the original checkpoint: what would fit lists the other formats",
        )
    return shape


def hub_shape(name: str, api: Any = None, config_path: Callable[..., str] | None = None) -> ModelShape:
    """The shape of a model on huggingface.co; nothing but metadata is downloaded.

    Args:
        name: owner/name.
        api: what answers `get_safetensors_metadata(name)`; None for huggingface_hub.HfApi().
        config_path: what downloads one file, (repo, file) -> path; None for huggingface_hub.hf_hub_download.

    Raises:
        ModelError: model_missing, model_gated or download_failed.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
    )

    if api is None and constants.HF_HUB_OFFLINE:
        remedy = "name a directory, or unset HF_HUB_OFFLINE"
        raise ModelError(f"{name}: no such directory, and the hub is switched off", "model_missing", remedy)
    try:
        # First, because it turns every kind of lost connection into an OSError.
        config = read_json(Path((config_path or hf_hub_download)(name, "config.json")))
        metadata = (api or HfApi()).get_safetensors_metadata(name)
    except GatedRepoError:
        remedy = f"accept its terms on https://huggingface.co/{name}, then: hf auth login"
        raise ModelError(f"{name} is gated", "model_gated", remedy) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name} is neither a local directory nor a public model on huggingface.co", "model_missing"
        ) from None
    except LocalEntryNotFoundError:
        remedy = "name a directory, or plan it on a machine with a network"
        raise ModelError(
            f"{name}: no such directory, and the hub is out of reach", "download_failed", remedy
        ) from None
    except (HfHubHTTPError, NotASafetensorsRepoError, OSError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{name}: {first[0]}", "download_failed") from None
    tensors = (
        RawTensor(tensor, info.dtype, tuple(info.shape), Path(file), begin, end - begin)
        for file, part in metadata.files_metadata.items()
        for tensor, info in part.tensors.items()
        for begin, end in (info.data_offsets,)
    )
    return make_shape(name, config, tensors)


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
